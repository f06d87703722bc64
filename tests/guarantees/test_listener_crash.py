"""A listener that dies at any step leaves each event with exactly one effect."""

import asyncio
import json
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from outbox.jetstream.client import JetStreamClient
from outbox.telemetry import Step
from tests.faults import Watch
from tests.guarantees.listener_child import Effect
from tests.servers.children import killed

EVENTS = 40


async def publish_all(client: JetStreamClient) -> list[str]:
    """Publish the events of the test; return their ids."""
    ids = [str(uuid4()) for _ in range(EVENTS)]
    for event_id in ids:
        body = {
            "event_id": event_id,
            "event_type": Effect.subject,
            "correlation_id": event_id,
            "source_service": "shop",
            "timestamp": "2026-01-02T03:04:05+00:00",
            "data": {},
        }
        await client.js.publish(Effect.subject, json.dumps(body).encode())
    return ids


async def all_acked(client: JetStreamClient, stream: str) -> None:
    """Return once the broker holds nothing for the listener any more; its acks take a moment."""
    async with asyncio.timeout(30):
        while True:
            info = await client.api(f"CONSUMER.INFO.{stream}.mail-effects")
            if info["num_pending"] == info["num_ack_pending"] == 0:
                return
            await asyncio.sleep(0.02)


async def column(engine: AsyncEngine, sql: str) -> list[str]:
    """Return the first column of a query, sorted."""
    async with engine.connect() as connection:
        return sorted(str(row[0]) for row in await connection.execute(text(sql)))


@pytest.mark.parametrize("nth", [1, 7])
@pytest.mark.parametrize(
    "step",
    [
        Step.RECEIVED,
        Step.RECORDED,
        Step.HANDLED,
        Step.FLUSHED,
        Step.COMMITTED,
        Step.ACKED,
    ],
)
async def test_crash_at_any_step_leaves_one_effect_per_event(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    database_url: str,
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
    step: Step,
    nth: int,
) -> None:
    """Effects, inbox rows and follow-up events are equal to the events, none twice."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (event_id text)"))
    ids = await publish_all(js_client)
    await killed("tests.guarantees.listener_child", database_url, nats_server, step, str(nth))
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await watch.until(Step.ACKED)
        await all_acked(js_client, stream)
    assert await column(engine, "SELECT event_id FROM effect") == sorted(ids)
    assert await column(engine, "SELECT event_id FROM outbox.inbox") == sorted(ids)
    causes = "SELECT convert_from(body, 'UTF8')::json->'data'->>'cause' FROM outbox.pending"
    assert await column(engine, causes) == sorted(ids)
    assert await column(engine, "SELECT id FROM outbox.dead_letter") == []
    assert await column(engine, "SELECT event_id FROM outbox.attempt") == []
