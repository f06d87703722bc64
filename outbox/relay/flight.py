"""One page on its way to the broker: frames out, acks in, each row decided."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from outbox.errors import BrokerUnavailable
from outbox.jetstream import publishing
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.publishing import AckInbox, Answer, Held, Outcome
from outbox.relay.page import Page, State
from outbox.relay.verdict import OBSTACLES, DeadReason, Verdict

logger = logging.getLogger(__name__)
CHUNK_ROWS = 500
LOOK_UPS_MAX = 32  # messages read at once
REPUBLISHED_MAX = 20


@dataclass(slots=True)
class Flight:
    """Sends `page` and collects what became of it; used once.

    A row that the broker did not answer for is `UNKNOWN` at the end, and `outage` says why.
    """

    page: Page
    inbox: AckInbox
    client: JetStreamClient
    stream: str
    base: int  # token of the first row; no other page uses these tokens
    timeout: timedelta  # without any ack
    attempts_max: int
    may_send: Callable[[], None]  # raises when the lane is lost
    sent: Callable[[int], None] = lambda _: None  # told of each piece that was handed over
    streams: dict[str, str] = field(default_factory=dict)  # subject: its stream, if another
    confirmed: list[tuple[int, int, str]] = field(default_factory=list)  # id, sequence, stream
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # failed and dead rows
    duplicates: int = 0
    no_responders: list[int] = field(default_factory=list)
    limits_subjects: bool = False  # of the stream: one subject may be full alone
    full: list[int] = field(default_factory=list)  # refused so; whether the stream is, shows later
    outage: str | None = None
    sent_at: float | None = None  # monotonic; when the last piece was handed over
    generation: int = -1  # of the connection that it was sent on
    _ready: list[int] = field(default_factory=list)
    _claimed: list[tuple[int, Answer]] = field(default_factory=list)  # duplicates to look up
    _suffix: dict[int, int] = field(default_factory=dict)
    _event: asyncio.Event = field(default_factory=asyncio.Event)
    _acked_at: float = 0.0
    _success: Callable[[bytes], "re.Match[bytes] | None"] = lambda _: None
    _heads: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # of frames, by subject

    async def run(self) -> None:
        """Send the page and wait until each row is decided, or the broker is out.

        Raises:
            LaneLost: what was not sent stays unsent.
        """
        self._success = publishing.success(self.stream)
        self._acked_at = time.monotonic()
        self.generation = self.inbox.generation
        self.inbox.takers.append(self._on_ack)
        unsubscribe = self.client.on_change(self._event.set)
        try:
            await self._send(self.page.first)
            await self._wait()
        except BrokerUnavailable as error:
            self.outage = str(error)
        finally:
            unsubscribe()
            self.inbox.takers.remove(self._on_ack)
            self.page.give_up()

    @property
    def connected(self) -> bool:
        """True while the connection lasts that the page is sent on."""
        return self.inbox.current and self.inbox.generation == self.generation

    def release(self, blocked: Collection[str], *, outage: bool) -> None:
        """Send what waited for the page before, which has ended; see `Page.release`."""
        self._ready += self.page.release(blocked, outage=outage)
        self._acked_at = time.monotonic()
        self._event.set()

    async def _wait(self) -> None:
        while self.page.undecided:
            self._event.clear()
            if self._claimed:
                await self._look_up()
            elif self._ready:
                ready, self._ready = self._ready, []
                await self._follow(ready)
            else:
                if not self.connected:
                    raise BrokerUnavailable("disconnected while events were in flight")
                await self._until_event()

    async def _until_event(self) -> None:
        """Wait for an ack or another event; no ack in time means that the broker is out.

        While rows are deferred the page before is in flight, which has the same deadline.
        """
        left = self._acked_at + self.timeout.total_seconds() - time.monotonic()
        if left <= 0 and not self.page.deferred:
            raise BrokerUnavailable(f"no ack within {self.timeout}")
        try:
            async with asyncio.timeout(left if left > 0 else self.timeout.total_seconds()):
                await self._event.wait()
        except TimeoutError:
            return

    async def _follow(self, ready: Sequence[int]) -> None:
        """Send the next of each key, unless the broker is out."""
        if self.outage is None:
            await self._send(ready)
            return
        for index in ready:
            self.page.decide(index, State.UNKNOWN)

    async def _send(self, indexes: Sequence[int]) -> None:
        for start in range(0, len(indexes), CHUNK_ROWS):
            self.may_send()
            if self.outage is not None:
                for index in indexes[start:]:
                    self.page.decide(index, State.UNKNOWN)
                return
            frames = self._frames(indexes[start : start + CHUNK_ROWS])
            if frames:
                if not self.connected:
                    raise BrokerUnavailable("disconnected")
                await self.inbox.write(frames)
                self.sent_at = time.monotonic()
                self.sent(len(frames))
                await asyncio.sleep(0)  # the flusher's turn

    def _frames(self, indexes: Sequence[int]) -> list[bytes]:
        frames: list[bytes] = []
        rows, states, prefix, base = self.page.rows, self.page.states, self.inbox.prefix, self.base
        payload_max, heads, frame = self.inbox.payload_max, self._heads, publishing.frame
        for index in indexes:
            row = rows[index]
            message_id, subject, lines, body = row.event_id, row.subject, row.headers, row.body
            suffix = self._suffix.get(index, row.republished)
            if suffix:
                message_id = f"{message_id}~r{suffix}"
            head = heads.get(subject)
            if head is None:
                stream = self.streams.get(subject, self.stream)
                head = heads[subject] = publishing.message_head(subject, stream)
            size = publishing.header_bytes(message_id, head, lines)
            found = publishing.obstacle(subject, size, len(body), payload_max=payload_max)
            if found is not None:
                error = f"{size} bytes of headers and {len(body)} of body"
                self._bury(index, OBSTACLES[found], error, attempts=row.attempts)
                continue
            states[index] = State.SENT
            frames.append(frame(head, f"{prefix}{base + index}", message_id, lines, body))
        return frames

    def _on_ack(self, token: int, data: bytes) -> bool:
        """Take the ack of one row; return False when it is another page's."""
        index = token - self.base
        states = self.page.states
        if not 0 <= index < len(states):
            return False
        if states[index] is not State.SENT:
            return True
        success = self._success(data)
        if success is not None:
            self._confirm(index, int(success[1]), self.stream)
            return True
        row = self.page.rows[index]
        if not data:
            self.no_responders.append(index)
            answer = Answer(Outcome.UNAVAILABLE, detail=f"no stream takes {row.subject} (503)")
        else:
            answer = publishing.classify(data, self.streams.get(row.subject, self.stream))
        self._answered(index, answer)
        return True

    def _answered(self, index: int, answer: Answer) -> None:
        row = self.page.rows[index]
        match answer.outcome:
            case Outcome.CONFIRMED:
                self._confirm(index, answer.sequence, answer.stream)
            case Outcome.DUPLICATE:
                self._claimed.append((index, answer))
                self._event.set()
            case Outcome.UNKNOWN:  # anybody may answer first; the broker's own ack still counts
                logger.error(
                    "an ack that is not the broker's",
                    extra={"event_id": row.event_id, "reason": answer.detail},
                )
            case Outcome.UNAVAILABLE:
                if self.limits_subjects and answer.code == publishing.STORE_FAILED:
                    self.full.append(index)
                else:
                    self.outage = answer.detail
                self._decide(index, State.UNKNOWN)
            case Outcome.MISCONFIGURED:
                self.fail(index, answer.detail, counted=False)
            case Outcome.IMPOSSIBLE:
                self._bury(index, DeadReason.REFUSED, answer.detail, attempts=row.attempts + 1)
            case Outcome.REFUSED:
                self.fail(index, answer.detail, counted=True)

    def _confirm(self, index: int, sequence: int, stream: str) -> None:
        self.confirmed.append((self.page.rows[index].id, sequence, stream))
        self._decide(index, State.CONFIRMED)

    def fail(
        self,
        index: int,
        error: str,
        *,
        counted: bool,
        reason: DeadReason = DeadReason.ATTEMPTS,
    ) -> None:
        """Have row `index` wait, or give it up when its attempts are spent."""
        attempts = self.page.rows[index].attempts + counted
        if counted and attempts >= self.attempts_max:
            self._bury(index, reason, error, attempts=attempts)
            return
        self.verdicts[index] = Verdict(
            error, attempts, counted=counted, republished=self._suffix.get(index)
        )
        self._decide(index, State.FAILED)

    def _bury(self, index: int, reason: DeadReason, error: str, *, attempts: int) -> None:
        self.verdicts[index] = Verdict(error, attempts, reason=reason)
        self._decide(index, State.DEAD)

    def _decide(self, index: int, state: State) -> None:
        self._acked_at = time.monotonic()
        following = self.page.decide(index, state)
        if following is not None:
            self._ready.append(following)
            self._event.set()
        elif not self.page.undecided:
            self._event.set()

    async def _look_up(self) -> None:
        """Find out whether what the stream calls duplicates are these very events."""
        claimed, self._claimed = self._claimed[:LOOK_UPS_MAX], self._claimed[LOOK_UPS_MAX:]
        rows = [self.page.rows[index] for index, _ in claimed]
        found = await asyncio.gather(
            *(
                publishing.look_up(
                    self.client,
                    answer.stream,
                    answer.sequence,
                    event_id=row.event_id,
                    subject=row.subject,
                )
                for row, (_, answer) in zip(rows, claimed, strict=True)
            )
        )
        for (index, answer), held in zip(claimed, found, strict=True):
            await self._judge_duplicate(index, answer, held)

    async def _judge_duplicate(self, index: int, answer: Answer, held: Held) -> None:
        row = self.page.rows[index]
        match held:
            case Held.THIS:
                self.duplicates += 1
                self._confirm(index, answer.sequence, answer.stream)
            case Held.REUSED:
                error = f"sequence {answer.sequence} of {answer.stream} is another event"
                self._bury(index, DeadReason.ID_REUSE, error, attempts=row.attempts)
            case Held.NOTHING:
                suffix = self._suffix.get(index, row.republished) + 1
                if suffix - row.republished > REPUBLISHED_MAX:
                    raise BrokerUnavailable("the stream calls everything a duplicate")
                self._suffix[index] = suffix
                await self._send([index])
