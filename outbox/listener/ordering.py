"""Ordered handling: one active instance, one event of a key at a time, in the stream's order.

The active instance moves what it pulls into a table of its own database, acks it, and works that
queue: keys side by side, the events of a key one after the other. So a key whose head waits for a
retry holds back nothing but itself, neither memory nor the broker's `max_ack_pending`. The lease is
checked in each handler's transaction, so two instances that both believe in theirs cannot both
commit.
"""

import asyncio
import contextlib
import heapq
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import uuid4

from sqlalchemy.event import listen
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from outbox.envelope import decode_headers
from outbox.errors import OutboxError
from outbox.jetstream import provisioning
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.pulling import ConsumerGone, Message, Puller
from outbox.listener.attempt import DATABASE_SECONDS, InHand
from outbox.listener.dead import header_bytes, header_key
from outbox.listener.handling import Handling
from outbox.postgres import inbox
from outbox.postgres.dead_letters import printable
from outbox.postgres.ordering import Held, Place, Queue
from outbox.telemetry import Step

logger = logging.getLogger(__name__)
BATCH = 500  # messages that are held by one statement, and places that are read by one
SWEEP_SECONDS = 30.0
FLOOR_LOOK_FIRST, FLOOR_LOOK = 0.002, 0.2  # seconds between two looks at the consumer
AFTER_CANCELLATION = timedelta(seconds=1)
PARKED_LOOK = 1.0  # seconds between two looks at whether a person has decided
START = Place("", 0, datetime.min.replace(tzinfo=UTC), None)


class LeaseLost(Exception):  # noqa: N818 - a state; handled inside the listener
    """Another instance is active."""


