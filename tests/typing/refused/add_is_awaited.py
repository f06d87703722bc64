"""`add` does nothing that could be awaited."""

from sqlalchemy.ext.asyncio import AsyncSession

from outbox import Outbox


async def refused(events: Outbox, session: AsyncSession) -> None:
    await events.add(session, "evt.order.placed.v1", {})  # refused
