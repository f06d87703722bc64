"""An engine has no transaction to add to."""

from sqlalchemy.ext.asyncio import AsyncEngine

import outbox


def refused(engine: AsyncEngine) -> None:
    outbox.add(engine, "evt.order.placed.v1", {})  # refused
