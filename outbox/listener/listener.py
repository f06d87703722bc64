"""The inbox-guarded listener: pulls, hands each event to its handler, and answers the broker."""

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Any, ClassVar, Generic

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox.backoff import Backoff
from outbox.envelope import (
    Delivery,
    EventEnvelope,
    MalformedMessage,
    P_co,
    fallback_key,
    inbox_key,
    parse,
)
from outbox.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    OutboxError,
    Reject,
    Retry,
    shorten,
)
from outbox.jetstream import provisioning
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import ConsumerGone, Message, Puller
from outbox.lifecycle import Worker
from outbox.listener import declaration
from outbox.listener.attempt import Attempt, Work, is_outage
from outbox.listener.dead import GivenUp, Undertaker
from outbox.listener.guard import TransactionEscaped
from outbox.postgres import attempts, schema
from outbox.postgres.dead_letters import printable
from outbox.settings import Settings
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)

PREFETCH_BYTES = 16 * 1_048_576
_OUTAGE = Backoff(first=timedelta(seconds=0.2), longest=timedelta(seconds=10))
_running: dict[tuple[int, str, str], str] = {}  # client, stream, identity: subject


class Disposition(StrEnum):
    """What `on_error` decides about an event whose handler failed."""

    RETRY = "retry"
    DEAD_LETTER = "dead_letter"
    DISCARD = "discard"