@dataclass(slots=True)
class Ordered:
    """Works the queue of one listener while this instance is the active one."""

    sessionmaker: async_sessionmaker[AsyncSession]
    client: JetStreamClient
    handling: Handling
    make_puller: Callable[[], Puller]
    pause: Callable[[timedelta | float], Awaitable[bool]]  # returns True when stopping
    schema: str
    stream: str
    identity: str
    lease: timedelta
    _queue: Queue = field(init=False)
    _created: str = field(default="", init=False)  # the stream's incarnation
    _cursor: Place = field(default=START, init=False)
    _floor: int = field(default=0, init=False)  # all messages up to it have come into the queue
    _waits: float = field(default=FLOOR_LOOK_FIRST, init=False)  # before the next look at it
    _busy: set[str | Place] = field(default_factory=set, init=False)  # turns at work, or waiting
    _later: list[tuple[float, int, Place]] = field(default_factory=list, init=False)  # a heap
    _order: int = field(default=0, init=False)
    _skipped: set[str | Place] = field(default_factory=set, init=False)  # of them: more was seen
    _parked: dict[str, Place] = field(default_factory=dict, init=False)  # key: its first event
    _looked: float = field(default=0.0, init=False)  # at them, loop time
    _swept: float = field(default=0.0, init=False)  # loop time
    _generation: int = field(default=-1, init=False)  # of the connection
    _failure: Exception | None = field(default=None, init=False)
    _work: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._queue = Queue(self.schema, self.identity, uuid4())
        self._places = asyncio.Semaphore(2 * self.handling.concurrency)
        self.handling.begun = lambda _: None  # nothing is unacked while a handler runs

    async def serve(self, created: str) -> None:
        """Stand by for the lease, then work until stopped, or until something ends it.

        Args:
            created: the stream's incarnation.

        Raises:
            ConsumerGone: it has to be made again.
            OutboxError, SQLAlchemyError, OSError: an outage; begin anew after a while.
        """
        self._created = created
        while not self.handling.stopping.is_set():
            if not await self._taken():
                await self.pause(self.lease / 3)
                continue
            try:
                await self._active(created)
            except LeaseLost:
                logger.warning("another instance is active", extra={"listener": self.identity})
                continue
            finally:
                with contextlib.suppress(SQLAlchemyError, OSError):
                    async with self._transaction() as session:
                        await self._queue.release(session)

    @contextlib.asynccontextmanager
    async def _transaction(self) -> Any:
        async with (
            asyncio.timeout(DATABASE_SECONDS),
            self.sessionmaker() as session,
            session.begin(),
        ):
            yield session

    async def _taken(self) -> bool:
        name = f"{socket.gethostname()}:{os.getpid()}"[:255]
        async with self._transaction() as session:
            epoch = await self._queue.take(session, name, self.lease)
        if epoch is None:
            return False
        self._queue = replace(self._queue, epoch=epoch)
        self.handling.attempt = replace(self.handling.attempt, fence=self._fence)
        self._cursor, self._floor = START, 0
        self._busy.clear()
        self._skipped.clear()
        self._later.clear()
        self._parked.clear()
        self._failure = None
        self._swept = asyncio.get_running_loop().time()
        self._generation = self.client.generation
        logger.info("active", extra={"listener": self.identity, "epoch": epoch})
        return True

    async def _fence(self, session: AsyncSession) -> None:
        """Refuse the commit of a handler whose lease another instance has taken meanwhile.

        The event leaves the queue in the same transaction. Of a requeued dead letter there is none.
        """
        answer = _answering.get()
        if answer is None:
            mine = await self._queue.is_mine(session)
        else:
            mine = await self._queue.done_by_holder(session, answer.place)
            listen(session.sync_session, "after_commit", answer.committed, once=True)
        if not mine:
            raise InHand("another instance is active")

    async def _active(self, created: str) -> None:
        """Pull, hold and work, each beside the others; whichever fails ends them all."""
        async with self.make_puller() as puller:
            parts = {
                asyncio.create_task(self._keep(), name="ordered-lease"),
                asyncio.create_task(self._feed(puller, created), name="ordered-feed"),
                asyncio.create_task(self._work_all(), name="ordered-work"),
            }
            stopped = asyncio.create_task(self.handling.stopping.wait(), name="stop")
            try:
                await asyncio.wait({*parts, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    puller.pause()
                    self._work.set()
                    worker = next(part for part in parts if part.get_name() == "ordered-work")
                    await asyncio.wait({worker})  # what is at work ends; the grace bounds it
            finally:
                for task in (*parts, stopped):
                    task.cancel()
                await asyncio.wait({*parts, stopped})
            while puller.waiting:
                await puller.nak(await puller.next())
        for part in parts:
            if not part.cancelled() and (error := part.exception()) is not None:
                raise error

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 3)
            async with self._transaction() as session:
                if not await self._queue.renew(session, self.lease):
                    raise LeaseLost

    # ---- in ----------------------------------------------------------------------------------

    async def _feed(self, puller: Puller, created: str) -> None:
        """Move messages into the queue, and ack what is committed there."""
        while True:
            messages = [await puller.next()]
            while puller.waiting and len(messages) < BATCH:
                messages.append(await puller.next())
            try:
                duplicates = await self._hold(created, messages)
            except BaseException:
                for message in messages:
                    await puller.nak(message)
                raise
            for message in duplicates:
                self.handling.tell(Step.DUPLICATE, message)
            for message in messages:
                await puller.ack(message)
            self._work.set()

    async def _hold(self, created: str, messages: Sequence[Message]) -> list[Message]:
        """Move messages into the queue; return those that the inbox knows, which need no place.

        A consumer that was made again delivers the whole stream once more.
        """
        keys = [self.handling.key(message) for message in messages]
        async with self._transaction() as session:
            known = await inbox.known(
                session,
                self.schema,
                listener=self.identity,
                event_ids=[key for key in keys if key is not None],
            )
            new = [
                _held(message)
                for message, key in zip(messages, keys, strict=True)
                if key not in known
            ]
            if new:
                await self._queue.hold(session, created, new)
        return [message for message, key in zip(messages, keys, strict=True) if key in known]

    # ---- out ---------------------------------------------------------------------------------

    async def _work_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:  # which would wrap an outage into a group
            while not self._is_over():
                try:
                    await self._start_all(tasks)
                except (OutboxError, SQLAlchemyError, OSError) as error:
                    self._failure = error
        if self._failure is not None:
            raise self._failure

    async def _start_all(self, tasks: asyncio.TaskGroup) -> None:
        """Start what may be worked now; rest when that is nothing."""
        self._work.clear()
        started = await self._start_due(tasks)
        started += await self._start_released(tasks)
        started += await self._start_new(tasks)
        if not started:
            await self._rest()

    def _is_over(self) -> bool:
        return self._failure is not None or self.handling.stopping.is_set()

    async def _start_due(self, tasks: asyncio.TaskGroup) -> int:
        """Start the heads whose next try has come."""
        started, now = 0, asyncio.get_running_loop().time()
        while self._later and self._later[0][0] <= now:
            _, _, place = heapq.heappop(self._later)
            await self._start(tasks, place)
            started += 1
        return started

    async def _start_released(self, tasks: asyncio.TaskGroup) -> int:
        """Start the keys whose dead letter was handled or discarded."""
        now = asyncio.get_running_loop().time()
        if not self._parked or now - self._looked < PARKED_LOOK:
            return 0
        self._looked = now
        async with self._transaction() as session:
            still = await self._queue.parked(session, self._parked)
        released = [self._parked.pop(key) for key in self._parked.keys() - still]
        for place in released:
            await self._start(tasks, place)
        return len(released)

    async def _start_new(self, tasks: asyncio.TaskGroup) -> int:
        """Start what stands behind the cursor, but for busy keys: their turn comes with the key.

        Now and then from the beginning: a message that was lost on its way comes late.
        """
        now = asyncio.get_running_loop().time()
        if self.client.generation != self._generation:
            # A broker that was restored meanwhile gives sequences out once more.
            self._generation, self._floor, self._cursor = self.client.generation, 0, START
        if now - self._swept >= SWEEP_SECONDS:
            self._swept, self._cursor = now, START
        page = await self._page()
        last = max((each.sequence for each in page if each.created == self._created), default=0)
        beyond = last
        if last > self._floor:
            beyond = await self._look_at_floor(last)
            # What came late, before a place of this page, came after the page was read.
            page = [place for place in await self._page() if place[:3] <= page[-1][:3]]
        started = 0
        for place in page:
            if self._floor < place.sequence <= beyond and place.created == self._created:
                self._waits = min(2 * self._waits, FLOOR_LOOK)
                return started
            if _turn(place) in self._busy:
                self._skipped.add(_turn(place))
            else:
                await self._start(tasks, place)
            self._cursor = place
            started += 1
        self._waits = FLOOR_LOOK_FIRST
        return started

    async def _page(self) -> list[Place]:
        async with self._transaction() as session:
            return await self._queue.page(session, self._cursor, BATCH)

    async def _look_at_floor(self, last: int) -> int:
        """Learn up to where all messages of the stream are in the queue, of which `last` is one.

        What is not may be in the hands of an instance that is active no more, or was lost on its
        way. It comes again after the ack wait, and newer messages come before: worked at once, they
        would overtake it.

        Returns:
            The sequence that the stream has come to. What stands beyond it in the queue is of a
            past of the broker's, and waits for nothing.
        """
        info = await provisioning.consumer_info(self.client, self.stream, self.identity)
        if info is None:
            raise ConsumerGone(f"consumer {self.identity} is gone")
        self._floor = int(info["ack_floor"]["stream_seq"])
        if last <= int(info["delivered"]["stream_seq"]):
            return last
        taken = await self.client.api(f"STREAM.INFO.{self.stream}")
        return int(taken["state"]["last_seq"])

    async def _start(self, tasks: asyncio.TaskGroup, place: Place) -> None:
        self._busy.add(_turn(place))
        await self._places.acquire()
        tasks.create_task(self._one(place), name=f"event {place.sequence}")

    async def _rest(self) -> None:
        """Sleep until something comes, or the next try of a head."""
        loop = asyncio.get_running_loop()
        seconds = self._later[0][0] - loop.time() if self._later else 1.0
        if self._waits > FLOOR_LOOK_FIRST:
            seconds = min(seconds, self._waits)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(min(seconds, 1.0), 0.001)):
                await self._work.wait()

    async def _one(self, place: Place) -> None:
        """Work a place, and the key's later ones after it, until the key waits or is empty."""
        turn = _turn(place)
        try:
            while not self._is_over():
                self._skipped.discard(turn)
                async with self._transaction() as session:
                    found = await self._first(session, place)
                if found is not None and self._is_ahead(found.place, place):
                    self._busy.discard(turn)  # the cursor has not come to it
                    return
                if found is not None and not await self._worked(found):
                    return  # its turn stays busy
                if turn not in self._skipped and (found is None or not found.more):
                    self._busy.discard(turn)  # nothing behind it was there, nor was seen since
                    return
        except (OutboxError, SQLAlchemyError, OSError) as error:
            self._failure = error
        except asyncio.CancelledError:  # a handler may cancel its own task; the key goes on
            self._put_off(place, AFTER_CANCELLATION)
            raise
        finally:
            self._places.release()
            self._work.set()

    def _is_ahead(self, found: Place, started: Place) -> bool:
        """Return whether messages before `found` may be missing in the queue."""
        allowed = max(self._floor, started.sequence)
        return found.created == self._created and found.sequence > allowed

    async def _worked(self, found: Held) -> bool:
        """Have the event handled; return False when it waits: for its next try, or a person."""
        if found.parked and found.key is not None:
            self._parked[found.key] = found.place
            return False
        answer = _Answer(self, found.place)
        if found.due_seconds > 0:
            answer.delay = timedelta(seconds=float(found.due_seconds))
        else:
            _answering.set(answer)
            await self.handling.message(cast("Puller", answer), self._message(found))
        if answer.delay is not None:
            self._put_off(found.place, answer.delay)
        return answer.delay is None

    async def _first(self, session: AsyncSession, place: Place) -> Held | None:
        """Return the key's first event, which may stand before `place`; of no key the event."""
        if place.key is not None:
            return await self._queue.next_of_key(session, place.key)
        return await self._queue.row(session, place)

    def _put_off(self, place: Place, delay: timedelta) -> None:
        self._order += 1
        at = asyncio.get_running_loop().time() + delay.total_seconds()
        heapq.heappush(self._later, (at, self._order, place))
        self._work.set()

    def _message(self, found: Held) -> Message:
        """Return the event as a delivery; one of an earlier epoch may have been tried before."""
        tried = max(found.delivered, int(found.epoch != self._queue.epoch))
        return Message(
            subject=found.subject,
            headers=decode_headers(found.headers),
            body=found.body,
            reply="",
            stream=self.stream,
            sequence=found.sequence,
            delivered=tried + 1,
            timestamp=found.stored_at,
        )

    async def finish(self, place: Place) -> None:
        """Delete an event that is handled or given up; a crash before it finds the inbox row."""
        async with self._transaction() as session:
            await self._queue.done(session, place)

    async def postpone(self, place: Place, delay: timedelta) -> None:
        """Have a key wait; without a database it waits in memory."""
        with contextlib.suppress(SQLAlchemyError, OSError):
            async with self._transaction() as session:
                await self._queue.postpone(session, place, delay)


