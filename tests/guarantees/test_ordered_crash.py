"""An ordered listener that dies at any step leaves one effect per event, in its key's order."""

import json
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from outbox.jetstream.client import JetStreamClient
from outbox.telemetry import Step
from tests.faults import Watch
from tests.guarantees.ordered_child import SETTINGS, OrderedEffect
from tests.servers.children import killed
from tests.servers.events import count

EVENTS, KEYS = 60, 3


async def publish_all(client: JetStreamClient) -> None:
    """Publish the events of the test."""
    for n in range(EVENTS):
        event_id = str(uuid4())
        body = {
            "event_id": event_id,
            "event_type": OrderedEffect.subject,
            "source_service": "shop",
            "timestamp": "2026-01-02T03:04:05+00:00",
            "data": {"n": n},
        }
        headers = {"Nats-Msg-Id": event_id, "Outbox-Key": f"k{n % KEYS}"}
        await client.js.publish(OrderedEffect.subject, json.dumps(body).encode(), headers=headers)


@pytest.mark.parametrize("nth", [1, 9])
@pytest.mark.parametrize(
    "step", [Step.RECORDED, Step.HANDLED, Step.FLUSHED, Step.COMMITTED, Step.ACKED]
)
async def test_crash_at_any_step_leaves_one_effect_per_event_in_order(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    database_url: str,
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
    step: Step,
    nth: int,
) -> None:
    async with engine.begin() as connection:
        sql = "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, key text, n int)"
        await connection.execute(text(sql))
    await publish_all(js_client)
    await killed("tests.guarantees.ordered_child", database_url, nats_server, step, str(nth))
    left = EVENTS - await count(engine, "inbox")
    watch = Watch()
    async with OrderedEffect(js_client, sessionmaker, settings=SETTINGS, observer=watch):
        await watch.until(Step.COMMITTED, left, within=30)
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT key, n FROM effect ORDER BY id"))
        effects = [(str(key), int(n)) for key, n in rows]
    for key in range(KEYS):
        assert [n for k, n in effects if k == f"k{key}"] == list(range(key, EVENTS, KEYS))
    assert await count(engine, "dead_letter") == 0
    assert stream
