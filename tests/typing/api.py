"""A caller's code. Never run: mypy and basedpyright check it in their strict modes."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, assert_type
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from sqlalchemy.orm import Session
from typing_extensions import override

import outbox
from outbox import (
    BatchListener,
    BrokerUnavailable,
    Disposition,
    EventEnvelope,
    InvalidEvent,
    InvalidSession,
    JetStreamClient,
    Listener,
    Observer,
    Outbox,
    OutboxError,
    PublishError,
    Reject,
    Relay,
    Retry,
    Settings,
    current_session,
    event_id_for,
    register,
    upgrade,
)


class Subject(StrEnum):
    PLACED = "evt.order.placed.v1"


@register(Subject.PLACED, key=lambda order: str(order.order_id))
class OrderPlaced(BaseModel):
    order_id: int
    email: str


class RushOrderPlaced(OrderPlaced):
    hours: int


events = Outbox(source_service="shop")
other = Outbox("shop", settings=Settings.defaults(schema_name="events"))


# ---- adding -----------------------------------------------------------------------------------


async def add_with_every_session(
    session: AsyncSession,
    synchronous: Session,
    connection: AsyncConnection,
    plain: Connection,
    payload: OrderPlaced,
) -> None:
    assert_type(events.add(session, Subject.PLACED, payload), str)
    events.add(synchronous, "evt.order.placed.v1", {"order_id": 1})
    events.add(connection, Subject.PLACED, {"order_id": [1, None, 2.5]})
    events.add(plain, Subject.PLACED, payload, key="order-1")
    assert_type(events.add(session, payload), str)
    outbox.add(session, payload, key="order-1")
    await events.flush(session)
    await events.flush(connection)
    assert_type(outbox.add(session, Subject.PLACED, payload, key="order-1"), str)


def add_with_everything(session: Session, payload: OrderPlaced) -> None:
    event_id = event_id_for("shop", Subject.PLACED, "order-1")
    assert_type(event_id, str)
    events.add(
        session,
        Subject.PLACED,
        payload,
        key="order-1",
        correlation_id="request-7",
        event_id=event_id,
        headers={"X-Tenant": "blue"},
        metadata={"actor": "admin"},
        deliver_at=datetime.now(UTC) + timedelta(hours=1),
    )
    events.add(session, Subject.PLACED, payload, event_id=UUID(event_id))


async def deep_inside_a_handler() -> None:
    assert_type(current_session(), AsyncSession)
    assert_type(OrderPlaced(order_id=1, email="a@example").order_id, int)


# ---- handling ---------------------------------------------------------------------------------


class Mailer:
    async def send(self, address: str) -> None: ...


class SendReceipt(Listener[OrderPlaced]):
    """A typed payload, and dependencies of its own."""

    subject = Subject.PLACED
    queue_group = "receipts"
    service_name = "mailer"
    stream_name = "EVENTS"
    max_attempts = 5
    timeout = timedelta(seconds=10)
    ack_wait = 30.0
    concurrency = 4

    def __init__(
        self,
        js_client: JetStreamClient,
        sessionmaker: async_sessionmaker[AsyncSession],
        *,
        mailer: Mailer,
    ) -> None:
        super().__init__(js_client, sessionmaker)
        self._mailer = mailer

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope[OrderPlaced]) -> None:
        assert_type(event.payload, OrderPlaced)
        assert_type(event.payload.email, str)
        assert_type(event.data, Mapping[str, Any])
        assert_type(event.timestamp, datetime)
        assert_type(event.key, str | None)
        assert_type(event.delivery.attempt, int)
        if event.delivery.redelivered:
            raise Retry("busy", after=timedelta(seconds=30))
        if not event.payload.email:
            raise Reject("no address")
        await self._mailer.send(event.payload.email)
        events.add(session, "evt.receipt.sent.v1", {"order_id": event.payload.order_id})

    @override
    async def on_error(
        self, error: Exception, event: EventEnvelope[OrderPlaced]
    ) -> Disposition | None:
        return Disposition.DEAD_LETTER if isinstance(error, KeyError) else None

    @override
    async def handle(self, session: AsyncSession, event: EventEnvelope[OrderPlaced]) -> None:
        await super().handle(session, event)


class Log(Listener):
    """A plain listener: the payload is the mapping."""

    subject = "evt.>"
    queue_group = "log"
    service_name = "audit"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        assert_type(event.payload, Mapping[str, Any])


class Count(BatchListener[OrderPlaced]):
    """Many events in one transaction."""

    subject = Subject.PLACED
    queue_group = "count"
    service_name = "analytics"

    @override
    async def on_batch(
        self, session: AsyncSession, events: Sequence[EventEnvelope[OrderPlaced]]
    ) -> None:
        assert_type([event.payload.order_id for event in events], list[int])


def covariant(event: EventEnvelope[RushOrderPlaced]) -> EventEnvelope[OrderPlaced]:
    return event


def default_payload(event: EventEnvelope) -> EventEnvelope[Mapping[str, Any]]:
    return event


# ---- running ----------------------------------------------------------------------------------


class Print(Observer):
    """Told of every step."""


async def run(engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]) -> None:
    settings = Settings.from_environment()
    await upgrade(engine, schema="outbox")
    async with JetStreamClient("nats://127.0.0.1:4222", token="word") as client:  # noqa: S106
        assert_type(client, JetStreamClient)
        assert_type(client.is_connected, bool)
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"], max_age=3600)
        relay = Relay(engine, client, settings=settings, observer=Print())
        async with relay as running, SendReceipt(client, sessionmaker, mailer=Mailer()) as receipts:
            assert_type(running, Relay)
            assert_type(receipts, SendReceipt)
        await relay.start()
        await relay.stop(grace=timedelta(seconds=2))
        await relay.stop(grace=0.5)
        assert_type((await relay.drain()).published, int)
        await Log(client, sessionmaker, settings=settings).run()
        await Count(client, sessionmaker, observer=Print()).run()
    later = JetStreamClient()
    await later.connect(["nats://a:4222", "nats://b:4222"])
    await later.close()


def migrate(connection: Connection) -> None:
    upgrade(connection)


def errors(session: Session) -> str:
    try:
        events.add(session, Subject.PLACED, {})
    except InvalidEvent as error:
        as_value_error: ValueError = error
        return f"{as_value_error} {assert_type(error.field, str)} {assert_type(error.rule, str)}"
    except InvalidSession as error:
        as_type_error: TypeError = error
        return str(as_type_error)
    except BrokerUnavailable:
        return "later"
    except PublishError as error:
        return assert_type(error.event_id, str)
    except OutboxError as error:
        return str(error)
    return ""
