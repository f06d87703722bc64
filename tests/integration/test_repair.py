"""What the broker loses after it acknowledged is sent again; what people took away is not."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool
from typing_extensions import override

from outbox import JetStreamClient, Relay, Settings
from outbox.embedded import EmbeddedNats
from outbox.relay.repair import Repair, Standing
from outbox.telemetry import Moment, Step
from tests.faults import Watch
from tests.servers.events import count, insert, published

STREAM = "EVENTS"
TAKEN = """
UPDATE outbox.lane SET owner = gen_random_uuid(), owner_name = 'elsewhere:0', epoch = epoch + 1,
       expires_at = clock_timestamp() + interval '0.5 seconds'
"""
SUBJECTS = ["evt.>", "cmd.>", "dlq.>"]


@contextmanager
def stopped(nats: EmbeddedNats) -> Iterator[Path]:
    """Stop the server, yield the directory of its streams, and start it again."""
    nats.stop()
    (store,) = nats.directory.rglob("jetstream")
    yield store
    nats.start()


def copy(nats: EmbeddedNats, to: Path) -> None:
    """Keep a copy of what the server has stored by now."""
    with stopped(nats) as store:
        shutil.copytree(store, to)


def restore(nats: EmbeddedNats, kept: Path) -> None:
    """Put the copy in the place of what the server has: all later acks are forgotten."""
    with stopped(nats) as store:
        shutil.rmtree(store)
        shutil.copytree(kept, store)
        owner = nats.directory.stat()
        for each in (store, *store.rglob("*")):
            shutil.chown(each, owner.st_uid, owner.st_gid)


async def publish(engine: AsyncEngine, url: str, number: int = 0) -> tuple[list[str], Watch]:
    """Commit `number` events and relay until nothing is left; return their ids and the watch."""
    ids = await insert(engine, [f"k{n % 3}" for n in range(number)]) if number else []
    watch = Watch()
    async with JetStreamClient(url) as client:
        relay = Relay(engine, client, settings=Settings.defaults(stream=STREAM), observer=watch)
        drained = await relay.drain()
    assert drained.complete, drained
    return ids, watch


async def stored(url: str) -> Counter[str]:
    """Count how often the stream holds each event."""
    async with JetStreamClient(url) as client:
        return Counter(each.partition("~")[0] for each in await published(client, STREAM))


async def add_foreign(url: str, number: int) -> None:
    """Publish as another service would."""
    async with JetStreamClient(url) as client:
        for n in range(number):
            await client.js.publish("evt.other.v1", b"{}", headers={"Nats-Msg-Id": f"other-{n}"})


@pytest.fixture
async def nats(private_nats: EmbeddedNats) -> EmbeddedNats:
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream(STREAM, SUBJECTS)
    return private_nats


@pytest.mark.parametrize("foreign", [0, 5, 40], ids=["alone", "some", "beyond our own"])
async def test_tail_that_the_broker_lost_is_published_again(
    engine: AsyncEngine, nats: EmbeddedNats, tmp_path: Path, foreign: int
) -> None:
    first, _ = await publish(engine, nats.url, 20)
    copy(nats, tmp_path / "kept")
    second, _ = await publish(engine, nats.url, 30)
    restore(nats, tmp_path / "kept")
    assert (await stored(nats.url)).keys() == set(first)
    await add_foreign(nats.url, foreign)
    third, watch = await publish(engine, nats.url, 4)
    assert watch.count(Step.REPAIRED) == 30
    found = await stored(nats.url)
    assert {
        event: n for event, n in found.items() if not event.startswith("other")
    } == dict.fromkeys([*first, *second, *third], 1)
    assert await count(engine, "archive") == 54
    _, again = await publish(engine, nats.url)
    assert not again.of(Step.REPAIRED)


async def test_recreated_stream_gets_everything_again_that_it_would_still_hold(
    engine: AsyncEngine, nats: EmbeddedNats
) -> None:
    old, _ = await publish(engine, nats.url, 5)
    async with engine.begin() as connection:
        await connection.execute(
            text("UPDATE outbox.archive SET published_at = now() - interval '2 h'")
        )
    young, _ = await publish(engine, nats.url, 12)
    async with JetStreamClient(nats.url) as client:
        await client.delete_stream(STREAM)
        await client.ensure_stream(STREAM, SUBJECTS, max_age=3600)
    third, watch = await publish(engine, nats.url, 3)
    assert watch.count(Step.REPAIRED) == 12
    assert await stored(nats.url) == Counter([*young, *third])
    assert await count(engine, "archive") == 20
    assert old
    _, again = await publish(engine, nats.url, 1)
    assert not again.of(Step.REPAIRED)


async def test_what_was_published_to_the_new_stream_before_it_was_noticed_stands(
    engine: AsyncEngine, nats: EmbeddedNats
) -> None:
    settings, watch = Settings.defaults(stream=STREAM), Watch()
    async with (
        JetStreamClient(nats.url) as client,
        Relay(engine, client, settings=settings, observer=watch),
    ):
        first = await insert(engine, 10)
        await watch.until_events(Step.SETTLED, 10)
        await client.delete_stream(STREAM)
        await client.ensure_stream(STREAM, SUBJECTS)
        second = await insert(engine, 6)
        await watch.until_events(Step.SETTLED, 16)
    assert not watch.of(Step.OUTAGE_BEGAN)
    assert await stored(nats.url) == Counter(second)
    _, watch = await publish(engine, nats.url)
    assert watch.count(Step.REPAIRED) == 10
    assert await stored(nats.url) == Counter([*first, *second])


@pytest.mark.parametrize("how", ["purge", "part", "delete newest", "limit"])
async def test_what_people_and_limits_took_away_is_not_undone(
    engine: AsyncEngine, nats: EmbeddedNats, how: str
) -> None:
    await publish(engine, nats.url, 12)
    async with JetStreamClient(nats.url) as client:
        match how:
            case "purge":
                await client.api(f"STREAM.PURGE.{STREAM}")
            case "part":
                await client.api(f"STREAM.PURGE.{STREAM}", {"keep": 3})
            case "delete newest":
                await client.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": 12})
            case _:
                config = (await client.get_stream_info(STREAM))["config"]
                await client.api(
                    f"STREAM.UPDATE.{STREAM}", config | {"max_msgs": 2, "discard": "old"}
                )
    _, watch = await publish(engine, nats.url, 1)
    assert not watch.of(Step.REPAIRED)
    assert await count(engine, "archive") == 13


async def test_running_relay_repairs_after_the_broker_comes_back(
    engine: AsyncEngine, nats: EmbeddedNats, tmp_path: Path
) -> None:
    await publish(engine, nats.url, 5)
    copy(nats, tmp_path / "kept")
    watch = Watch()
    async with (
        JetStreamClient(nats.url) as client,
        Relay(engine, client, settings=Settings.defaults(stream=STREAM), observer=watch),
    ):
        ids = await insert(engine, 7)
        await watch.until_events(Step.SETTLED, 7)
        restore(nats, tmp_path / "kept")
        await watch.until_events(Step.REPAIRED, 7, within=30)
        await watch.until_events(Step.SETTLED, 14, within=30)
    found = await stored(nats.url)
    assert {each: found[each] for each in ids} == dict.fromkeys(ids, 1)
    assert len(found) == 12


async def test_stream_that_is_gone_for_good_holds_nothing_up(
    engine: AsyncEngine, nats: EmbeddedNats
) -> None:
    await publish(engine, nats.url, 2)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE outbox.archive SET stream = 'ABANDONED'"))
    _, watch = await publish(engine, nats.url, 2)
    assert not watch.of(Step.REPAIRED)
    assert await count(engine, "archive") == 4


async def test_what_a_former_holder_settles_late_stays_where_it_is(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    """Its acks may be of a broker that was restored meanwhile; the next holder has looked already.

    The next holder publishes the rows again, under the same ids.
    """
    settings = Settings.defaults(stream=stream, lease=timedelta(seconds=1), publish_timeout=0.5)
    ids = await insert(engine, ["k"] * 3)

    class Elsewhere(Watch):
        """Has the lane taken away while the settling statement is on its way."""

        @override
        def on_step(self, moment: Moment) -> None:
            super().on_step(moment)
            if moment.step is Step.SETTLING and moment.count and self.count(Step.SETTLING) == 3:
                with create_engine(sync_url, poolclass=NullPool).begin() as connection:
                    connection.execute(text(TAKEN))

    sync_url = engine.url.set(drivername="postgresql+psycopg")
    watch = Elsewhere()
    async with Relay(engine, js_client, settings=settings, observer=watch):
        await watch.until(Step.LANE_LOST)
        assert watch.count(Step.SETTLED) == 0
        assert await count(engine, "archive") == 0
        await watch.until_events(Step.SETTLED, 3, within=20)
    assert watch.count(Step.DUPLICATE) == 3
    assert await published(js_client, stream) == ids
    assert (await count(engine, "archive"), await count(engine, "pending")) == (3, 0)


async def test_relay_that_is_stopped_before_it_is_sure_publishes_nothing_more(
    engine: AsyncEngine,
    private_nats: EmbeddedNats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it would publish stands above what was lost; nobody would look below it again."""
    url = private_nats.url
    async with JetStreamClient(url) as client:
        await client.ensure_stream(STREAM, SUBJECTS)
    copy(private_nats, tmp_path / "kept")
    lost, _ = await publish(engine, url, 5)
    restore(private_nats, tmp_path / "kept")
    late = await insert(engine, ["k"])
    looked = asyncio.Event()
    standing = Repair._standing

    async def noted(*given: Any) -> Standing:
        found = await standing(*given)
        looked.set()
        return found

    monkeypatch.setattr(Repair, "_standing", noted)
    monkeypatch.setattr("outbox.relay.repair.SECOND_LOOK", 60.0)
    async with JetStreamClient(url) as client:
        relay = Relay(engine, client, settings=Settings.defaults(stream=STREAM))
        async with asyncio.timeout(20):
            await relay.start()
            await looked.wait()
            await relay.stop()
        assert await published(client, STREAM) == []
    monkeypatch.setattr("outbox.relay.repair.SECOND_LOOK", 0.1)
    await publish(engine, url)
    assert await stored(url) == Counter([*lost, *late])
