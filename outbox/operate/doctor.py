"""`outbox doctor`: what could break the promise, why, and what mends it."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import BrokerUnavailable, ConfigurationError
from outbox.findings import Finding, Severity
from outbox.jetstream import examining, provisioning
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.postgres import inspecting, schema
from outbox.postgres.driver import translated
from outbox.postgres.inspecting import Holder, Server
from outbox.settings import Settings

VERSION_MIN = 140_000
HELD_SINCE = timedelta(minutes=5)
MONITOR_SECONDS = 5.0
MONITOR_BYTES_MAX = 4_194_304


async def examine(
    engine: AsyncEngine,
    client: JetStreamClient,
    settings: Settings,
    *,
    held_since: timedelta = HELD_SINCE,
    monitor: str | None = None,
) -> list[Finding]:
    """Return what was found in the database, the stream and the consumers, the worst first.

    Args:
        held_since: transactions that are open for longer are told.
        monitor: URL of nats-server's monitoring port; clients cannot ask when it syncs its disk.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable, BrokerUnavailable: it cannot be asked.
    """
    name = settings.schema_name
    with translated():
        await schema.check_version(engine, name)
        async with engine.connect() as connection:
            asked = datetime.now(UTC)
            server = await inspecting.server(connection, name)
            found = [
                *_of_server(server, asked),
                *_of_unlogged(await inspecting.unlogged(connection, name), name),
                *_of_holders(await inspecting.holders(connection, name, held_since)),
                *_of_privileges(await inspecting.missing_privileges(connection, name), name),
            ]
            identities = await inspecting.listeners(connection, name)
            await connection.rollback()
            found += _of_pool(await inspecting.backends(connection, name))
    found += await _broker(client, settings, identities)
    if monitor is not None:
        found += examining.disk(await asyncio.to_thread(_varz, monitor), settings)
    return sorted(found, key=lambda each: list(Severity).index(each.severity))


# ---- database --------------------------------------------------------------------------------


def _of_server(server: Server, asked: datetime) -> Iterator[Finding]:
    if server.standby:
        yield Finding(
            Severity.ERROR,
            "the database is a standby",
            "its rows may be of a failed primary, and it takes no writes",
            "point OUTBOX_DATABASE_URL at the primary",
        )
    if server.version < VERSION_MIN:
        yield Finding(
            Severity.ERROR,
            f"PostgreSQL {server.version // 10_000} is too old",
            "the statements need version 14",
            "upgrade PostgreSQL",
        )
    for setting, value in (("fsync", server.fsync), ("full_page_writes", server.full_page_writes)):
        if value == "off":
            yield Finding(
                Severity.ERROR,
                f"{setting} is off",
                "a power cut can lose or break commits, and their events with them",
                f"ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf()",
            )
    if server.synchronous_commit == "off":
        yield Finding(
            Severity.NOTE,
            "synchronous_commit is off",
            "transactions that carry events raise it for themselves; others may be lost by a crash",
            "ALTER DATABASE … SET synchronous_commit = on",
        )
    if abs(server.now - asked) > examining.SKEW:
        yield Finding(
            Severity.WARNING,
            f"the database's clock is {abs(server.now - asked).total_seconds():.0f} s off ours",
            "leases and schedules follow the database, timestamps of events this host",
            "synchronise the clocks (NTP)",
        )


def _of_unlogged(tables: list[str], schema_name: str) -> Iterator[Finding]:
    for table in tables:
        yield Finding(
            Severity.ERROR,
            f"table {table} is UNLOGGED",
            "a crash of PostgreSQL empties it",
            f"ALTER TABLE {schema_name}.{table} SET LOGGED",
        )


def _of_holders(holders: list[Holder]) -> Iterator[Finding]:
    mends = {
        "session": "SELECT pg_terminate_backend({name})",
        "prepared transaction": "ROLLBACK PREPARED '{name}'",
        "replication slot": "SELECT pg_drop_replication_slot('{name}')",
    }
    for each in holders:
        age = f" for {each.age.total_seconds():.0f} s" if each.age else ""
        yield Finding(
            Severity.WARNING,
            f"{each.kind} {each.name} ({each.application or 'no name'}) is open{age}",
            "nothing newer can be vacuumed, and the relay's floor does not rise",
            mends[each.kind].format(name=each.name),
        )


def _of_privileges(missing: list[str], schema_name: str) -> Iterator[Finding]:
    if missing:
        yield Finding(
            Severity.WARNING,
            f"this role lacks {', '.join(missing)}",
            "the relay needs them; a role that only adds or listens does not",
            f"GRANT … IN SCHEMA {schema_name} TO the relay's role, as the migrations say",
        )


def _of_pool(backends: int) -> Iterator[Finding]:
    if backends > 1:
        yield Finding(
            Severity.ERROR,
            "the connection changes its backend between transactions",
            "a pooler in transaction mode drops session settings, LISTEN and prepared statements",
            "give relay and listeners a URL of session pooling, or of the server itself",
        )


# ---- broker ----------------------------------------------------------------------------------


async def _broker(
    client: JetStreamClient, settings: Settings, identities: list[str]
) -> list[Finding]:
    found = list(examining.version(client.server_version))
    try:
        info = await client.api(f"STREAM.INFO.{settings.stream}")
    except ApiError as error:
        if error.err_code != provisioning.STREAM_NOT_FOUND:
            raise BrokerUnavailable(str(error)) from error
        subjects = ",".join(f"{prefix}>" for prefix in settings.subject_prefixes)
        mend = f"nats stream add {settings.stream} --subjects '{subjects},dlq.>' --discard new"
        why = "nothing can be published"
        missing = Finding(Severity.ERROR, f"stream {settings.stream} does not exist", why, mend)
        return [*found, missing]
    found += examining.subjects(info["config"], settings)
    found += examining.stream(info["config"])
    found += examining.retention(info["config"], settings)
    found += examining.clock(info.get("ts"))
    for identity in identities:
        consumer = await provisioning.consumer_info(client, settings.stream, identity)
        if consumer is not None:
            found += examining.consumer(consumer)
            found += examining.gap(consumer, info)
    return found


def _varz(monitor: str) -> dict[str, Any]:
    """Return what nats-server tells of itself over HTTP."""
    if not monitor.startswith(("http://", "https://")):
        raise ConfigurationError("--monitor: an http:// or https:// URL, such as http://nats:8222")
    url = f"{monitor.rstrip('/')}/varz"
    try:
        with urllib.request.urlopen(url, timeout=MONITOR_SECONDS) as answer:  # noqa: S310 - http
            told = json.loads(answer.read(MONITOR_BYTES_MAX))
    except (OSError, ValueError) as error:
        raise BrokerUnavailable(f"the monitoring port does not answer: {error}") from error
    return told if isinstance(told, dict) else {}
