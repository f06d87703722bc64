"""One attempt: record, handle, prove, commit; then ack. What may go wrong is named here."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InternalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from outbox import context, tracing
from outbox.envelope import EventEnvelope
from outbox.errors import DatabaseUnavailable, HandlerError, OutboxError
from outbox.listener.guard import Guard, TransactionBroken, TransactionEscaped
from outbox.postgres import attempts, inbox, redrive
from outbox.telemetry import Fact, Moment, Observer, Step
from outbox.writer import write_buffered

logger = logging.getLogger(__name__)

# serialization_failure, deadlock_detected, lock_not_available: nobody's failure, repeated at once
CONTENTION = frozenset({"40001", "40P01", "55P03"})
CONTENTION_REPEATS = 5
DATABASE_SECONDS = 30.0  # for what the listener itself asks; a dead link answers nothing
# connection lost, server shutting down or starting, too many connections
_OUTAGE_CLASSES = ("08", "57P", "53")


class InHand(OutboxError):  # noqa: N818 - internal
    """Another transaction records the same event and stays open; nothing was spent."""


class ConnectionLost(OutboxError):  # noqa: N818 - internal
    """The database ended the handler's connection: an outage, unless others are served."""


@dataclass(frozen=True, slots=True)
class Work:
    """An event in hand, parsed, with its inbox key."""

    event: EventEnvelope[Any]
    key: UUID


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one listener runs its handler on events, in one transaction each time."""

    sessionmaker: async_sessionmaker[AsyncSession]
    schema: str
    listener: str
    service: str
    timeout: timedelta
    observer: Observer
    fence: Callable[[AsyncSession], Awaitable[None]] | None = None  # raises to refuse the commit

    async def run(
        self,
        works: Sequence[Work],
        handle: Callable[[AsyncSession, Sequence[Work]], Awaitable[None]],
        *,
        marked: bool,
        letter: int | None = None,
    ) -> int:
        """Commit the effect of `handle` on those events that are new; return how many were.

        Args:
            works: events; more than one only for a batch.
            handle: called with the new ones, inside the transaction.
            marked: an attempt row exists, and is deleted in the same transaction.
            letter: the requeued dead letter that the one work comes from.

        Raises:
            TransactionEscaped: the handler ended the transaction by SQL.
            DatabaseUnavailable: nobody's failure.
            InHand: another instance is at one of the events.
            ConnectionLost: perhaps the handler's doing, perhaps an outage.
            Exception: whatever the handler raised; nothing was committed.
        """
        for repeat in range(CONTENTION_REPEATS + 1):
            clock = asyncio.timeout(self.timeout.total_seconds() + DATABASE_SECONDS)
            try:
                async with clock:
                    return await self._once(works, handle, marked=marked, letter=letter)
            except TimeoutError as error:
                if clock.expired():
                    raise DatabaseUnavailable("no answer in time") from error
                raise
            except DBAPIError as error:
                if is_outage(error):
                    raise DatabaseUnavailable(type(error.orig).__name__) from error
                if sqlstate(error) not in CONTENTION or repeat == CONTENTION_REPEATS:
                    raise
        raise AssertionError  # the loop always ends by return or raise

    async def _once(
        self,
        works: Sequence[Work],
        handle: Callable[[AsyncSession, Sequence[Work]], Awaitable[None]],
        *,
        marked: bool,
        letter: int | None,
    ) -> int:
        async with self.sessionmaker() as session:
            new, xid = await self._recorded(session, works, letter)
            if xid is None:
                return 0
            connection = (await session.connection()).sync_connection
            assert connection is not None  # noqa: S101 - the transaction is open on it
            spanned = tracing.processing(self.listener, [work.event for work in new])
            with spanned, Guard(session, connection, xid) as guard:
                await self._handle(session, new, handle, guard)
                await session.flush()
                if marked:
                    for work in new:
                        await attempts.forget(
                            session, self.schema, listener=self.listener, event_id=work.key
                        )
                if self.fence is not None:
                    await self.fence(session)
                await session.run_sync(write_buffered)
                self._tell(Step.FLUSHED, new)
                guard.release()
                await session.commit()
            self._tell(Step.COMMITTED, new)
            return len(new)

    async def _recorded(
        self, session: AsyncSession, works: Sequence[Work], letter: int | None
    ) -> tuple[list[Work], str | None]:
        """Record in a fresh transaction; what goes wrong here is never the handler's failure."""
        for _ in range(CONTENTION_REPEATS + 1):
            try:
                return await self._record(session, works, letter)
            except (OSError, PoolTimeout) as error:  # what the handler raises of these is its own
                raise DatabaseUnavailable(type(error).__name__) from error
            except DBAPIError as error:
                if sqlstate(error) not in CONTENTION:
                    raise
            await session.rollback()
        raise InHand("another transaction records the event")

    async def _record(
        self, session: AsyncSession, works: Sequence[Work], letter: int | None
    ) -> tuple[list[Work], str | None]:
        await _begin(session)
        if letter is not None:
            xid, unhandled = await redrive.reopen(session, self.schema, letter)
            if xid is None:
                raise InHand("another instance runs the dead letter")
            return (list(works), xid) if unhandled else ([], None)
        if len(works) == 1:
            xid = await inbox.record(
                session, self.schema, listener=self.listener, event_id=works[0].key
            )
            new = list(works) if xid is not None else []
        else:
            ids, xid = await inbox.record_many(
                session,
                self.schema,
                listener=self.listener,
                event_ids=[work.key for work in works],
            )
            new = _first_of_each(works, ids)
        if new:
            self._tell(Step.RECORDED, new)
        return new, xid

    async def _handle(
        self,
        session: AsyncSession,
        new: Sequence[Work],
        handle: Callable[[AsyncSession, Sequence[Work]], Awaitable[None]],
        guard: Guard,
    ) -> None:
        event = new[0].event
        running = context.Running(event.event_id, event.correlation_id, self.service, session)
        clock = asyncio.timeout(self.timeout.total_seconds())
        begun = time.monotonic()
        try:
            async with clock:
                with context.handling(running):
                    await handle(session, new)
            await guard.check(self.schema)
        except TransactionEscaped:
            raise
        except Exception as error:
            await self._look_for_escape(guard)
            reason = self._breach(error, timed_out=clock.expired())
            if reason is None and isinstance(error, DBAPIError) and is_outage(error):
                raise ConnectionLost(type(error.orig).__name__) from error
            if reason is None:
                raise
            raise HandlerError(self.listener, event.event_id, reason) from error
        self._tell(Step.HANDLED, new, time.monotonic() - begun)

    def _breach(self, error: Exception, *, timed_out: bool) -> str | None:
        """Return how the handler broke its contract, None when it merely raised."""
        if isinstance(error, TimeoutError) and timed_out:
            return f"timed out after {self.timeout.total_seconds():g} s"
        return str(error) if isinstance(error, TransactionBroken) else None

    async def _look_for_escape(self, guard: Guard) -> None:
        """Raise TransactionEscaped when a failed handler had ended the transaction by SQL."""
        try:
            await guard.check(self.schema)
        except TransactionEscaped:
            raise
        except Exception as error:  # noqa: BLE001 - the handler's own error says more
            logger.debug("the transaction is over", extra={"error_type": type(error).__name__})

    def _tell(self, step: Step, works: Sequence[Work], seconds: float | None = None) -> None:
        one = works[0].event if len(works) == 1 else None
        wanted = step is Step.COMMITTED and self.observer.wants_events
        self.observer.on_step(
            Moment(
                step,
                self.listener,
                count=len(works),
                event_id=one.event_id if one else None,
                subject=one.event_type if one else None,
                attempt=one.delivery.attempt if one else None,
                seconds=seconds,
                events=[_fact(work.event) for work in works] if wanted else (),
                sequence=one.delivery.sequence if one else None,
            )
        )


