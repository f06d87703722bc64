"""One subject, one key or one event that fails holds nothing else up, and a stuck broker shows."""

import asyncio
import os
import signal
from datetime import timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Relay, Settings, upgrade
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.operate.status import status
from outbox.telemetry import Step
from outbox.testing import Result, deliver
from tests.faults import Watch
from tests.servers.events import count, insert, published
from tests.servers.streams import change

FULL, FREE = "evt.full.v1", "evt.free.v1"


async def test_subject_at_its_own_limit_waits_alone_and_goes_on_when_there_is_room(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await change(js_client, stream, max_msgs_per_subject=3, discard_new_per_subject=True)
    full = await insert(engine, ["k"] * 6 + [None] * 2, subject=FULL)
    free = [
        each
        for number in range(3)
        for each in await insert(engine, 1, subject=f"evt.free.n{number}.v1")
    ]
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    async with Relay(engine, js_client, settings=settings, observer=watch):
        await watch.until_events(Step.SETTLED, 6)
        assert set(free) < set(await published(js_client, stream))
        assert not watch.of(Step.OUTAGE_BEGAN)
        assert await count(engine, "dead_letter") == 0
        await change(js_client, stream, max_msgs_per_subject=100)
        await watch.until_events(Step.SETTLED, 11, within=20)
    sent = [each for each in await published(js_client, stream) if each in full[:6]]
    assert sent == full[:6]
    assert await count(engine, "waiting") == 0


async def test_full_stream_that_also_limits_subjects_is_an_outage(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    await change(
        js_client, stream, max_msgs=4, max_msgs_per_subject=100, discard_new_per_subject=True
    )
    await insert(engine, 10, subject=FREE)
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    async with Relay(engine, js_client, settings=settings, observer=watch):
        await watch.until(Step.OUTAGE_BEGAN)
        await watch.until_events(Step.SETTLED, 4)
        assert await count(engine, "waiting") == 0
        await change(js_client, stream, max_msgs=100)
        await watch.until_events(Step.SETTLED, 10, within=20)
    assert await count(engine, "dead_letter") == 0


async def test_broker_that_hangs_shows_in_health_and_status_within_15_seconds(
    engine: AsyncEngine, private_nats: EmbeddedNats
) -> None:
    settings = Settings.defaults(lease=timedelta(seconds=3), publish_timeout=timedelta(seconds=1))
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
        watch = Watch()
        async with Relay(engine, client, settings=settings, observer=watch) as relay:
            await insert(engine, 1)
            await watch.until_events(Step.SETTLED, 1)
            assert relay.health().ok
            assert private_nats.pid is not None
            os.kill(private_nats.pid, signal.SIGSTOP)
            try:
                await insert(engine, 1)
                deadline = asyncio.get_running_loop().time() + 15
                lane: dict[str, Any] = {}
                while not (relay.health().problem or "").startswith("no ack for"):
                    (lane,) = (await status(engine))["lanes"]  # asked again and again, as people do
                    assert asyncio.get_running_loop().time() < deadline, (lane, relay.health())
                assert lane["alive"]
                assert lane["no_ack_seconds"] > 5
                assert lane["hindrance"]
            finally:
                os.kill(private_nats.pid, signal.SIGCONT)
            await watch.until_events(Step.SETTLED, 2, within=30)
            assert relay.health().ok


class Idle(Listener):
    """Its handler idles in the transaction until the database ends the connection."""

    subject = FREE
    queue_group = "idle"
    service_name = "test"
    max_attempts = 3

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        async with self.sessionmaker() as other:
            gone = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
            while await other.scalar(gone, {"pid": pid}):
                await other.rollback()  # of what it has seen: statistics are of one moment
        await session.execute(text("SELECT 1"))


async def test_handler_that_loses_its_connection_each_time_is_given_up(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    listener = Idle(JetStreamClient(), sessionmaker)
    outcome = await deliver(listener, FREE, {"n": 1}, times=3)
    assert outcome.results == (Result.RETRIED, Result.RETRIED, Result.DEAD_LETTER)
    assert outcome.reason == "attempts"
    assert isinstance(outcome.error, DBAPIError)
    assert await count(engine, "dead_letter") == 1


async def test_connection_that_is_lost_in_an_outage_spends_nothing(
    private_postgres: EmbeddedPostgres,
) -> None:
    engine = create_async_engine(private_postgres.url)
    await upgrade(engine)

    class Unlucky(Idle):
        queue_group = "unlucky"

        @override
        async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
            await asyncio.to_thread(private_postgres.kill)
            await session.execute(text("SELECT 1"))

    outcome = await deliver(Unlucky(JetStreamClient(), async_sessionmaker(engine)), FREE, {"n": 1})
    assert outcome.result is Result.OUTAGE
    await asyncio.to_thread(private_postgres.start)
    assert await count(engine, "attempt") == 0
    await engine.dispose()
