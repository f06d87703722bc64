"""What a stream holds, read by plain JetStream calls: nothing of the library is trusted here."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import nats
from nats.aio.client import Client

BATCH = 500
DEADLINE = 30.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of the stream."""

    sequence: int
    subject: str
    message_id: str
    key: str | None
    mark: str
    event_id: str
    data: dict[str, Any]


async def read(url: str, stream: str) -> list[Stored]:
    """Return every message of the stream, in its order."""
    client = await nats.connect(url)
    try:
        answer = await client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=DEADLINE)
        state = json.loads(answer.data)["state"]
        last = int(state["last_seq"])
        pages = messages(client, stream, int(state["first_seq"]), last)
        found = [each async for page in pages for each in page]
        assert len(found) == int(state["messages"]), "the reading is not complete"
        return found
    finally:
        await client.close()


async def messages(
    client: Client, stream: str, sequence: int, last: int
) -> AsyncIterator[list[Stored]]:
    """Return the messages from one sequence to another, in pages."""
    while sequence <= last:
        page = await _page(client, stream, sequence, min(BATCH, last - sequence + 1))
        page = [each for each in page if each.sequence <= last]
        yield page
        sequence = page[-1].sequence + 1 if page else sequence + BATCH


async def consumers(url: str, stream: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return what the broker says of the durables."""
    client = await nats.connect(url)
    try:
        return {name: await consumer(client, stream, name) for name in names}
    finally:
        await client.close()


async def consumer(client: Client, stream: str, name: str) -> dict[str, Any]:
    """Return what the broker says of a durable; of none there is an `error`."""
    subject = f"$JS.API.CONSUMER.INFO.{stream}.{name}"
    answer = await client.request(subject, b"", timeout=DEADLINE)
    info: dict[str, Any] = json.loads(answer.data)
    return info


async def _page(client: Client, stream: str, sequence: int, number: int) -> list[Stored]:
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    ask = json.dumps({"seq": sequence, "batch": number}).encode()
    await client.publish(f"$JS.API.DIRECT.GET.{stream}", ask, reply=inbox)
    found: list[Stored] = []
    async with asyncio.timeout(DEADLINE):
        while True:
            message = await subscription.next_msg(timeout=DEADLINE)
            headers = message.headers or {}
            if "Status" in headers:  # 204 ends a batch, 404 says that nothing follows
                break
            found.append(_stored(headers, message.data))
    await subscription.unsubscribe()
    return found


def _stored(headers: dict[str, str], body: bytes) -> Stored:
    envelope = json.loads(body)
    return Stored(
        int(headers["Nats-Sequence"]),
        headers["Nats-Subject"],
        headers.get("Nats-Msg-Id", ""),
        headers.get("Outbox-Key"),
        headers.get("Mark", ""),
        envelope["event_id"],
        envelope["data"],
    )
