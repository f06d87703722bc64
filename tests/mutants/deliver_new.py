"""The consumer begins with what comes after it was made."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from outbox.jetstream import provisioning

TARGET = "outbox.jetstream.provisioning:ensure_consumer"
FAULTS = ("consumer_deleted", "nats_killed")


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Make the durable with deliver policy `new`."""

    async def ensure_consumer(
        client: Any,
        *,
        stream: str,
        durable: str,
        filter_subject: str,
        ack_wait: timedelta,
        max_ack_pending: int,
    ) -> Any:
        wanted = {
            "durable_name": durable,
            "filter_subject": filter_subject,
            "deliver_policy": "new",
            "ack_policy": "explicit",
            "max_deliver": -1,
            "ack_wait": int(ack_wait.total_seconds() * 1e9),
            "max_ack_pending": max_ack_pending,
        }
        found = await provisioning.consumer_info(client, stream, durable)
        return found or await provisioning._create_consumer(client, stream, durable, wanted)

    return ensure_consumer
