"""Reading the ids of a stream's messages, and no payloads."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import nats.errors
from nats.aio.msg import Msg

from outbox.errors import BrokerUnavailable
from outbox.jetstream.at_once import deliver_at_once
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.jetstream.pulling import metadata

BATCH = 5000  # messages of one request; the next one is made when half of them have come
ANSWER_SECONDS = 30.0
_ENDED = frozenset({"404", "408", "409"})
_NANOSECONDS = 1_000_000_000


class Scan:
    """The (sequence, Msg-Id) of each message of a stream, in order."""

    def __init__(self, client: JetStreamClient, stream: str, consumer: str, last: int) -> None:
        self._client = client
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._last = last
        self._inbox = client.client.new_inbox()
        self._found: deque[tuple[int, str]] = deque()
        self._outstanding = 0
        self._done = False
        self._wake = asyncio.Event()

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[None]:
        subscription = await self._client.client.subscribe(self._inbox, pending_bytes_limit=0)
        deliver_at_once(subscription, self._take)
        try:
            yield
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    def _take(self, message: Msg) -> None:
        found = metadata(message.reply)
        if found is None:
            self._done = self._done or (message.headers or {}).get("Status") in _ENDED
        else:
            self._outstanding -= 1
            self._done = found.sequence >= self._last
            self._found.append((found.sequence, (message.headers or {}).get("Nats-Msg-Id", "")))
        if self._done or self._outstanding <= BATCH // 2 or len(self._found) >= BATCH:
            self._wake.set()

    async def pages(self) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield what has come, until the last message.

        Raises:
            BrokerUnavailable: it was lost on the way.
        """
        async with self._subscribed():
            while not self._done or self._found:
                if not self._done and self._outstanding <= BATCH // 2:
                    await self._ask()
                if not self._found:
                    await self._wait()
                page = list(self._found)
                self._found.clear()
                yield page

    async def _ask(self) -> None:
        if not self._client.is_connected:
            raise BrokerUnavailable("disconnected while a stream was read")
        request = {"batch": BATCH, "expires": int(ANSWER_SECONDS * _NANOSECONDS), "no_wait": False}
        self._outstanding += BATCH
        await self._client.client.publish(
            self._subject, json.dumps(request).encode(), reply=self._inbox
        )

    async def _wait(self) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._wake.wait()
        except TimeoutError:
            raise BrokerUnavailable("the stream does not answer") from None


@asynccontextmanager
async def scan(
    client: JetStreamClient, stream: str, *, first: int, last: int
) -> AsyncIterator[Scan]:
    """Lend a scan of the sequences `first` to `last`, by a consumer that is deleted afterwards.

    Raises:
        BrokerUnavailable: the stream cannot be read.
    """
    name = f"outbox-scan-{uuid4().hex}"
    config = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": max(first, 1),
        "ack_policy": "none",
        "headers_only": True,
        "mem_storage": True,
        "num_replicas": 1,
        "inactive_threshold": int(2 * ANSWER_SECONDS * _NANOSECONDS),
    }
    try:
        await client.api(
            f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config}
        )
    except ApiError as error:
        raise BrokerUnavailable(f"stream {stream} cannot be read: {error}") from error
    try:
        yield Scan(client, stream, name, last)
    finally:
        with contextlib.suppress(ApiError, BrokerUnavailable):
            await client.api(f"CONSUMER.DELETE.{stream}.{name}")
