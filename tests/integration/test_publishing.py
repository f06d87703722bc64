"""Acks are classified by what they mean for the event; frames are what the server expects."""

import asyncio
import json

import pytest

from outbox.errors import BrokerUnavailable
from outbox.jetstream import publishing
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.publishing import AckInbox, Held, Outcome


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ((503, 10077), Outcome.UNAVAILABLE),
        ((400, 10158), Outcome.UNAVAILABLE),
        ((429, 10167), Outcome.UNAVAILABLE),
        ((400, 10054), Outcome.IMPOSSIBLE),
        ((400, 10097), Outcome.IMPOSSIBLE),
        ((400, 10060), Outcome.MISCONFIGURED),
        ((400, 10109), Outcome.MISCONFIGURED),
        ((400, 10999), Outcome.REFUSED),
    ],
)
def test_error_of_the_broker_is_classified(error: tuple[int, int], outcome: Outcome) -> None:
    code, reason = error
    data = json.dumps({"error": {"code": code, "err_code": reason}}).encode()
    assert publishing.classify(data, "EVENTS").outcome is outcome


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"[]",
        b"{}",
        b'{"stream":"EVENTS"}',
        b'{"stream":"EVENTS","seq":0}',
        b'{"stream":"EVENTS","seq":true}',
        b'{"stream":"OTHER","seq":1}',
        b'{"error":"no"}',
    ],
)
def test_ack_of_a_stranger_confirms_nothing(data: bytes) -> None:
    assert publishing.success("EVENTS")(data) is None
    assert publishing.classify(data, "EVENTS").outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    "subject", ["", "evt..a", ".a", "a.", "evt.*", "evt.>", "evt a", "evt.\r\nPUB x", "a" * 1025]
)
def test_subject_that_the_server_would_not_take_is_never_sent(subject: str) -> None:
    assert publishing.obstacle(subject, 10, 10, payload_max=100) == "subject"


def test_headers_count_towards_the_payload_limit() -> None:
    assert publishing.obstacle("evt.a", 60, 40, payload_max=100) is None
    assert publishing.obstacle("evt.a", 60, 41, payload_max=100) == "size"


async def test_frames_are_stored_with_headers_and_acked(
    js_client: JetStreamClient, stream: str
) -> None:
    inbox = AckInbox(js_client)
    await inbox.open()
    acks: dict[int, bytes] = {}
    done = asyncio.Event()

    def take(token: int, data: bytes) -> bool:
        acks[token] = data
        if len(acks) == 3:
            done.set()
        return True

    inbox.takers.append(lambda _token, _data: False)  # another page
    inbox.takers.append(take)
    head = publishing.message_head("evt.a", stream)
    frames = [
        publishing.frame(head, f"{inbox.prefix}{n}", f"id-{n}", b"Outbox-Key: k\r\n", b"{}")
        for n in range(2)
    ]
    other = publishing.message_head("evt.a", "OTHER")
    frames.append(publishing.frame(other, f"{inbox.prefix}2", "x", b"", b""))
    await inbox.write(frames)
    async with asyncio.timeout(5):
        await done.wait()
    assert [bool(publishing.success(stream)(acks[n])) for n in range(3)] == [True, True, False]
    assert publishing.classify(acks[2], stream).outcome is Outcome.MISCONFIGURED
    held = await publishing.look_up(js_client, stream, 1, event_id="id-0", subject="evt.a")
    assert held is Held.THIS
    held = await publishing.look_up(js_client, stream, 1, event_id="id-0", subject="evt.b")
    assert held is Held.REUSED
    held = await publishing.look_up(js_client, stream, 9, event_id="id-0", subject="evt.a")
    assert held is Held.NOTHING
    await inbox.close()
    with pytest.raises(BrokerUnavailable):
        await inbox.write(frames)
