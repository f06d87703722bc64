"""The listener when database, broker, user code or another instance misbehave."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, model_validator
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.ext.asyncio import AsyncSession as Session
from typing_extensions import override

from outbox.backoff import Backoff
from outbox.envelope import EventEnvelope, inbox_key
from outbox.jetstream.client import JetStreamClient
from outbox.listener import BatchListener, Listener
from outbox.postgres import inbox
from outbox.telemetry import Step
from tests.faults import Watch
from tests.integration.test_listener import (
    SUBJECT,
    Effect,
    Sessions,
    effects,
    envelope,
    publish,
    rows,
)
from tests.integration.test_listener import _effect_table as _effect_table  # noqa: PLC0414

Behave = Callable[[Session, EventEnvelope], Awaitable[None]]
QUICK = Backoff(first=timedelta(milliseconds=10), longest=timedelta(milliseconds=20))
MARK = "INSERT INTO outbox.attempt (listener, event_id, started, failed) VALUES (:l, :e, :s, :f)"


def effect(client: JetStreamClient, sessions: Sessions, watch: Watch, behave: Behave) -> Effect:
    listener = Effect(client, sessions, observer=watch)
    listener._behave = behave
    return listener


async def mark(
    engine: AsyncEngine, listener: str, event_id: str, started: int, failed: int
) -> None:
    async with engine.begin() as connection:
        values = {"l": listener, "e": inbox_key(event_id), "s": started, "f": failed}
        await connection.execute(text(MARK), values)


async def nothing(session: Session, event: EventEnvelope) -> None:
    """Handle in peace."""


async def test_an_on_error_that_fails_is_a_retry_and_ends_nothing(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """User code that raises twice must not take the listener with it."""

    class Broken(Effect):
        queue_group = "broken"

        @override
        async def on_message(self, session: Session, event: EventEnvelope) -> None:
            if event.data.get("bad"):
                raise ValueError("first")
            await super().on_message(session, event)

        @override
        async def on_error(self, error: Exception, event: EventEnvelope) -> Any:
            if event.data["bad"] == 1:
                raise KeyError("second")
            return "nonsense"

    watch, good = Watch(), envelope()
    async with Broken(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope(data={"bad": 1}))
        await publish(js_client, envelope(data={"bad": 2}))
        await publish(js_client, good)
        await watch.until(Step.ACKED, 3)
    assert await effects(engine) == [good["event_id"]]
    found = await rows(engine, "SELECT reason, attempts FROM outbox.dead_letter")
    assert found == [("attempts", 3)] * 2


class Careless(BaseModel):
    number: int

    @model_validator(mode="before")
    @classmethod
    def _look(cls, value: Any) -> Any:
        return {"number": value["nummer"]}  # KeyError, which pydantic passes on


async def test_a_validator_that_raises_anything_is_an_invalid_payload(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Pydantic turns only ValueError and AssertionError into ValidationError."""

    class Typed(Listener[Careless]):
        subject = SUBJECT
        queue_group = "careless"
        service_name = "mail"

        @override
        async def on_message(self, session: Session, event: EventEnvelope[Careless]) -> None:
            del session, event

    watch = Watch()
    async with Typed(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await publish(js_client, envelope(data={"nummer": 1}))
        await watch.until(Step.ACKED, 2)
    assert await rows(engine, "SELECT reason FROM outbox.dead_letter") == [("invalid_payload",)]
    assert len(watch.of(Step.COMMITTED)) == 1


async def test_contention_is_repeated_at_once_and_spends_nothing(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """40001, 40P01 and 55P03 are nobody's failure, five times."""
    left = ["40001", "40P01", "55P03", "40001", "40P01"]

    async def behave(session: Session, event: EventEnvelope) -> None:
        if left:
            raising = f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{left.pop()}'; END $$"
            await session.execute(text(raising))

    watch = Watch()
    async with effect(js_client, sessionmaker, watch, behave):
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert len(watch.of(Step.RECEIVED)) == 1
    assert len(watch.of(Step.RECORDED)) == 6
    assert len(await effects(engine)) == 1
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_a_lost_connection_counts_as_a_failure_while_others_are_served(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Else a handler that loses its connection each time would be repeated without end."""
    killed: list[int] = []

    async def behave(session: Session, event: EventEnvelope) -> None:
        if len(killed) < 2:  # less often than max_attempts
            killed.append(1)
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    watch = Watch()
    async with effect(js_client, sessionmaker, watch, behave):
        await publish(js_client, envelope())
        await watch.until(Step.ACKED, within=20)
    assert len(await effects(engine)) == 1
    assert len(watch.of(Step.RETRIED)) == 2
    assert await rows(engine, "SELECT count(*) FROM outbox.dead_letter") == [(0,)]
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_another_instance_that_keeps_an_event_open_is_waited_for(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """The inbox INSERT gives up after a moment; the handler finds its own lock_timeout."""
    event, timeouts = envelope(), []

    async def behave(session: Session, event: EventEnvelope) -> None:
        timeouts.append((await session.execute(text("SHOW lock_timeout"))).scalar_one())

    async with sessionmaker() as other:
        key = inbox_key(event["event_id"])
        assert await inbox.record(other, "outbox", listener="mail-effects", event_id=key)
        async with sessionmaker() as second, asyncio.timeout(5):
            with pytest.raises(Exception, match="lock timeout"):
                await inbox.record(second, "outbox", listener="mail-effects", event_id=key)
        watch = Watch()
        async with effect(js_client, sessionmaker, watch, behave):
            await publish(js_client, event)
            await watch.until(Step.RECEIVED)
            await other.rollback()
            await watch.until(Step.ACKED, within=20)
    assert await effects(engine) == [event["event_id"]]
    assert timeouts == ["0"]


async def test_asynchronous_commit_is_raised_for_the_handlers_transaction(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """The ack that follows is final, so the commit must be on disk."""
    async with engine.begin() as connection:
        await connection.execute(text("ALTER ROLE CURRENT_USER SET synchronous_commit = off"))
    await engine.dispose()
    seen: list[str] = []

    async def behave(session: Session, event: EventEnvelope) -> None:
        seen.append((await session.execute(text("SHOW synchronous_commit"))).scalar_one())

    watch = Watch()
    try:
        async with effect(js_client, sessionmaker, watch, behave):
            await publish(js_client, envelope())
            await watch.until(Step.ACKED)
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("ALTER ROLE CURRENT_USER RESET synchronous_commit"))
    assert seen == ["on"]


async def test_a_serializable_engine_still_sees_duplicates(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """The attempt runs in READ COMMITTED whatever the engine's default is."""
    serializable = async_sessionmaker(engine.execution_options(isolation_level="SERIALIZABLE"))
    levels: list[str] = []

    async def behave(session: Session, event: EventEnvelope) -> None:
        levels.append((await session.execute(text("SHOW transaction_isolation"))).scalar_one())

    watch, event = Watch(), envelope()
    async with effect(js_client, serializable, watch, behave):
        await publish(js_client, event)
        await publish(js_client, event)
        await watch.until(Step.ACKED, 2)
    assert levels == ["read committed"]
    assert await effects(engine) == [event["event_id"]]


async def test_a_redelivered_event_runs_alone_while_a_start_has_no_end(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """It may have killed its process: nothing else may die with it, or be counted for it."""
    suspect, running, together = envelope(), set[str](), []

    async def behave(session: Session, event: EventEnvelope) -> None:
        if event.event_id == suspect["event_id"] and not event.delivery.redelivered:
            raise ValueError("come again")
        running.add(event.event_id)
        await session.execute(text("SELECT pg_sleep(0.05)"))
        if event.event_id == suspect["event_id"]:
            together.append(len(running))
        running.discard(event.event_id)

    await mark(engine, "mail-effects", suspect["event_id"], 1, 0)
    watch = Watch()
    async with effect(js_client, sessionmaker, watch, behave):
        await publish(js_client, suspect)
        for _ in range(30):
            await publish(js_client, envelope())
        await watch.until(Step.ACKED, 31)
    assert together == [1]
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_unfinished_starts_are_spent_attempts(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Two deaths and one failure make three of three: the handler is not called again."""
    event, calls = envelope(), []

    async def behave(session: Session, event: EventEnvelope) -> None:
        calls.append(1)
        raise ValueError("no")

    await mark(engine, "mail-effects", event["event_id"], 2, 0)
    watch = Watch()
    async with effect(js_client, sessionmaker, watch, behave):
        await publish(js_client, event)
        await watch.until(Step.ACKED)
    assert calls == [1]
    assert await rows(engine, "SELECT reason, attempts FROM outbox.dead_letter") == [
        ("attempts", 3)
    ]


async def test_a_stale_start_mark_goes_with_its_duplicate(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """A copy that another instance finished first leaves no row behind for ever."""
    event, first = envelope(), asyncio.Event()
    handed = asyncio.Event()

    async def slow(session: Session, event: EventEnvelope) -> None:
        first.set()
        await handed.wait()

    class Impatient(Effect):
        ack_wait = timedelta(seconds=0.5)
        timeout = timedelta(seconds=20)

    one, two = Watch(), Watch()
    holder = Impatient(js_client, sessionmaker, observer=one)
    holder._behave = slow
    async with holder:
        await publish(js_client, event)
        await first.wait()
        for message in holder._in_hand.values():
            holder._beats_end[id(message)] = 0.0  # the heartbeats end, so it comes again
        async with Impatient(js_client, sessionmaker, observer=two):
            await asyncio.wait(
                {asyncio.create_task(w.until(Step.RECEIVED, n)) for w, n in ((one, 2), (two, 1))},
                return_when=asyncio.FIRST_COMPLETED,
            )
            handed.set()
            await one.until(Step.COMMITTED)
            await asyncio.wait(
                {asyncio.create_task(w.until(Step.DUPLICATE)) for w in (one, two)},
                return_when=asyncio.FIRST_COMPLETED,
            )
    assert await effects(engine) == [event["event_id"]]
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_the_heartbeats_end_with_the_handlers_time(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """A handler that cannot be cancelled does not keep its message for ever."""
    calls: list[int] = []
    release = asyncio.Event()

    class Deaf(Effect):
        queue_group = "deaf"
        timeout = timedelta(seconds=0.4)
        ack_wait = timedelta(seconds=0.6)

    async def behave(session: Session, event: EventEnvelope) -> None:
        calls.append(1)
        while len(calls) == 1 and not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    watch = Watch()
    listener = Deaf(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.RECEIVED, 2)
        release.set()
        await watch.until(Step.ACKED)
    assert len(await effects(engine)) == 1


async def test_concurrency_is_limited_to_the_pool(
    js_client: JetStreamClient,
    stream: str,
    database_url: str,
    engine: AsyncEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More handlers than connections would wait for the pool and fail; it says so once."""
    small = create_async_engine(database_url, pool_size=2, max_overflow=0, pool_timeout=0.2)
    running, most = 0, 0

    async def behave(session: Session, event: EventEnvelope) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await session.execute(text("SELECT pg_sleep(0.02)"))
        running -= 1

    watch = Watch()
    with caplog.at_level(logging.WARNING, "outbox"):
        async with effect(js_client, async_sessionmaker(small), watch, behave):
            for _ in range(20):
                await publish(js_client, envelope())
            await watch.until(Step.ACKED, 20)
    await small.dispose()
    assert most == 2
    assert [r.message for r in caplog.records if "pool" in r.message] == [
        "concurrency is limited by the connection pool"
    ]


async def test_a_failed_dead_letter_event_adds_no_other(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """`dlq.dlq.…` does not exist."""

    class Undertaking(Effect):
        subject = "dlq.order.created.v1"
        queue_group = "undertaking"
        max_attempts = 1

        @override
        async def on_message(self, session: Session, event: EventEnvelope) -> None:
            raise ValueError("no")

    watch = Watch()
    async with Undertaking(js_client, sessionmaker, observer=watch):
        body = json.dumps(envelope(event_type="dlq.order.created.v1")).encode()
        await js_client.js.publish("dlq.order.created.v1", body)
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT count(*) FROM outbox.dead_letter") == [(1,)]
    assert await rows(engine, "SELECT count(*) FROM outbox.pending") == [(0,)]


@pytest.fixture
async def stream_without_dlq(js_client: JetStreamClient, stream: str) -> str:
    await js_client.api(f"STREAM.DELETE.{stream}")
    await js_client.ensure_stream(stream, ["evt.>"])
    return stream


async def test_without_a_stream_for_it_no_dlq_event_waits_for_ever(
    js_client: JetStreamClient, stream_without_dlq: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Older streams take no `dlq.>`: the row is all there is."""
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, b"rubbish")
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT count(*) FROM outbox.dead_letter") == [(1,)]
    assert await rows(engine, "SELECT count(*) FROM outbox.pending") == [(0,)]


async def test_a_large_original_is_cut_in_the_event_and_kept_in_the_row(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """The `dlq.` event must itself be publishable."""
    body = b"x" * 900_000
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, body)
        await watch.until(Step.ACKED)
    found = await rows(engine, "SELECT octet_length(body) FROM outbox.dead_letter")
    assert found == [(900_000,)]
    (event,) = await rows(engine, "SELECT body, headers FROM outbox.pending")
    data = json.loads(event[0])["data"]
    assert len(event[0]) < 100_000
    assert (data["original_bytes"], data["original_subject"]) == (900_000, SUBJECT)
    assert b"Outbox-Original-Subject: " + SUBJECT.encode() in event[1]


async def test_a_strange_subject_is_kept_without_a_dlq_event(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """NATS takes nearly any bytes as a subject; what we publish is plain."""

    class Everything(Effect):
        subject = "evt.>"
        queue_group = "everything"

    watch = Watch()
    async with Everything(js_client, sessionmaker, observer=watch):
        await js_client.js.publish('evt.a"b\\.v1', b"rubbish")
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT count(*) FROM outbox.dead_letter") == [(1,)]
    assert await rows(engine, "SELECT count(*) FROM outbox.pending") == [(0,)]


class Batched(BatchListener):
    subject = SUBJECT
    queue_group = "batched"
    service_name = "mail"
    max_attempts = 3
    _backoff: ClassVar[Backoff] = QUICK
    _batches: ClassVar[list[list[str]]] = []

    @override
    async def on_batch(self, session: Session, events: Any) -> None:
        self._batches.append([event.event_id for event in events])


async def test_an_event_that_was_tried_never_enters_a_batch(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Not even as a first delivery, which it is again when the consumer was made anew."""
    Batched._batches.clear()
    tried = envelope()
    await mark(engine, "mail-batched", tried["event_id"], 0, 1)
    for body in (*(envelope() for _ in range(10)), tried, *(envelope() for _ in range(10))):
        await publish(js_client, body)
    watch = Watch()
    async with Batched(js_client, sessionmaker, observer=watch):
        await watch.until(Step.ACKED, 21)
    assert [tried["event_id"]] in Batched._batches
    assert sum(len(batch) for batch in Batched._batches) == 21
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_pruning_takes_stale_attempts_along(engine: AsyncEngine) -> None:
    """Nothing unbounded grows; young rows stay."""
    event = envelope()["event_id"]
    await mark(engine, "gone", event, 1, 1)
    async with engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO outbox.inbox (listener, event_id) VALUES ('gone', :e)"),
            {"e": inbox_key(event)},
        )
    async with engine.begin() as connection:
        day = timedelta(days=1)
        assert await inbox.prune(connection, "outbox", older_than=day, limit=10) == 0
    async with engine.begin() as connection:
        zero = timedelta(0)
        assert await inbox.prune(connection, "outbox", older_than=zero, limit=10) == 1
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]
