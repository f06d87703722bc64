"""The shop: adds events in business transactions, one in ten of which is rolled back."""

import asyncio
import random
import secrets
import sys
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from outbox.demo.tables import LEDGER, ROLLED_BACK
from outbox.settings import Settings
from outbox.writer import Outbox

SUBJECT = "evt.shop.ordered.v1"
EVENTS_PER_TRANSACTION = 5
SECONDS = 8.0  # that all of it takes, so that the relay is killed amid work
ROLLED_BACK_SHARE = 0.1
CUSTOMERS = 50


async def main(events: int) -> None:
    """Add `events` events, and as many more as are rolled back."""
    settings = Settings.from_environment()
    engine = create_async_engine(settings.database_url.get_secret_value())
    sessions = async_sessionmaker(engine)
    outbox = Outbox("shop", settings=settings)
    chance = random.Random(1)  # noqa: S311 - the same run every time
    done = 0
    while done < events:
        count = min(EVENTS_PER_TRANSACTION, events - done)
        if chance.random() < ROLLED_BACK_SHARE:
            await _roll_back(sessions, outbox, count)
        else:
            await _commit(sessions, outbox, count)
            done += count
        await asyncio.sleep(SECONDS * count / events)
    await engine.dispose()


async def _commit(sessions: async_sessionmaker[AsyncSession], outbox: Outbox, count: int) -> None:
    async with sessions.begin() as session:
        await _order(session, outbox, count)


async def _roll_back(
    sessions: async_sessionmaker[AsyncSession], outbox: Outbox, count: int
) -> None:
    async with sessions() as session:
        added = await _order(session, outbox, count)
        await outbox.flush(session)  # even events that are written already are gone
        await session.rollback()
    async with sessions.begin() as session:
        await session.execute(insert(ROLLED_BACK), [{"event_id": each} for each in added])


async def _order(session: AsyncSession, outbox: Outbox, count: int) -> list[UUID]:
    added = []
    for number in range(count):
        payload = {"item": number, "amount": "12.50"}
        key = f"customer-{secrets.randbelow(CUSTOMERS)}"
        added.append(UUID(outbox.add(session, SUBJECT, payload, key=key)))
    await session.execute(insert(LEDGER), [{"event_id": each} for each in added])
    return added


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
