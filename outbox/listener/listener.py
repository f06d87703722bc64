"""The inbox-guarded listener: pulls, hands each event to its handler, and answers the broker."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Generic

from pydantic import TypeAdapter
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.pool import QueuePool
from typing_extensions import override

from outbox import findings
from outbox.backoff import Backoff
from outbox.envelope import (
    EventEnvelope,
    P_co,
)
from outbox.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    OutboxError,
)
from outbox.jetstream import examining, provisioning
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import ConsumerGone, Message, Puller
from outbox.lifecycle import Worker
from outbox.listener import declaration
from outbox.listener.attempt import DATABASE_SECONDS, Attempt, Work, is_outage
from outbox.listener.dead import Undertaker
from outbox.listener.gaps import GapWatch
from outbox.listener.handling import Disposition, Handling
from outbox.listener.health import Health
from outbox.listener.ordering import BATCH, Ordered
from outbox.listener.outage import Outage
from outbox.listener.redriving import Redriving
from outbox.postgres import schema
from outbox.settings import OnDead, Settings
from outbox.telemetry import Observer, Step

logger = logging.getLogger(__name__)

PREFETCH_BYTES = 16 * 1_048_576
AFTER_LOSS = timedelta(seconds=0.2)  # before a vanished consumer is made again
_running: dict[tuple[int, str, str], list[str]] = {}  # client, stream, identity: its subjects


class Listener(Worker, Generic[P_co]):
    """Handles the events of one subject; each takes effect once in the handler's database.

    The event's id is recorded in the inbox in the transaction that the handler is given, so its
    effect and the record commit together or not at all. Subclass it, declare `subject` and
    `queue_group`, and write `on_message`. `Listener[Model]` validates the payload; where a payload
    is registered for a subject, it must be `Model`, a subclass, or a member of the union.
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
    on_dead: ClassVar[str] = OnDead.CONTINUE
    _handler: ClassVar[str] = "on_message"
    _payload: ClassVar[Any] = None
    _adapter: ClassVar[TypeAdapter[Any] | None] = None
    _backoff: ClassVar[Backoff] = Backoff()

    @override
    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        declaration.check(cls, handler=cls._handler)
        cls._payload = declaration.payload_type(cls, Listener)
        cls._adapter = None if cls._payload is None else TypeAdapter(cls._payload)
        declaration.check_registered(cls, cls.subject, cls._payload)

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
        declaration.check_registered(type(self), self.subject, self._payload)  # later ones too
        self.identity = f"{self.service}-{self.queue_group}"
        super().__init__(f"listener {self.identity}")
        self.grace = self.settings.grace
        self.stream = self.stream_name or self.settings.stream
        self.client = js_client
        self.sessionmaker = sessionmaker
        self.observer = observer or Observer()
        self._outage = Outage(self.identity, self.observer)
        self._places = self._limited()
        self._beats_end: dict[int, float] = {}  # of what a handler runs on, by loop time
        self._handling = self.make_handling()
        self._in_hand: dict[int, Message] = {}
        self._gaps = GapWatch(self.client, self.stream, self.identity, self.observer)
        self._prepared = False

    @override
    def health(self) -> Health:
        """Return how this listener does, without asking anybody."""
        return Health(
            running=self.running,
            connected=self.client.is_connected,
            prepared=self._prepared,
            in_hand=len(self._in_hand),
            outage=self._outage.reason,
        )

    def make_handling(self, kind: type[Handling] = Handling, **more: Any) -> Handling:
        """Return what handles this listener's messages; for the library's own subclasses."""
        schema_name = self.settings.schema_name
        return kind(
            attempt=Attempt(
                self.sessionmaker,
                schema_name,
                self.identity,
                self.service,
                declaration.duration(self.timeout),
                self.observer,
            ),
            undertaker=Undertaker(
                self.client,
                self.sessionmaker,
                schema_name,
                self.identity,
                self.service,
                self.on_dead == OnDead.PARK_KEY,
                {},
            ),
            outage=self._outage,
            handle=self._handle_all,
            on_error=self.on_error,
            adapter=self._adapter,
            max_attempts=self.max_attempts,
            backoff=self._backoff,
            concurrency=self._places,
            begun=self._beat_until_timeout,
            stopping=self.stopping,
            **more,
        )

    def _limited(self) -> int:
        """Return how many handlers may run at once: no more than connections can be had."""
        room = _pool_room(self.sessionmaker)
        if room is None or room >= self.concurrency:
            return self.concurrency
        logger.warning(
            "concurrency is limited by the connection pool",
            extra={"listener": self.identity, "wanted": self.concurrency, "pool": room},
        )
        return room

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

    async def _handle_all(self, session: AsyncSession, works: Sequence[Work]) -> None:
        for work in works:
            await self.handle(session, work.event)

    # ---- life ---------------------------------------------------------------------------------

    @override
    async def _live(self) -> None:
        place = (id(self.client), self.stream, self.identity)
        redriving = Redriving(self._handling, self.settings.schema_name, self.identity, self.pause)
        with self._claimed(place):
            redrive = asyncio.create_task(redriving.run(), name="redrive")
            gaps = asyncio.create_task(self._gaps.run(self.pause), name="gaps")
            try:
                await self._serve()
            finally:
                for task in (redrive, gaps):
                    task.cancel()
                await asyncio.wait({redrive, gaps})
        if not redrive.cancelled() and (error := redrive.exception()) is not None:
            raise error

    async def _serve(self) -> None:
        """Prepare and consume until stopped; start anew after an outage."""
        while not self.stopping.is_set():
            try:
                await self._prepare()
                self._outage.ended()
                await self._consume()
            except ConsumerGone:
                logger.warning("the consumer is gone", extra={"listener": self.identity})
                await self.pause(AFTER_LOSS)
            except (OutboxError, SQLAlchemyError, OSError) as error:
                if not self._prepared and not _is_nobodys(error):
                    raise  # wrong configuration at start; later it is an outage like others
                await self.pause(self._outage.began(error))

    @contextlib.contextmanager
    def _claimed(self, place: tuple[int, str, str]) -> Iterator[None]:
        """Refuse a second subject under one identity: both would share one durable."""
        subjects = _running.setdefault(place, [])
        if subjects and subjects[0] != self.subject:
            raise ConfigurationError(
                f"two listeners share the identity {self.identity}, one on {subjects[0]} and one "
                f"on {self.subject}: give one of them another queue_group"
            )
        subjects.append(self.subject)
        try:
            yield
        finally:
            subjects.remove(self.subject)
            if not subjects:
                del _running[place]

    async def _prepare(self) -> None:
        """Check schema, stream and consumer, and make the consumer when it is missing."""
        async with asyncio.timeout(DATABASE_SECONDS), self.sessionmaker() as session:
            await schema.check_version(await session.connection(), self.settings.schema_name)
        facts = await provisioning.check_stream(self.client, self.stream, [self.subject])
        self._handling.stream_created = facts.created
        consumer = await provisioning.ensure_consumer(
            self.client,
            stream=self.stream,
            durable=self.identity,
            filter_subject=self.subject,
            ack_wait=declaration.duration(self.ack_wait),
            max_ack_pending=max(1000, 4 * self._prefetch()),
        )
        if not self._prepared:
            found = (
                *examining.stream(facts.config),
                *examining.retention(facts.config, self.settings),
                *examining.consumer(consumer),
            )
            findings.log(logger, found, listener=self.identity)
        self._prepared = True
        await self._gaps.look()

    def _puller(self) -> Puller:
        return Puller(
            self.client,
            stream=self.stream,
            durable=self.identity,
            prefetch=self._prefetch(),
            bytes_max=PREFETCH_BYTES,
        )

    async def _consume(self) -> None:
        if self.ordered:
            await self._consume_in_order()
            return
        puller = self._puller()
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

    async def _consume_in_order(self) -> None:
        ordered = Ordered(
            self.sessionmaker,
            self.client,
            self._handling,
            self._puller,
            self.pause,
            schema=self.settings.schema_name,
            stream=self.stream,
            identity=self.identity,
            lease=self.settings.lease,
        )
        await ordered.serve(self._handling.stream_created)

    def _prefetch(self) -> int:
        return BATCH if self.ordered else self._places

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
        self._handling.tell(Step.RECEIVED, message)

    async def _one(self, puller: Puller, message: Message) -> None:
        try:
            await self._handling.message(puller, message)
        finally:
            self._put_down(puller, message)

    def _put_down(self, puller: Puller, message: Message) -> None:
        self._in_hand.pop(id(message), None)
        self._beats_end.pop(id(message), None)
        if len(self._in_hand) < self._prefetch() and not self.stopping.is_set():
            puller.resume()

    async def _beat(self, puller: Puller) -> None:
        """Tell the broker that what is in hand is worked on, or waits; not beyond `timeout`."""
        interval = declaration.duration(self.ack_wait).total_seconds() / 3
        while True:
            await asyncio.sleep(interval)
            now = asyncio.get_running_loop().time()
            for message in list(self._in_hand.values()):
                if now < self._beats_end.get(id(message), math.inf):
                    await puller.in_progress(message)

    def _beat_until_timeout(self, message: Message) -> None:
        """End the heartbeats with the handler's time: one that cannot be stopped is given away."""
        seconds = declaration.duration(self.timeout).total_seconds()
        self._beats_end[id(message)] = asyncio.get_running_loop().time() + seconds

    def _beat_on(self, message: Message) -> None:
        self._beats_end.pop(id(message), None)


def _is_nobodys(error: Exception) -> bool:
    """Return True for an outage of broker or database, which waiting mends."""
    if isinstance(error, SQLAlchemyError):
        return not isinstance(error, DBAPIError) or is_outage(error)
    return isinstance(error, BrokerUnavailable | DatabaseUnavailable | OSError)


def _pool_room(sessions: async_sessionmaker[AsyncSession]) -> int | None:
    """Return how many connections the sessions' pool may open, None when nobody can tell."""
    pool = getattr(getattr(sessions, "kw", {}).get("bind"), "pool", None)
    if not isinstance(pool, QueuePool):
        return None
    overflow = int(getattr(pool, "_max_overflow", -1))
    return None if overflow < 0 or pool.size() == 0 else pool.size() + overflow


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
