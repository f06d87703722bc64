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

from outbox.context import current_session
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
from outbox.registry import register
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Observer
from outbox.writer import Outbox, environment_outbox

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
    "current_session",
    "event_id_for",
    "register",
    "upgrade",
]


# `Outbox.add` with the settings of the OUTBOX_* variables, which are read at the first call. The
# service's name is OUTBOX_SOURCE_SERVICE, else that of the listener whose handler is running.
add = environment_outbox.add
