"""One event's life, from the tables of one or several services and from the stream."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.envelope import added_at, inbox_key
from outbox.errors import BrokerUnavailable
from outbox.jetstream import publishing
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.publishing import Held
from outbox.postgres import lives, redrive, schema
from outbox.postgres.driver import translated

T = TypeVar("T")
_ON_STREAM = {Held.THIS: "there", Held.REUSED: "another event", Held.NOTHING: "gone"}
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(slots=True)
class Life:
    """What one database knows of an event; JSON-ready but for times."""

    added: dict[str, Any] | None = None
    waits: list[dict[str, Any]] = field(default_factory=list)  # in `pending` or `waiting`
    published: list[dict[str, Any]] = field(default_factory=list)
    handled: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    caused: list[dict[str, Any]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether anything is known of it."""
        parts = (self.waits, self.published, self.handled, self.attempts, self.held)
        return self.added is not None or any(parts) or bool(self.dead_letters or self.caused)


async def trace(
    engine: AsyncEngine,
    schema_name: str,
    event_id: str,
    *,
    client: JetStreamClient | None = None,
) -> Life:
    """Return what the database knows of an event; what could not be looked at is in `unseen`.

    Args:
        event_id: as publishers and logs write it; one that is no UUID is known to listeners only.
        client: asked whether the stream still holds what was published.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    key = inbox_key(event_id)
    life = Life()
    with translated():
        await schema.check_version(engine, schema_name)
        async with engine.connect() as connection:
            await _look(connection, schema_name, event_id, key, life)
    for each in life.published if client is not None else ():
        assert client is not None  # noqa: S101 - as the line above says
        await _look_at_stream(client, each, event_id, life)
    return life


async def _look(
    connection: AsyncConnection, name: str, event_id: str, key: UUID, life: Life
) -> None:
    async def within(what: str, look: Callable[[], Awaitable[T]]) -> T | None:
        """Return what a look finds in a transaction of its own, or note that it took too long."""
        try:
            async with connection.begin():
                await lives.limit(connection)
                return await look()
        except DBAPIError as error:
            if not lives.took_too_long(error):
                raise
            life.unseen.append(f"{what}: it took longer than {lives.SECONDS} s to look through")
            return None

    here = (connection, name)
    for row in await within("outbox and archive", partial(lives.rows, *here, key)) or ():
        _note(row, life)
    known = await within("inbox", partial(lives.of_listeners, *here, key))
    life.handled, life.attempts = known or ([], [])
    for letter in await within("dead letters", partial(lives.letters, *here, key)) or ():
        history = await within("dead letters", partial(redrive.history, *here, letter.id))
        life.dead_letters.append(letter._asdict() | {"history": history or []})
    life.held = await within("queues", partial(lives.held, *here, event_id)) or []
    made = added_at(event_id)
    since = _EPOCH if made is None else datetime.fromtimestamp(made - 60, UTC)  # clocks differ
    for sql in lives.CAUSED:
        look = partial(lives.mentioning, *here, key, since, sql)
        found = await within("what it has caused", look) or ()
        life.caused += [each for row in found if (each := _effect(row, event_id)) is not None]


def _note(row: lives.Row, life: Life) -> None:
    if life.added is None:
        envelope = _envelope(row.body)
        metadata = envelope.get("metadata")
        life.added = {
            "at": row.created_at,
            "subject": row.subject,
            "key": row.key,
            "service": envelope.get("source_service"),
            "correlation_id": envelope.get("correlation_id"),
            "causation_id": metadata.get("causation_id") if isinstance(metadata, dict) else None,
            "bytes": len(row.body),
        }
    if row.table == "archive":
        life.published.append(row.more | {"subject": row.subject, "on_stream": None})
    else:
        life.waits.append({"table": row.table} | row.more)


def _envelope(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _effect(row: tuple[str, str, datetime, bytes, str], event_id: str) -> dict[str, Any] | None:
    """Return an event that names this one as its cause, None for one that merely mentions it."""
    other, subject, at, body, table = row
    metadata = _envelope(body).get("metadata")
    if not isinstance(metadata, dict) or metadata.get("causation_id") != event_id:
        return None
    return {"event_id": other, "subject": subject, "at": at, "table": table}


async def _look_at_stream(
    client: JetStreamClient, published: dict[str, Any], event_id: str, life: Life
) -> None:
    try:
        held = await publishing.look_up(
            client,
            published["stream"],
            published["sequence"],
            event_id=event_id,
            subject=published["subject"],
        )
    except BrokerUnavailable as error:
        life.unseen.append(f"stream {published['stream']}: {error}")
    else:
        published["on_stream"] = _ON_STREAM[held]
