"""What happens to one message: read, handled, counted, given up, and answered."""

import asyncio
import dataclasses
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from outbox.backoff import Backoff
from outbox.context import EntryPoint, LogFacts, logged
from outbox.envelope import (
    Delivery,
    EventEnvelope,
    MalformedMessage,
    fallback_key,
    inbox_key,
    parse,
    with_registered_payload,
)
from outbox.errors import (
    DatabaseUnavailable,
    OutboxError,
    Reject,
    Retry,
    hide_parameters,
    shorten,
)
from outbox.jetstream.pulling import Message, Puller
from outbox.listener.attempt import DATABASE_SECONDS, Attempt, ConnectionLost, InHand, Work
from outbox.listener.dead import DeadReason, GivenUp, Undertaker, header_key
from outbox.listener.guard import TransactionEscaped
from outbox.listener.outage import Outage
from outbox.postgres import attempts
from outbox.postgres.dead_letters import printable
from outbox.telemetry import Moment, Step

logger = logging.getLogger(__name__)

IN_HAND_ELSEWHERE = timedelta(seconds=2)  # when to look again


class Disposition(StrEnum):
    """What `on_error` decides about an event whose handler failed."""

    RETRY = "retry"
    DEAD_LETTER = "dead_letter"
    DISCARD = "discard"


Decision = Disposition | bool | None


