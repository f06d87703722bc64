"""The flags that commands share, and what is built from them."""

import argparse
import inspect
from datetime import timedelta
from typing import Any

import asyncpg
from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.errors import ConfigurationError
from outbox.settings import Settings

COMMAND_TIMEOUT = timedelta(seconds=60)
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_CODES = "exit codes: 0 done, 1 failed (the reason is on stderr), 2 usage or configuration"
_DRIVERS = {"postgres", "postgresql"}
POOL_SIZE = 5
# What a URL may carry behind "?": the driver's own arguments and those of SQLAlchemy's dialect.
_QUERY = frozenset(inspect.signature(asyncpg.connect).parameters) | {
    "async_fallback",
    "prepared_statement_cache_size",
}
_FLAGS = {
    "--database-url": ("database_url", "URL", "PostgreSQL (OUTBOX_DATABASE_URL)"),
    "--nats-url": ("nats_url", "URL", "NATS servers, separated by commas (OUTBOX_NATS_URL)"),
    "--source-service": ("source_service", "NAME", "name of this service (OUTBOX_SOURCE_SERVICE)"),
    "--schema": ("schema_name", "NAME", "schema of the tables (OUTBOX_SCHEMA)"),
    "--stream": ("stream", "NAME", "stream of the events (OUTBOX_STREAM)"),
    "--log-level": ("log_level", "LEVEL", "level of the logs (OUTBOX_LOG_LEVEL)"),
    "--log-format": ("log_format", "FORMAT", "'console' or 'json' (OUTBOX_LOG_FORMAT)"),
}


def parser(name: str, summary: str, examples: str) -> dict[str, Any]:
    """Return the arguments of an `ArgumentParser` that all commands share."""
    return {
        "prog": name,
        "description": summary,
        "epilog": f"examples:\n{examples}\n\n{EXIT_CODES}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_flags(target: argparse.ArgumentParser) -> None:
    """Add the flags that override a variable of the environment."""
    group = target.add_argument_group("settings (flags win over the environment)")
    for flag, (field, metavar, text) in _FLAGS.items():
        group.add_argument(flag, dest=field, metavar=metavar, help=text)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings of the environment, with the flags that were given.

    Raises:
        ConfigurationError: a value is out of range, or a variable is unknown.
    """
    fields = [field for field, _, _ in _FLAGS.values()]
    given = {field: getattr(arguments, field, None) for field in (*fields, "metrics_port")}
    return Settings.from_environment(**given)


def database_url(settings: Settings) -> URL:
    """Return the database's URL for asyncpg, whichever way PostgreSQL's users write it.

    Raises:
        ConfigurationError: it is missing, no URL, or names another driver.
    """
    text = settings.database_url.get_secret_value()
    if not text:
        raise ConfigurationError("no database is given: set OUTBOX_DATABASE_URL or --database-url")
    return _parsed(text, "OUTBOX_DATABASE_URL")


def _parsed(text: str, name: str) -> URL:
    """Return the URL; what is wrong with it is said without it, for it may hold a secret."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigurationError(f"{name} is not a URL") from None
    except ValueError:  # SQLAlchemy's own would be a traceback with the whole URL
        raise ConfigurationError(f"{name}: the port must be a number") from None
    if url.drivername in _DRIVERS:
        url = url.set(drivername="postgresql+asyncpg")
    if url.drivername != "postgresql+asyncpg":
        raise ConfigurationError(f"{name}: {url.drivername} is not postgresql+asyncpg")
    mode = url.query.get("sslmode")
    if mode is not None:
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    unknown = sorted(url.query.keys() - _QUERY)
    if unknown:
        names = ", ".join(unknown)
        raise ConfigurationError(f"{name}: asyncpg does not take {names} in its query")
    return url


def engine(
    settings: Settings,
    name: str,
    *,
    timeout: timedelta | None = None,
    sessions: int = 0,
    size: int = POOL_SIZE,
    url: str | None = None,
) -> AsyncEngine:
    """Return an engine whose sessions carry `name` and whose statements end in time.

    Args:
        sessions: what handlers hold at once, beside the few that every command needs.
        size: those few.
        url: of another database than the settings'.
    """
    limit = COMMAND_TIMEOUT if timeout is None else timeout
    return create_async_engine(
        database_url(settings) if url is None else _parsed(url, "--database"),
        pool_pre_ping=True,
        pool_size=size + sessions,
        connect_args={
            "command_timeout": limit.total_seconds(),
            "server_settings": {"application_name": name},
        },
    )
