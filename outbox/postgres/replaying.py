"""Archived events, taken once more: to their stream, or to one listener."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres.tables import statement

BATCH = 1000  # events that one transaction takes
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Window:
    """Which archived events; what is None does not restrict them."""

    since: datetime | None = None  # of publication
    until: datetime | None = None
    subject: str | None = None  # a regular expression
    key: str | None = None


class Event(NamedTuple):
    """An archived event."""

    id: int
    event_id: UUID
    key: str | None
    subject: str
    headers: bytes
    body: bytes
    created_at: datetime
    published_at: datetime


_WHERE = """
WHERE (CAST(:since AS timestamptz) IS NULL OR published_at >= CAST(:since AS timestamptz))
  AND (CAST(:until AS timestamptz) IS NULL OR published_at < CAST(:until AS timestamptz))
  AND (CAST(:subject AS text) IS NULL OR subject ~ CAST(:subject AS text))
  AND (CAST(:key AS text) IS NULL OR key = CAST(:key AS text))
"""
PAGE = f"""
SELECT id, event_id, key, subject, headers, body, created_at, published_at
FROM {{schema}}.archive {_WHERE}
  AND (published_at, id) > (CAST(:after_time AS timestamptz), CAST(:after_id AS int8))
ORDER BY published_at, id LIMIT :rows_max
"""  # noqa: S608 - no value is built in
# New ids in the order of the old ones, and a Msg-Id suffix that no earlier publication had: the
# stream would swallow one that it still remembers.
PUBLISH = """
INSERT INTO {schema}.waiting (id, event_id, slot, key, subject, headers, body, created_at, reason,
                              attempts, due_at, republished)
SELECT nextval(pg_get_serial_sequence('{schema}.pending', 'id')), event_id, slot, key, subject,
       headers, body, created_at, 'replayed', 0, clock_timestamp(), CAST(:run AS int4)
FROM {schema}.archive JOIN unnest(CAST(:ids AS int8[]), CAST(:times AS timestamptz[]))
     WITH ORDINALITY AS c(cid, ctime, n) ON id = cid AND published_at = ctime
ORDER BY n
"""
BEGIN = "SELECT CAST(1000 + random() * 2000000000 AS int4), clock_timestamp()"
KNOWN = """
SELECT event_id FROM {schema}.inbox
WHERE listener = CAST(:listener AS text) AND outcome = 'handled'
  AND event_id = ANY(CAST(:event_ids AS uuid[]))
"""
HAND_OVER = """
WITH letters AS (
  INSERT INTO {schema}.dead_letter (side, listener, event_id, subject, key, headers, body, reason,
    error, attempts, created_at, state, state_at, state_by)
  SELECT 'listener', CAST(:listener AS text), e, j, k, h, b, 'replayed',
         'taken from the archive once more', 0, t, 'requeued', now(), CAST(:by AS text)
  FROM unnest(CAST(:event_ids AS uuid[]), CAST(:subjects AS text[]), CAST(:keys AS text[]),
              CAST(:headers AS bytea[]), CAST(:bodies AS bytea[]),
              CAST(:created_ats AS timestamptz[])) AS u(e, j, k, h, b, t)
  RETURNING id
)
INSERT INTO {schema}.dead_letter_action (dead_letter_id, action, by, note)
SELECT id, 'requeued', CAST(:by AS text), 'replay' FROM letters
"""


async def page(
    connection: AsyncConnection, schema: str, window: Window, after: Event | None
) -> list[Event]:
    """Return up to 1,000 events behind one, in the order of their publication."""
    place = {
        "after_time": _EARLIEST if after is None else after.published_at,
        "after_id": 0 if after is None else after.id,
        "rows_max": BATCH,
    }
    values: dict[str, Any] = {each.name: getattr(window, each.name) for each in fields(window)}
    found = await connection.execute(statement(schema, PAGE), values | place)
    return [Event(*row) for row in found]


async def begin(connection: AsyncConnection, schema: str) -> tuple[int, datetime]:
    """Return a number that no earlier replay has put into message ids, and the time."""
    row = (await connection.execute(statement(schema, BEGIN))).one()
    return int(row[0]), row[1]


async def publish(
    connection: AsyncConnection, schema: str, events: Sequence[Event], run: int
) -> None:
    """Have events published once more, by way of `waiting`; the transaction is the caller's."""
    values = {
        "run": run,
        "ids": [event.id for event in events],
        "times": [event.published_at for event in events],
    }
    await connection.execute(statement(schema, PUBLISH), values)


async def known(
    connection: AsyncConnection, schema: str, listener: str, events: Sequence[Event]
) -> set[UUID]:
    """Return which events the listener has handled."""
    values = {"listener": listener, "event_ids": [event.event_id for event in events]}
    return set((await connection.execute(statement(schema, KNOWN), values)).scalars())


async def hand_over(
    connection: AsyncConnection, schema: str, listener: str, events: Sequence[Event], by: str
) -> None:
    """Give events to one listener, as requeued dead letters; the transaction is the caller's."""
    values: dict[str, Any] = {
        "listener": listener,
        "by": by,
        "event_ids": [event.event_id for event in events],
        "subjects": [event.subject for event in events],
        "keys": [event.key for event in events],
        "headers": [event.headers for event in events],
        "bodies": [event.body for event in events],
        "created_ats": [event.created_at for event in events],
    }
    await connection.execute(statement(schema, HAND_OVER), values)