@dataclass(kw_only=True)
class Handling:
    """Handles messages of one listener; each call of `message` answers the broker once."""

    attempt: Attempt
    undertaker: Undertaker
    outage: Outage
    handle: Callable[[AsyncSession, Sequence[Work]], Awaitable[None]]
    on_error: Callable[[Exception, EventEnvelope[Any]], Awaitable[Decision] | Decision]
    adapter: TypeAdapter[Any] | None  # of the payload
    max_attempts: int
    backoff: Backoff
    concurrency: int
    begun: Callable[[Message], None]  # a handler is about to run on it
    stopping: asyncio.Event
    stream_created: str = ""  # tells a stream from one of the same name made later
    _free: asyncio.Semaphore = field(init=False)
    _alone: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.concurrency)

    async def message(self, puller: Puller, message: Message) -> None:
        """Handle one message and answer the broker; never raises but on cancellation."""
        try:
            await self._read(puller, message)
        except (OutboxError, SQLAlchemyError, OSError) as error:
            await self.hand_back(puller, message, error)
        except asyncio.CancelledError:
            await puller.nak(message)
            raise

    async def hand_back(self, puller: Puller, message: Message, error: Exception) -> None:
        """Have the message come again; nothing is spent on an outage."""
        await puller.nak(message, self.outage.began(error))

    async def _read(self, puller: Puller, message: Message) -> None:
        try:
            event = self._parsed(message)
        except MalformedMessage as error:
            await self._bury_unread(puller, message, error)
            return
        with self.logged(event):
            await self._event(puller, message, event)

    def key(self, message: Message) -> UUID | None:
        """Return the inbox's key of a message, None when it carries no event."""
        try:
            return inbox_key(self._parsed(message).event_id)
        except MalformedMessage:
            return None

    def read(self, message: Message, key: UUID) -> Work:
        """Return what a message carries, for the inbox key that it was given up under.

        Raises:
            MalformedMessage: it carries no event.
            pydantic.ValidationError: its data does not fit.
        """
        return Work(self._with_payload(self._parsed(message)), key)

    def logged(self, event: EventEnvelope[Any]) -> AbstractContextManager[None]:
        """Have the log lines of the block say which event is handled."""
        facts = LogFacts(
            EntryPoint.LISTENER,
            self.attempt.service,
            event.event_id,
            event.event_type,
            event.correlation_id,
            event.source_service,
        )
        return logged(facts)

    async def _event(self, puller: Puller, message: Message, event: EventEnvelope[Any]) -> None:
        key = inbox_key(event.event_id)
        try:
            event = self._with_payload(event)
        except Exception as error:  # noqa: BLE001 - a model's own validators raise anything
            text = summary(error) if isinstance(error, ValidationError) else type(error).__name__
            await self._give_up(puller, message, Work(event, key), DeadReason.INVALID_PAYLOAD, text)
            return
        await self._work(puller, message, Work(event, key))

    def _parsed(self, message: Message) -> EventEnvelope[Any]:
        delivery = Delivery(
            attempt=message.delivered,
            stream=message.stream,
            sequence=message.sequence,
            redelivered=message.delivered > 1,
        )
        return parse(
            message.body, subject=message.subject, headers=message.headers, delivery=delivery
        )

    def _with_payload(self, event: EventEnvelope[Any]) -> EventEnvelope[Any]:
        if self.adapter is None:
            return event
        known = with_registered_payload(event)
        if known is not event:
            return known
        payload = self.adapter.validate_json(to_json(event.data))  # as JSON, as it was sent
        return dataclasses.replace(event, payload=payload)

    async def _work(self, puller: Puller, message: Message, work: Work) -> None:
        if message.delivered == 1:
            async with self._free:
                if self.stopping.is_set():
                    await puller.nak(message)
                else:
                    await self._try(puller, message, work, marked=False)
            return
        await self._again(puller, message, work)

    async def _again(self, puller: Puller, message: Message, work: Work) -> None:
        """Handle an event that may have been tried before.

        Its start is marked only once it has its place. Marked while it waits, it would be taken
        for the cause when another one kills the process, and be given up together with that one.
        """
        seen = await self._seen(work)
        if seen.spent >= self.max_attempts:
            error = f"{seen.failed} failures and {seen.unfinished} starts without an end"
            await self._give_up(puller, message, work, DeadReason.ATTEMPTS, error)
            return
        async with self._alone_or_not(alone=seen.unfinished > 0):
            if self.stopping.is_set():
                await puller.nak(message)
            elif await self._start(work) is None:
                await self._known(puller, message)
            else:
                await self._try(puller, message, work, marked=True)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one of the places in which handlers run."""
        async with self._free:
            yield

    @asynccontextmanager
    async def _alone_or_not(self, *, alone: bool) -> AsyncIterator[None]:
        """Hold all places when an earlier start has no end: it may have killed its process."""
        if not alone:
            async with self._free:
                yield
            return
        async with self._alone:
            held = 0
            try:
                for _ in range(self.concurrency):
                    await self._free.acquire()
                    held += 1
                yield
            finally:
                for _ in range(held):
                    self._free.release()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Begin a transaction of the listener's own, and commit it; bounded in time."""
        async with (
            asyncio.timeout(DATABASE_SECONDS),
            self.attempt.sessionmaker() as session,
            session.begin(),
        ):
            yield session

    async def _start(self, work: Work) -> attempts.Started | None:
        async with self.transaction() as session:
            return await attempts.start(
                session, self.attempt.schema, listener=self.attempt.listener, event_id=work.key
            )

    async def _seen(self, work: Work) -> attempts.Started:
        async with self.transaction() as session:
            return await attempts.seen(
                session, self.attempt.schema, listener=self.attempt.listener, event_id=work.key
            )

    async def _try(self, puller: Puller, message: Message, work: Work, *, marked: bool) -> None:
        self.begun(message)
        try:
            new = await self.attempt.run([work], self.handle, marked=marked)
        except TransactionEscaped as error:
            await self._escaped(puller, message, work, error)
            return
        except InHand:
            await self._release(work, marked=marked)
            await puller.nak(message, IN_HAND_ELSEWHERE)
            return
        except ConnectionLost as error:
            await self._lost_connection(puller, message, work, error, marked=marked)
            return
        except (DatabaseUnavailable, asyncio.CancelledError):
            await self._release(work, marked=marked)
            raise
        except Exception as error:  # the one place where a handler's failure is taken
            hide_parameters(error)
            logger.warning(
                "a handler failed",
                extra=self._facts(message, work) | {"error_type": type(error).__name__},
                exc_info=not isinstance(error, Retry | Reject),
            )
            await self._failed(puller, message, work, error, marked=marked)
            return
        self.outage.ended()
        if new:
            await self._ack(puller, message)
        else:
            await self._unmark(work, marked=marked)
            await self._known(puller, message)

    async def _lost_connection(
        self, puller: Puller, message: Message, work: Work, error: Exception, *, marked: bool
    ) -> None:
        """Count a failure if the database serves others: then the handler has lost its connection.

        `on_error` is not asked. It decides about what a handler raises, and would give an event up
        for an outage that is over by the time it is counted.
        """
        try:
            async with self.transaction() as session:
                await session.execute(select(1))
        except (SQLAlchemyError, OSError):
            await self._release(work, marked=marked)
            raise DatabaseUnavailable(str(error)) from error
        await self._counted(puller, message, work, error, marked=marked)

    async def _escaped(
        self, puller: Puller, message: Message, work: Work, error: TransactionEscaped
    ) -> None:
        """Give up an event whose handler ended the transaction: its inbox row may be committed."""
        await self._give_up(
            puller, message, work, DeadReason.HANDLER_TRANSACTION, str(error), override=True
        )

    async def _failed(
        self, puller: Puller, message: Message, work: Work, error: Exception, *, marked: bool
    ) -> None:
        decision = await self._decide(error, work)
        text = f"{type(error).__name__}: {error}"
        if decision is not Disposition.RETRY:
            reason = DeadReason.REJECTED if isinstance(error, Reject) else DeadReason.ON_ERROR
            await self._give_up(
                puller,
                message,
                work,
                DeadReason.DISCARDED if decision is Disposition.DISCARD else reason,
                text,
                discarded=decision is Disposition.DISCARD,
            )
            return
        await self._counted(puller, message, work, error, marked=marked)

    async def _counted(
        self, puller: Puller, message: Message, work: Work, error: Exception, *, marked: bool
    ) -> None:
        """Count a failure; have the event come again, or give it up."""
        text = f"{type(error).__name__}: {error}"
        seen = await self._count(work, error, text, marked=marked)
        self.outage.ended()  # the database answers
        if seen.spent >= self.max_attempts:
            await self._give_up(puller, message, work, DeadReason.ATTEMPTS, text)
            return
        delay = self._delay(error, seen.failed)
        self.tell(Step.RETRIED, message, event=work.event, reason=type(error).__name__)
        await puller.nak(message, delay)

    async def _decide(self, error: Exception, work: Work) -> Disposition:
        if isinstance(error, Reject):
            return Disposition.DEAD_LETTER
        if isinstance(error, Retry):
            return Disposition.RETRY
        try:
            answer = self.on_error(error, work.event)
            decided = await answer if inspect.isawaitable(answer) else answer
            if isinstance(decided, bool):
                return Disposition.DISCARD if decided else Disposition.RETRY
            return Disposition.RETRY if decided is None else Disposition(decided)
        except Exception:  # the user's code: what it would have decided is not known
            logger.exception("on_error failed", extra={"listener": self.attempt.listener})
            return Disposition.RETRY

    def _delay(self, error: Exception, failed: int) -> timedelta:
        if isinstance(error, Retry) and error.after is not None:
            return error.after
        return self.backoff.delay(failed)

    async def _count(
        self, work: Work, error: Exception, text: str, *, marked: bool
    ) -> attempts.Started:
        """Count the failure, on a fresh connection: if none answers, it was an outage."""
        async with self.transaction() as session:
            seen = await attempts.seen(
                session, self.attempt.schema, listener=self.attempt.listener, event_id=work.key
            )
            return await attempts.fail(
                session,
                self.attempt.schema,
                listener=self.attempt.listener,
                event_id=work.key,
                marked=marked,
                delay=self._delay(error, seen.failed + 1),
                error=printable(text),
            )

    async def _release(self, work: Work, *, marked: bool) -> None:
        """End a start that was nobody's failure; a dead database keeps it, which is safe."""
        if not marked:
            return
        with suppress(SQLAlchemyError, OSError):
            async with self.transaction() as session:
                await attempts.release(
                    session, self.attempt.schema, listener=self.attempt.listener, event_id=work.key
                )

    async def _unmark(self, work: Work, *, marked: bool) -> None:
        """Delete the start mark of an event that another copy has finished meanwhile."""
        if not marked:
            return
        async with self.transaction() as session:
            await attempts.forget(
                session, self.attempt.schema, listener=self.attempt.listener, event_id=work.key
            )

    async def _ack(self, puller: Puller, message: Message) -> None:
        await puller.ack(message)
        self.tell(Step.ACKED, message)

    async def _known(self, puller: Puller, message: Message) -> None:
        self.tell(Step.DUPLICATE, message)
        await self._ack(puller, message)

    async def _give_up(
        self,
        puller: Puller,
        message: Message,
        work: Work,
        reason: str,
        error: str,
        *,
        discarded: bool = False,
        override: bool = False,
    ) -> None:
        event = work.event
        seen = await self._seen(work)
        given = GivenUp(
            message,
            work.key,
            event.event_id if event.event_id != str(work.key) else None,
            event.key,
            reason,
            error,
            max(seen.spent, 1),
            created_at=event.timestamp,
            correlation_id=event.correlation_id,
            discarded=discarded,
            override=override,
        )
        await self._bury(puller, message, given)

    async def _bury_unread(self, puller: Puller, message: Message, error: MalformedMessage) -> None:
        """Give up a message that is no event; its key is made from where and when it was stored."""
        key = fallback_key(
            message.stream,
            self.stream_created,
            message.sequence,
            message.timestamp.isoformat(),
            message.body,
        )
        unread = header_key(message)
        given = GivenUp(message, key, None, unread, str(error.reason), error.detail, 1)
        await self._bury(puller, message, given)

    async def _bury(self, puller: Puller, message: Message, given: GivenUp) -> None:
        if await self.undertaker.bury(given):
            logger.error(
                "gave up an event",
                extra={
                    "listener": self.attempt.listener,
                    "event_id": str(given.key),
                    "subject": shorten(message.subject),
                    "reason": given.reason,
                },
            )
            self.tell(Step.DEAD_LETTERED, message, reason=given.reason)
        await self._ack(puller, message)

    def tell(
        self,
        step: Step,
        message: Message,
        *,
        event: EventEnvelope[Any] | None = None,
        reason: str | None = None,
    ) -> None:
        """Tell the observer of a step of one message."""
        self.attempt.observer.on_step(
            Moment(
                step,
                self.attempt.listener,
                event_id=event.event_id if event else message.headers.get("Nats-Msg-Id"),
                subject=message.subject,
                reason=reason,
                attempt=message.delivered,
                sequence=message.sequence,
            )
        )

    def _facts(self, message: Message, work: Work) -> dict[str, object]:
        return {
            "listener": self.attempt.listener,
            "event_id": work.event.event_id,
            "subject": message.subject,
            "attempt": message.delivered,
        }


def summary(error: ValidationError) -> str:
    """Return which fields are wrong and how, without their values."""
    found = error.errors(include_input=False, include_url=False)
    return "; ".join(sorted({f"{'.'.join(map(str, e['loc']))}: {e['type']}" for e in found}))
