"""A pull loop goes on after restarts, says when its consumer is gone, and counts deliveries."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nats.errors
import pytest

from outbox.embedded import EmbeddedNats
from outbox.jetstream import provisioning, pulling
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import ConsumerGone, Message, Puller, metadata

DURABLE = "shop-mail"


@asynccontextmanager
async def _puller(
    client: JetStreamClient, stream: str, prefetch: int = 8, bytes_max: int = 1 << 20
) -> AsyncIterator[Puller]:
    await provisioning.ensure_consumer(
        client,
        stream=stream,
        durable=DURABLE,
        filter_subject="evt.>",
        ack_wait=timedelta(seconds=2),
        max_ack_pending=1000,
    )
    async with Puller(
        client, stream=stream, durable=DURABLE, prefetch=prefetch, bytes_max=bytes_max
    ) as puller:
        yield puller


async def _publish(client: JetStreamClient, number: int, size: int = 0) -> None:
    for index in range(number):
        headers = {"Nats-Msg-Id": f"id-{index}", "Outbox-Key": "k"}
        body = b"%d" % index + b"." * size
        await client.js.publish("evt.a", body, headers=headers)


async def _unacked(client: JetStreamClient, stream: str) -> int:
    info = await provisioning.consumer_info(client, stream, DURABLE)
    assert info is not None
    return int(info["num_ack_pending"]) + int(info["num_pending"])


async def _take(puller: Puller, within: float = 10.0) -> Message:
    async with asyncio.timeout(within):
        return await puller.next()


async def test_messages_arrive_whole_in_order_and_once(
    js_client: JetStreamClient, stream: str
) -> None:
    await _publish(js_client, 50)
    async with _puller(js_client, stream) as puller:
        for index in range(50):
            message = await _take(puller)
            assert message.body == b"%d" % index
            assert message.subject == "evt.a"
            assert message.headers == {"Nats-Msg-Id": f"id-{index}", "Outbox-Key": "k"}
            assert (message.stream, message.sequence, message.delivered) == (stream, index + 1, 1)
            assert abs(datetime.now(UTC) - message.timestamp) < timedelta(minutes=1)
            await puller.ack(message)
        # The server takes acks and questions on separate queues: ask until the acks were taken.
        async with asyncio.timeout(10):
            while await _unacked(js_client, stream):
                pass


async def test_no_more_is_in_hand_than_asked_for(js_client: JetStreamClient, stream: str) -> None:
    await _publish(js_client, 40)
    async with _puller(js_client, stream, prefetch=4) as puller:
        await puller.ack(await _take(puller))
        info = await provisioning.consumer_info(js_client, stream, DURABLE)
        assert info is not None
        assert info["num_ack_pending"] <= 5
        assert puller.waiting <= 4


async def test_large_messages_arrive_within_a_small_byte_limit(
    js_client: JetStreamClient, stream: str
) -> None:
    await _publish(js_client, 12, size=300_000)
    async with _puller(js_client, stream, prefetch=100, bytes_max=400_000) as puller:
        for _ in range(12):
            await puller.ack(await _take(puller))


async def test_a_nak_comes_again_and_is_counted(js_client: JetStreamClient, stream: str) -> None:
    await _publish(js_client, 1)
    async with _puller(js_client, stream) as puller:
        await puller.nak(await _take(puller))
        again = await _take(puller)
        assert again.delivered == 2
        await puller.nak(again, timedelta(milliseconds=50))
        third = await _take(puller)
        assert third.delivered == 3
        await puller.in_progress(third)
        await puller.ack(third)


async def test_a_deleted_consumer_is_told(js_client: JetStreamClient, stream: str) -> None:
    await _publish(js_client, 1)
    async with _puller(js_client, stream) as puller:
        await puller.ack(await _take(puller))
        await js_client.api(f"CONSUMER.DELETE.{stream}.{DURABLE}")
        with pytest.raises(ConsumerGone):
            await _take(puller)
    async with _puller(js_client, stream) as puller:
        assert (await _take(puller)).sequence == 1


async def test_a_deleted_stream_is_told(js_client: JetStreamClient, stream: str) -> None:
    async with _puller(js_client, stream) as puller:
        await js_client.delete_stream(stream)
        with pytest.raises(ConsumerGone):
            await _take(puller)


async def test_pulling_goes_on_after_the_server_was_killed(private_nats: EmbeddedNats) -> None:
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>"])
        await _publish(client, 1)
        async with _puller(client, "EVENTS") as puller:
            await puller.ack(await _take(puller))
            down = asyncio.Event()
            client.on_change(lambda: None if client.is_connected else down.set())
            await asyncio.to_thread(private_nats.kill)
            async with asyncio.timeout(10):
                await down.wait()
            await asyncio.to_thread(private_nats.start)
            assert await client.ready(timedelta(seconds=20))
            await client.js.publish("evt.b", b"after")
            while (message := await _take(puller, 20)).body != b"after":
                await puller.ack(message)


async def test_pulling_goes_on_after_the_connection_was_rebuilt(
    js_client: JetStreamClient, stream: str
) -> None:
    async with _puller(js_client, stream) as puller:
        await _publish(js_client, 1)
        await puller.ack(await _take(puller))
        await js_client.client.close()
        assert await js_client.ready(timedelta(seconds=10))
        await js_client.js.publish("evt.b", b"after")
        while (message := await _take(puller)).body != b"after":
            await puller.ack(message)


async def test_requests_that_vanished_are_made_again(
    js_client: JetStreamClient, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "HEARTBEAT", timedelta(milliseconds=200))
    async with _puller(js_client, stream) as puller:
        await _publish(js_client, 1)
        await puller.ack(await _take(puller))
        assert puller._subscription is not None
        # The server forgets our interest, and with it the requests: only silence tells.
        await js_client.client._send_unsubscribe(puller._subscription._id)
        await js_client.js.publish("evt.b", b"after")
        while (message := await _take(puller)).body != b"after":
            await puller.ack(message)


def test_both_forms_of_the_reply_subject_are_read() -> None:
    first = metadata("$JS.ACK.S.C.2.7.9.1700000000123456789.0")
    second = metadata("$JS.ACK._.hash.S.C.2.7.9.1700000000123456789.0.token")
    assert first == second
    assert first is not None
    assert (first.stream, first.consumer, first.delivered, first.sequence) == ("S", "C", 2, 7)
    assert first.timestamp == datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)
    for broken in ("", "_INBOX.a", "$JS.ACK.S.C.x.7.9.1.0", "$JS.ACK.S.C.1"):
        assert metadata(broken) is None


async def test_an_ack_from_before_a_restore_is_not_taken_for_one_of_a_newer_message(
    private_nats: EmbeddedNats, tmp_path: Path
) -> None:
    """The restored broker gives the sequence out once more, to a message that nobody handled."""
    store, copy = private_nats.directory / "store", tmp_path / "copy"
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>"])
        async with _puller(client, "EVENTS") as puller:
            private_nats.stop()
            shutil.copytree(store, copy)
            private_nats.start()
            await _publish_anew(private_nats, b"old")
            old = await _take(puller, within=20)
            private_nats.kill()
            shutil.rmtree(store)
            shutil.copytree(copy, store)
            private_nats.start()
            await _publish_anew(private_nats, b"new")
            new = await _take(puller, within=20)
            assert (old.body, new.body) == (b"old", b"new")
            assert (old.sequence, old.reply.split(".")[2:6]) == (1, new.reply.split(".")[2:6])
            await puller.ack(old)
            await client.client.flush()
            assert await _unacked(client, "EVENTS") == 1
            again = await _take(puller, within=20)
            assert (again.body, again.delivered) == (b"new", 2)
            await puller.ack(again)
            async with asyncio.timeout(10):
                while await _unacked(client, "EVENTS"):
                    pass


async def test_what_was_not_written_when_the_connection_ended_is_not_sent_on_the_next(
    private_nats: EmbeddedNats,
) -> None:
    async with JetStreamClient(private_nats.url) as client:
        owner = client.client
        private_nats.kill()
        async with asyncio.timeout(10):
            while client.is_connected:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await owner.publish("evt.a", b"late")
                await asyncio.sleep(0)
        private_nats.start()
        async with JetStreamClient(private_nats.url) as other:
            heard = await other.client.subscribe("evt.a")
            await other.client.flush()
            assert await client.ready(timedelta(seconds=20))
            await owner.publish("evt.a", b"new")
            assert (await heard.next_msg(timeout=10)).data == b"new"


async def _publish_anew(server: EmbeddedNats, body: bytes) -> None:
    """Publish on a connection of its own: others may not have seen yet that theirs has ended."""
    async with JetStreamClient(server.url) as client:
        await client.js.publish("evt.a", body)
