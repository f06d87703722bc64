"""Ordered listeners: the events of a key one by one, in the stream's order, whatever fails."""

import asyncio
import json
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import BatchListener, EventEnvelope, JetStreamClient, Listener, Reject, Retry, Settings
from outbox.embedded import EmbeddedNats
from outbox.jetstream import provisioning
from outbox.postgres.ordering import Place, Queue
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count

SUBJECT = "evt.order.changed.v1"
Seen = list[tuple[str, int]]


class Ordered(Listener):
    """Notes what it commits, in a table without a unique key; its own state decides on failures."""

    subject = SUBJECT
    queue_group = "ordered"
    service_name = "warehouse"
    ordered = True
    ack_wait = 1
    concurrency = 4
    max_attempts = 30

    _gate: asyncio.Event | None = None
    _failures: dict[tuple[str, int], int]

    def __init__(
        self, *given: Any, failures: dict[tuple[str, int], int] | None = None, **more: Any
    ):
        super().__init__(*given, **more)
        self._failures = failures or {}
        self.begun: Seen = []

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        place = (str(event.key), int(event.data["n"]))
        self.begun.append(place)
        await session.execute(
            text("INSERT INTO seen (key, n) VALUES (:k, :n)"), {"k": place[0], "n": place[1]}
        )
        if self._gate is not None and event.data.get("waits"):
            await self._gate.wait()
        if self._failures.get(place, 0) > 0:
            self._failures[place] -= 1
            raise Retry("not yet", after=timedelta(seconds=0.02))
        if event.data.get("reject"):
            raise Reject("poison")
        if event.data.get("cancels") and len(self.begun) == 1:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
async def _table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        sql = "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, key text, n int)"
        await connection.execute(text(sql))


async def send(
    client: JetStreamClient, events: Iterable[tuple[str | None, int]], **data: Any
) -> None:
    """Publish events of (key, n), in this order."""
    for key, n in events:
        event_id = str(uuid4())
        body = {
            "event_id": event_id,
            "event_type": SUBJECT,
            "source_service": "shop",
            "timestamp": "2026-11-25T07:00:00Z",
            "data": {"n": n} | data,
        }
        headers = {"Nats-Msg-Id": event_id} | ({} if key is None else {"Outbox-Key": key})
        await client.js.publish(SUBJECT, json.dumps(body).encode(), headers=headers)


async def seen(engine: AsyncEngine, key: str | None = None) -> list[int]:
    """Return what was committed, of one key or of all, in the order of the handlers' writes."""
    where = "" if key is None else "WHERE key = :key"
    async with engine.connect() as connection:
        rows = await connection.execute(
            text(f"SELECT n FROM seen {where} ORDER BY id"), {"key": key}
        )
        return [row[0] for row in rows]


@pytest.fixture
def settings(stream: str) -> Settings:
    return Settings.defaults(stream=stream, lease=timedelta(seconds=1), publish_timeout=0.5)


async def test_keys_run_side_by_side_and_each_in_order(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    events = [(f"k{n % 7}", n) for n in range(140)]
    await send(js_client, events)
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 140)
    for key in range(7):
        assert await seen(engine, f"k{key}") == [n for _, n in events if n % 7 == key]
    assert await count(engine, "held") == 0
    assert await count(engine, "inbox") == 140


