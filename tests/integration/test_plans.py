"""Each index serves the statement that it was made for, also on a large and mostly dead table."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.postgres import inbox, pending, waiting
from outbox.postgres.tables import raw

ROWS = 20_000
FILL = """
INSERT INTO outbox.pending (event_id, slot, key, subject, headers, body)
SELECT gen_random_uuid(), 0, 'k' || n % 1000, 'evt.a.v1', '', 'x' FROM generate_series(1, :n) AS n;
INSERT INTO outbox.waiting (id, event_id, slot, key, subject, headers, body, created_at, reason,
                            attempts, due_at, republished)
SELECT n, gen_random_uuid(), 0, 'k' || n % 1000, 'evt.a.v1', '', 'x', now(),
       CASE WHEN n % 2 = 0 THEN 'scheduled' ELSE 'blocked' END, 0,
       CASE WHEN n % 2 = 0 THEN now() + interval '1 day' ELSE 'infinity' END, 0
FROM generate_series(1, :n) AS n;
INSERT INTO outbox.inbox (listener, event_id, processed_at)
SELECT 'l', gen_random_uuid(), now() - interval '30 days' + n * interval '2 minutes'
FROM generate_series(1, :n) AS n
"""


async def plan(engine: AsyncEngine, sql: str, *arguments: Any) -> str:
    """Return the plan of one of the relay's statements, planned as the relay plans."""
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute("SET plan_cache_mode = force_custom_plan")
        found = await driver.fetch("EXPLAIN " + raw("outbox", sql), *arguments)
        return "\n".join(str(row[0]) for row in found)


@pytest.fixture
async def _full(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        for each in FILL.split(";"):
            await connection.execute(text(each), {"n": ROWS})
    async with engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        for table in ("pending", "waiting", "inbox"):
            await autocommit.execute(text(f"ANALYZE outbox.{table}"))


@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize(
    ("sql", "arguments", "index"),
    [
        (pending.READ, (15_000, [], 1000, 8_000_000), "pending_pkey"),
        (waiting.DUE, (1000, 8_000_000), "waiting_due"),
        (waiting.FOLLOWERS, (1000, 8_000_000, ["k7"]), "waiting_key"),
    ],
)
async def test_the_relays_reads_use_their_index(
    engine: AsyncEngine, sql: str, arguments: tuple[Any, ...], index: str
) -> None:
    """No page is read by a scan of the whole table."""
    found = await plan(engine, sql, *arguments)
    assert index in found
    assert "Seq Scan" not in found


@pytest.mark.usefixtures("_full")
async def test_pruning_finds_old_rows_by_their_block_range(engine: AsyncEngine) -> None:
    """The inbox is pruned without a scan of what is young."""
    async with engine.connect() as connection:
        sql = raw("outbox", inbox.PRUNE)
        found = await connection.execute(
            text(f"EXPLAIN {sql}"), {"older_than": timedelta(days=29), "limit": 5000}
        )
        assert "inbox_processed" in "\n".join(row[0] for row in found)
