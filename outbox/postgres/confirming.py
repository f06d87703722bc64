"""The archive as proof of what a stream should hold, and the way back for what it has lost."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.lanes import FENCE
from outbox.postgres.pending import Fence
from outbox.postgres.tables import distinct, raw

LOST_ROWS_MAX = 5000  # moved by one statement
RECENT_ROWS_MAX = 200_000


class Archived(NamedTuple):
    """A published event, and where the stream should hold it."""

    id: int
    event_id: str
    sequence: int
    published_at: datetime


STREAMS = f"""
WITH RECURSIVE {distinct("archive", "stream")}
SELECT stream FROM found WHERE stream IS NOT NULL LIMIT 1000
"""  # noqa: S608 - no value is built in
SEEN = "SELECT created FROM {schema}.stream WHERE name = $1::text"
# Compare and set: of two relays that see a new incarnation one is first.
NOTE = """
WITH {fence}
INSERT INTO {schema}.stream AS s (name, created)
SELECT $4::text, $5::text FROM fence
ON CONFLICT (name) DO UPDATE SET created = excluded.created,
  since = coalesce($6::timestamptz, clock_timestamp())
WHERE s.created = $7::text
RETURNING 1
""".replace("{fence}", FENCE)
_OWN = """
SELECT id, CAST(event_id AS text), sequence, published_at FROM {schema}.archive
WHERE stream = $1::text AND published_at >= coalesce(
  (SELECT since FROM {schema}.stream WHERE name = $1::text), '-infinity') AND """
NEWEST = _OWN + "sequence > $2::int8 ORDER BY sequence DESC LIMIT 1"
ABOVE = _OWN + "sequence > $2::int8 AND sequence < $3::int8 ORDER BY sequence LIMIT 1"
BELOW = _OWN + "sequence > $2::int8 AND sequence < $3::int8 ORDER BY sequence DESC LIMIT 1"
RECENT = (
    _OWN
    + "sequence <= $2::int8 AND published_at > now() - $3::interval"
    + f" ORDER BY published_at, id LIMIT {RECENT_ROWS_MAX}"
)
# Moved in ranges of the index, so each statement is bounded; a relay that dies goes on from there.
CHUNK = """
SELECT max(sequence) FROM (
  SELECT sequence FROM {schema}.archive WHERE stream = $1::text AND sequence > $2::int8
  ORDER BY sequence LIMIT $3::int4) AS chunk
