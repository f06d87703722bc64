"""The gap alarm: what the stream dropped before a listener had read it is told, once."""

import json
import logging
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Settings
from outbox.jetstream import provisioning
from outbox.listener.gaps import GapWatch
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.streams import change

SUBJECT = "evt.letter.written.v1"


class Reader(Listener):
    """Reads letters."""

    subject = SUBJECT
    queue_group = "reader"
    service_name = "mail"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        pass


async def publish(client: JetStreamClient, number: int, subject: str = SUBJECT) -> None:
    for _ in range(number):
        body = {
            "event_id": str(uuid4()),
            "event_type": subject,
            "correlation_id": "c",
            "source_service": "shop",
            "timestamp": "2026-01-02T03:04:05Z",
            "data": {},
            "metadata": {},
        }
        await client.js.publish(subject, json.dumps(body).encode())


async def drop_all_but(client: JetStreamClient, stream: str, kept: int) -> None:
    await change(client, stream, discard="old", max_msgs=kept)
    await change(client, stream, discard="new", max_msgs=-1)


async def make_consumer(client: JetStreamClient, stream: str, subject: str = SUBJECT) -> None:
    await provisioning.ensure_consumer(
        client,
        stream=stream,
        durable="mail-reader",
        filter_subject=subject,
        ack_wait=timedelta(seconds=30),
        max_ack_pending=1000,
    )


async def read(client: JetStreamClient, stream: str, number: int) -> None:
    pulled = await client.js.pull_subscribe_bind("mail-reader", stream)
    for message in await pulled.fetch(number):
        await message.ack_sync()
    await pulled.unsubscribe()


def gap_watch(client: JetStreamClient, stream: str) -> GapWatch:
    return GapWatch(client, stream, "mail-reader", Watch())


async def test_listener_that_was_away_for_too_long_tells_what_it_missed(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del engine
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    await publish(js_client, 2)
    async with Reader(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 2)
    assert not watch.of(Step.GAP)
    await publish(js_client, 10)
    await drop_all_but(js_client, stream, 3)
    with caplog.at_level(logging.ERROR):
        async with Reader(js_client, sessionmaker, settings=settings, observer=watch):
            await watch.until(Step.ACKED, 5)
    (moment,) = watch.of(Step.GAP)
    assert (moment.source, moment.count) == ("mail-reader", 7)
    (record,) = [each for each in caplog.records if "dropped" in each.message]
    assert vars(record)["mend"] == "outbox replay --to mail-reader in each publisher's database"


async def test_gap_is_told_once_and_a_wider_one_by_what_is_new(
    js_client: JetStreamClient, stream: str
) -> None:
    gaps = gap_watch(js_client, stream)
    await publish(js_client, 1)
    await make_consumer(js_client, stream)
    await read(js_client, stream, 1)
    assert await gaps.look() == 0
    await publish(js_client, 10)
    await drop_all_but(js_client, stream, 8)
    assert await gaps.look() == 2
    assert await gaps.look() == 0
    await drop_all_but(js_client, stream, 5)
    assert await gaps.look() == 3


async def test_what_expired_before_a_listener_began_is_no_gap(
    js_client: JetStreamClient, stream: str
) -> None:
    await publish(js_client, 5)
    await drop_all_but(js_client, stream, 2)
    await make_consumer(js_client, stream)
    gaps = gap_watch(js_client, stream)
    assert await gaps.look() == 0
    await drop_all_but(js_client, stream, 1)
    assert await gaps.look() == 1


async def test_other_subjects_that_expire_are_no_gap_for_a_listener_that_had_read_all(
    js_client: JetStreamClient, stream: str
) -> None:
    gaps = gap_watch(js_client, stream)
    await publish(js_client, 1)
    await make_consumer(js_client, stream)
    await read(js_client, stream, 1)
    await publish(js_client, 9, "evt.other.v1")
    assert await gaps.look() == 0
    await publish(js_client, 1)
    await drop_all_but(js_client, stream, 2)
    assert await gaps.look() == 0
    await drop_all_but(js_client, stream, 1)
    assert await gaps.look() == 0  # the letter is still there
    await publish(js_client, 1)
    await drop_all_but(js_client, stream, 1)
    assert await gaps.look() == 1


async def test_purge_by_an_operator_and_a_stream_made_anew_are_no_gaps(
    js_client: JetStreamClient, stream: str
) -> None:
    gaps = gap_watch(js_client, stream)
    await publish(js_client, 2)
    await make_consumer(js_client, stream)
    await read(js_client, stream, 1)
    await publish(js_client, 3)
    await js_client.api(f"STREAM.PURGE.{stream}")
    assert await gaps.look() == 0
    await js_client.delete_stream(stream)
    await js_client.ensure_stream(stream, ["evt.>", "cmd.>", "dlq.>"])
    await make_consumer(js_client, stream)
    await publish(js_client, 1)
    assert await gaps.look() == 0
