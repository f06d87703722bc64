"""A relay that dies at any step loses no event, publishes none that was rolled back."""

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.jetstream.client import JetStreamClient
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Step
from tests.servers.children import killed
from tests.servers.events import count, insert, published


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize(
    "step", [Step.READ, Step.SENT, Step.CONFIRMED, Step.SETTLING, Step.SETTLED]
)
async def test_crash_at_any_step_loses_nothing_and_stores_each_event_once(
    engine: AsyncEngine,
    database_url: str,
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
    step: Step,
    nth: int,
) -> None:
    keys = [f"k{n % 7}" if n % 3 else None for n in range(450)]
    ids = await insert(engine, keys)
    await killed("tests.guarantees.relay_child", database_url, nats_server, step, str(nth))
    drained = await Relay(engine, js_client, settings=Settings.defaults(lease=6)).drain()
    assert drained.complete
    stored = await published(js_client, stream)
    assert sorted(stored) == sorted(ids)  # the stream's duplicate window absorbed what came twice
    for key in {key for key in keys if key is not None}:
        wanted = [each for each, own in zip(ids, keys, strict=True) if own == key]
        chosen = set(wanted)
        assert [each for each in stored if each in chosen] == wanted
    assert await count(engine, "pending") == await count(engine, "waiting") == 0
    assert await count(engine, "archive") == len(ids)
