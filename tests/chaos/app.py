"""The application: business transactions, each with its events and their ledger rows."""

import asyncio
import contextlib
import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from outbox import Outbox
from tests.chaos import process
from tests.chaos.failpoints import Failing
from tests.chaos.shared import CANARY, MESSAGE_BYTES_MAX, Journal, Orders, digest

PLACED, CHANGED = "evt.order.placed.v1", "evt.stock.changed.v1"
KEYS = 40
GENERATION_SECONDS = 8.0  # then other keys are used
NEXT = """
INSERT INTO counters (key, n) VALUES (:key, :count)
ON CONFLICT (key) DO UPDATE SET n = counters.n + excluded.n RETURNING n
"""
LEDGER = """
INSERT INTO ledger (event_id, subject, key, key_seq, digest, kind)
VALUES (:event_id, :subject, :key, :key_seq, :digest, :kind)
"""
# What handlers do with an event, and how often of a thousand.
KINDS = {"flaky": 25, "reject": 5, "commits": 3, "swallows": 3, "big": 3}

Target = AsyncSession | AsyncConnection


class RolledBack(Exception):  # noqa: N818 - ends a transaction on purpose
    """The business said no."""


class Writer:
    """Commits one business transaction after the other."""

    def __init__(self, orders: Orders, journal: Journal, task: int) -> None:
        self._random = random.Random(f"{orders.seed}-{orders.index}-{task}-{uuid4()}")
        self._events = Outbox("shop")
        self._journal = journal

    def pause(self, rate: float) -> float:
        """Return how long to wait before the next of `rate` transactions a second."""
        return self._random.uniform(0.5, 1.5) / rate

    async def transaction(self, engine: AsyncEngine) -> None:
        """Commit some events of one key, and some without; or roll them back."""
        if self._random.random() < 0.1:
            async with engine.begin() as connection:
                await self._business(connection)
            return
        async with AsyncSession(engine, expire_on_commit=False) as session:
            await self._business(session)
            if self._random.random() < 0.03:
                await self._cancelled(session)
            else:
                await session.commit()

    async def _business(self, target: Target) -> None:
        generation = int(asyncio.get_running_loop().time() / GENERATION_SECONDS)
        key = f"order-{generation}-{self._random.randrange(KEYS)}"
        count = self._random.choice((1, 1, 1, 2, 3, 5))
        last = await target.scalar(text(NEXT), {"key": key, "count": count})  # locks the key's row
        for number in range(int(last or 0) - count + 1, int(last or 0) + 1):
            await self._add(target, PLACED, key, number)
        if self._random.random() < 0.3:
            later = timedelta(seconds=self._random.uniform(0.2, 2.0))
            scheduled = datetime.now(UTC) + later if self._random.random() < 0.2 else None
            await self._add(target, CHANGED, None, None, deliver_at=scheduled)
        await self._odd(target)

    async def _odd(self, target: Target) -> None:
        """Do now and then what applications do: savepoints, early flushes, a change of mind."""
        chance = self._random.random()
        if chance < 0.05:
            with contextlib.suppress(RolledBack):
                async with target.begin_nested():
                    await self._add(target, CHANGED, None, None, ghost=True)
                    self._journal.note("savepoint_rolled_back")
                    raise RolledBack
        elif chance < 0.08:
            await self._events.flush(target)
            self._journal.note("late_commit")
            await asyncio.sleep(self._random.uniform(0.05, 0.6))  # its ids are drawn, unseen
        elif chance < 0.12:
            self._journal.note("rolled_back")
            raise RolledBack

    async def _add(
        self,
        target: Target,
        subject: str,
        key: str | None,
        number: int | None,
        *,
        deliver_at: datetime | None = None,
        ghost: bool = False,
    ) -> None:
        kind = "ghost" if ghost else self._kind()
        data: dict[str, Any] = {"kind": kind, "n": number, "canary": CANARY, "pad": "é" * 20}
        if kind == "big":
            data["pad"] = "x" * MESSAGE_BYTES_MAX
        mark = f"mark-{self._random.randrange(1000)}"
        event_id = self._events.add(
            target, subject, data, key=key, headers={"Mark": mark}, deliver_at=deliver_at
        )
        values = {"event_id": event_id, "subject": subject, "key": key, "key_seq": number}
        values |= {"digest": digest(data | {"mark": mark}), "kind": kind}
        await target.execute(text(LEDGER), values)

    def _kind(self) -> str:
        drawn = self._random.randrange(1000)
        for kind, share in KINDS.items():
            if drawn < share:
                return kind
            drawn -= share
        return "ok"

    async def _cancelled(self, session: AsyncSession) -> None:
        """Cancel a commit on its way; whether it took place only the ledger knows."""
        self._journal.note("commit_cancelled")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(session.commit(), self._random.uniform(0.0, 0.003))


async def main(orders: Orders, journal: Journal, failing: Failing, asked: asyncio.Event) -> None:
    """Commit until asked to stop; an outage is waited for."""
    del failing
    engine = process.engine(orders, "shop", pool=orders.tasks)

    async def work(task: int) -> None:
        writer = Writer(orders, journal, task)
        while not asked.is_set():
            try:
                async with asyncio.timeout(10):
                    await writer.transaction(engine)
            except RolledBack:
                pass
            except (SQLAlchemyError, OSError, TimeoutError):
                await asyncio.sleep(0.2)
            await asyncio.sleep(writer.pause(orders.rate))

    async with asyncio.TaskGroup() as tasks:
        for task in range(orders.tasks):
            tasks.create_task(work(task))
    await engine.dispose()