async def test_head_that_fails_twenty_times_holds_back_its_own_key_only(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    await send(js_client, [("slow", n) for n in range(60)])
    await send(js_client, [(f"k{n % 5}", n) for n in range(50)])
    await send(js_client, [(None, n) for n in range(10)])
    watch = Watch()
    listener = Ordered(
        js_client, sessionmaker, settings=settings, observer=watch, failures={("slow", 0): 20}
    )
    async with listener:
        await watch.until(Step.ACKED, 120, within=30)
    assert await seen(engine, "slow") == list(range(60))
    others = [place for place in listener.begun if place[0] != "slow"]
    last_try = max(i for i, place in enumerate(listener.begun) if place == ("slow", 0))
    assert listener.begun.index(others[-1]) < last_try  # they did not wait for it
    assert watch.count(Step.RETRIED) == 20


async def test_dead_head_lets_its_followers_go_on(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    await send(js_client, [("k", 0)], reject=True)
    await send(js_client, [("k", 1), ("k", 2)])
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 3)
    assert await seen(engine, "k") == [1, 2]
    assert await count(engine, "dead_letter", "reason = 'rejected'") == 1
    assert await count(engine, "held") == 0


async def test_second_instance_stands_by_and_takes_over_in_order(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    nats_server: str,
    settings: Settings,
) -> None:
    watches = [Watch(), Watch()]
    async with JetStreamClient(nats_server) as other:
        first = Ordered(js_client, sessionmaker, settings=settings, observer=watches[0])
        second = Ordered(other, sessionmaker, settings=settings, observer=watches[1])
        await first.start()
        await send(js_client, [(f"k{n % 3}", n) for n in range(30)])
        await watches[0].until(Step.ACKED, 30)
        await second.start()
        await send(js_client, [(f"k{n % 3}", n) for n in range(30, 60)])
        await watches[0].until(Step.ACKED, 60)
        assert not second.begun
        first._gate = asyncio.Event()
        await send(js_client, [(f"k{n % 3}", n) for n in range(60, 120)], waits=True)
        await first.stop(grace=0)  # in the middle of it
        left = 120 - await count(engine, "inbox")
        assert left == 60
        await watches[1].until(Step.COMMITTED, left, within=30)
        await second.stop()
    for key in range(3):
        assert await seen(engine, f"k{key}") == list(range(key, 120, 3))


async def test_message_held_between_the_page_and_the_look_at_the_floor_is_not_passed_by(
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that comes late, after later ones: the page was read before it, the floor after."""
    page, early = Queue.page, 0

    async def without_the_first(*given: Any) -> list[Place]:
        nonlocal early
        found = await page(*given)
        early += bool(found)
        return found[1:] if early == 1 else found

    monkeypatch.setattr(Queue, "page", without_the_first)
    await send(js_client, [("a", 0), ("b", 1)])
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.COMMITTED, 2)  # not by the sweep, which comes much later
    assert early > 0


async def test_instance_that_lost_its_lease_commits_nothing(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    nats_server: str,
    settings: Settings,
) -> None:
    await send(js_client, [("k", 0)], waits=True)
    await send(js_client, [("k", 1)])
    gate = asyncio.Event()
    async with JetStreamClient(nats_server) as other:
        watch = Watch()
        first = Ordered(js_client, sessionmaker, settings=settings, observer=watch)
        first._gate = gate
        second = Ordered(other, sessionmaker, settings=settings, observer=watch)
        async with first:
            await watch.until(Step.RECORDED)
            async with engine.begin() as connection:  # as if it had slept through its lease
                sql = (
                    "UPDATE outbox.listener_lease SET owner = gen_random_uuid(), epoch = epoch + 1"
                )
                await connection.execute(text(f"{sql}, expires_at = '-infinity'"))
            gate.set()
            async with second:
                await watch.until(Step.COMMITTED, 2, within=20)
    assert watch.count(Step.COMMITTED) == 2
    assert await seen(engine, "k") == [0, 1]


async def test_what_a_dead_instance_had_in_hand_comes_before_what_is_newer(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    settings: Settings,
) -> None:
    await provisioning.ensure_consumer(
        js_client,
        stream=stream,
        durable="warehouse-ordered",
        filter_subject=SUBJECT,
        ack_wait=timedelta(seconds=1),
        max_ack_pending=2000,
    )
    await send(js_client, [("k", n) for n in range(5)])
    pulled = await js_client.js.pull_subscribe_bind("warehouse-ordered", stream)
    assert len(await pulled.fetch(5)) == 5  # and never acked: their owner is dead
    await send(js_client, [("k", n) for n in range(5, 10)])
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 10)
    assert await seen(engine, "k") == list(range(10))
    await pulled.unsubscribe()


async def test_key_stays_blocked_over_a_restart(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    await send(js_client, [("k", n) for n in range(4)])
    failures = {("k", 0): 3}
    watch = Watch()
    given: dict[str, Any] = {"settings": settings, "failures": failures}
    async with Ordered(js_client, sessionmaker, observer=watch, **given):
        await watch.until(Step.RETRIED, 2)
    watch = Watch()
    async with Ordered(js_client, sessionmaker, observer=watch, **given):
        await watch.until(Step.ACKED, 4)
    assert await seen(engine, "k") == [0, 1, 2, 3]


async def test_repeated_and_foreign_messages_take_effect_once_or_die(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    settings: Settings,
) -> None:
    await send(js_client, [("k", 0)])
    message = await js_client.js.get_msg(stream, 1)
    headers = dict(message.headers or {})
    headers["Nats-Msg-Id"] += "~r1"
    await js_client.js.publish(SUBJECT, message.data or b"", headers=headers)
    odd = {"Outbox-Key": "a\u00fcb" * 200}
    await js_client.js.publish(SUBJECT, b"not json", headers=odd)
    await send(js_client, [("k", 1)])
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 4)
    assert await seen(engine, "k") == [0, 1]
    assert watch.count(Step.DUPLICATE) == 1
    assert await count(engine, "dead_letter", "reason = 'malformed'") == 1


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_hundred_thousand_followers_hold_nobody_up(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    async with engine.begin() as connection:
        body = json.dumps(
            {
                "event_id": "ID",
                "event_type": SUBJECT,
                "source_service": "shop",
                "timestamp": "2026-11-25T07:00:00Z",
                "data": {"n": 1},
            }
        )
        sql = (
            "INSERT INTO outbox.held (listener, created, sequence, key, subject, headers, body,"
            " stored_at, epoch) SELECT 'warehouse-ordered', '2026', n, 'hot', :subject,"
            " CAST('Outbox-Key: hot' || chr(13) || chr(10) AS bytea),"
            " convert_to(replace(:body, 'ID', CAST(gen_random_uuid() AS text)), 'UTF8'), now(), 0"
            " FROM generate_series(1, 100000) AS n"
        )
        await connection.execute(text(sql), {"subject": SUBJECT, "body": body})
    watch = Watch()

    class Patient(Ordered):
        max_attempts = 10**6

    failures = {("hot", 1): 10**6}
    listener = Patient(
        js_client, sessionmaker, settings=settings, observer=watch, failures=failures
    )
    async with listener:
        await watch.until(Step.RETRIED, 1, within=30)
        await send(js_client, [(f"k{n % 5}", n) for n in range(200)])
        await watch.until(Step.ACKED, 200, within=60)
    assert len(await seen(engine)) == 200
    assert await count(engine, "held") == 100_000


def test_batch_cannot_be_ordered() -> None:
    with pytest.raises(TypeError, match="a batch cannot be ordered"):

        class Batch(BatchListener):
            subject = SUBJECT
            queue_group = "batch"
            service_name = "warehouse"
            ordered = True


async def test_broker_that_is_killed_and_comes_back_keeps_the_order(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    private_nats: EmbeddedNats,
) -> None:
    settings = Settings.defaults(lease=timedelta(seconds=1), publish_timeout=0.5)
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
        await send(client, [(f"k{n % 3}", n) for n in range(150)])
        watch = Watch()
        async with Ordered(client, sessionmaker, settings=settings, observer=watch):
            await watch.until(Step.COMMITTED, 5)
            private_nats.kill()
            private_nats.start()
            async with JetStreamClient(private_nats.url) as sender:
                await send(sender, [(f"k{n % 3}", n) for n in range(150, 210)])
            await watch.until(Step.COMMITTED, 210, within=40)
    for key in range(3):
        assert await seen(engine, f"k{key}") == list(range(key, 210, 3))


async def test_message_that_was_lost_on_its_way_is_found_when_it_comes_late(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("outbox.listener.ordering.SWEEP_SECONDS", 0.5)
    await send(js_client, [("k", 0), (None, 1), (None, 2), ("j", 3)])
    watch = Watch()
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 4)
        async with engine.begin() as connection:  # below what was worked already
            sql = (
                "INSERT INTO outbox.held (listener, created, sequence, key, subject, headers, body,"
                " stored_at, epoch) VALUES ('warehouse-ordered', '', 1, 'late', :subject,"
                " CAST('Outbox-Key: late' || chr(13) || chr(10) AS bytea), CAST(:body AS bytea),"
                " now(), 1)"
            )
            body = {
                "event_id": str(uuid4()),
                "event_type": SUBJECT,
                "source_service": "shop",
                "timestamp": "2026-11-25T07:00:00Z",
                "data": {"n": 9},
            }
            values = {"subject": SUBJECT, "body": json.dumps(body).encode()}
            await connection.execute(text(sql), values)
        await watch.until(Step.ACKED, 5)
    assert await seen(engine, "late") == [9]


async def test_a_restored_broker_that_gives_sequences_out_twice_hides_no_event(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    private_nats: EmbeddedNats,
    tmp_path: Path,
) -> None:
    """An event that waits in the queue has the sequence of a later one, which is not lost."""
    settings = Settings.defaults(lease=timedelta(seconds=1), publish_timeout=0.5)
    store, copy = private_nats.directory / "store", tmp_path / "copy"
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
    private_nats.stop()
    shutil.copytree(store, copy)
    private_nats.start()
    watch = Watch()
    async with JetStreamClient(private_nats.url) as client:
        listener = Ordered(
            client, sessionmaker, settings=settings, observer=watch, failures={("k", 1): 1000}
        )
        async with listener:
            await send(client, [("k", 1)])
            await watch.until(Step.RETRIED, 1)
    private_nats.kill()
    shutil.rmtree(store)
    shutil.copytree(copy, store)
    private_nats.start()
    async with JetStreamClient(private_nats.url) as client:
        await send(client, [("other", 2)])
        again = Ordered(client, sessionmaker, settings=settings, observer=watch)
        async with again:
            await watch.until_events(Step.COMMITTED, 2, within=15)
    assert sorted(await seen(engine)) == [1, 2]
    assert await count(engine, "held") == 0


async def test_what_a_consumer_that_was_made_again_repeats_is_acked_without_a_place(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    """The whole stream comes again; what the inbox knows does not go through the queue."""
    watch = Watch()
    await send(js_client, [(f"k{n % 5}", n) for n in range(50)])
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch) as listener:
        await watch.until_events(Step.COMMITTED, 50)
        received = watch.count(Step.HANDLED)
        await js_client.api(f"CONSUMER.DELETE.{settings.stream}.{listener.identity}")
        await watch.until_events(Step.DUPLICATE, 50, within=20)
        await send(js_client, [("k0", 50)])
        await watch.until_events(Step.COMMITTED, 51)
    assert watch.count(Step.HANDLED) == received + 1
    assert sorted(await seen(engine)) == list(range(51))
    assert await count(engine, "held") == 0


async def test_what_somebody_else_has_in_hand_is_not_overtaken(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
    nats_server: str,
) -> None:
    """An instance that is active no more may still be given what it had asked for."""
    watch = Watch()
    await send(js_client, [("k", 0)])
    async with (
        JetStreamClient(nats_server) as former,
        Ordered(js_client, sessionmaker, settings=settings, observer=watch) as listener,
    ):
        await watch.until_events(Step.COMMITTED, 1)
        inbox = former.client.new_inbox()
        taken = await former.client.subscribe(inbox)
        request = {"batch": 1, "expires": 30_000_000_000}
        asking = f"$JS.API.CONSUMER.MSG.NEXT.{settings.stream}.{listener.identity}"
        await former.client.publish(asking, json.dumps(request).encode(), reply=inbox)
        await former.client.flush()
        await send(js_client, [("k", n) for n in range(1, 6)])
        assert json.loads((await taken.next_msg(timeout=10)).data)["data"]["n"] < 5
        await watch.until_events(Step.COMMITTED, 6, within=20)
    assert await seen(engine, "k") == list(range(6))


async def test_handler_that_cancels_its_own_task_holds_its_key_up_for_a_moment_only(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    settings: Settings,
) -> None:
    """Nothing is raised to anybody, since a cancelled task has no error."""
    watch = Watch()
    await send(js_client, [("k", n) for n in range(3)], cancels=True)
    async with Ordered(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until_events(Step.COMMITTED, 3, within=20)
    assert await seen(engine, "k") == [0, 1, 2]
