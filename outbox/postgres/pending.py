"""Reading `pending`, and moving its rows out."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.lanes import FENCE
from outbox.postgres.tables import raw

Fence = tuple[int, UUID, int]  # lane, owner, epoch


class Row(NamedTuple):
    """An event to publish, from `pending` or `waiting`."""

    id: int
    event_id: str
    key: str | None
    subject: str
    headers: bytes
    body: bytes
    early: bool  # its deliver_at has not come yet
    attempts: int = 0
    republished: int = 0
    reason: str = ""


class Read(NamedTuple):
    """A page, and the oldest transaction that was running when it was read."""

    rows: list[Row]
    xmin: int
    full: bool  # there may be more rows above the floor


@dataclass(frozen=True, slots=True)
class Wait:
    """A row that must wait: why, and for how long."""

    id: int
    reason: str  # of waiting.reason
    attempts: int = 0
    delay: timedelta = timedelta(0)
    republished: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Dead:
    """A row that can never be published."""

    id: int
    reason: str
    error: str
    attempts: int


# $2: read and not yet settled. The running sum ends a page by bytes; octet_length reads no TOAST.
READ = """
SELECT m.*, CAST(pg_snapshot_xmin(s.s) AS text)
FROM (SELECT pg_current_snapshot() AS s) AS s
LEFT JOIN LATERAL (
  SELECT id, CAST(event_id AS text), key, subject, headers, body, early
  FROM (
    SELECT *, sum(bytes) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) - bytes AS before
    FROM (
      SELECT *, octet_length(body) AS bytes, coalesce(deliver_at > now(), false) AS early
      FROM {schema}.pending
      WHERE id > $1::int8 AND NOT (id = ANY($2::int8[]))
      ORDER BY id LIMIT $3::int4
    ) AS above_floor
  ) AS summed WHERE before < $4::int8
  ORDER BY id
) AS m ON true
"""
# The xid is drawn after the page was read: it is the barrier that the floor is proven with. Fenced,
# although a row that somebody settled first is skipped: a broker that was restored from an older
# copy has lost what it acknowledged before, and the next holder looks for that in the archive once,
# before it publishes. What came into the archive later would be missed.
SETTLE_ARCHIVED = """
WITH {fence}, moved AS (
  DELETE FROM {schema}.{source} WHERE id = ANY($4::int8[]) AND EXISTS (SELECT 1 FROM fence)
  RETURNING id, event_id, slot, key, subject, headers, body, created_at
), kept AS (
  INSERT INTO {schema}.archive (id, event_id, slot, key, subject, headers, body, created_at,
                                stream, sequence, published_at, day)
  SELECT m.*, c.stream, c.sequence, now(),
         CAST((CAST(floor(extract(epoch FROM now())) AS int8) / 86400) % 32 AS int2)
  FROM moved AS m JOIN unnest($4::int8[], $5::int8[], $6::text[]) AS c(id, sequence, stream)
    ON c.id = m.id
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM kept),
         CAST(pg_current_xact_id() AS text)
""".replace("{fence}", FENCE)
SETTLE_DELETED = """
WITH {fence}, moved AS (
  DELETE FROM {schema}.{source} WHERE id = ANY($4::int8[]) AND EXISTS (SELECT 1 FROM fence)
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM moved),
         CAST(pg_current_xact_id() AS text)
