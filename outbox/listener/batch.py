"""Handling many events in one transaction."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override

from outbox.envelope import EventEnvelope, P_co
from outbox.errors import DatabaseUnavailable
from outbox.jetstream.pulling import Message, Puller
from outbox.listener.attempt import Work
from outbox.listener.guard import TransactionEscaped
from outbox.listener.handling import Handling
from outbox.listener.listener import Listener

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
            async with self._free:
                await self._run_batch(puller, batch)

    async def _run_batch(self, puller: Puller, batch: Sequence[_Entry]) -> None:
        if self.stopping.is_set():
            for entry in batch:
                await puller.nak(entry.message)
            return
        works = [entry.work for entry in batch]
        try:
            await self.attempt.run(works, self.handle, marked=False)
        except DatabaseUnavailable as error:
            for entry in batch:
                await self.hand_back(puller, entry.message, error)
            return
        except TransactionEscaped as error:
            for entry in batch:
                await self._escaped(puller, entry.message, entry.work, error)
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
            try:
                await self._try(puller, entry.message, entry.work, marked=False)
            except DatabaseUnavailable as error:
                await self.hand_back(puller, entry.message, error)


class BatchListener(Listener[P_co]):
    """Handles up to `batch_size` events in one transaction; an event that fails is retried alone.

    Only first deliveries enter a batch: one that failed before would spoil each batch it is in.
    """

    batch_size: ClassVar[int] = 200
    _handler: ClassVar[str] = "on_batch"

    async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope[P_co]]) -> None:
        """Apply `events`, in stream order, to `session`; the listener commits."""
        raise NotImplementedError

    @override
    def _make_handling(self, kind: type[Handling] = Batching, **more: Any) -> Handling:
        return super()._make_handling(kind, batch_size=self.batch_size, **more)

    @override
    def _prefetch(self) -> int:
        return max(self.batch_size, self.concurrency)

    @override
    async def _handle_all(self, session: AsyncSession, works: Sequence[Work]) -> None:
        await self.on_batch(session, [work.event for work in works])
