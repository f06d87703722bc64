"""Events as they are published, from the stream; no listener notices."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from outbox.errors import BrokerUnavailable, ConfigurationError
from outbox.jetstream import provisioning
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.jetstream.pulling import ConsumerGone, Message, Puller
from outbox.subjects import HEADER_KEY

PREFETCH = 256
BYTES_MAX = 8 * 1_048_576
PAUSE_SECONDS = 0.5  # before a consumer is made again
FORGOTTEN_SECONDS = 60  # after which the broker deletes the consumer of a reader that is gone


@dataclass(frozen=True, slots=True)
class Seen:
    """An event on the stream, as its message and its body say."""

    stored_at: datetime
    sequence: int
    subject: str
    key: str | None
    event_id: str | None
    source_service: str | None
    correlation_id: str | None
    body: bytes


async def tail(
    client: JetStreamClient,
    stream: str,
    *,
    subject: str = ">",
    since: datetime | None = None,
) -> AsyncIterator[Seen]:
    """Yield what is stored from now on, or since a time, for as long as it is asked for.

    It goes on after an outage where it was, without a gap and without repeats.

    Args:
        subject: may hold NATS's wildcards.

    Raises:
        ConfigurationError: there is no such stream, or the subject is none.
    """
    after = 0
    since = since or datetime.now(UTC)
    while True:
        try:
            name = await _consumer(client, stream, subject, since, after)
            puller = Puller(
                client, stream=stream, durable=name, prefetch=PREFETCH, bytes_max=BYTES_MAX
            )
            async with puller:
                while True:
                    message = await puller.next()
                    if message.sequence > after:
                        after = message.sequence
                        yield _seen(message)
        except (ConsumerGone, BrokerUnavailable):
            await asyncio.sleep(PAUSE_SECONDS)


async def _consumer(
    client: JetStreamClient, stream: str, subject: str, since: datetime, after: int
) -> str:
    """Make a consumer that acks nothing and is forgotten soon; return its name."""
    name = f"outbox-tail-{uuid4().hex[:12]}"
    config: dict[str, Any] = {
        "name": name,
        "filter_subject": subject,
        "ack_policy": "none",
        "mem_storage": True,
        "inactive_threshold": FORGOTTEN_SECONDS * 1_000_000_000,
    }
    if after:
        config |= {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1}
    else:
        config |= {"deliver_policy": "by_start_time", "opt_start_time": since.isoformat()}
    request = {"stream_name": stream, "config": config}
    try:
        await client.api(f"CONSUMER.CREATE.{stream}.{name}", request)
    except ApiError as error:
        if error.err_code == provisioning.STREAM_NOT_FOUND:
            raise ConfigurationError(f"there is no stream {stream}") from error
        raise ConfigurationError(f"subject {subject!r} cannot be read: {error}") from error
    return name


def _seen(message: Message) -> Seen:
    headers = {name.lower(): value for name, value in message.headers.items()}
    try:
        body = json.loads(message.body)
    except ValueError:
        body = {}
    facts = body if isinstance(body, dict) else {}

    def fact(name: str) -> str | None:
        value = facts.get(name)
        return value if isinstance(value, str) else None

    return Seen(
        message.timestamp,
        message.sequence,
        message.subject,
        headers.get(HEADER_KEY.lower()),
        fact("event_id") or headers.get("nats-msg-id"),
        fact("source_service"),
        fact("correlation_id"),
        message.body,
    )