class _Answer:
    """Takes what the handling answers where a broker would."""

    def __init__(self, ordered: Ordered, place: Place) -> None:
        self._ordered = ordered
        self.place = place
        self.delay: timedelta | None = None
        self._gone = False  # with the handler's transaction

    def committed(self, session: object) -> None:
        """Note that the handler's transaction has committed, which has deleted the event."""
        del session
        self._gone = True

    async def ack(self, message: Message) -> None:
        """Finish with the event."""
        del message
        if not self._gone:
            await self._ordered.finish(self.place)

    async def nak(self, message: Message, delay: timedelta = timedelta(0)) -> None:
        """Have the event tried again."""
        del message
        self.delay = delay
        await self._ordered.postpone(self.place, delay)


# The event that is handled in this task.
_answering: ContextVar[_Answer | None] = ContextVar("outbox_ordered_answer", default=None)


def _turn(place: Place) -> str | Place:
    """Return what is worked one at a time: a key, or an event without one."""
    return place if place.key is None else place.key


def _held(message: Message) -> Held:
    """Return a message as a row; what no text column takes of a stranger's is left out, or escaped.

    The event then fails as it would by itself: its type is not the subject.
    """
    return Held(
        "",
        message.sequence,
        header_key(message),
        printable(message.subject),
        header_bytes(message.headers),
        message.body,
        message.timestamp,
        0,
        0,
        0.0,
        parked=False,
        more=False,
    )