"""
LOSE = """
WITH {fence}, lost AS (
  DELETE FROM {schema}.archive
  WHERE stream = $4::text AND sequence > $5::int8 AND sequence <= $6::int8
    AND published_at >= coalesce(
      (SELECT since FROM {schema}.stream WHERE name = $4::text), '-infinity')
    AND ($7::timestamptz IS NULL OR (published_at, id) < ($7::timestamptz, $8::int8))
    AND ($9::interval IS NULL OR published_at > now() - $9::interval)
    AND EXISTS (SELECT 1 FROM fence)
  RETURNING id, event_id, slot, key, subject, headers, body, created_at
), kept AS (
  INSERT INTO {schema}.waiting (id, event_id, slot, key, subject, headers, body, created_at,
                                reason, attempts, due_at, republished, last_error)
  SELECT id, event_id, slot, key, subject, headers, body, created_at,
         'repaired', 0, clock_timestamp(), 0, $10::text
  FROM lost
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM kept)
""".replace("{fence}", FENCE)


async def streams(driver: Driver, schema: str) -> list[str]:
    """Return the names of up to 1,000 streams that the archive holds events of."""
    return [str(row[0]) for row in await _fetch(driver, schema, STREAMS)]


async def seen(driver: Driver, schema: str, stream: str) -> str | None:
    """Return when the stream was created as it was seen last, None for a new one."""
    rows = await _fetch(driver, schema, SEEN, stream)
    return str(rows[0][0]) if rows else None


async def note(
    driver: Driver,
    schema: str,
    fence: Fence,
    stream: str,
    *,
    created: str,
    before: str | None,
    since: datetime | None = None,
) -> bool:
    """Note the stream's incarnation; return False when another relay noted one, or has the lane.

    Args:
        before: what `seen` returned; only that is replaced.
        since: what the archive holds of this incarnation begins here; None means now.
    """
    rows = await _fetch(driver, schema, NOTE, *fence, stream, created, since, before)
    return bool(rows)


async def newest(driver: Driver, schema: str, stream: str) -> Archived | None:
    """Return our own event with the highest sequence in the stream."""
    return _first(await _fetch(driver, schema, NEWEST, stream, 0))


async def above(driver: Driver, schema: str, stream: str, low: int, high: int) -> Archived | None:
    """Return our own event with the lowest sequence strictly between `low` and `high`."""
    return _first(await _fetch(driver, schema, ABOVE, stream, low, high))


async def below(driver: Driver, schema: str, stream: str, low: int, high: int) -> Archived | None:
    """Return our own event with the highest sequence strictly between `low` and `high`."""
    return _first(await _fetch(driver, schema, BELOW, stream, low, high))


async def recent(
    driver: Driver, schema: str, stream: str, last: int, within: timedelta
) -> list[Archived]:
    """Return what was published `within` this time, up to sequence `last`, as it was published."""
    return [Archived(*row) for row in await _fetch(driver, schema, RECENT, stream, last, within)]


async def lose(
    driver: Driver,
    schema: str,
    fence: Fence,
    stream: str,
    *,
    above: int,
    before: Archived | None = None,
    max_age: timedelta | None = None,
    error: str,
) -> int | None:
    """Move events that the stream has lost to `waiting`; return how many, None without the lane.

    Bounded statements, each a transaction of its own; a repetition goes on where one ended.

    Args:
        above: of the sequences.
        before: only what was published before this event.
        max_age: only what the stream would still hold.
    """
    moved, low = 0, above
    cut = (None, None) if before is None else (before.published_at, before.id)
    while True:
        rows = await _fetch(driver, schema, CHUNK, stream, low, LOST_ROWS_MAX)
        high = rows[0][0]
        if high is None:
            return moved
        found = await _fetch(
            driver, schema, LOSE, *fence, stream, low, int(high), *cut, max_age, error
        )
        if found[0][0] != 1:
            return None
        moved += int(found[0][1])
        low = int(high)


async def _fetch(driver: Driver, schema: str, sql: str, *values: object) -> Sequence[Sequence[Any]]:
    with translated():
        return await driver.fetch(raw(schema, sql), *values, timeout=STATEMENT_SECONDS)


def _first(rows: Sequence[Sequence[Any]]) -> Archived | None:
    return Archived(*rows[0]) if rows else None


class Owned(NamedTuple):
    """An archived event, as `outbox verify` lists it."""

    sequence: int
    event_id: str
    subject: str
    published_at: datetime


PAGE = """
SELECT sequence, CAST(event_id AS text), subject, published_at FROM {schema}.archive
WHERE stream = $1::text AND sequence > $2::int8 AND published_at >= coalesce(
  (SELECT since FROM {schema}.stream WHERE name = $1::text), '-infinity')
ORDER BY sequence LIMIT $3::int4
"""
GIVE_BACK = """
WITH missing AS (
  DELETE FROM {schema}.archive
  WHERE stream = $1::text AND sequence = ANY($2::int8[])
  RETURNING id, event_id, slot, key, subject, headers, body, created_at
), kept AS (
  INSERT INTO {schema}.waiting (id, event_id, slot, key, subject, headers, body, created_at,
                                reason, attempts, due_at, republished, last_error)
  SELECT id, event_id, slot, key, subject, headers, body, created_at,
         'repaired', 0, clock_timestamp(), 0, $3::text
  FROM missing
  RETURNING 1
) SELECT count(*) FROM kept
"""


async def page(driver: Driver, schema: str, stream: str, after: int, rows_max: int) -> list[Owned]:
    """Return our own events of a stream behind a sequence, in the stream's order."""
    return [Owned(*row) for row in await _fetch(driver, schema, PAGE, stream, after, rows_max)]


async def give_back(
    driver: Driver, schema: str, stream: str, sequences: Sequence[int], error: str
) -> int:
    """Move archived events to `waiting`, to be published again; return how many.

    A row that somebody moved first is skipped, so a repetition is harmless.
    """
    rows = await _fetch(driver, schema, GIVE_BACK, stream, list(sequences), error)
    return int(rows[0][0])
