"""Publishing finished bytes as core NATS frames, many in flight, with one ack subscription.

`js.publish` costs 4 to 5 event loop hops and 83 µs or more of client CPU per message; frames that
are built here and written as one piece cost about a tenth of that.
"""

import base64
import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from outbox.errors import BrokerUnavailable
from outbox.jetstream.at_once import deliver_at_once
from outbox.jetstream.client import ApiError, JetStreamClient

SUBJECT_BYTES_MAX = 1024  # far below the 4096 of a control line, beyond which the server closes us
_SUBJECT = re.compile(r"[^\s*>.\x00-\x1f\x7f-\U0010ffff]+(?:\.[^\s*>.\x00-\x1f\x7f-\U0010ffff]+)*")
_FIXED_HEADER_BYTES = len(b"NATS/1.0\r\nNats-Msg-Id: \r\n")
_HEADER_BYTES_MAX = 65_535  # error 10097 beyond
NOT_FOUND = 10037
_PROBE_SECONDS = 5
# Errors of the connection, whatever was sent on it. A refused frame's own error is often lost: the
# reset that follows it takes its place.
_NOT_THE_FRAME = re.compile(
    "authori[sz]ation|authentication|expired|account|maximum connections|slow consumer|shutdown"
    "|stale|revoked|subscriptions|secure",
    re.IGNORECASE,
)


class Outcome(StrEnum):
    """What an ack, or its absence, means for the event (docs/facts.md)."""

    CONFIRMED = "confirmed"
    DUPLICATE = "duplicate"  # claimed; true only when the stored message is this event
    UNAVAILABLE = "unavailable"  # nobody's failure: the lane backs off
    UNKNOWN = "unknown"  # sent again with the same id
    REFUSED = "refused"  # for the event's own sake, perhaps not for ever
    IMPOSSIBLE = "impossible"  # this event can never be published
    MISCONFIGURED = "misconfigured"  # the event is fine, its subject or stream is not


@dataclass(frozen=True, slots=True)
class Answer:
    """A classified ack."""

    outcome: Outcome
    sequence: int = 0
    stream: str = ""
    detail: str = ""
    code: int = 0  # of the error


class Held(StrEnum):
    """What the stream holds where it said that a duplicate is."""

    THIS = "this"
    NOTHING = "nothing"  # purged, or another event: ours is not stored
    REUSED = "reused"  # another event with the same id


STORE_FAILED = 10077  # the stream is full, or has its most of this subject
_OUTAGES = frozenset({10008, 10009, 10023, 10047, 10074, 10077, 10158, 10167})
_IMPOSSIBLE = frozenset({10054, 10097, 10165, 10189, 10190})
_MISCONFIGURED = frozenset({10060, 10071, 10109, 10111, 10164, 10166})
_SERVER_BUSY = 500


@lru_cache(maxsize=32)
def success(stream: str) -> Callable[[bytes], re.Match[bytes] | None]:
    """Return what matches the usual ack of `stream`; group 1 is the sequence. No JSON is parsed."""
    return re.compile(rb'\{"stream":"%b", ?"seq":([1-9]\d*)\}' % stream.encode()).fullmatch


def classify(data: bytes, stream: str) -> Answer:
    """Return what `data`, the body of an ack for an event of `stream`, means."""
    try:
        answer = json.loads(data)
    except ValueError:
        return Answer(Outcome.UNKNOWN, detail="an ack that is not JSON")
    if not isinstance(answer, dict):
        return Answer(Outcome.UNKNOWN, detail="an ack that is no object")
    if "error" in answer:
        return _classify_error(answer["error"])
    sequence = answer.get("seq")
    if answer.get("stream") != stream or type(sequence) is not int or sequence <= 0:
        return Answer(Outcome.UNKNOWN, detail="an ack of a stranger")
    outcome = Outcome.DUPLICATE if answer.get("duplicate") else Outcome.CONFIRMED
    return Answer(outcome, sequence, stream)


def _classify_error(error: Any) -> Answer:
    if not isinstance(error, dict):
        return Answer(Outcome.UNKNOWN, detail="an ack with an odd error")
    code, reason = error.get("code"), error.get("err_code")
    detail = f"{code}/{reason} {error.get('description', '')}"[:500]
    if reason in _IMPOSSIBLE:
        return Answer(Outcome.IMPOSSIBLE, detail=detail)
    if reason in _MISCONFIGURED:
        return Answer(Outcome.MISCONFIGURED, detail=detail)
    if reason in _OUTAGES or (isinstance(code, int) and code >= _SERVER_BUSY):
        return Answer(Outcome.UNAVAILABLE, detail=detail, code=int(reason or 0))
    return Answer(Outcome.REFUSED, detail=detail)


def obstacle(subject: str, header_bytes: int, body_bytes: int, *, payload_max: int) -> str | None:
    """Return why an event must not be sent: the server would close the connection, or None."""
    if not _is_subject(subject):
        return "subject"
    if header_bytes > _HEADER_BYTES_MAX:
        return "headers"
    return "size" if header_bytes + body_bytes > payload_max else None


@lru_cache(maxsize=4096)
def _is_subject(subject: str) -> bool:
    return len(subject) <= SUBJECT_BYTES_MAX and _SUBJECT.fullmatch(subject) is not None


def message_head(subject: str, stream: str) -> tuple[bytes, bytes]:
    """Return what all frames of one subject share: how each begins, and the last of our headers."""
    return f"HPUB {subject} ".encode(), f"\r\nNats-Expected-Stream: {stream}\r\n".encode()


