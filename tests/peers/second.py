"""A publisher and a listener of GLAM's second generation, by hand: pydantic and nats-py.

The envelope is validated in full, `metadata` and a `Nats-Msg-Id` header are sent along.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig
from pydantic import BaseModel, Field


class Envelope(BaseModel):
    """What the second generation validates."""

    event_id: str
    event_type: str
    correlation_id: str
    source_service: str
    timestamp: datetime
    data: dict[str, Any]
    metadata: dict[str, Any] | None = None


class Sent(Envelope):
    """What it sends."""

    event_id: str = Field(default_factory=lambda: str(uuid4()))
    correlation_id: str = Field(default_factory=lambda: str(uuid4()))
    source_service: str = "newer-service"
    timestamp: datetime = Field(default_factory=lambda: datetime.now(UTC))


async def publish(client: Client, subject: str, data: dict[str, Any], **fields: Any) -> str:
    """Publish an event as the second generation does; return its id."""
    envelope = Sent(event_type=subject, data=data, metadata={"attempt": 1}, **fields)
    await client.jetstream().publish(
        subject,
        envelope.model_dump_json().encode(),
        headers={"Nats-Msg-Id": envelope.event_id},
    )
    return envelope.event_id


async def receive(
    client: Client, subject: str, *, service_name: str, queue_group: str, count: int
) -> list[Envelope]:
    """Handle `count` events with the second generation's durable, and return them validated."""
    subscription = await client.jetstream().pull_subscribe(
        subject,
        durable=f"{service_name}-{queue_group}",
        config=ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, ack_wait=30),
    )
    found: list[Envelope] = []
    while len(found) < count:
        for message in await subscription.fetch(count - len(found), timeout=10):
            found.append(Envelope.model_validate_json(message.data))
            await message.ack()
    await subscription.unsubscribe()
    return found
