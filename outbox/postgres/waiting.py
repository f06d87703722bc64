"""Rows that must wait: failed ones, followers of a blocked key, scheduled ones.

A key is blocked while a row of it is here as `failed` or `blocked`. Followers have no due time:
they are read by key once their head has left, so a key with many of them costs the others nothing.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.lanes import FENCE
from outbox.postgres.pending import Fence, Row, Wait
from outbox.postgres.tables import raw

_COLUMNS = """id, CAST(event_id AS text), key, subject, headers, body, created_at, false, attempts,
       republished, reason"""
DUE = f"""
SELECT {_COLUMNS} FROM {{schema}}.waiting
WHERE due_at <= now() ORDER BY id LIMIT $1::int4
"""  # noqa: S608 - a constant
FOLLOWERS = f"""
SELECT {_COLUMNS} FROM {{schema}}.waiting
WHERE key = ANY($2::text[]) AND reason = 'blocked' ORDER BY id LIMIT $1::int4
"""  # noqa: S608 - a constant
# Keys with a row that holds the others up, and whether a failed one is among them.
BLOCKED = """
SELECT key, bool_or(reason = 'failed') FROM {schema}.waiting
WHERE key IS NOT NULL AND reason IN ('failed', 'blocked')
  AND ($1::text[] IS NULL OR key = ANY($1::text[]))
GROUP BY key
"""
POSTPONE = (
    "WITH "
    + FENCE
    + """, changed AS (
  UPDATE {schema}.waiting AS m
  SET reason = w.reason, attempts = w.attempts, republished = w.republished, last_error = w.error,
      due_at = CASE w.reason WHEN 'blocked' THEN 'infinity' ELSE clock_timestamp() + w.delay END
  FROM unnest($4::int8[], $5::text[], $6::int4[], $7::interval[], $8::int4[], $9::text[])
       AS w(id, reason, attempts, delay, republished, error)
  WHERE m.id = w.id AND EXISTS (SELECT 1 FROM fence)
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM changed)
"""
)
COUNTS = """
SELECT count(*) FILTER (WHERE due_at <= now()),
       count(*) FILTER (WHERE reason = 'scheduled' AND due_at > now()),
       count(*) FILTER (WHERE reason <> 'scheduled' AND due_at > now()),
       min(due_at) FILTER (WHERE due_at <> 'infinity')
FROM (SELECT due_at, reason FROM {schema}.waiting LIMIT 100000) AS w
"""


class Counts(NamedTuple):
    """How many rows wait, by what they wait for; exact up to 100,000."""

    due: int
    scheduled: int
    backing_off: int
    next_due: datetime | None


async def due(driver: Driver, schema: str, limit: int) -> list[Row]:
    """Return rows whose time has come, in id order."""
    with translated():
        found = await driver.fetch(raw(schema, DUE), limit, timeout=STATEMENT_SECONDS)
    return [Row(*record) for record in found]


async def followers(driver: Driver, schema: str, keys: Collection[str], limit: int) -> list[Row]:
    """Return rows that waited behind a head of `keys`, in id order."""
    with translated():
        found = await driver.fetch(
            raw(schema, FOLLOWERS), limit, list(keys), timeout=STATEMENT_SECONDS
        )
    return [Row(*record) for record in found]


async def blocked_keys(
    driver: Driver, schema: str, keys: Collection[str] | None = None
) -> dict[str, bool]:
    """Return the blocked keys (of `keys`, or all), each with whether a failed row is its head."""
    with translated():
        found = await driver.fetch(
            raw(schema, BLOCKED), None if keys is None else list(keys), timeout=STATEMENT_SECONDS
        )
    return {str(key): bool(failed) for key, failed in found}


async def postpone(driver: Driver, schema: str, fence: Fence, waits: Sequence[Wait]) -> bool:
    """Have rows of `waiting` wait on; return False when the lane is lost."""
    with translated():
        row = await driver.fetchrow(
            raw(schema, POSTPONE),
            *fence,
            [each.id for each in waits],
            [each.reason for each in waits],
            [each.attempts for each in waits],
            [each.delay for each in waits],
            [each.republished for each in waits],
            [each.error for each in waits],
            timeout=STATEMENT_SECONDS,
        )
    return row is not None and row[0] == 1


async def counts(driver: Driver, schema: str) -> Counts:
    """Return how many rows wait."""
    with translated():
        row = await driver.fetchrow(raw(schema, COUNTS), timeout=STATEMENT_SECONDS)
    assert row is not None  # noqa: S101 - an aggregate always has a row
    return Counts(int(row[0]), int(row[1]), int(row[2]), row[3])