def header_bytes(message_id: str, head: tuple[bytes, bytes], lines: bytes) -> int:
    """Return the size of the header block of one message."""
    return _FIXED_HEADER_BYTES + len(message_id) + len(head[1]) + len(lines)


def frame(
    head: tuple[bytes, bytes], reply: str, message_id: str, lines: bytes, body: bytes
) -> bytes:
    """Return the HPUB frame of one message: our two headers, the stored lines, the stored body."""
    size = header_bytes(message_id, head, lines)
    return b"%b%b %d %d\r\nNATS/1.0\r\nNats-Msg-Id: %b%b%b\r\n%b\r\n" % (
        head[0],
        reply.encode(),
        size,
        size + len(body),
        message_id.encode(),
        head[1],
        lines,
        body,
    )


class AckInbox:
    """One subscription for all acks, of one generation of the connection.

    Each is offered to all of `takers` as (token, body) until one takes it by returning True; an
    empty body is the server's 503, no responders. What nobody takes is late and means nothing.
    """

    def __init__(self, client: JetStreamClient) -> None:
        self._client = client
        self._owner: NatsClient | None = None
        self._subscription: Subscription | None = None
        self._prefix_bytes = 0
        self.generation = -1
        self.prefix = ""
        self.takers: list[Callable[[int, bytes], bool]] = []

    @property
    def current(self) -> bool:
        """True while frames written now are answered here."""
        return self._client.is_connected and self.generation == self._client.generation

    @property
    def payload_max(self) -> int:
        """Bytes of headers and body that the server takes in one message."""
        return self._client.max_payload

    @property
    def closed_for_good(self) -> bool:
        """True when nats-py gave the connection up, as it does when the server refuses a frame."""
        owner = self._owner
        return owner is not None and (owner.is_closed or self._client.client is not owner)

    @property
    def refused(self) -> bool:
        """True when that may be the answer to what was sent, not the connection's own end."""
        if not self.closed_for_good or self._owner is None:
            return False
        told = f"{self._owner.last_error or ''} {self._client.last_error or ''}"
        return _NOT_THE_FRAME.search(told) is None

    async def open(self) -> None:
        """Subscribe on the current connection, unless that is done.

        Raises:
            BrokerUnavailable: not connected.
        """
        if self.current:
            return
        await self.close()
        if not self._client.is_connected:
            raise BrokerUnavailable("not connected")
        generation, owner = self._client.generation, self._client.client
        inbox = owner.new_inbox()
        try:
            self._subscription = await owner.subscribe(f"{inbox}.*", pending_bytes_limit=0)
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(f"cannot subscribe to acks: {error}") from error
        deliver_at_once(self._subscription, self._receive)
        self._owner = owner
        self.prefix = f"{inbox}."
        self._prefix_bytes = len(self.prefix)
        self.generation = generation

    async def probe(self) -> None:
        """Return once the server answered a ping on this connection.

        Raises:
            BrokerUnavailable: it did not.
        """
        if not self.current or self._owner is None:
            raise BrokerUnavailable("disconnected")
        try:
            await self._owner.flush(timeout=_PROBE_SECONDS)
        except (nats.errors.Error, OSError, ValueError) as error:
            raise BrokerUnavailable(f"no answer to a ping: {error}") from error
        if not self.current:
            raise BrokerUnavailable("disconnected")

    async def close(self) -> None:
        """End the subscription."""
        subscription, self._subscription = self._subscription, None
        self.generation = -1
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError, ValueError):
                await subscription.unsubscribe()

    async def write(self, frames: list[bytes]) -> None:
        """Hand `frames` to the connection as one piece.

        Raises:
            BrokerUnavailable: the connection is another one now, or none.
        """
        if not self.current or self._owner is None:
            raise BrokerUnavailable("disconnected")
        await _write(self._owner, b"".join(frames))

    def _receive(self, message: Msg) -> None:
        token = message.subject[self._prefix_bytes :]
        if not token.isdigit():
            return
        number = int(token)
        for take in self.takers:
            if take(number, message.data):
                return


async def _write(client: NatsClient, blob: bytes) -> None:
    """Write finished protocol bytes through nats-py's connection.

    nats-py has no public way to send prebuilt frames; these are the two calls that its own
    `publish` ends with (2.16). Neither waits while `pending_size` is 0 and the queue is empty.
    """
    await client._send_command(blob)  # noqa: SLF001 - see above
    queue = client._flush_queue  # noqa: SLF001
    if queue is not None and queue.empty():
        await client._flush_pending()  # noqa: SLF001


async def look_up(
    client: JetStreamClient, stream: str, sequence: int, *, event_id: str, subject: str
) -> Held:
    """Return what `stream` holds at `sequence`: this event, another with its id, or neither.

    Raises:
        BrokerUnavailable: nobody could tell.
    """
    try:
        answer = await client.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence})
    except ApiError as error:
        if error.err_code == NOT_FOUND:
            return Held.NOTHING
        raise BrokerUnavailable(str(error)) from error
    message = answer.get("message") or {}
    if not carries(base64.b64decode(message.get("hdrs") or ""), event_id):
        return Held.NOTHING
    return Held.THIS if message.get("subject") == subject else Held.REUSED


def carries(block: bytes, event_id: str) -> bool:
    """Return whether a message with this header block carries the event, published once or again.

    The id of a re-publication has a suffix, `<id>~rN`.
    """
    found = message_id(block)
    return found == event_id or found.startswith(f"{event_id}~")


def message_id(block: bytes) -> str:
    """Return the Msg-Id of a header block, or nothing."""
    for line in block.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"nats-msg-id":
            return value.strip().decode(errors="replace")
    return ""
