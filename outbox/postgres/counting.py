"""Counting rows for people: exact up to a limit, the planner's estimate beyond."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres.tables import statement

EXACT_MAX = 10_000
BACKLOG_MAX = 100_000

# A row that is still due later is no backlog: it is counted as scheduled.
PENDING = """
SELECT count(*), CAST(extract(epoch FROM clock_timestamp() - min(created_at)) AS float8) FROM (
  (SELECT created_at FROM {schema}.pending
   WHERE deliver_at IS NULL OR deliver_at <= now() ORDER BY id LIMIT CAST(:limit AS int8))
  UNION ALL
  (SELECT created_at FROM {schema}.waiting
   WHERE NOT (reason = 'scheduled' AND due_at > now()) ORDER BY id LIMIT CAST(:limit AS int8))
) AS chosen
"""
SCHEDULED = """
SELECT count(*) FROM (
  (SELECT 1 FROM {schema}.pending WHERE deliver_at > now() LIMIT CAST(:limit AS int8))
  UNION ALL
  (SELECT 1 FROM {schema}.waiting
   WHERE reason = 'scheduled' AND due_at > now() LIMIT CAST(:limit AS int8))
) AS chosen
"""
PUBLISHED = "SELECT count(*) FROM (SELECT 1 FROM {schema}.archive LIMIT CAST(:limit AS int8)) AS s"
INBOX = "SELECT count(*) FROM (SELECT 1 FROM {schema}.inbox LIMIT CAST(:limit AS int8)) AS s"
DEAD_LETTERS = """
SELECT count(*) FROM (
  SELECT 1 FROM {schema}.dead_letter WHERE state = 'open' LIMIT CAST(:limit AS int8)
) AS chosen
"""
# Of the table, or of its partitions; -1 stands for a table that was never analysed.
ESTIMATE = """
SELECT CAST(coalesce(sum(greatest(c.reltuples, 0)), 0) AS int8) FROM pg_class AS c
WHERE c.relkind = 'r' AND (
  c.oid = to_regclass(CAST(:name AS text))
  OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(CAST(:name AS text)))
)
"""
OPEN_LETTERS = """
SELECT side, reason, count(*) FROM (
  SELECT side, reason FROM {schema}.dead_letter WHERE state = 'open' LIMIT CAST(:limit AS int8)
) AS chosen GROUP BY side, reason
"""
LANES = """
SELECT lane, owner_name, epoch, owner IS NOT NULL AND expires_at > clock_timestamp(),
       CASE WHEN isfinite(expires_at)
            THEN CAST(extract(epoch FROM expires_at - clock_timestamp()) AS float8) END,
       CAST(extract(epoch FROM clock_timestamp() - unanswered_since) AS float8), hindrance
FROM {schema}.lane ORDER BY lane
"""
_COUNTED = {
    "scheduled": (SCHEDULED, ("pending", "waiting")),
    "published": (PUBLISHED, ("archive",)),
    "dead_letters": (DEAD_LETTERS, ("dead_letter",)),
    "inbox": (INBOX, ("inbox",)),
}


@dataclass(frozen=True, slots=True)
class Counts:
    """What the tables hold; names in `estimated` are not exact."""

    numbers: dict[str, int]
    oldest: timedelta | None
    estimated: list[str]


@dataclass(frozen=True, slots=True)
class LaneState:
    """Who holds a lane."""

    lane: int
    owner: str | None
    epoch: int
    alive: bool
    expires_in_seconds: float | None
    no_ack_seconds: float | None  # how long the owner has waited for one
    hindrance: str | None  # why it does not publish


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for the relay, or for a person."""

    pending: int
    oldest: timedelta | None
    scheduled: int
    dead_letters: dict[tuple[str, str], int]  # open ones by side and reason


async def backlog(connection: AsyncConnection, schema: str) -> Backlog:
    """Count exactly up to 100,000 rows of each; of more pending ones the planner's estimate."""
    values = {"limit": BACKLOG_MAX + 1}
    pending, oldest = (await connection.execute(statement(schema, PENDING), values)).one()
    if pending > BACKLOG_MAX:
        estimate = await _estimate(connection, schema, ("pending", "waiting"))
        pending = max(estimate, BACKLOG_MAX)
    scheduled = (await connection.execute(statement(schema, SCHEDULED), values)).scalar_one()
    return Backlog(
        int(pending),
        None if oldest is None else timedelta(seconds=max(0.0, oldest)),
        int(scheduled),
        await open_letters(connection, schema),
    )


async def open_letters(connection: AsyncConnection, schema: str) -> dict[tuple[str, str], int]:
    """Return how many open dead letters there are by side and reason, up to 100,000."""
    values = {"limit": BACKLOG_MAX + 1}
    found = await connection.execute(statement(schema, OPEN_LETTERS), values)
    return {(str(side), str(reason)): int(number) for side, reason, number in found}


async def count(connection: AsyncConnection, schema: str) -> Counts:
    """Count everything; beyond 10,000 rows the planner's statistics answer."""
    numbers: dict[str, int] = {}
    estimated: list[str] = []
    values = {"limit": EXACT_MAX + 1}
    row = (await connection.execute(statement(schema, PENDING), values)).one()
    numbers["pending"] = int(row[0])
    if numbers["pending"] > EXACT_MAX:
        estimated.append("pending")
        numbers["pending"] = await _estimate(connection, schema, ("pending", "waiting"))
    for name, (sql, tables) in _COUNTED.items():
        found = (await connection.execute(statement(schema, sql), values)).scalar_one()
        numbers[name] = int(found)
        if found > EXACT_MAX:
            estimated.append(name)
            numbers[name] = await _estimate(connection, schema, tables)
    oldest = None if row[1] is None else timedelta(seconds=max(0.0, row[1]))
    return Counts(numbers, oldest, estimated)


async def lanes(connection: AsyncConnection, schema: str) -> list[LaneState]:
    """Return every lane with its owner."""
    rows: Any = (await connection.execute(statement(schema, LANES))).all()
    return [LaneState(*row) for row in rows]


async def _estimate(connection: AsyncConnection, schema: str, tables: tuple[str, ...]) -> int:
    total = 0
    for table in tables:
        values = {"name": f"{schema}.{table}"}
        total += (await connection.execute(statement(schema, ESTIMATE), values)).scalar_one()
    return max(total, EXACT_MAX + 1)  # that many were seen
