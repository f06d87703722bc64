"""What a drain has still to publish: `pending` and `waiting`, seen by one statement.

A relay moves rows from the one table to the other, and two statements would miss what moves between
them.
"""

from typing import NamedTuple

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.tables import raw

NEWEST = "SELECT max(id) FROM {schema}.pending"
REMAINING = """
SELECT p.ready + w.due, p.early + w.scheduled, w.backing_off,
       EXISTS (SELECT 1 FROM {schema}.waiting AS b WHERE b.reason = 'blocked' AND NOT EXISTS (
         SELECT 1 FROM {schema}.waiting AS f WHERE f.key = b.key AND f.reason = 'failed')
       AND NOT EXISTS (
         SELECT 1 FROM {schema}.dead_letter AS d
         WHERE d.key = b.key AND d.parks AND d.state = 'open' AND d.side = 'relay'))
FROM (
  SELECT count(*) FILTER (WHERE deliver_at IS NULL OR deliver_at <= now()) AS ready,
         count(*) FILTER (WHERE deliver_at > now()) AS early
  FROM {schema}.pending WHERE id <= $1::int8
) AS p, (
  SELECT count(*) FILTER (WHERE due_at <= now()) AS due,
         count(*) FILTER (WHERE reason = 'scheduled' AND due_at > now()) AS scheduled,
         count(*) FILTER (WHERE reason <> 'scheduled' AND due_at > now()) AS backing_off
  FROM (SELECT due_at, reason FROM {schema}.waiting LIMIT 100000) AS chosen
) AS w
"""


class Remaining(NamedTuple):
    """How many rows are left, by what they wait for; of `waiting` exact up to 100,000."""

    ready: int
    scheduled: int
    backing_off: int  # failed, or behind a failed one
    released: bool  # followers whose head has left; they go next


async def newest(driver: Driver, schema: str) -> int:
    """Return the highest id in `pending`, 0 when it is empty."""
    with translated():
        row = await driver.fetchrow(raw(schema, NEWEST), timeout=STATEMENT_SECONDS)
    return 0 if row is None or row[0] is None else int(row[0])


async def count(driver: Driver, schema: str, last: int) -> Remaining:
    """Return how many rows are left: those of `pending` up to the id `last`, and what waits."""
    with translated():
        row = await driver.fetchrow(raw(schema, REMAINING), last, timeout=STATEMENT_SECONDS)
    assert row is not None  # noqa: S101 - an aggregate always has a row
    return Remaining(int(row[0]), int(row[1]), int(row[2]), bool(row[3]))