def _fact(event: EventEnvelope[Any]) -> Fact:
    return Fact(event.event_id, event.event_type, event.timestamp.timestamp())


async def _begin(session: AsyncSession) -> None:
    """Begin in READ COMMITTED, where a duplicate waits for the first and then is known."""
    if isinstance(session.sync_session.get_bind(), Engine):
        _ = await session.connection(execution_options={"isolation_level": "READ COMMITTED"})


def _first_of_each(works: Sequence[Work], ids: set[UUID]) -> list[Work]:
    """Return the works of `ids`; of two copies of one event in a batch only the first."""
    left = set(ids)
    new: list[Work] = []
    for work in works:
        if work.key in left:
            left.discard(work.key)
            new.append(work)
    return new


def sqlstate(error: DBAPIError) -> str:
    """Return the five characters that PostgreSQL answered, or nothing."""
    return str(getattr(error.orig, "sqlstate", None) or "")


def is_outage(error: BaseException) -> bool:
    """Return True for what the database does to everybody, not to this event."""
    if isinstance(error, DBAPIError):
        state = sqlstate(error)
        # asyncpg's own, not the server's: a connection that was lost in the middle of a statement
        lost = isinstance(error, InternalError) and not state
        return error.connection_invalidated or lost or state.startswith(_OUTAGE_CLASSES)
    return isinstance(error, OSError | DatabaseUnavailable)
