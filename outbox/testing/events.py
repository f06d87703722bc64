"""What a transaction has added, and what waits to be published."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from outbox.envelope import Delivery, EventEnvelope, decode_headers, parse, with_registered_payload
from outbox.postgres import peeking
from outbox.writer import held_by
from outbox.writer.adding import AnySession
from outbox.writer.connections import Ledger

Ledger.keep_written = True  # `added` shows what an early flush has written, too
_NOT_DELIVERED = Delivery(attempt=0, stream="", sequence=0, redelivered=False)


def added(session: AnySession) -> list[EventEnvelope[Any]]:
    """Return the events that were added to the session's transaction, in the order of `add`.

    Nothing is written or committed, and no broker is asked. Events that an early flush, or the
    commit of a session inside a test's own transaction, has written already are among them.

    Raises:
        InvalidSession: the session is of none of the kinds that `add` takes.
    """
    return [_envelope(each.subject, each.headers, each.body) for each in held_by(session)]


async def pending(
    session_or_engine: AsyncSession | AsyncConnection | AsyncEngine,
    subject: str | None = None,
    *,
    schema: str = "outbox",
) -> list[EventEnvelope[Any]]:
    """Return the written events that are not published yet, in the order of publication.

    Of an engine those are the committed ones; a session sees what its own transaction has written
    too. Scheduled and failed events are among them.

    Args:
        subject: None returns the events of all subjects.
    """
    if isinstance(session_or_engine, AsyncEngine):
        async with session_or_engine.connect() as connection:
            rows = await peeking.unpublished(connection, schema, subject)
    else:
        rows = await peeking.unpublished(session_or_engine, schema, subject)
    return [_envelope(*row) for row in rows]


def _envelope(subject: str, headers: bytes, body: bytes) -> EventEnvelope[Any]:
    lines = decode_headers(headers)
    event = parse(body, subject=subject, headers=lines, delivery=_NOT_DELIVERED)
    return with_registered_payload(event)
