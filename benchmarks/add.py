"""Client CPU of `add`: 1,000 events in one transaction, beside the same rows as ORM objects.

The figure counts the events' whole share of the process: encoding, buffering and the INSERT, less
an empty transaction. Run `python -m benchmarks.add`; OUTBOX_DATABASE_URL names another server.
"""

import asyncio
import gc
import json
import os
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.embedded import EmbeddedPostgres
from outbox.postgres.schema import upgrade
from outbox.writer import Outbox

EVENTS = 1000
ROUNDS = 9
TARGET_MICROSECONDS = 10.0
SUBJECT = "evt.merchant.created.v1"


class Base(DeclarativeBase):
    """Tables of the comparison."""


class Row(Base):
    """What an outbox made of ORM objects stores."""

    __tablename__ = "orm_outbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[uuid.UUID]
    subject: Mapped[str]
    body: Mapped[str]


def payload(n: int) -> dict[str, object]:
    """Return a small payload."""
    return {"merchant_id": f"m-{n}", "name": "Tea & Sons", "plan": "basic", "credits": n}


PAYLOADS = [(f"m-{n}", payload(n)) for n in range(EVENTS)]
events = Outbox("merchant-service")


async def add_events(session: AsyncSession) -> None:
    """Add events through the library."""
    for key, each in PAYLOADS:
        events.add(session, SUBJECT, each, key=key)


async def add_rows(session: AsyncSession) -> None:
    """Add the same events as ORM objects."""
    for _, each in PAYLOADS:
        event_id = uuid.uuid4()
        body = {
            "event_id": str(event_id),
            "event_type": SUBJECT,
            "timestamp": datetime.now(UTC).isoformat(),
            "data": each,
        }
        session.add(Row(event_id=event_id, subject=SUBJECT, body=json.dumps(body)))


async def add_nothing(session: AsyncSession) -> None:
    """Add nothing: the cost of the transaction itself."""


async def measure(
    sessions: async_sessionmaker[AsyncSession], work: Callable[[AsyncSession], Awaitable[None]]
) -> float:
    """Return the median seconds of client CPU that one transaction with `work` takes."""
    found = []
    for _ in range(ROUNDS):
        gc.collect()
        async with sessions() as session:
            began = time.process_time()
            await session.execute(text("SELECT 1"))
            await work(session)
            await session.commit()
            found.append(time.process_time() - began)
    return statistics.median(found)


async def run(url: str) -> float:
    """Print the figures; return the microseconds per event."""
    engine = create_async_engine(url)
    await upgrade(engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine)
    for work in (add_nothing, add_events, add_rows):  # caches filled
        await measure(sessions, work)
    empty = await measure(sessions, add_nothing)
    ours = (await measure(sessions, add_events) - empty) / EVENTS * 1e6
    orm = (await measure(sessions, add_rows) - empty) / EVENTS * 1e6
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE orm_outbox"))
        await connection.execute(text("TRUNCATE outbox.pending"))
    await engine.dispose()
    print(f"add: {ours:.1f} us of client CPU per event, {EVENTS} events in one transaction")
    print(f"ORM objects: {orm:.1f} us, {orm / ours:.1f} times as much")
    return ours


def main() -> int:
    """Measure; return 1 when the target of 10 us is missed."""
    with ExitStack() as stack:
        url = os.environ.get("OUTBOX_DATABASE_URL")
        if url is None:
            url = stack.enter_context(EmbeddedPostgres()).url
        microseconds = asyncio.run(run(url))
    print(f"target: below {TARGET_MICROSECONDS:.0f} us: {microseconds < TARGET_MICROSECONDS}")
    return 0 if microseconds < TARGET_MICROSECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
