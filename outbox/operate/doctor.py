"""`outbox doctor`: what could break the promise, why, and what mends it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import BrokerUnavailable
from outbox.jetstream import provisioning
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.postgres import inspecting, schema
from outbox.postgres.driver import translated
from outbox.postgres.inspecting import Holder, Server
from outbox.settings import Settings

VERSION_MIN = 140_000
HELD_SINCE = timedelta(minutes=5)
WINDOW_MIN = timedelta(minutes=2)  # of duplicates; the relay repeats within seconds
MARGIN = timedelta(hours=1)  # of the inbox beyond what may be delivered again
SKEW = timedelta(seconds=5)


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"  # breaks a sentence of the promise
    WARNING = "warning"  # will, when something else goes wrong
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    severity: Severity
    what: str
    why: str
    mend: str  # a command or statement


async def examine(
    engine: AsyncEngine,
    client: JetStreamClient,
    settings: Settings,
    *,
    held_since: timedelta = HELD_SINCE,
) -> list[Finding]:
    """Return what was found in the database, the stream and the consumers, the worst first.

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
    if abs(server.now - asked) > SKEW:
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
    found = list(_of_version(client.server_version))
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
    found += _of_stream(info["config"], settings)
    found += _of_clock(info.get("ts"))
    for identity in identities:
        consumer = await provisioning.consumer_info(client, settings.stream, identity)
        if consumer is not None:
            found += _of_consumer(consumer, info, settings.stream)
    return found


def _of_version(version: tuple[int, int, int]) -> Iterator[Finding]:
    needed = {(2, 11): 16, (2, 12): 7}
    if version[:2] < (2, 11) or version[2] < needed.get(version[:2], 0):
        yield Finding(
            Severity.WARNING,
            f"nats-server {'.'.join(map(str, version))} is older than it should be",
            "versions before 2.11.16, 2.12.7 and 2.14.0 have defects that lose messages",
            "upgrade nats-server",
        )


def _of_clock(told: object) -> Iterator[Finding]:
    if not isinstance(told, str):
        return
    skew = abs(datetime.fromisoformat(told) - datetime.now(UTC))
    if skew > SKEW:
        yield Finding(
            Severity.WARNING,
            f"the broker's clock is {skew.total_seconds():.0f} s off ours",
            "max_age and the duplicate window follow the broker's",
            "synchronise the clocks (NTP)",
        )


def _of_stream(config: dict[str, Any], settings: Settings) -> Iterator[Finding]:
    name = config["name"]
    edit = f"nats stream edit {name}"
    taken = [str(subject) for subject in config.get("subjects") or ()]
    wanted = [f"{prefix}>" for prefix in settings.subject_prefixes]
    lacking = [each for each in wanted if not any(provisioning.covers(t, each) for t in taken)]
    if lacking:
        subjects = ",".join([*taken, *lacking])
        what, why = f"stream {name} does not take {', '.join(lacking)}", "such events wait for ever"
        yield Finding(Severity.ERROR, what, why, f"{edit} --subjects '{subjects}'")
    if config.get("storage") == "memory":
        what, why = f"stream {name} is in memory", "a restart of the broker loses what it stored"
        yield Finding(Severity.ERROR, what, why, "make it anew with --storage file")
    if config.get("retention") != "limits":
        what = f"stream {name} has {config.get('retention')} retention"
        why = "messages may go before every listener has read them, and cannot be verified"
        yield Finding(Severity.ERROR, what, why, "make it anew with --retention limits")
    limits = [each for each in ("max_msgs", "max_bytes") if int(config.get(each) or -1) > 0]
    if config.get("discard") == "old" and limits:
        what = f"stream {name} discards old messages at {' and '.join(limits)}"
        why = "listeners that are behind lose unread events silently"
        yield Finding(Severity.ERROR, what, why, f"{edit} --discard new")
    yield from _of_times(config, settings, edit)


def _of_times(config: dict[str, Any], settings: Settings, edit: str) -> Iterator[Finding]:
    """Check the chain: what may be delivered again must still be known to the inbox."""
    name = config["name"]
    window = _duration(config.get("duplicate_window"))
    if window < WINDOW_MIN:
        what = f"stream {name} forgets duplicates after {window.total_seconds():.0f} s"
        why = "a relay that repeats itself later stores an event twice; inboxes absorb it"
        yield Finding(Severity.WARNING, what, why, f"{edit} --dupe-window 5m")
    max_age = _duration(config.get("max_age"))
    archived = settings.archive_retention or timedelta(0)
    if not max_age:
        what = f"stream {name} keeps messages for ever"
        why = "one that is delivered again after the inbox has forgotten it takes effect twice"
        yield Finding(Severity.WARNING, what, why, f"{edit} --max-age 24h")
    elif settings.inbox_retention < max_age + archived + MARGIN:
        needed = int((max_age + archived + MARGIN).total_seconds())
        what = "the inbox forgets before stream and archive do"
        why = "an event that is delivered or repaired late takes effect twice"
        yield Finding(Severity.ERROR, what, why, f"OUTBOX_INBOX_RETENTION={needed}")


def _of_consumer(consumer: dict[str, Any], info: dict[str, Any], stream: str) -> Iterator[Finding]:
    name, config = consumer["name"], consumer["config"]
    remake = f"nats consumer edit {stream} {name}"
    if int(config.get("max_deliver") or -1) != -1:
        what = f"consumer {name} gives up after {config['max_deliver']} deliveries"
        why = "the broker then drops the event for this listener, silently"
        yield Finding(Severity.ERROR, what, why, f"{remake} --max-deliver=-1")
    if config.get("ack_policy") != "explicit":
        what = f"consumer {name} has ack policy {config.get('ack_policy')}"
        why = "an event counts as handled before it is"
        yield Finding(Severity.ERROR, what, why, f"nats consumer rm {stream} {name}; restart it")
    floor = int(consumer["ack_floor"]["stream_seq"])
    gap = int(info["state"]["first_seq"]) - floor - 1
    if gap > 0 and int(consumer.get("num_pending") or 0) > 0 and floor > 0:
        what = f"up to {gap} messages left the stream before {name} had read them"
        why = "they were dropped by max_age, a limit or a purge"
        mend = f"outbox replay --to {name} in each publisher's database"
        yield Finding(Severity.ERROR, what, why, mend)


def _duration(nanoseconds: object) -> timedelta:
    return timedelta(microseconds=int(str(nanoseconds or 0)) / 1000)
