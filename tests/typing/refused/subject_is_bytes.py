"""A subject is a text."""

from sqlalchemy.ext.asyncio import AsyncSession

from outbox import Outbox


def refused(events: Outbox, session: AsyncSession) -> None:
    events.add(session, b"evt.order.placed.v1", {})  # refused
