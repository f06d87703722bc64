"""A handler on its real path (inbox, transaction, commit), without a broker."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, cast
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override

from outbox.envelope import decode_headers
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import Message, Puller
from outbox.listener import Listener
from outbox.listener.attempt import Work
from outbox.listener.handling import Handling
from outbox.listener.outage import Outage
from outbox.telemetry import Moment, Observer, Step
from outbox.writer import Outbox, PendingEvent, prepared


class Result(StrEnum):
    """What became of one delivery."""

    HANDLED = "handled"  # committed, with its inbox row
    DUPLICATE = "duplicate"  # the inbox knew it; the handler was not called
    RETRIED = "retried"  # rolled back; it comes again after `retry_after`
    DEAD_LETTER = "dead_letter"  # given up, kept for a person
    DISCARDED = "discarded"  # given up by `on_error`, kept as discarded
    OUTAGE = "outage"  # the database did not answer; nothing was spent


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an event that was delivered once or more."""

    event_id: str
    results: tuple[Result, ...]  # one for each delivery
    error: BaseException | None = None  # the last that the handler raised
    reason: str | None = None  # of the dead letter
    retry_after: timedelta | None = None  # when the last delivery asked to come again
    handled: int = 0  # how often the handler's effect was committed: at most once

    @property
    def result(self) -> Result:
        """What became of the last delivery."""
        return self.results[-1]


async def deliver(
    listener: Listener[Any],
    subject: str | BaseModel,
    payload: BaseModel | Mapping[str, Any] | bytes | None = None,
    *,
    event_id: str | UUID | None = None,
    key: str | None = None,
    correlation_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    times: int = 1,
) -> Outcome:
    """Deliver an event to `listener` as its broker would; return what became of it.

    The listener's own code runs: validation, inbox row, handler, commit, retries, dead letter. It
    needs the migrated database, and neither a running listener nor a connected client.

    Args:
        subject: may be left out when `payload` is registered for one subject.
        payload: what `add` takes, or bytes: a whole body, as a stranger may send it.
        times: deliveries in a row, each numbered one higher.

    Raises:
        InvalidEvent: `add` would refuse it.
    """
    if isinstance(payload, bytes):
        event = PendingEvent(str(event_id or ""), key, str(subject), b"", payload)
    else:
        event = prepared(
            Outbox("testing", settings=listener.settings),
            subject,
            payload,
            key=key,
            correlation_id=correlation_id,
            event_id=event_id,
            headers=headers,
        )
    delivery = _Delivery(listener)
    results = [await delivery.once(_message(listener, event, n)) for n in range(1, times + 1)]
    return Outcome(
        event.event_id,
        tuple(results),
        delivery.error,
        delivery.reason,
        delivery.retry_after,
        delivery.handled,
    )


def _message(listener: Listener[Any], event: PendingEvent, delivered: int) -> Message:
    headers = decode_headers(event.headers)
    if event.event_id:
        headers["Nats-Msg-Id"] = event.event_id
    return Message(
        subject=event.subject,
        headers=headers,
        body=event.body,
        reply="",
        stream=listener.stream,
        sequence=1,
        delivered=delivered,
        timestamp=datetime.now(UTC),
    )


class _Delivery(Observer):
    """Runs messages through a listener's handling, and notes what it is told."""

    def __init__(self, listener: Listener[Any]) -> None:
        self.error: BaseException | None = None
        self.reason: str | None = None
        self.retry_after: timedelta | None = None
        self.handled = 0
        self._result: Result | None = None
        self._told = listener.observer
        self._handling = self._own(listener)

    def _own(self, listener: Listener[Any]) -> Handling:
        handling = listener.make_handling()
        handling.attempt = dataclasses.replace(handling.attempt, observer=self)
        handling.outage = Outage(listener.identity, self)
        handling.stopping = asyncio.Event()
        handling.handle = self._noting(handling.handle)
        if not listener.client.is_connected:
            handling.undertaker.client = cast("JetStreamClient", _NoStreams())
        return handling

    def _noting(
        self, handle: Callable[[AsyncSession, Sequence[Work]], Awaitable[None]]
    ) -> Callable[[AsyncSession, Sequence[Work]], Awaitable[None]]:
        async def noting(session: AsyncSession, works: Sequence[Work]) -> None:
            try:
                await handle(session, works)
            except BaseException as error:
                self.error = error
                raise

        return noting

    @override
    def on_step(self, moment: Moment) -> None:
        """Note what the step means, and tell the listener's own observer."""
        match moment.step:
            case Step.COMMITTED:
                self._result = Result.HANDLED
                self.handled += moment.count
            case Step.DUPLICATE:
                self._result = Result.DUPLICATE
            case Step.RETRIED:
                self._result = Result.RETRIED
            case Step.OUTAGE_BEGAN:
                self._result = Result.OUTAGE
            case Step.DEAD_LETTERED:
                self.reason = moment.reason
                discarded = moment.reason == "discarded"
                self._result = Result.DISCARDED if discarded else Result.DEAD_LETTER
            case _:
                pass
        self._told.on_step(moment)

    async def once(self, message: Message) -> Result:
        """Deliver `message` once."""
        self._result = self.retry_after = None
        await self._handling.message(cast("Puller", self), message)
        return Result.RETRIED if self._result is None else self._result

    # ---- as the puller -----------------------------------------------------------------------

    async def ack(self, message: Message) -> None:
        """Take the ack that the broker would get."""

    async def nak(self, message: Message, delay: timedelta = timedelta(0)) -> None:
        """Note when the message was asked for again."""
        del message
        self.retry_after = delay


class _NoStreams:
    """Stands for the broker where there is none: no stream takes `dlq.` subjects."""

    async def api(self, suffix: str, payload: object = None) -> dict[str, Any]:
        """Answer that there is no stream."""
        del suffix, payload
        return {"streams": []}
