"""Messages of a durable consumer, by a pull loop of our own.

nats-py's `fetch` loses what arrives while it is cancelled, hides most statuses and costs 12 µs per
message. Here one subscription feeds a queue, and requests (`MSG.NEXT`) are refilled at half.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from outbox.errors import BrokerUnavailable, OutboxError
from outbox.jetstream import provisioning
from outbox.jetstream.api import ApiError
from outbox.jetstream.client import JetStreamClient

log = logging.getLogger(__name__)

EXPIRES = timedelta(seconds=30)
HEARTBEAT = timedelta(seconds=5)
_TICK = timedelta(seconds=1)  # an upper bound: everything else wakes the loop earlier
_PAUSE_AFTER_REFUSAL = timedelta(seconds=1)
_NANOSECONDS = 1_000_000_000
_SUBSCRIPTION_BYTES_MAX = 1 << 30  # bounded by what we ask for, so nats-py must not drop any


class ConsumerGone(OutboxError):  # noqa: N818 - a state, like the public errors
    """The durable consumer or its stream was deleted; whoever pulls must make it again."""


@dataclass(slots=True)
class Message:
    """A message as it was delivered; `delivered` counts deliveries, this one included."""

    subject: str
    headers: dict[str, str]
    body: bytes
    reply: str
    stream: str
    sequence: int
    delivered: int
    timestamp: datetime
    epoch: int = -1  # of the puller, see `Puller`


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the `$JS.ACK` reply subject tells."""

    stream: str
    consumer: str
    delivered: int
    sequence: int
    timestamp: datetime


