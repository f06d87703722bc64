"""Dead letters as people and listeners act on them: listed, requeued, discarded, run again."""

import zlib
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from outbox.postgres.tables import SLOTS, statement

BATCH = 1000  # rows that one transaction acts on


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters; what is None does not restrict them."""

    ids: list[int] | None = None
    side: str | None = None
    subject: str | None = None
    listener: str | None = None
    reason: str | None = None
    older_than: timedelta | None = None
    newer_than: timedelta | None = None
    state: str | None = "open"


class Letter(NamedTuple):
    """A dead letter without its bytes."""

    id: int
    side: str
    event_id: str
    subject: str
    listener: str | None
    reason: str
    attempts: int
    failed_at: datetime
    state: str
    error: str
    key: str | None
    stream: str | None
    sequence: int | None
    state_at: datetime | None
    state_by: str | None
    parks: bool  # later events of its key wait behind it


class Requeued(NamedTuple):
    """A listener's dead letter that is to be handled again."""

    id: int
    event_id: UUID  # the inbox key
    subject: str
    headers: bytes
    body: bytes
    stream: str | None
    sequence: int | None
    failed_at: datetime


_WHERE = """
WHERE (CAST(:ids AS int8[]) IS NULL OR id = ANY(CAST(:ids AS int8[])))
  AND (CAST(:side AS text) IS NULL OR side = CAST(:side AS text))
  AND (CAST(:subject AS text) IS NULL OR subject = CAST(:subject AS text))
  AND (CAST(:listener AS text) IS NULL OR listener = CAST(:listener AS text))
  AND (CAST(:reason AS text) IS NULL OR reason = CAST(:reason AS text))
  AND (CAST(:older_than AS interval) IS NULL OR failed_at < now() - CAST(:older_than AS interval))
  AND (CAST(:newer_than AS interval) IS NULL OR failed_at > now() - CAST(:newer_than AS interval))
  AND (CAST(:state AS text) IS NULL OR state = CAST(:state AS text))
"""
LIST = f"""
SELECT id, side, CAST(event_id AS text), subject, listener, reason, attempts, failed_at, state,
       error, key, stream, sequence, state_at, state_by, parks
FROM {{schema}}.dead_letter {_WHERE}  AND id > :after ORDER BY id LIMIT :rows_max
"""  # noqa: S608 - no value is built in
COUNT = f"SELECT count(*) FROM {{schema}}.dead_letter {_WHERE}"  # noqa: S608 - as above
BYTES = "SELECT headers, body FROM {schema}.dead_letter WHERE id = :id"
HISTORY = """
SELECT action, at, by, note FROM {schema}.dead_letter_action
WHERE dead_letter_id = :id ORDER BY id LIMIT 1000
"""
CHOOSE = f"""
SELECT id, side, event_id, key FROM {{schema}}.dead_letter {_WHERE}
ORDER BY id LIMIT :rows_max FOR UPDATE SKIP LOCKED
"""  # noqa: S608 - as above
ACT = """
WITH changed AS (
  UPDATE {schema}.dead_letter
  SET state = CAST(:action AS text), state_at = now(), state_by = CAST(:by AS text)
  WHERE id = ANY(CAST(:chosen AS int8[])) RETURNING id
)
INSERT INTO {schema}.dead_letter_action (dead_letter_id, action, by, note)
SELECT id, CAST(:action AS text), CAST(:by AS text), CAST(:note AS text) FROM changed
"""
# A parked key's head takes its place again, before its followers. Of other keys later ones may
# have been published, so it comes last.
PUBLISH_AGAIN = """
INSERT INTO {schema}.waiting (id, event_id, slot, key, subject, headers, body, created_at, reason,
                              attempts, due_at, republished)
SELECT CASE WHEN d.parks THEN d.position
            ELSE nextval(pg_get_serial_sequence('{schema}.pending', 'id')) END,
       d.event_id, c.slot, d.key, d.subject, d.headers, d.body,
       coalesce(d.created_at, d.failed_at), CASE WHEN d.parks THEN 'failed' ELSE 'requeued' END, 0,
       clock_timestamp(), 0
FROM unnest(CAST(:relayed AS int8[]), CAST(:slots AS int2[])) AS c(id, slot)
JOIN {schema}.dead_letter AS d ON d.id = c.id ORDER BY d.id
"""
REQUEUED = """
SELECT id, event_id, subject, headers, body, stream, sequence, failed_at FROM {schema}.dead_letter
WHERE listener = CAST(:listener AS text) AND state = 'requeued' AND id > :after
ORDER BY id LIMIT 1
"""
# One statement of the handler's own transaction: when that rolls back, nothing of it has happened.
REOPEN = """
WITH taken AS (
  UPDATE {schema}.dead_letter SET state = 'handled', state_at = now(), state_by = listener
  WHERE id = (SELECT id FROM {schema}.dead_letter
              WHERE id = :id AND state = 'requeued' FOR UPDATE SKIP LOCKED)
  RETURNING id, listener, event_id
), noted AS (
  INSERT INTO {schema}.dead_letter_action (dead_letter_id, action, by)
  SELECT id, 'handled', listener FROM taken
), opened AS (
  INSERT INTO {schema}.inbox AS i (listener, event_id)
  SELECT listener, event_id FROM taken
  WHERE (SELECT CASE WHEN current_setting('synchronous_commit') = 'off'
                     THEN set_config('synchronous_commit', 'on', true) ELSE '' END) IS NOT NULL
  ON CONFLICT (listener, event_id)
    DO UPDATE SET outcome = 'handled', processed_at = now() WHERE i.outcome <> 'handled'
  RETURNING 1
) SELECT CAST(pg_current_xact_id() AS text), (SELECT count(*) FROM opened) FROM taken
"""
CLOSE = """
WITH changed AS (
  UPDATE {schema}.dead_letter
  SET state = CAST(:state AS text), state_at = now(), state_by = listener,
      error = coalesce(CAST(:error AS text), error),
      attempts = attempts + CASE WHEN CAST(:error AS text) IS NULL THEN 0 ELSE 1 END
  WHERE id = :id AND state = 'requeued' RETURNING id, listener
)
INSERT INTO {schema}.dead_letter_action (dead_letter_id, action, by, note)
SELECT id, CAST(:action AS text), listener, CAST(:note AS text) FROM changed
"""

