"""Only a registered payload can do without a subject."""

from sqlalchemy.ext.asyncio import AsyncSession

import outbox


def caller(session: AsyncSession) -> None:
    outbox.add(session, {"order_id": 1})  # refused
