"""A publisher and a listener of GLAM's first generation, by hand, with nothing but nats-py.

They know nothing of us: no headers, uuid4 ids, times in UTC that do not say so, no `metadata`; the
listener looks at `event_id`, `event_type` and `data` only.
"""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig


async def publish(client: Client, subject: str, data: dict[str, Any], **fields: Any) -> str:
    """Publish an event as the first generation does; return its id."""
    event_id = str(uuid4())
    body = {
        "event_id": event_id,
        "event_type": subject,
        "correlation_id": str(uuid4()),
        "source_service": "older-service",
        "timestamp": datetime.now(UTC).replace(tzinfo=None).isoformat(),
        "data": data,
    } | fields
    await client.jetstream().publish(subject, json.dumps(body).encode())
    return event_id


async def receive(
    client: Client, subject: str, *, service_name: str, queue_group: str, count: int
) -> list[dict[str, Any]]:
    """Handle `count` events with the first generation's durable, and return what it looked at."""
    subscription = await client.jetstream().pull_subscribe(
        subject,
        durable=f"{service_name}-{queue_group}",
        config=ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_deliver=3),
    )
    found: list[dict[str, Any]] = []
    while len(found) < count:
        for message in await subscription.fetch(count - len(found), timeout=10):
            body = json.loads(message.data)
            assert body["event_type"] == message.subject
            found.append({name: body[name] for name in ("event_id", "event_type", "data")})
            await message.ack()
    await subscription.unsubscribe()
    return found