Session = AsyncSession | AsyncConnection


async def letters(
    session: Session, schema: str, chosen: Filter, *, after: int = 0, rows_max: int = BATCH
) -> list[Letter]:
    """Return the dead letters behind id `after`, in the order of ids."""
    values = _values(chosen) | {"after": after, "rows_max": rows_max}
    found = await session.execute(statement(schema, LIST), values)
    return [Letter(*row) for row in found]


async def count(session: Session, schema: str, chosen: Filter) -> int:
    """Return how many there are."""
    found = await session.execute(statement(schema, COUNT), _values(chosen))
    return int(found.scalar_one())


async def content(session: Session, schema: str, letter: int) -> tuple[bytes, bytes]:
    """Return header lines and body."""
    row = (await session.execute(statement(schema, BYTES), {"id": letter})).one()
    return bytes(row[0]), bytes(row[1])


async def history(session: Session, schema: str, letter: int) -> list[dict[str, Any]]:
    """Return who did what with it, and when."""
    found = await session.execute(statement(schema, HISTORY), {"id": letter})
    return [dict(row._mapping) for row in found]  # noqa: SLF001 - SQLAlchemy's public name


async def act(
    session: Session, schema: str, chosen: Filter, *, action: str, by: str, note: str | None
) -> int:
    """Requeue or discard up to 1,000 of the open ones; return how many.

    What another session acts on at the moment is left to it. The transaction is the caller's; when
    it is repeated after a crash it goes on with what is still open.
    """
    values = _values(chosen) | {"state": "open", "rows_max": BATCH}
    rows = (await session.execute(statement(schema, CHOOSE), values)).all()
    if not rows:
        return 0
    relayed = [row for row in rows if row.side == "relay"] if action == "requeued" else []
    if relayed:
        slots = [zlib.crc32((row.key or str(row.event_id)).encode()) % SLOTS for row in relayed]
        again = {"relayed": [row.id for row in relayed], "slots": slots}
        await session.execute(statement(schema, PUBLISH_AGAIN), again)
    acted = {"action": action, "by": by, "note": note, "chosen": [row.id for row in rows]}
    await session.execute(statement(schema, ACT), acted)
    return len(rows)


async def requeued(session: Session, schema: str, listener: str, after: int) -> Requeued | None:
    """Return the listener's first requeued dead letter behind id `after`."""
    values = {"listener": listener, "after": after}
    row = (await session.execute(statement(schema, REQUEUED), values)).one_or_none()
    return None if row is None else Requeued(*row)


async def reopen(session: AsyncSession, schema: str, letter: int) -> tuple[str | None, bool]:
    """Take a requeued dead letter into the handler's transaction.

    Returns:
        The xid, None when another instance has it; and whether the event was unhandled so far.
    """
    row = (await session.execute(statement(schema, REOPEN), {"id": letter})).one_or_none()
    return (None, False) if row is None else (str(row[0]), bool(row[1]))


async def close(
    session: AsyncSession, schema: str, letter: int, *, error: str | None, note: str
) -> None:
    """End a requeued run that did not commit: failed again, or handled by somebody before."""
    action = "handled" if error is None else "failed"
    state = "handled" if error is None else "open"
    values = {"id": letter, "state": state, "action": action, "error": error, "note": note}
    await session.execute(statement(schema, CLOSE), values)


def _values(chosen: Filter) -> dict[str, Any]:
    return {each.name: getattr(chosen, each.name) for each in fields(chosen)}
