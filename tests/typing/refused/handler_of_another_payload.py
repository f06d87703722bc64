"""A handler takes the payload that its listener declares."""

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override

from outbox import EventEnvelope, Listener


class OrderPlaced(BaseModel):
    order_id: int


class UserCreated(BaseModel):
    user_id: int


class SendReceipt(Listener[OrderPlaced]):
    subject = "evt.order.placed.v1"
    queue_group = "receipts"

    @override
    async def on_message(
        self, session: AsyncSession, event: EventEnvelope[UserCreated]
    ) -> None: ...  # refused # noqa: E501
