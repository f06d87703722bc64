"""Rows that must wait: failed ones, followers of a blocked key, scheduled ones.

A key is blocked while a row of it is here as `failed` or `blocked`, or while a dead letter of it
parks the others. Followers have no due time: they are read by key once their head has left, so a
key with many of them costs the others nothing.
"""

from collections.abc import Collection, Sequence
from enum import StrEnum

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.lanes import FENCE
from outbox.postgres.pending import Fence, Row, Wait, wait_columns
from outbox.postgres.tables import raw

# The running sum ends a page by bytes.
_PAGE = """
SELECT id, CAST(event_id AS text), key, subject, headers, body, false, attempts,
       republished, reason
FROM (
  SELECT *, sum(octet_length(body)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING)
            - octet_length(body) AS before
  FROM (SELECT * FROM {schema}.waiting WHERE {condition} ORDER BY id LIMIT $1::int4) AS chosen
) AS summed WHERE before < $2::int8 ORDER BY id
"""
DUE = _PAGE.replace("{condition}", "due_at <= now()")
FOLLOWERS = _PAGE.replace("{condition}", "key = ANY($3::text[]) AND reason = 'blocked'")
# Keys with a row that holds the others up, and what their head is.
BLOCKED = """
SELECT key, CASE WHEN bool_or(head = 'dead') THEN 'dead' WHEN bool_or(head = 'failed') THEN 'failed'
                 ELSE 'none' END
FROM (
  SELECT key, CASE reason WHEN 'failed' THEN 'failed' ELSE 'none' END AS head
  FROM {schema}.waiting
  WHERE key IS NOT NULL AND reason IN ('failed', 'blocked')
    AND ($1::text[] IS NULL OR key = ANY($1::text[]))
  UNION ALL
  SELECT key, 'dead' FROM {schema}.dead_letter
  WHERE parks AND state = 'open' AND side = 'relay'
    AND ($1::text[] IS NULL OR key = ANY($1::text[]))
) AS heads GROUP BY key
"""
PARKED = """
SELECT DISTINCT key FROM {schema}.dead_letter
WHERE parks AND state = 'open' AND side = 'relay' AND key = ANY($1::text[])
"""
POSTPONE = """
WITH {fence}, changed AS (
  UPDATE {schema}.waiting AS m
  SET reason = w.reason, attempts = w.attempts, republished = w.republished, last_error = w.error,
      due_at = CASE w.reason WHEN 'blocked' THEN 'infinity' ELSE clock_timestamp() + w.delay END
  FROM unnest($4::int8[], $5::text[], $6::int4[], $7::interval[], $8::int4[], $9::text[])
       AS w(id, reason, attempts, delay, republished, error)
  WHERE m.id = w.id AND EXISTS (SELECT 1 FROM fence)
  RETURNING 1
) SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM changed)
""".replace("{fence}", FENCE)


class Head(StrEnum):
    """What the followers of a blocked key wait for."""

    NONE = "none"  # it has left: they go next
    FAILED = "failed"  # its next try
    DEAD = "dead"  # a person: it was given up, and parks them


async def due(driver: Driver, schema: str, *, rows_max: int, bytes_max: int) -> list[Row]:
    """Return rows whose time has come, in id order."""
    with translated():
        found = await driver.fetch(raw(schema, DUE), rows_max, bytes_max, timeout=STATEMENT_SECONDS)
    return [Row(*record) for record in found]


async def followers(
    driver: Driver, schema: str, keys: Collection[str], *, rows_max: int, bytes_max: int
) -> list[Row]:
    """Return rows that waited behind a head of `keys`, in id order."""
    with translated():
        found = await driver.fetch(
            raw(schema, FOLLOWERS), rows_max, bytes_max, list(keys), timeout=STATEMENT_SECONDS
        )
    return [Row(*record) for record in found]


async def blocked_keys(
    driver: Driver, schema: str, keys: Collection[str] | None = None
) -> dict[str, Head]:
    """Return the blocked keys (of `keys`, or all), each with its head."""
    with translated():
        found = await driver.fetch(
            raw(schema, BLOCKED), None if keys is None else list(keys), timeout=STATEMENT_SECONDS
        )
    return {str(key): Head(head) for key, head in found}


async def parked_keys(driver: Driver, schema: str, keys: Collection[str]) -> set[str]:
    """Return those of `keys` whose followers are parked behind an open dead letter."""
    with translated():
        found = await driver.fetch(raw(schema, PARKED), list(keys), timeout=STATEMENT_SECONDS)
    return {str(row[0]) for row in found}


async def postpone(driver: Driver, schema: str, fence: Fence, waits: Sequence[Wait]) -> bool:
    """Have rows of `waiting` wait on; return False when the lane is lost."""
    with translated():
        row = await driver.fetchrow(
            raw(schema, POSTPONE),
            *fence,
            *wait_columns(waits),
            timeout=STATEMENT_SECONDS,
        )
    return row is not None and row[0] == 1
