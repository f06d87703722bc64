"""Both older generations read what we publish, and we read what they publish."""

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import nats
import pytest
from nats.aio.client import Client
from sqlalchemy import Column, MetaData, String, Table, Text, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

import outbox
from outbox import EventEnvelope, JetStreamClient, Listener, Relay
from outbox.contracts import (
    CreditTrialGrantedPayload,
    DataListener,
    EnvelopeListener,
    MerchantIdentifiers,
    Publisher,
    Subjects,
)
from outbox.settings import Settings
from outbox.telemetry import Step
from tests.faults import Watch
from tests.peers import first, second

GRANTED = Subjects.CREDIT_TRIAL_GRANTED
effect = Table("effect", MetaData(), Column("event_id", String), Column("seen", Text))


class CreditPublisher(Publisher):
    service_name = "credit-service"


@pytest.fixture
async def peer(nats_server: str) -> AsyncIterator[Client]:
    """A bare nats-py connection."""
    client = await nats.connect(nats_server)
    yield client
    await client.close()


@pytest.fixture
async def effects(engine: AsyncEngine) -> Table:
    """A table without a unique key, in which handlers note their effects."""
    async with engine.begin() as connection:
        await connection.run_sync(effect.metadata.create_all)
    return effect


async def noted(sessionmaker: async_sessionmaker[AsyncSession]) -> dict[str, Any]:
    async with sessionmaker() as session:
        rows = (await session.execute(select(effect))).all()
    assert len({row.event_id for row in rows}) == len(rows)
    return {row.event_id: json.loads(row.seen) for row in rows}


def granted(merchant_id: UUID, amount: float) -> CreditTrialGrantedPayload:
    return CreditTrialGrantedPayload(
        identifiers=MerchantIdentifiers(
            merchant_id=merchant_id,
            platform_name="shopify",
            platform_shop_id="17",
            domain="tea.example",
        ),
        amount=amount,
        email="owner@tea.example",
    )


async def test_both_generations_read_ours_in_the_order_of_each_key(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    peer: Client,
    stream: str,
) -> None:
    merchants = [uuid4() for _ in range(3)]
    sent: list[tuple[str, CreditTrialGrantedPayload]] = []
    publisher = CreditPublisher()
    for amount in range(20):
        async with sessionmaker.begin() as session:
            payload = granted(merchants[amount % 3], amount)
            event_id = await publisher.publish_event(session, GRANTED, payload, metadata={"n": 1})
            sent.append((event_id, payload))
    settings = Settings.defaults(stream=stream)
    async with Relay(engine, js_client, settings=settings):
        where = {"service_name": "analytics-service", "count": 20}
        older = await first.receive(peer, GRANTED, queue_group="older", **where)  # type: ignore[arg-type]
        newer = await second.receive(peer, GRANTED, queue_group="newer", **where)  # type: ignore[arg-type]
    wanted = {event_id: payload.model_dump(mode="json") for event_id, payload in sent}
    assert {each["event_id"]: each["data"] for each in older} == wanted
    assert {each.event_id: each.data for each in newer} == wanted
    assert all(each.timestamp.utcoffset() is not None for each in newer)
    assert {each.source_service for each in newer} == {"credit-service"}
    for merchant in map(str, merchants):
        amounts = [e["data"]["amount"] for e in older if _merchant(e["data"]) == merchant]
        assert amounts == sorted(amounts)


def _merchant(data: dict[str, Any]) -> str:
    return str(data["identifiers"]["merchant_id"])


class OfFirst(DataListener):
    service_name = "mail-service"
    queue_group = "first"
    subject = GRANTED

    @override
    async def on_message(self, data: dict[str, Any]) -> None:  # type: ignore[override] # older form
        session = outbox.current_session()
        seen = insert(effect).values(event_id=data["note"], seen=json.dumps(data))
        await session.execute(seen)


class OfSecond(EnvelopeListener):
    service_name = "mail-service"
    queue_group = "second"
    subject = GRANTED

    @override
    async def on_message(self, session: AsyncSession, envelope: EventEnvelope) -> None:
        seen = json.dumps([envelope.source_service, envelope.timestamp.isoformat()])
        await session.execute(insert(effect).values(event_id=envelope.event_id, seen=seen))


class Typed(Listener[CreditTrialGrantedPayload]):
    service_name = "mail-service"
    queue_group = "typed"
    subject = GRANTED

    @override
    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[CreditTrialGrantedPayload]
    ) -> None:
        seen = json.dumps(event.payload.amount)
        await session.execute(insert(effect).values(event_id=event.event_id, seen=seen))


async def test_handlers_of_the_first_generation_read_both(
    effects: Table,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    peer: Client,
    stream: str,
) -> None:
    del effects
    data = granted(uuid4(), 5).model_dump(mode="json")
    await first.publish(peer, GRANTED, data | {"note": "a"})
    await second.publish(peer, GRANTED, data | {"note": "b"})
    watch = Watch()
    listener = OfFirst(js_client, None, sessionmaker, settings=_on(stream), observer=watch)
    async with listener:
        await watch.until(Step.ACKED, 2)
    assert await noted(sessionmaker) == {note: data | {"note": note} for note in ("a", "b")}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"metadata": {"retry": True}, "unknown": [1]},
        {"timestamp": "2026-11-25T07:00:00Z"},
        {"timestamp": "2026-11-25T07:00:00.25+00:00"},
        {"timestamp": "2026-11-25T07:00:00"},
    ],
    ids=["plain", "metadata", "Z", "offset", "naive"],
)
async def test_handlers_of_the_second_generation_and_ours_read_each_form(
    effects: Table,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    peer: Client,
    stream: str,
    fields: dict[str, Any],
) -> None:
    del effects
    data = granted(uuid4(), 7.5).model_dump(mode="json")
    older = await first.publish(peer, GRANTED, data, **fields)
    watch = Watch()
    async with OfSecond(js_client, sessionmaker, settings=_on(stream), observer=watch):
        await watch.until(Step.ACKED)
    service, time = (await noted(sessionmaker))[older]
    assert service == "older-service"
    assert time.endswith("+00:00")
    watch = Watch()
    newer = await second.publish(peer, GRANTED, data)
    async with Typed(js_client, sessionmaker, settings=_on(stream), observer=watch):
        await watch.until(Step.ACKED, 2)
    async with sessionmaker() as session:
        typed = await session.scalars(select(effect.c.event_id).where(effect.c.seen == "7.5"))
        assert set(typed) == {older, newer}


async def test_what_the_peers_repeat_takes_effect_once(
    effects: Table,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    peer: Client,
    stream: str,
) -> None:
    del effects
    data = granted(uuid4(), 1).model_dump(mode="json")
    event_id = await first.publish(peer, GRANTED, data)
    await first.publish(peer, GRANTED, data, event_id=event_id)  # no Msg-Id: stored twice
    watch = Watch()
    async with Typed(js_client, sessionmaker, settings=_on(stream), observer=watch):
        await watch.until(Step.ACKED, 2)
    assert await noted(sessionmaker) == {event_id: 1.0}
    assert watch.count(Step.DUPLICATE) == 1


def _on(stream: str) -> Settings:
    return Settings.defaults(stream=stream)
