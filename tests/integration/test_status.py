"""`status`: exact to 10,000 rows, estimated and marked beyond."""

from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.operate.status import status
from outbox.postgres import counting, schema
from outbox.relay import Relay
from tests.servers.events import insert

WAITING = """
INSERT INTO outbox.waiting (id, event_id, slot, subject, headers, body, created_at, reason,
                            attempts, due_at, republished)
SELECT 1000000 + n, gen_random_uuid(), 0, 'evt.a.b.v1', '', '', now() - interval '1 hour',
       CAST(:reason AS text), 0, now() + interval '1 hour', 0
FROM generate_series(1, CAST(:rows AS int8)) AS n
"""
LETTERS = """
INSERT INTO outbox.dead_letter (side, event_id, subject, headers, body, reason, error, attempts,
                                state)
SELECT 'relay', gen_random_uuid(), 'evt.a.b.v1', '', '', 'refused', '', 1, s
FROM unnest(ARRAY['open', 'open', 'discarded']) AS s
"""


async def test_status_of_empty_tables_has_every_key(engine: AsyncEngine) -> None:
    assert await status(engine) == {
        "pending": 0,
        "oldest_pending_seconds": None,
        "scheduled": 0,
        "published": 0,
        "dead_letters": 0,
        "inbox": 0,
        "schema_version": schema.head(),
        "lanes": [
            {
                "lane": 0,
                "owner": None,
                "epoch": 0,
                "alive": False,
                "expires_in_seconds": None,
                "no_ack_seconds": None,
                "hindrance": None,
            }
        ],
        "estimated": [],
    }


async def test_status_counts_waiting_as_pending_and_scheduled_apart(engine: AsyncEngine) -> None:
    await insert(engine, 3)
    await insert(engine, 2, later=timedelta(hours=1))
    async with engine.begin() as connection:
        await connection.execute(text(WAITING), {"reason": "failed", "rows": 4})
        await connection.execute(text(WAITING.replace("1000000", "2")), _scheduled(5))
        await connection.execute(text(LETTERS))
    found = await status(engine)
    assert (found["pending"], found["scheduled"], found["dead_letters"]) == (7, 7, 2)
    assert 3600 <= found["oldest_pending_seconds"] < 3700
    assert found["estimated"] == []


def _scheduled(rows: int) -> dict[str, object]:
    return {"reason": "scheduled", "rows": rows}


async def test_status_estimates_beyond_the_limit(engine: AsyncEngine) -> None:
    await insert(engine, counting.EXACT_MAX)
    exact = await status(engine)
    assert (exact["pending"], exact["estimated"]) == (counting.EXACT_MAX, [])
    await insert(engine, 10_000)
    unknown = await status(engine)
    assert unknown["pending"] > counting.EXACT_MAX
    assert unknown["estimated"] == ["pending"]
    async with engine.begin() as connection:
        await connection.execute(text("ANALYZE outbox.pending"))
    assert (await status(engine))["pending"] == 20_000


async def test_status_shows_published_and_a_free_lane_after_a_drain(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    del stream
    await insert(engine, 20)
    assert (await Relay(engine, js_client).drain()).complete
    found = await status(engine)
    assert (found["pending"], found["published"]) == (0, 20)
    (lane,) = found["lanes"]
    assert (lane["owner"], lane["epoch"], lane["alive"]) == (None, 1, False)


async def test_status_names_the_command_when_there_are_no_tables(empty_database_url: str) -> None:
    engine = create_async_engine(empty_database_url)
    with pytest.raises(ConfigurationError, match="outbox migrate"):
        await status(engine)
    await engine.dispose()
