"""The listener on real servers: one effect per event, and nothing lost in silence."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox.backoff import Backoff
from outbox.envelope import EventEnvelope
from outbox.errors import ConfigurationError, Reject, Retry
from outbox.jetstream.client import JetStreamClient
from outbox.listener import BatchListener, Disposition, Listener
from outbox.settings import Settings
from outbox.telemetry import Step
from outbox.writer import Outbox
from tests.faults import Watch

Sessions = async_sessionmaker[AsyncSession]
SUBJECT = "evt.order.created.v1"
QUICK = Backoff(first=timedelta(milliseconds=10), longest=timedelta(milliseconds=20))


def envelope(event_id: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": event_id or str(uuid4()),
        "event_type": SUBJECT,
        "correlation_id": "c-1",
        "source_service": "shop",
        "timestamp": "2026-01-02T03:04:05Z",
        "data": {"number": 7},
        "metadata": {},
    } | changes


async def publish(client: JetStreamClient, body: dict[str, Any] | bytes, **headers: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    await client.js.publish(SUBJECT, raw, headers=headers or None)


class Effect(Listener):
    subject = SUBJECT
    queue_group = "effects"
    service_name = "mail"
    max_attempts = 3
    ack_wait = timedelta(seconds=2)
    _backoff = QUICK
    _behave: Callable[[AsyncSession, EventEnvelope], Awaitable[None]] | None = None

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:id)"), {"id": event.event_id})
        if self._behave is not None:
            await self._behave(session, event)


@pytest.fixture(autouse=True)
async def _effect_table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (event_id text)"))


async def rows(engine: AsyncEngine, sql: str) -> list[Any]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(sql))]


async def effects(engine: AsyncEngine) -> list[str]:
    return [row[0] for row in await rows(engine, "SELECT event_id FROM effect")]


async def test_an_event_takes_effect_once_and_duplicates_are_acked(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Three copies of one event, under three message ids, have one effect."""
    watch = Watch()
    first = envelope()
    async with Effect(js_client, sessionmaker, observer=watch):
        for suffix in ("", "~r1", "~r2"):
            await publish(js_client, first, **{"Nats-Msg-Id": first["event_id"] + suffix})
        await watch.until(Step.ACKED, 3)
    assert await effects(engine) == [first["event_id"]]
    assert len(watch.of(Step.DUPLICATE)) == 2
    assert len(watch.of(Step.COMMITTED)) == 1


async def test_the_first_delivery_writes_no_attempt_row(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """What goes well at once costs one inbox row and nothing else."""
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]
    assert await rows(engine, "SELECT listener, outcome FROM outbox.inbox") == [
        ("mail-effects", "handled")
    ]


