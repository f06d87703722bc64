"""A payload is a model or a mapping, never a text."""

from sqlalchemy.ext.asyncio import AsyncSession

from outbox import Outbox


def refused(events: Outbox, session: AsyncSession) -> None:
    events.add(session, "evt.order.placed.v1", "order 7")  # refused
