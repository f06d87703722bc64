"""Attempts: starts and failures of events that failed or were redelivered.

A first delivery writes nothing here. A redelivered event gets a start mark before its handler
runs, so that a handler that kills its process is counted although nobody is left to count it.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from outbox.postgres.tables import statement


class Started(NamedTuple):
    """What was known of an event before this start."""

    unfinished: int  # earlier starts without an end
    failed: int

    @property
    def spent(self) -> int:
        """What is compared with `max_attempts`."""
        return self.unfinished + self.failed


START = """
INSERT INTO {schema}.attempt AS a (listener, event_id, started, failed)
SELECT CAST(:listener AS text), CAST(:event_id AS uuid), 1, 0
WHERE NOT EXISTS (SELECT 1 FROM {schema}.inbox AS i
                  WHERE i.listener = CAST(:listener AS text)
                    AND i.event_id = CAST(:event_id AS uuid))
ON CONFLICT (listener, event_id) DO UPDATE SET started = a.started + 1, updated_at = now()
RETURNING started - 1, failed
"""
# A failure ends one start when there is one.
FAIL = """
INSERT INTO {schema}.attempt AS a (listener, event_id, started, failed, next_at, last_error)
VALUES (CAST(:listener AS text), CAST(:event_id AS uuid), 0, 1,
        now() + CAST(:delay AS interval), CAST(:error AS text))
ON CONFLICT (listener, event_id) DO UPDATE
SET started = greatest(a.started - CAST(:ended AS int), 0), failed = a.failed + 1,
    next_at = excluded.next_at, last_error = excluded.last_error, updated_at = now()
RETURNING started, failed
"""
RELEASE = """
UPDATE {schema}.attempt SET started = greatest(started - 1, 0), updated_at = now()
WHERE listener = CAST(:listener AS text) AND event_id = CAST(:event_id AS uuid)
"""
FORGET = """
DELETE FROM {schema}.attempt
WHERE listener = CAST(:listener AS text) AND event_id = CAST(:event_id AS uuid)
"""
SEEN = """
SELECT started, failed FROM {schema}.attempt
WHERE listener = CAST(:listener AS text) AND event_id = CAST(:event_id AS uuid)
"""

AMONG = """
SELECT event_id FROM {schema}.attempt
WHERE listener = CAST(:listener AS text) AND event_id = ANY(CAST(:event_ids AS uuid[]))
"""


async def start(
    session: AsyncSession, schema: str, *, listener: str, event_id: UUID
) -> Started | None:
    """Mark the start of an attempt; return what was before, None when the inbox has the event."""
    values = {"listener": listener, "event_id": event_id}
    row = (await session.execute(statement(schema, START), values)).one_or_none()
    return None if row is None else Started(row[0], row[1])


async def fail(
    session: AsyncSession,
    schema: str,
    *,
    listener: str,
    event_id: UUID,
    marked: bool,
    delay: timedelta,
    error: str,
) -> Started:
    """Count a failure, and end the start that `marked` says was made; return what is now."""
    values = {
        "listener": listener,
        "event_id": event_id,
        "ended": int(marked),
        "delay": delay,
        "error": error,
    }
    row = (await session.execute(statement(schema, FAIL), values)).one()
    return Started(row[0], row[1])


async def release(session: AsyncSession, schema: str, *, listener: str, event_id: UUID) -> None:
    """End a start that was nobody's failure: an outage, or a stop."""
    values = {"listener": listener, "event_id": event_id}
    await session.execute(statement(schema, RELEASE), values)


async def forget(session: AsyncSession, schema: str, *, listener: str, event_id: UUID) -> None:
    """Delete what is known of an event's attempts, in the transaction that finishes it."""
    values = {"listener": listener, "event_id": event_id}
    await session.execute(statement(schema, FORGET), values)


async def seen(session: AsyncSession, schema: str, *, listener: str, event_id: UUID) -> Started:
    """Return what is known of an event's attempts; zeros when nothing is."""
    values = {"listener": listener, "event_id": event_id}
    row = (await session.execute(statement(schema, SEEN), values)).one_or_none()
    return Started(0, 0) if row is None else Started(row[0], row[1])


async def among(
    session: AsyncSession, schema: str, *, listener: str, event_ids: Sequence[UUID]
) -> set[UUID]:
    """Return those of `event_ids` that were tried before without an end."""
    values = {"listener": listener, "event_ids": list(event_ids)}
    return set((await session.execute(statement(schema, AMONG), values)).scalars())