def metadata(reply: str) -> Metadata | None:
    """Parse `$JS.ACK…` in its first form (9 tokens) and its second (11 and more; ADR-15)."""
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"]:
        return None
    if len(tokens) == 9:  # noqa: PLR2004 - the first form
        fields = tokens[2:]
    elif len(tokens) >= 11:  # noqa: PLR2004 - domain and account hash come first in the second
        fields = tokens[4:]
    else:
        return None
    try:
        delivered, sequence, nanoseconds = int(fields[2]), int(fields[3]), int(fields[5])
        moment = datetime.fromtimestamp(nanoseconds // _NANOSECONDS, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    moment += timedelta(microseconds=nanoseconds % _NANOSECONDS // 1000)
    return Metadata(fields[0], fields[1], delivered, sequence, moment)


class Puller:
    """Keeps up to `prefetch` messages, and about `bytes_max` bytes, on their way or in hand.

    Use it as a context manager. Leaving it drops what nobody took; that comes again after the
    consumer's ack wait, or at once when the owner naks it first.

    Messages are answered in their own epoch only, which ends with the connection, and when the
    broker had trouble with the consumer. An answer names a message by its sequence, and a broker
    that was restored from an older copy gives sequences out twice: an ack from before would be
    taken for one of a newer message, which its listener then never handles.
    """

    def __init__(
        self, client: JetStreamClient, *, stream: str, durable: str, prefetch: int, bytes_max: int
    ) -> None:
        self._client = client
        self._stream = stream
        self._durable = durable
        self._prefetch = max(prefetch, 1)
        self._bytes_max = max(bytes_max, 1)
        self._queue: deque[Message] = deque()
        self._queued_bytes = 0
        self._outstanding = 0
        self._wake = asyncio.Event()  # there is something for the loop to do
        self._filled = asyncio.Event()  # there is something for next()
        self._owner: NatsClient | None = None
        self._subscription: Subscription | None = None
        self._generation = -1
        self._epoch = 0
        self._inbox = ""
        self._heard = 0.0
        self._refused_until = 0.0
        self._suspect = False
        self._paused = False
        self._failure: OutboxError | None = None
        self._task: asyncio.Task[None] | None = None
        self._unsubscribe = _nothing

    async def __aenter__(self) -> Self:
        self._unsubscribe = self._client.on_change(self._wake.set)
        self._task = asyncio.create_task(self._pull(), name=f"pull-{self._durable}")
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unsubscribe()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        await self._leave()

    async def next(self) -> Message:
        """Wait for the next message.

        Raises:
            ConsumerGone: the consumer was deleted; what was in hand is returned before.
        """
        while not self._queue:
            if self._failure is not None:
                raise self._failure
            self._filled.clear()
            await self._filled.wait()
        message = self._queue.popleft()
        self._queued_bytes -= len(message.body)
        if len(self._queue) + self._outstanding <= self._prefetch // 2:
            self._wake.set()
        return message

    @property
    def waiting(self) -> int:
        """How many messages `next` would return without waiting."""
        return len(self._queue)

    def pause(self) -> None:
        """Ask for no more messages; what was asked for may still arrive."""
        self._paused = True

    def resume(self) -> None:
        """Ask for messages again."""
        self._paused = False
        self._wake.set()

    async def ack(self, message: Message) -> None:
        """Tell the broker that the message is done; lost after its epoch, which is harmless."""
        await self._answer(message, b"+ACK")

    async def nak(self, message: Message, delay: timedelta = timedelta(0)) -> None:
        """Ask for the message again after `delay`."""
        nanoseconds = delay // timedelta(microseconds=1) * 1000
        body = b"-NAK" if nanoseconds <= 0 else b'-NAK {"delay": %d}' % nanoseconds
        await self._answer(message, body)

    async def in_progress(self, message: Message) -> None:
        """Begin the message's ack wait anew."""
        await self._answer(message, b"+WPI")

    async def _answer(self, message: Message, body: bytes) -> None:
        current = message.epoch == self._epoch and self._generation == self._client.generation
        if not current or not self._client.is_connected:
            return
        # A lost answer means a redelivery, which the inbox absorbs.
        with contextlib.suppress(nats.errors.Error, OSError, BrokerUnavailable):
            await self._client.client.publish(message.reply, body)

    async def _pull(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._step()
            except (BrokerUnavailable, ApiError, nats.errors.Error, OSError, TimeoutError) as error:
                log.debug("the pull loop waits for NATS", extra={"reason": str(error)})
                self._generation = -1
                await self._client.ready(_TICK)
                await asyncio.sleep(0.1)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK.total_seconds()):
                    await self._wake.wait()

    async def _step(self) -> None:
        self._client.check()
        if not self._client.is_connected:
            self._generation = -1
            return
        now = asyncio.get_running_loop().time()
        silent = bool(self._outstanding) and now - self._heard > 2 * HEARTBEAT.total_seconds()
        if silent or self._generation != self._client.generation:
            await self._join()
        if self._suspect:
            await self._verify()
        if now >= self._refused_until:
            await self._ask()

    async def _join(self) -> None:
        """Subscribe on this connection; requests made on an earlier one are gone."""
        await self._leave()
        generation, owner = self._client.generation, self._client.client
        # A new inbox for each connection: a late answer to an old request is not counted.
        self._inbox = inbox = owner.new_inbox()
        self._epoch += 1

        async def received(raw: Msg) -> None:
            self._received(raw, inbox)

        self._subscription = await owner.subscribe(
            inbox, cb=received, pending_bytes_limit=_SUBSCRIPTION_BYTES_MAX
        )
        self._owner, self._generation = owner, generation
        self._outstanding = 0
        self._suspect = True

    async def _leave(self) -> None:
        subscription, owner = self._subscription, self._owner
        self._subscription = self._owner = None
        if subscription is not None and owner is not None and not owner.is_closed:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    async def _verify(self) -> None:
        """Make sure that the consumer is there, and forget requests that nobody answers."""
        try:
            info = await provisioning.consumer_info(self._client, self._stream, self._durable)
        except provisioning.StreamMissing as error:
            raise ConsumerGone(f"stream {self._stream} is gone") from error
        if info is None:
            raise ConsumerGone(f"consumer {self._durable} of stream {self._stream} is gone")
        self._suspect = False
        self._outstanding = 0
        self._heard = asyncio.get_running_loop().time()

    async def _ask(self) -> None:
        in_hand = len(self._queue) + self._outstanding
        room = self._bytes_max - self._queued_bytes
        if self._paused or in_hand > self._prefetch // 2 or (room <= 0 and self._queue):
            return
        count = self._prefetch - in_hand
        request = {
            "batch": count,
            "expires": int(EXPIRES.total_seconds() * _NANOSECONDS),
            "idle_heartbeat": int(HEARTBEAT.total_seconds() * _NANOSECONDS),
            # Never below one message, or the server would refuse the request for ever.
            "max_bytes": max(room, 2 * self._client.max_payload),
        }
        assert self._owner is not None  # noqa: S101 - _join has set it
        self._outstanding += count
        if self._outstanding == count:
            self._heard = asyncio.get_running_loop().time()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._durable}"
        await self._owner.publish(subject, json.dumps(request).encode(), reply=self._inbox)

    def _received(self, raw: Msg, inbox: str) -> None:
        if inbox != self._inbox:
            return  # of an earlier connection; it comes again
        if raw.subject == inbox and not raw.reply.startswith("$JS.ACK."):
            self._status(raw.headers or {})
            return
        self._heard = asyncio.get_running_loop().time()
        self._outstanding = max(self._outstanding - 1, 0)
        found = metadata(raw.reply)
        if found is None:
            log.warning("a message without JetStream's reply subject was ignored")
            return
        self._queue.append(
            Message(
                subject=raw.subject,
                headers=dict(raw.headers or {}),
                body=raw.data,
                reply=raw.reply,
                stream=found.stream,
                sequence=found.sequence,
                delivered=found.delivered,
                timestamp=found.timestamp,
                epoch=self._epoch,
            )
        )
        self._queued_bytes += len(raw.data)
        self._filled.set()
        if self._outstanding <= self._prefetch // 2:
            self._wake.set()

    def _status(self, headers: dict[str, str]) -> None:
        """Take note of a status: heartbeat, a request that ended, or one that was refused."""
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        code, text = headers.get("Status", ""), headers.get("Description", "").lower()
        if code == "100":
            return
        unfilled = _whole(headers.get("Nats-Pending-Messages"))
        # A status without a count ends a request of unknown size: start counting anew.
        self._outstanding = 0 if unfilled is None else max(self._outstanding - unfilled, 0)
        ended = "maxbytes" in text.replace(" ", "") or text == "batch completed"
        if code in {"404", "408"} or (code == "409" and ended):
            self._wake.set()
            return
        log.debug("a pull request was refused", extra={"code": code, "reason": text})
        # 409 (deleted, leadership change, shutdown), 423, 503: look before asking again.
        self._suspect = True
        self._epoch += 1
        if "deleted" not in text:
            self._refused_until = loop.time() + _PAUSE_AFTER_REFUSAL.total_seconds()
        self._wake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error if isinstance(error, OutboxError) else _broken(error)
            self._filled.set()


def _nothing() -> None:
    """Stand in until there is something to unsubscribe."""


def _broken(error: BaseException) -> OutboxError:
    failure = OutboxError(f"the pull loop failed: {type(error).__name__}")
    failure.__cause__ = error
    return failure


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
