"""The listener records nothing."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

TARGET = "outbox.postgres.inbox:record"
FAULTS = ("cut_before_ack", "listener_killed")


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Take every event for new."""

    async def record(
        session: AsyncSession, schema: str, *, listener: str, event_id: UUID
    ) -> str | None:
        del schema, listener, event_id
        return str(await session.scalar(text("SELECT pg_current_xact_id()")))

    return record