""".replace("{fence}", FENCE)
MOVE_TO_WAITING = """
WITH {fence}, moved AS (
  DELETE FROM {schema}.pending WHERE id = ANY($4::int8[]) AND EXISTS (SELECT 1 FROM fence)
  RETURNING id, event_id, slot, key, subject, headers, body, created_at, deliver_at
), kept AS (
  INSERT INTO {schema}.waiting (id, event_id, slot, key, subject, headers, body, created_at,
                                reason, attempts, due_at, republished, last_error)
  SELECT m.id, m.event_id, m.slot, m.key, m.subject, m.headers, m.body, m.created_at,
         w.reason, w.attempts,
         CASE w.reason WHEN 'blocked' THEN 'infinity' WHEN 'scheduled' THEN m.deliver_at
                       ELSE clock_timestamp() + w.delay END,
         w.republished, w.error
  FROM moved AS m
  JOIN unnest($4::int8[], $5::text[], $6::int4[], $7::interval[], $8::int4[], $9::text[])
       AS w(id, reason, attempts, delay, republished, error) ON w.id = m.id
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM kept)
""".replace("{fence}", FENCE)
# Giving up is final for the row, so it is on disk before anyone hears of it.
MOVE_TO_DEAD_LETTERS = """
WITH {fence}, moved AS (
  DELETE FROM {schema}.{source} WHERE id = ANY($4::int8[]) AND EXISTS (SELECT 1 FROM fence)
    AND set_config('synchronous_commit', 'on', true) IS NOT NULL
  RETURNING id, event_id, key, subject, headers, body, created_at
), kept AS (
  INSERT INTO {schema}.dead_letter (side, event_id, subject, key, headers, body, reason, error,
                                    attempts, created_at, position, parks)
  SELECT 'relay', m.event_id, m.subject, m.key, m.headers, m.body, d.reason, d.error, d.attempts,
         m.created_at, m.id, $8::boolean AND m.key IS NOT NULL
  FROM moved AS m JOIN unnest($4::int8[], $5::text[], $6::text[], $7::int4[])
       AS d(id, reason, error, attempts) ON d.id = m.id
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM kept)
""".replace("{fence}", FENCE)


async def read(
    driver: Driver,
    schema: str,
    *,
    floor: int,
    in_flight: Sequence[int],
    rows_max: int,
    bytes_max: int,
) -> Read:
    """Return the next page above `floor` in id order, without the rows in flight."""
    with translated():
        found = await driver.fetch(
            raw(schema, READ), floor, in_flight, rows_max, bytes_max, timeout=STATEMENT_SECONDS
        )
    xmin = int(found[0][7])
    if found[0][0] is None:
        return Read([], xmin, full=False)
    rows = [Row(*record[:7]) for record in found]
    full = len(rows) >= rows_max or sum(len(row.body) for row in rows) >= bytes_max
    return Read(rows, xmin, full)


async def settle(
    driver: Driver,
    schema: str,
    fence: Fence,
    confirmed: Sequence[tuple[int, int, str]],
    *,
    archive: bool,
    source: str = "pending",
) -> tuple[int, int] | None:
    """Move confirmed rows out of `source`; return how many this call moved, and its own xid.

    None when the lane is lost. A row that was settled before is skipped.

    Args:
        confirmed: id, stream sequence and stream of each row that the broker stored.
        archive: keep the rows for the archive's retention; False deletes them.
    """
    ids = [each[0] for each in confirmed]
    sql = _from(SETTLE_ARCHIVED if archive else SETTLE_DELETED, source)
    columns = ([each[1] for each in confirmed], [each[2] for each in confirmed]) if archive else ()
    with translated():
        row = await driver.fetchrow(
            raw(schema, sql), *fence, ids, *columns, timeout=STATEMENT_SECONDS
        )
    assert row is not None  # noqa: S101 - an aggregate always has a row
    return (int(row[1]), int(row[2])) if row[0] else None


def wait_columns(waits: Sequence[Wait]) -> tuple[list[object], ...]:
    """Return `waits` as the arrays that MOVE_TO_WAITING and waiting.POSTPONE join with."""
    return (
        [each.id for each in waits],
        [each.reason for each in waits],
        [each.attempts for each in waits],
        [each.delay for each in waits],
        [each.republished for each in waits],
        [each.error for each in waits],
    )


async def move_to_waiting(driver: Driver, schema: str, fence: Fence, waits: Sequence[Wait]) -> bool:
    """Move rows from `pending` to `waiting`; return False when the lane is lost."""
    with translated():
        row = await driver.fetchrow(
            raw(schema, MOVE_TO_WAITING),
            *fence,
            *wait_columns(waits),
            timeout=STATEMENT_SECONDS,
        )
    return row is not None and row[0] == 1


async def move_to_dead_letters(
    driver: Driver,
    schema: str,
    fence: Fence,
    dead: Sequence[Dead],
    *,
    parks: bool,
    source: str = "pending",
) -> bool:
    """Move rows that can never be published to `dead_letter`; False when the lane is lost.

    Args:
        parks: later rows of their keys wait until a person has decided.
    """
    with translated():
        row = await driver.fetchrow(
            raw(schema, _from(MOVE_TO_DEAD_LETTERS, source)),
            *fence,
            [each.id for each in dead],
            [each.reason for each in dead],
            [each.error for each in dead],
            [each.attempts for each in dead],
            parks,
            timeout=STATEMENT_SECONDS,
        )
    return row is not None and row[0] == 1


def _from(sql: str, source: str) -> str:
    """Return `sql` for one of the two tables that events are published from."""
    assert source in {"pending", "waiting"}  # noqa: S101 - never outside text
    return sql.replace("{source}", source)
