"""Transactional outbox and inbox on PostgreSQL and NATS JetStream.

An event is added in the transaction that makes it true, published by a relay, and handled by
listeners in other services, each time with one effect:

```python
from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay

events = Outbox(source_service="shop")

class SendReceipt(Listener):
    subject = "evt.order.placed.v1"
    queue_group = "receipts"
    service_name = "mailer"

    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        session.add(Receipt(order_id=event.data["order_id"]))

async with JetStreamClient("nats://127.0.0.1:4222") as client:
    async with Relay(engine, client), SendReceipt(client, sessionmaker):
        async with sessionmaker.begin() as session:
            events.add(session, "evt.order.placed.v1", {"order_id": 7}, key="order-7")
```

What is named in `__all__` is public; the rest may be imported but is promised to no one.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from outbox.envelope import EventEnvelope, event_id_for
from outbox.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    HandlerError,
    InvalidEvent,
    InvalidSession,
    OutboxError,
    PublishError,
    Reject,
    Retry,
)
from outbox.jetstream.client import JetStreamClient
from outbox.listener import BatchListener, Disposition, Listener
from outbox.postgres.schema import upgrade
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Observer
from outbox.writer import Outbox, default_outbox
from outbox.writer.adding import AnySession

__all__ = [
    "BatchListener",
    "BrokerUnavailable",
    "ConfigurationError",
    "DatabaseUnavailable",
    "Disposition",
    "EventEnvelope",
    "HandlerError",
    "InvalidEvent",
    "InvalidSession",
    "JetStreamClient",
    "Listener",
    "Observer",
    "Outbox",
    "OutboxError",
    "PublishError",
    "Reject",
    "Relay",
    "Retry",
    "Settings",
    "add",
    "event_id_for",
    "upgrade",
]


def add(
    session: AnySession,
    subject: str,
    payload: BaseModel | Mapping[str, Any],
    *,
    key: str | None = None,
    correlation_id: str | None = None,
    event_id: str | UUID | None = None,
    headers: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    deliver_at: datetime | None = None,
) -> str:
    """Add an event as `Outbox.add` does, with the settings of the `OUTBOX_*` variables.

    They are read at the first call. The service's name is OUTBOX_SOURCE_SERVICE, else that of the
    listener whose handler is running.

    Raises:
        InvalidEvent: names the field and the rule; the transaction stays usable.
        InvalidSession: the session cannot carry events; nothing was changed.
        ConfigurationError: a variable is wrong.
    """
    return default_outbox().add(
        session,
        subject,
        payload,
        key=key,
        correlation_id=correlation_id,
        event_id=event_id,
        headers=headers,
        metadata=metadata,
        deliver_at=deliver_at,
    )
