"""Handling many events in one transaction."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override

from outbox.context import EntryPoint, LogFacts, logged
from outbox.envelope import EventEnvelope, P_co
from outbox.errors import DatabaseUnavailable, OutboxError
from outbox.jetstream.pulling import Message, Puller
from outbox.listener.attempt import Work
from outbox.listener.guard import TransactionEscaped
from outbox.listener.handling import Handling
from outbox.listener.listener import Listener
from outbox.postgres import attempts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    message: Message
    work: Work
    done: bool = False


@dataclass(kw_only=True)
class Batching(Handling):
    """Handles first deliveries in batches; what comes again is handled alone.

    While one batch runs the next gathers, so a batch is as large as the load makes it.
    """

    batch_size: int
    waits: Callable[[Message], None]  # it waits for its turn after a batch has failed
    _gathering: list[_Entry] = field(default_factory=list, init=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    @override
    async def _work(self, puller: Puller, message: Message, work: Work) -> None:
        if message.delivered > 1:
            await super()._work(puller, message, work)
            return
        entry = _Entry(message, work)
        self._gathering.append(entry)
        async with self._turn:
            if entry.done:
                return
            batch = self._gathering[: self.batch_size]
            del self._gathering[: self.batch_size]
            for each in batch:
                each.done = True
            await self._take_batch(puller, batch)

    async def _take_batch(self, puller: Puller, batch: Sequence[_Entry]) -> None:
        """Run those together that were never tried; the others one by one, as redelivered ones."""
        try:
            async with self._free:
                tried = await self._tried(batch)
                fresh = [entry for entry in batch if entry.work.key not in tried]
                if self.stopping.is_set():
                    for entry in batch:
                        await puller.nak(entry.message)
                    return
                if fresh:
                    await self._run_batch(puller, fresh)
        except (DatabaseUnavailable, SQLAlchemyError, OSError) as error:
            for entry in batch:
                await self.hand_back(puller, entry.message, error)
            return
        for entry in batch:  # the place is free again: one of them may need all places
            if entry.work.key in tried:
                again = self._again(puller, entry.message, entry.work)
                await self._or_hand_back(puller, entry.message, again)

    async def _tried(self, batch: Sequence[_Entry]) -> set[UUID]:
        async with self.transaction() as session:
            return await attempts.among(
                session,
                self.attempt.schema,
                listener=self.attempt.listener,
                event_ids=[entry.work.key for entry in batch],
            )

    async def _run_batch(self, puller: Puller, batch: Sequence[_Entry]) -> None:
        works = [entry.work for entry in batch]
        for entry in batch:
            self.begun(entry.message)
        try:
            with logged(LogFacts(EntryPoint.LISTENER, self.attempt.service)):  # of no single event
                await self.attempt.run(works, self.handle, marked=False)
        except DatabaseUnavailable:
            raise
        except TransactionEscaped as error:
            for entry in batch:
                given_up = self._escaped(puller, entry.message, entry.work, error)
                await self._or_hand_back(puller, entry.message, given_up)
            return
        except Exception as error:  # noqa: BLE001 - which event it was shows when each runs alone
            logger.info(
                "a batch failed, its events are handled one by one",
                extra={
                    "listener": self.attempt.listener,
                    "events": len(batch),
                    "error_type": type(error).__name__,
                },
            )
            await self._one_by_one(puller, batch)
            return
        self.outage.ended()
        for entry in batch:
            await self._ack(puller, entry.message)

    async def _one_by_one(self, puller: Puller, batch: Sequence[_Entry]) -> None:
        for entry in batch:
            self.waits(entry.message)
        for entry in batch:
            alone = self._try(puller, entry.message, entry.work, marked=False)
            with self.logged(entry.work.event):
                await self._or_hand_back(puller, entry.message, alone)

    async def _or_hand_back(
        self, puller: Puller, message: Message, running: Coroutine[None, None, None]
    ) -> None:
        """Run one event of a batch; an outage hands back this one, not the whole batch."""
        try:
            await running
        except (OutboxError, SQLAlchemyError, OSError) as error:
            await self.hand_back(puller, message, error)


class BatchListener(Listener[P_co]):
    """Handles up to `batch_size` events in one transaction; an event that fails is retried alone.

    Only events that were never tried enter a batch: one that failed would spoil each batch.
    """

    batch_size: ClassVar[int] = 200
    _handler: ClassVar[str] = "on_batch"

    @override
    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.ordered:
            raise TypeError(f"{cls.__name__}: a batch cannot be ordered; use Listener")

    async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope[P_co]]) -> None:
        """Apply `events`, in stream order, to `session`; the listener commits."""
        raise NotImplementedError

    @override
    def make_handling(self, kind: type[Handling] = Batching, **more: Any) -> Handling:
        more |= {"batch_size": self.batch_size, "waits": self._beat_on}
        return super().make_handling(kind, **more)

    @override
    def _prefetch(self) -> int:
        return max(self.batch_size, self._places)

    @override
    async def _handle_all(self, session: AsyncSession, works: Sequence[Work]) -> None:
        await self.on_batch(session, [work.event for work in works])
