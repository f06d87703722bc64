"""What commands that only look have in common: several databases, and a broker that may be away."""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.cli import options
from outbox.errors import ConfigurationError, OutboxError
from outbox.jetstream.client import JetStreamClient
from outbox.settings import Settings

BROKER_SECONDS = 2.0  # that a look waits for the broker


def add_databases(target: argparse.ArgumentParser) -> None:
    """Add the flag that names other services' databases."""
    target.add_argument(
        "--database",
        dest="databases",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="look here instead of OUTBOX_DATABASE_URL; may be repeated",
    )


@asynccontextmanager
async def databases(
    settings: Settings, given: argparse.Namespace, name: str
) -> AsyncIterator[dict[str, AsyncEngine]]:
    """Lend an engine for each database, by the name that it was given; one without has "".

    Raises:
        ConfigurationError: a database is named twice, or its URL is none.
    """
    engines: dict[str, AsyncEngine] = {}
    try:
        if not given.databases:
            engines[""] = options.engine(settings, name)
        for each in given.databases:
            label, separator, url = each.partition("=")
            if not separator or not label or "://" in label:
                raise ConfigurationError("--database: must be NAME=URL, for example shop=postgres…")
            if label in engines:
                raise ConfigurationError(f"--database: {label} is given twice")
            engines[label] = options.engine(settings, name, url=url)
        yield engines
    finally:
        for engine in engines.values():
            await engine.dispose()


@asynccontextmanager
async def broker(settings: Settings, name: str) -> AsyncIterator[JetStreamClient | str]:
    """Lend a connected client, or the reason why there is none."""
    client = JetStreamClient.from_settings(
        settings, name=name, connect_timeout=timedelta(seconds=BROKER_SECONDS)
    )
    try:
        try:
            await client.connect()
        except ConfigurationError:
            raise
        except OutboxError as error:
            yield str(error)
        else:
            yield client
    finally:
        await client.close()