class Listener(Worker, Generic[P_co]):
    """Handles the events of one subject; each takes effect once in the handler's database.

    The event's id is recorded in the inbox in the transaction that the handler is given, so its
    effect and the record commit together or not at all. Subclass it, declare `subject` and
    `queue_group`, and write `on_message`. `Listener[Model]` validates the payload.
    """

    subject: ClassVar[str] = ""
    queue_group: ClassVar[str] = ""
    service_name: ClassVar[str] = ""
    stream_name: ClassVar[str] = ""
    max_attempts: ClassVar[int] = 10
    timeout: ClassVar[timedelta | float] = timedelta(seconds=30)
    ack_wait: ClassVar[timedelta | float] = timedelta(seconds=30)
    concurrency: ClassVar[int] = 8
    ordered: ClassVar[bool] = False
    _handler: ClassVar[str] = "on_message"
    _adapter: ClassVar[TypeAdapter[Any] | None] = None
    _backoff: ClassVar[Backoff] = Backoff()

    @override
    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        declaration.check(cls, handler=cls._handler)
        cls._adapter = declaration.payload_adapter(cls, Listener)

    def __init__(
        self,
        js_client: JetStreamClient,
        sessionmaker: async_sessionmaker[AsyncSession],
        *,
        settings: Settings | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings or Settings.defaults()
        self.service = self.service_name or self.settings.source_service or ""
        if not self.service:
            raise ConfigurationError(
                f"{type(self).__name__}.service_name is missing, and so is OUTBOX_SOURCE_SERVICE"
            )
        if not self.subject or not self.queue_group:
            raise TypeError(f"{type(self).__name__} declares no subject or no queue_group")
        self.identity = f"{self.service}-{self.queue_group}"
        super().__init__(f"listener {self.identity}")
        self.grace = self.settings.grace
        self.stream = self.stream_name or self.settings.stream
        self.client = js_client
        self.sessionmaker = sessionmaker
        self.observer = observer or Observer()
        self._attempt = Attempt(
            sessionmaker,
            self.settings.schema_name,
            self.identity,
            self.service,
            declaration.duration(self.timeout),
            self.observer,
        )
        self._undertaker = Undertaker(
            js_client, sessionmaker, self.settings.schema_name, self.identity, self.service, {}
        )
        self._in_hand: dict[int, Message] = {}
        self._free = asyncio.Semaphore(self.concurrency)
        self._alone = asyncio.Lock()
        self._outage_since: float | None = None
        self._outages = 0
        self._created = ""
        self._prepared = False

    # ---- what a subclass writes ---------------------------------------------------------------

    async def on_message(self, session: AsyncSession, event: EventEnvelope[P_co]) -> None:
        """Apply the event to `session`; the listener commits. Raise `Retry` or `Reject`, or any.

        The handler may run more than once; of all runs one commits.
        """
        raise NotImplementedError

    async def on_error(
        self, error: Exception, event: EventEnvelope[P_co]
    ) -> Disposition | bool | None:
        """Decide early about a failed event, after its rollback; None keeps the default.

        True stands for DISCARD and False for RETRY, as in older listeners.
        """
        del error, event
        return None

    async def handle(self, session: AsyncSession, event: EventEnvelope[P_co]) -> None:
        """Call `on_message`; override it for what surrounds every handler."""
        await self.on_message(session, event)

    # ---- life ---------------------------------------------------------------------------------

    @override
    async def _live(self) -> None:
        place = (id(self.client), self.stream, self.identity)
        with self._claimed(place):
            while not self.stopping.is_set():
                try:
                    await self._prepare()
                    await self._consume()
                except ConsumerGone:
                    logger.warning("the consumer is gone", extra={"listener": self.identity})
                except (OutboxError, SQLAlchemyError, OSError) as error:
                    if not self._prepared and not _is_nobodys(error):
                        raise  # wrong configuration at start; later it is an outage like others
                    await self._hold_on(error)

    @contextlib.contextmanager
    def _claimed(self, place: tuple[int, str, str]) -> Iterator[None]:
        """Refuse a second subject under one identity: both would share one durable."""
        known = _running.get(place)
        if known is not None and known != self.subject:
            raise ConfigurationError(
                f"two listeners share the identity {self.identity}, one on {known} and one on "
                f"{self.subject}: give one of them another queue_group"
            )
        _running[place] = self.subject
        try:
            yield
        finally:
            if known is None:
                _running.pop(place, None)

    async def _prepare(self) -> None:
        """Check schema, stream and consumer, and make the consumer when it is missing."""
        async with self.sessionmaker() as session:
            await schema.check_version(await session.connection(), self.settings.schema_name)
        facts = await provisioning.check_stream(self.client, self.stream, [self.subject])
        self._created = facts.created
        await provisioning.ensure_consumer(
            self.client,
            stream=self.stream,
            durable=self.identity,
            filter_subject=self.subject,
            ack_wait=declaration.duration(self.ack_wait),
            max_ack_pending=max(1000, 4 * self._prefetch()),
        )
        self._prepared = True

    async def _consume(self) -> None:
        puller = Puller(
            self.client,
            stream=self.stream,
            durable=self.identity,
            prefetch=self._prefetch(),
            bytes_max=PREFETCH_BYTES,
        )
        async with puller:
            beating = asyncio.create_task(self._beat(puller), name="heartbeats")
            stopped = asyncio.create_task(self.stopping.wait(), name="stop")
            try:
                async with asyncio.TaskGroup() as tasks:
                    gone = await self._feed(puller, tasks, stopped)
            finally:
                for task in (beating, stopped):
                    task.cancel()
                await asyncio.wait({beating, stopped})
                while puller.waiting:  # nobody took them: they come again at once, elsewhere
                    await puller.nak(await puller.next())
        if gone is not None:
            raise gone

    def _prefetch(self) -> int:
        return self.concurrency

    async def _feed(
        self, puller: Puller, tasks: asyncio.TaskGroup, stopped: "asyncio.Task[bool]"
    ) -> ConsumerGone | None:
        """Take messages in hand until stopped or the consumer is gone, which is returned.

        Once twice what may run at once is in hand, no more is asked for.
        """
        while not self.stopping.is_set():
            try:
                message = await _first(puller, stopped)
            except ConsumerGone as error:
                return error
            if message is None:
                break
            self._take(message)
            tasks.create_task(self._one(puller, message), name=f"event {message.sequence}")
            if len(self._in_hand) >= 2 * self._prefetch():
                puller.pause()
        puller.pause()
        return None

    def _take(self, message: Message) -> None:
        self._in_hand[id(message)] = message
        self._tell(Step.RECEIVED, message)

    def _put_down(self, puller: Puller, message: Message) -> None:
        self._in_hand.pop(id(message), None)
        if len(self._in_hand) < self._prefetch() and not self.stopping.is_set():
            puller.resume()

    async def _beat(self, puller: Puller) -> None:
        """Tell the broker that what is in hand is worked on; each handler ends at `timeout`."""
        interval = declaration.duration(self.ack_wait).total_seconds() / 3
        while True:
            await asyncio.sleep(interval)
            for message in list(self._in_hand.values()):
                await puller.in_progress(message)

    # ---- one message --------------------------------------------------------------------------

    async def _one(self, puller: Puller, message: Message) -> None:
        """Handle one message and answer the broker; never raises but on cancellation."""
        try:
            try:
                event = self._parsed(message)
            except MalformedMessage as error:
                await self._bury_unread(puller, message, error)
                return
            key = inbox_key(event.event_id)
            try:
                event = self._with_payload(event)
            except ValidationError as error:
                text = _summary(error)
                await self._give_up(puller, message, Work(event, key), "invalid_payload", text)
                return
            await self._work(puller, message, Work(event, key))
        except (OutboxError, SQLAlchemyError, OSError) as error:
            await self._outage(puller, message, error)
        except asyncio.CancelledError:
            await puller.nak(message)
            raise
        finally:
            self._put_down(puller, message)

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
        if self._adapter is None:
            return event
        return dataclasses.replace(event, payload=self._adapter.validate_python(event.data))

    async def _work(self, puller: Puller, message: Message, work: Work) -> None:
        if message.delivered == 1:
            async with self._free:
                if self.stopping.is_set():
                    await puller.nak(message)
                else:
                    await self._try(puller, message, work, marked=False)
            return
        started = await self._start(work)
        if started is None:
            await self._known(puller, message)
            return
        if started.unfinished + started.failed >= self.max_attempts:
            error = f"{started.failed} failures and {started.unfinished} starts without an end"
            await self._give_up(puller, message, work, "attempts", error)
            return
        async with self._alone_or_not(alone=started.unfinished > 0):
            await self._try(puller, message, work, marked=True)

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

    async def _start(self, work: Work) -> attempts.Started | None:
        async with self.sessionmaker() as session, session.begin():
            return await attempts.start(
                session, self.settings.schema_name, listener=self.identity, event_id=work.key
            )

    async def _try(self, puller: Puller, message: Message, work: Work, *, marked: bool) -> None:
        try:
            new = await self._attempt.run([work], self._handle_all, marked=marked)
        except TransactionEscaped as error:
            await self._escaped(puller, message, work, error)
            return
        except (DatabaseUnavailable, asyncio.CancelledError):
            await self._release(work, marked=marked)
            raise
        except Exception as error:  # the one place where a handler's failure is taken
            logger.warning(
                "a handler failed",
                extra=self._facts(message, work) | {"error_type": type(error).__name__},
                exc_info=not isinstance(error, Retry | Reject),
            )
            await self._failed(puller, message, work, error, marked=marked)
            return
        self._recovered()
        if new:
            await self._ack(puller, message)
        else:
            await self._known(puller, message)

    async def _escaped(
        self, puller: Puller, message: Message, work: Work, error: TransactionEscaped
    ) -> None:
        """Give up an event whose handler ended the transaction: its inbox row may be committed."""
        await self._give_up(puller, message, work, "handler_transaction", str(error), override=True)

    async def _handle_all(self, session: AsyncSession, works: Sequence[Work]) -> None:
        for work in works:
            await self.handle(session, work.event)

    async def _failed(
        self, puller: Puller, message: Message, work: Work, error: Exception, *, marked: bool
    ) -> None:
        decision = await self._decide(error, work)
        text = f"{type(error).__name__}: {error}"
        if decision is not Disposition.RETRY:
            reason = "rejected" if isinstance(error, Reject) else "on_error"
            await self._give_up(
                puller,
                message,
                work,
                "discarded" if decision is Disposition.DISCARD else reason,
                text,
                discarded=decision is Disposition.DISCARD,
            )
            return
        seen = await self._count(work, error, text, marked=marked)
        if seen.failed + seen.unfinished >= self.max_attempts:
            await self._give_up(puller, message, work, "attempts", text)
            return
        delay = self._delay(error, seen.failed)
        self._tell(Step.RETRIED, message, event=work.event, reason=type(error).__name__)
        await puller.nak(message, delay)

    async def _decide(self, error: Exception, work: Work) -> Disposition:
        if isinstance(error, Reject):
            return Disposition.DEAD_LETTER
        if isinstance(error, Retry):
            return Disposition.RETRY
        try:
            answer = self.on_error(error, work.event)
            decided = await answer if inspect.isawaitable(answer) else answer
        except Exception:  # the user's code: what it would have decided is not known
            logger.exception("on_error failed", extra={"listener": self.identity})
            return Disposition.RETRY
        if isinstance(decided, bool):
            return Disposition.DISCARD if decided else Disposition.RETRY
        return Disposition.RETRY if decided is None else decided

    def _delay(self, error: Exception, failed: int) -> timedelta:
        if isinstance(error, Retry) and error.after is not None:
            return error.after
        return self._backoff.delay(failed)

    async def _count(
        self, work: Work, error: Exception, text: str, *, marked: bool
    ) -> attempts.Started:
        """Count the failure, on a fresh connection: if none answers, it was an outage."""
        async with self.sessionmaker() as session, session.begin():
            seen = await attempts.seen(
                session, self.settings.schema_name, listener=self.identity, event_id=work.key
            )
            return await attempts.fail(
                session,
                self.settings.schema_name,
                listener=self.identity,
                event_id=work.key,
                marked=marked,
                delay=self._delay(error, seen.failed + 1),
                error=printable(text),
            )

    async def _release(self, work: Work, *, marked: bool) -> None:
        """End a start that was nobody's failure; a dead database keeps it, which is safe."""
        if not marked:
            return
        with contextlib.suppress(SQLAlchemyError, OSError):
            async with self.sessionmaker() as session, session.begin():
                await attempts.release(
                    session, self.settings.schema_name, listener=self.identity, event_id=work.key
                )

    # ---- answers ------------------------------------------------------------------------------

    async def _ack(self, puller: Puller, message: Message) -> None:
        await puller.ack(message)
        self._tell(Step.ACKED, message)

    async def _known(self, puller: Puller, message: Message) -> None:
        self._tell(Step.DUPLICATE, message)
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
        async with self.sessionmaker() as session:
            seen = await attempts.seen(
                session, self.settings.schema_name, listener=self.identity, event_id=work.key
            )
        given = GivenUp(
            message,
            work.key,
            event.event_id if event.event_id != str(work.key) else None,
            event.key,
            reason,
            error,
            max(seen.failed + seen.unfinished, 1),
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
            self._created,
            message.sequence,
            message.timestamp.isoformat(),
            message.body,
        )
        given = GivenUp(message, key, None, None, str(error.reason), error.detail, 1)
        await self._bury(puller, message, given)

    async def _bury(self, puller: Puller, message: Message, given: GivenUp) -> None:
        if await self._undertaker.bury(given):
            logger.error(
                "gave up an event",
                extra={
                    "listener": self.identity,
                    "event_id": str(given.key),
                    "subject": shorten(message.subject),
                    "reason": given.reason,
                },
            )
            self._tell(Step.DEAD_LETTERED, message, reason=given.reason)
        await self._ack(puller, message)

    # ---- outages ------------------------------------------------------------------------------

    async def _outage(self, puller: Puller, message: Message, error: Exception) -> None:
        """Hand the message back; nothing is spent on an outage."""
        self._began(error)
        await puller.nak(message, _OUTAGE.delay(self._outages))

    async def _hold_on(self, error: Exception) -> None:
        self._began(error)
        await self.pause(_OUTAGE.delay(self._outages))

    def _began(self, error: Exception) -> None:
        self._outages += 1
        if self._outage_since is not None:
            return
        self._outage_since = time.monotonic()
        reason = type(error).__name__
        logger.warning("outage began", extra={"listener": self.identity, "error_type": reason})
        self.observer.on_step(Moment(Step.OUTAGE_BEGAN, self.identity, reason=reason))

    def _recovered(self) -> None:
        if self._outage_since is None:
            return
        seconds = time.monotonic() - self._outage_since
        self._outage_since, self._outages = None, 0
        logger.warning("outage ended", extra={"listener": self.identity, "seconds": seconds})
        self.observer.on_step(Moment(Step.OUTAGE_ENDED, self.identity, seconds=seconds))

    # ---- telling ------------------------------------------------------------------------------

    def _tell(
        self,
        step: Step,
        message: Message,
        *,
        event: EventEnvelope[Any] | None = None,
        reason: str | None = None,
    ) -> None:
        self.observer.on_step(
            Moment(
                step,
                self.identity,
                event_id=event.event_id if event else message.headers.get("Nats-Msg-Id"),
                subject=message.subject,
                reason=reason,
                attempt=message.delivered,
                sequence=message.sequence,
            )
        )

    def _facts(self, message: Message, work: Work) -> dict[str, object]:
        return {
            "listener": self.identity,
            "event_id": work.event.event_id,
            "subject": message.subject,
            "attempt": message.delivered,
        }


def _is_nobodys(error: Exception) -> bool:
    """Return True for an outage of broker or database, which waiting mends."""
    if isinstance(error, SQLAlchemyError):
        return not isinstance(error, DBAPIError) or is_outage(error)
    return isinstance(error, BrokerUnavailable | DatabaseUnavailable | OSError)


async def _first(puller: Puller, stopped: "asyncio.Task[bool]") -> Message | None:
    """Return the next message, None once stopped."""
    if puller.waiting:
        return await puller.next()
    coming = asyncio.create_task(puller.next(), name="next message")
    try:
        await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait({coming})


def _summary(error: ValidationError) -> str:
    """Return which fields are wrong and how, without their values."""
    found = error.errors(include_input=False, include_url=False)
    return "; ".join(sorted({f"{'.'.join(map(str, e['loc']))}: {e['type']}" for e in found}))
