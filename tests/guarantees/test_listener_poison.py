"""An event that kills its process is given up alone; those in hand beside it are handled."""

import asyncio
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.jetstream.client import JetStreamClient
from tests.guarantees.test_listener_crash import column, publish_all

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(110)
async def test_only_the_killer_is_given_up(
    engine: AsyncEngine,
    database_url: str,
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
) -> None:
    """After each death a supervisor starts the listener again, until nothing is left."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (event_id text)"))
    ids = await publish_all(js_client)
    poison = ids[0]
    deaths = await _supervise(database_url, nats_server, poison, js_client, stream)
    assert await column(engine, "SELECT event_id FROM outbox.dead_letter") == [poison]
    assert await column(engine, "SELECT event_id FROM effect") == sorted(ids[1:])
    assert await column(engine, "SELECT event_id FROM outbox.attempt") == []
    assert deaths == 4  # one unmarked first delivery, then three marked starts


async def _supervise(
    database_url: str, nats_url: str, poison: str, client: JetStreamClient, stream: str
) -> int:
    deaths = 0
    module = "tests.guarantees.poison_child"
    async with asyncio.timeout(100):
        while True:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, database_url, nats_url, poison, cwd=ROOT
            )
            ended = asyncio.create_task(child.wait())
            try:
                while not ended.done():
                    if await _finished(client, stream):
                        return deaths
                    await asyncio.wait({ended}, timeout=0.1)
                deaths += 1
            finally:
                if not ended.done():
                    child.kill()
                await ended


async def _finished(client: JetStreamClient, stream: str) -> bool:
    names = (await client.api(f"CONSUMER.NAMES.{stream}"))["consumers"] or []
    if "mail-effects" not in names:
        return False
    info = await client.api(f"CONSUMER.INFO.{stream}.mail-effects")
    return bool(info["num_pending"] == info["num_ack_pending"] == 0)