async def test_a_failing_handler_is_retried_and_its_attempts_are_forgotten(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Two failures leave no effect, the third run does, and the attempt row is gone."""
    calls: list[int] = []

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        calls.append(event.delivery.attempt)
        if len(calls) == 1:
            raise ValueError("no")
        if len(calls) == 2:
            raise Retry("later", after=0.01)

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert calls == [1, 2, 3]
    assert len(await effects(engine)) == 1
    assert await rows(engine, "SELECT count(*) FROM outbox.attempt") == [(0,)]


async def test_exhausted_attempts_leave_a_dead_letter_and_a_dlq_event(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Giving up is one transaction: inbox row, dead letter, `dlq.` event in the outbox."""

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        raise ValueError("never \x00 works")

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    event = envelope()
    async with listener:
        await publish(js_client, event)
        await watch.until(Step.ACKED)
    assert await effects(engine) == []
    found = await rows(
        engine,
        "SELECT side, listener, event_id::text, reason, attempts, state, body, error"
        " FROM outbox.dead_letter",
    )
    assert found[0][:6] == ("listener", "mail-effects", event["event_id"], "attempts", 3, "open")
    assert json.loads(found[0][6]) == event
    assert found[0][7] == "ValueError: never \\x00 works"
    assert await rows(engine, "SELECT outcome FROM outbox.inbox") == [("dead",)]
    pending = await rows(engine, "SELECT subject, key, body FROM outbox.pending")
    assert pending[0][:2] == ("dlq.order.created.v1", None)
    assert json.loads(pending[0][2])["data"]["original_event_id"] == event["event_id"]


@pytest.mark.parametrize(
    ("decision", "state", "outcome"),
    [
        (Disposition.DISCARD, "discarded", "discarded"),
        (True, "discarded", "discarded"),
        (Disposition.DEAD_LETTER, "open", "dead"),
    ],
)
async def test_on_error_decides_early(
    js_client: JetStreamClient,
    stream: str,
    engine: AsyncEngine,
    sessionmaker: Sessions,
    decision: Disposition | bool,
    state: str,
    outcome: str,
) -> None:
    """A discard leaves a row too."""

    class Decided(Effect):
        queue_group = "decided"

        @override
        async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
            raise ValueError("no")

        @override
        async def on_error(self, error: Exception, event: EventEnvelope) -> Disposition | bool:
            return decision

    watch = Watch()
    async with Decided(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT state FROM outbox.dead_letter") == [(state,)]
    assert await rows(engine, "SELECT outcome FROM outbox.inbox") == [(outcome,)]


async def test_reject_is_a_dead_letter_at_once(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """`Reject` spends one attempt and leaves no effect."""

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        raise Reject("merchant is unknown")

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await effects(engine) == []
    assert await rows(engine, "SELECT reason, attempts FROM outbox.dead_letter") == [
        ("rejected", 1)
    ]


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"not json", {}, "malformed"),
        (b"", {}, "malformed"),
        (b'{"a": NaN}', {}, "malformed"),
        (b'{"a":1,"a":2}', {}, "malformed"),
        (b"[" * 100_000, {}, "malformed"),
        (b'\xff\xfe{"event_id":"\xff"}', {}, "malformed"),
        (json.dumps({"event_id": "x"}).encode(), {}, "missing_field"),
        (json.dumps(envelope(event_type="evt.other.v1")).encode(), {}, "wrong_event_type"),
        (json.dumps(envelope()).encode(), {"Nats-Msg-Id": "another"}, "identity_mismatch"),
        (json.dumps(envelope()).encode(), {"Content-Encoding": "gzip"}, "unsupported_encoding"),
    ],
)
async def test_what_is_no_event_is_kept_with_its_bytes(
    js_client: JetStreamClient,
    stream: str,
    engine: AsyncEngine,
    sessionmaker: Sessions,
    body: bytes,
    headers: dict[str, str],
    reason: str,
) -> None:
    """Rubbish is a dead letter after one attempt, and the listener goes on."""
    watch = Watch()
    good = envelope()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, body, **headers)
        await publish(js_client, good)
        await watch.until(Step.ACKED, 2)
    assert await rows(engine, "SELECT reason, body FROM outbox.dead_letter") == [(reason, body)]
    assert await effects(engine) == [good["event_id"]]


