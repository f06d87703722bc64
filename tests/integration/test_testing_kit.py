"""The users' test kit shows what is there, and makes the faults that it names."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from typing_extensions import override

from outbox import (
    BatchListener,
    Disposition,
    EventEnvelope,
    InvalidEvent,
    InvalidSession,
    JetStreamClient,
    Listener,
    Outbox,
    Reject,
    Relay,
    Retry,
    Settings,
)
from outbox.telemetry import Step
from outbox.testing import (
    InjectedFault,
    Result,
    added,
    deliver,
    fail_at,
    pending,
    published,
    redeliver,
)
from tests.faults import Watch

SUBJECT = "evt.kit.done.v1"
events = Outbox("kit")


def numbers(found: Sequence[EventEnvelope[Any]]) -> list[int]:
    return [event.data["n"] for event in found]


class Count(Listener):
    subject = "evt.kit.*.v1"
    queue_group = "count"
    service_name = "kit"
    max_attempts = 3

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("INSERT INTO seen VALUES (:n)"), {"n": event.data["n"]})
        match event.data.get("then"):
            case "retry":
                raise Retry("busy", after=timedelta(seconds=7))
            case "reject":
                raise Reject("unknown")
            case "fail" | "discard":
                raise ValueError("odd")
            case _:
                events.add(session, "evt.counted.v1", {"n": event.data["n"]})

    @override
    async def on_error(self, error: Exception, event: EventEnvelope) -> Disposition | None:
        return Disposition.DISCARD if event.data.get("then") == "discard" else None


@pytest.fixture
def listener(sessionmaker: async_sessionmaker[AsyncSession]) -> Count:
    return Count(JetStreamClient(), sessionmaker)


@pytest.fixture(autouse=True)
async def _table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE seen (n int)"))


async def seen(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list(await connection.scalars(text("SELECT n FROM seen ORDER BY n")))


# ---- added and pending -----------------------------------------------------------------------


async def test_added_shows_what_is_buffered_and_what_was_flushed_in_order(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        assert added(session) == []
        events.add(session, SUBJECT, {"n": 1}, key="k", headers={"X-A": "b"})
        await events.flush(session)
        events.add(session, SUBJECT, {"n": 2})
        assert numbers(added(session)) == [1, 2]
        (first, _) = added(session)
        assert (first.key, first.headers["X-A"], first.source_service) == ("k", "b", "kit")
        assert first.delivery.attempt == 0
        assert await pending(engine) == []
        assert numbers(await pending(session)) == [1]
        await session.commit()
        assert added(session) == []
    assert numbers(await pending(engine)) == [1, 2]
    assert await pending(engine, "evt.other.v1") == []


async def test_added_follows_savepoints_also_after_a_flush(
    sessionmaker: async_sessionmaker[AsyncSession],
) -> None:
    async with sessionmaker() as session:
        events.add(session, SUBJECT, {"n": 1})
        async with session.begin_nested():
            events.add(session, SUBJECT, {"n": 2})
            await events.flush(session)
        lost = await session.begin_nested()
        events.add(session, SUBJECT, {"n": 3})
        await events.flush(session)
        events.add(session, SUBJECT, {"n": 4})
        assert numbers(added(session)) == [1, 2, 3, 4]
        await lost.rollback()
        assert numbers(added(session)) == [1, 2]
        await session.rollback()
        assert added(session) == []


async def test_added_works_inside_a_tests_own_transaction(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(
            connection, join_transaction_mode="create_savepoint", expire_on_commit=False
        ) as session:
            events.add(session, SUBJECT, {"n": 1})
            await session.commit()
            assert numbers(added(session)) == [1]
            events.add(session, SUBJECT, {"n": 2})
            await session.rollback()
            events.add(session, SUBJECT, {"n": 3})
            assert numbers(added(session)) == [1, 3]
            assert numbers(added(connection)) == [1]
        await outer.rollback()
        assert added(connection) == []
    assert await pending(engine) == []


async def test_added_takes_connections_and_sync_sessions(
    engine: AsyncEngine, database_url: str
) -> None:
    async with engine.connect() as connection:
        events.add(connection, SUBJECT, {"n": 1})
        assert numbers(added(connection)) == [1]
    sync = create_engine(database_url.replace("+asyncpg", "+psycopg"))
    with Session(sync) as session:
        events.add(session, SUBJECT, {"n": 2})
        assert numbers(added(session)) == [2]
        assert numbers(added(session.connection())) == []
    with sync.connect() as plain:
        events.add(plain, SUBJECT, {"n": 3})
        assert numbers(added(plain)) == [3]
    sync.dispose()
    with pytest.raises(InvalidSession):
        added(engine)  # type: ignore[arg-type]


# ---- deliver ---------------------------------------------------------------------------------


async def test_delivery_commits_effect_inbox_row_and_events_once(
    listener: Count, engine: AsyncEngine
) -> None:
    outcome = await deliver(listener, SUBJECT, {"n": 1}, times=2)
    assert outcome.results == (Result.HANDLED, Result.DUPLICATE)
    assert (outcome.handled, outcome.error, outcome.reason) == (1, None, None)
    assert await seen(engine) == [1]
    (event,) = await pending(engine)
    assert event.metadata == {"causation_id": outcome.event_id}
    again = await deliver(listener, SUBJECT, {"n": 1}, event_id=outcome.event_id)
    assert again.result is Result.DUPLICATE


@pytest.mark.parametrize(
    ("then", "results", "reason"),
    [
        ("retry", [Result.RETRIED], None),
        ("fail", [Result.RETRIED, Result.RETRIED, Result.DEAD_LETTER], "attempts"),
        ("reject", [Result.DEAD_LETTER], "rejected"),
        ("discard", [Result.DISCARDED], "discarded"),
    ],
)
async def test_what_the_handler_raises_decides_as_on_a_broker(
    listener: Count,
    engine: AsyncEngine,
    then: str,
    results: list[Result],
    reason: str | None,
) -> None:
    outcome = await deliver(listener, SUBJECT, {"n": 1, "then": then}, times=len(results))
    assert list(outcome.results) == results
    assert outcome.reason == reason
    assert outcome.error is not None
    assert outcome.handled == 0
    assert outcome.retry_after == (timedelta(seconds=7) if then == "retry" else None)
    assert await seen(engine) == []


async def test_bytes_are_delivered_as_a_strangers_message(listener: Count) -> None:
    outcome = await deliver(listener, SUBJECT, b"not json")
    assert (outcome.result, outcome.reason) == (Result.DEAD_LETTER, "malformed")


async def test_what_add_refuses_is_refused(listener: Count) -> None:
    with pytest.raises(InvalidEvent):
        await deliver(listener, "dlq.kit.v1", {"n": 1})


async def test_batch_listener_gets_a_batch_of_one(
    sessionmaker: async_sessionmaker[AsyncSession],
) -> None:
    sizes: list[int] = []

    class Batch(BatchListener):
        subject = SUBJECT
        queue_group = "batch"
        service_name = "kit"

        @override
        async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope]) -> None:
            sizes.append(len(events))

    outcome = await deliver(Batch(JetStreamClient(), sessionmaker), SUBJECT, {"n": 1}, times=2)
    assert outcome.results == (Result.HANDLED, Result.DUPLICATE)
    assert sizes == [1]


async def test_lost_database_is_an_outage_and_no_failure(
    listener: Count, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("ALTER SCHEMA outbox RENAME TO elsewhere"))
    outcome = await deliver(listener, SUBJECT, {"n": 1})
    assert outcome.result is not Result.HANDLED
    async with engine.begin() as connection:
        await connection.execute(text("ALTER SCHEMA elsewhere RENAME TO outbox"))
    assert (await deliver(listener, SUBJECT, {"n": 1})).result is Result.HANDLED


# ---- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["recorded", "handled", "flushed", "committed"])
async def test_listener_that_fails_at_a_step_has_one_effect(
    listener: Count, engine: AsyncEngine, step: str
) -> None:
    with fail_at(listener, step, times=2):
        outcome = await deliver(listener, SUBJECT, {"n": 1}, times=3)
    assert outcome.handled == 1
    assert await seen(engine) == [1]


async def test_step_that_is_never_taken_fails_the_test(listener: Count) -> None:
    with (
        pytest.raises(AssertionError, match="never took the step acked"),
        fail_at(listener, "acked"),
    ):
        pass
    with pytest.raises(ValueError, match="nonsense"), fail_at(listener, "nonsense"):
        pass


@pytest.mark.parametrize("step", ["read", "sent", "confirmed", "settling", "settled"])
async def test_relay_that_fails_at_a_step_publishes_once(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    step: str,
) -> None:
    async with sessionmaker.begin() as session:
        event_id = events.add(session, SUBJECT, {"n": 1})
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    relay = Relay(engine, js_client, settings=settings, observer=watch)
    with fail_at(relay, step), pytest.raises(InjectedFault, match=step):
        await relay.run()
    async with relay:
        assert (await published(js_client, SUBJECT)).event_id == event_id
        if step != "settled":
            await watch.until_events(Step.SETTLED, 1)
    assert await pending(engine) == []
    state = (await js_client.get_stream_info(stream))["state"]
    assert state["messages"] == 1


# ---- streams ---------------------------------------------------------------------------------


async def test_redelivered_event_is_seen_again_and_absorbed(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> None:
    async with sessionmaker.begin() as session:
        first = events.add(session, SUBJECT, {"n": 1}, key="k")
        events.add(session, SUBJECT, {"n": 2})
    settings, watch = Settings.defaults(stream=stream), Watch()
    async with (
        Relay(engine, js_client, settings=settings),
        Count(js_client, sessionmaker, settings=settings, observer=watch),
    ):
        await watch.until(Step.COMMITTED, 2)
        newest = await published(js_client, SUBJECT, within=timedelta(seconds=5))
        assert newest.data["n"] == 2
        await redeliver(js_client, SUBJECT, event_id=first)
        await redeliver(js_client, SUBJECT)
        await watch.until(Step.DUPLICATE, 2)
        assert (await published(js_client, SUBJECT, event_id=first)).key == "k"
    assert await seen(engine) == [1, 2]


async def test_what_is_not_published_is_named(js_client: JetStreamClient, stream: str) -> None:
    with pytest.raises(TimeoutError, match=r"no event on evt\.kit\.done\.v1 within 0\.2 s"):
        await published(js_client, SUBJECT, within=0.2)
    with pytest.raises(LookupError, match=r"no stream takes other\.v1"):
        await published(js_client, "other.v1")
    assert stream