async def test_ids_that_are_no_uuid_are_accepted(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Others may use any text, also with NUL, once."""
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch) as listener:
        listener._behave = None
        await publish(js_client, envelope("order-17"))
        await publish(js_client, envelope("order-17"))
        await watch.until(Step.ACKED, 2)
    assert await effects(engine) == ["order-17"]


class Order(BaseModel):
    number: int


async def test_a_typed_listener_gets_its_model(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """`Listener[Model]` validates; what does not fit is a dead letter without its values."""
    seen: list[Order] = []

    class Typed(Listener[Order]):
        subject = "evt.order.*.v1"
        queue_group = "typed"
        service_name = "mail"

        @override
        async def on_message(self, session: AsyncSession, event: EventEnvelope[Order]) -> None:
            seen.append(event.payload)

    watch = Watch()
    async with Typed(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await publish(js_client, envelope(data={"number": "secret"}))
        await watch.until(Step.ACKED, 2)
    assert seen == [Order(number=7)]
    found = await rows(engine, "SELECT reason, error FROM outbox.dead_letter")
    assert found == [("invalid_payload", "number: int_parsing")]


async def _commit(session: AsyncSession, event: EventEnvelope) -> None:
    await session.commit()


async def _commit_swallowed(session: AsyncSession, event: EventEnvelope) -> None:
    try:
        await session.commit()
    except Exception as error:  # noqa: BLE001 - what the test is about
        assert "commit" in str(error)


async def _rollback(session: AsyncSession, event: EventEnvelope) -> None:
    await session.rollback()


async def _rollback_and_work(session: AsyncSession, event: EventEnvelope) -> None:
    await session.rollback()
    await session.execute(text("INSERT INTO effect VALUES ('again')"))


async def _close(session: AsyncSession, event: EventEnvelope) -> None:
    await session.close()


async def _begin(session: AsyncSession, event: EventEnvelope) -> None:
    async with session.begin():
        await session.execute(text("SELECT 1"))


async def _connection_commit(session: AsyncSession, event: EventEnvelope) -> None:
    await (await session.connection()).commit()


async def _swallow(session: AsyncSession, event: EventEnvelope) -> None:
    try:
        await session.execute(text("SELECT 1/0"))
    except Exception as error:  # noqa: BLE001 - what the test is about
        assert "zero" in str(error)


async def _hang(session: AsyncSession, event: EventEnvelope) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "behave",
    [
        _commit,
        _commit_swallowed,
        _rollback,
        _rollback_and_work,
        _close,
        _begin,
        _connection_commit,
        _swallow,
        _hang,
    ],
)
async def test_a_handler_that_breaks_its_transaction_is_caught(
    js_client: JetStreamClient,
    stream: str,
    engine: AsyncEngine,
    sessionmaker: Sessions,
    behave: Callable[[AsyncSession, EventEnvelope], Awaitable[None]],
) -> None:
    """It is a failed attempt: rolled back, retried, and a dead letter in the end."""

    class Misbehaving(Effect):
        queue_group = "misbehaving"
        max_attempts = 2
        timeout = timedelta(seconds=0.3)

    watch = Watch()
    listener = Misbehaving(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await effects(engine) == []
    assert await rows(engine, "SELECT reason, attempts FROM outbox.dead_letter") == [
        ("attempts", 2)
    ]


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("then_raise", [False, True])
async def test_a_transaction_ended_by_sql_is_a_dead_letter_never_a_redelivery(
    js_client: JetStreamClient,
    stream: str,
    engine: AsyncEngine,
    sessionmaker: Sessions,
    sql: str,
    then_raise: bool,
) -> None:
    """A redelivery would be taken for a duplicate and the rest of the handler be lost."""

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text(sql))
        if then_raise:
            raise ValueError("after the fact")

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT reason FROM outbox.dead_letter") == [("handler_transaction",)]
    assert await rows(engine, "SELECT outcome FROM outbox.inbox") == [("dead",)]


async def test_savepoints_are_the_handlers_own(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """A handler may use nested transactions, and events of a rolled back one are gone."""
    events = Outbox("mail")

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        async with session.begin_nested():
            events.add(session, "evt.kept.v1", {})
        nested = await session.begin_nested()
        events.add(session, "evt.dropped.v1", {})
        await nested.rollback()

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert await rows(engine, "SELECT subject FROM outbox.pending") == [("evt.kept.v1",)]


async def test_events_of_a_handler_inherit_correlation_and_cause(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """The follow-up event names the event that caused it."""
    events = Outbox("mail")

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        events.add(session, "evt.email.sent.v1", {"to": "x"})

    watch = Watch()
    listener = Effect(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    cause = envelope()
    async with listener:
        await publish(js_client, cause)
        await watch.until(Step.ACKED)
    body = json.loads((await rows(engine, "SELECT body FROM outbox.pending"))[0][0])
    assert body["correlation_id"] == "c-1"
    assert body["metadata"]["causation_id"] == cause["event_id"]


async def test_two_instances_share_the_work(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """Each event is handled by one of them."""
    watch = Watch()
    one = Effect(js_client, sessionmaker, observer=watch)
    two = Effect(js_client, sessionmaker, observer=watch)
    async with one, two:
        for _ in range(50):
            await publish(js_client, envelope())
        await watch.until(Step.ACKED, 50)
    assert len(set(await effects(engine))) == len(await effects(engine)) == 50


async def test_one_identity_on_two_subjects_is_refused(
    js_client: JetStreamClient, stream: str, sessionmaker: Sessions
) -> None:
    """Both would share one durable consumer."""

    class Other(Effect):
        subject = "evt.order.paid.v1"

    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
        with pytest.raises(ConfigurationError, match="evt.order.paid.v1"):
            await Other(js_client, sessionmaker).run()
    with pytest.raises(ConfigurationError, match="evt.order"):
        await Other(js_client, sessionmaker).run()


async def test_a_deleted_consumer_is_made_again(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """It starts from the beginning of the stream; the inbox absorbs what it knows."""
    watch = Watch()
    async with Effect(js_client, sessionmaker, observer=watch):
        await publish(js_client, envelope())
        await watch.until(Step.COMMITTED)
        await js_client.api(f"CONSUMER.DELETE.{stream}.mail-effects")
        await publish(js_client, envelope())
        await watch.until(Step.COMMITTED, 2, within=30)
    assert len(await effects(engine)) == 2


async def test_a_stop_lets_the_running_handler_finish(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """What runs ends well; what has not begun goes back at once and is handled elsewhere."""
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        begun.set()
        await may_end.wait()

    class Narrow(Effect):
        concurrency = 1

    watch = Watch()
    listener = Narrow(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    await listener.start()
    for _ in range(4):
        await publish(js_client, envelope())
    await begun.wait()
    listener.stopping.set()
    may_end.set()
    await listener.stop(grace=5)
    assert len(await effects(engine)) == 1
    async with Narrow(js_client, sessionmaker, observer=watch):
        await watch.until(Step.COMMITTED, 4, within=20)
    assert len(set(await effects(engine))) == 4


async def test_a_slow_handler_is_not_delivered_twice(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """In-progress acks bridge an ack_wait shorter than the handler."""
    gate = asyncio.Event()

    class Slow(Effect):
        ack_wait = timedelta(seconds=0.6)
        timeout = timedelta(seconds=10)

    async def behave(session: AsyncSession, event: EventEnvelope) -> None:
        asyncio.get_running_loop().call_later(2, gate.set)
        await gate.wait()

    watch = Watch()
    listener = Slow(js_client, sessionmaker, observer=watch)
    listener._behave = behave
    async with listener:
        await publish(js_client, envelope())
        await watch.until(Step.ACKED)
    assert len(watch.of(Step.RECEIVED)) == 1


class Counted(BatchListener):
    subject = SUBJECT
    queue_group = "counted"
    service_name = "mail"
    _backoff: ClassVar[Backoff] = QUICK
    _sizes: ClassVar[list[int]] = []
    max_attempts = 2

    @override
    async def on_batch(self, session: AsyncSession, events: Any) -> None:
        self._sizes.append(len(events))
        for event in events:
            await session.execute(text("INSERT INTO effect VALUES (:id)"), {"id": event.event_id})
            if event.data.get("poison"):
                raise ValueError("poison")


async def test_a_batch_commits_together_and_poison_ends_alone(
    js_client: JetStreamClient, stream: str, engine: AsyncEngine, sessionmaker: Sessions
) -> None:
    """All but the poison take effect once; duplicates inside a batch too."""
    Counted._sizes.clear()
    good = [envelope() for _ in range(60)]
    poison = envelope(data={"poison": True})
    for body in (*good[:30], poison, *good[30:], good[0]):
        await publish(js_client, body)
    watch = Watch()
    async with Counted(js_client, sessionmaker, observer=watch):
        await watch.until(Step.ACKED, 62)
    assert sorted(await effects(engine)) == sorted(each["event_id"] for each in good)
    assert max(Counted._sizes) > 1
    assert await rows(engine, "SELECT event_id::text FROM outbox.dead_letter") == [
        (poison["event_id"],)
    ]


async def test_settings_may_name_the_service(
    js_client: JetStreamClient, stream: str, sessionmaker: Sessions
) -> None:
    """Without any service name the listener is refused."""

    class Nameless(Listener):
        subject = SUBJECT
        queue_group = "nameless"

        @override
        async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
            raise AssertionError

    settings = Settings.defaults(source_service="shop")
    assert Nameless(js_client, sessionmaker, settings=settings).identity == "shop-nameless"
    with pytest.raises(ConfigurationError, match="OUTBOX_SOURCE_SERVICE"):
        Nameless(js_client, sessionmaker)


async def test_an_inbox_that_forgets_before_the_stream_is_named_at_start(
    js_client: JetStreamClient,
    stream: str,
    sessionmaker: Sessions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An event could come again after pruning: at start the log says so, and what mends it."""
    watch = Watch()
    for number, (max_age, level) in enumerate(
        [(timedelta(0), "WARNING"), (timedelta(days=9), "ERROR"), (timedelta(days=1), None)]
    ):
        await js_client.delete_stream(stream)
        await js_client.ensure_stream(stream, ["evt.>"], max_age=max_age)
        caplog.clear()
        async with Effect(js_client, sessionmaker, observer=watch):
            await publish(js_client, envelope())
            await watch.until(Step.ACKED, number + 1)
        found = [each for each in caplog.records if hasattr(each, "mend")]
        assert [each.levelname for each in found] == ([level] if level else [])
        mends = {"WARNING": "--max-age", "ERROR": "OUTBOX_INBOX_RETENTION="}
        assert all(mends[each.levelname] in vars(each)["mend"] for each in found)
