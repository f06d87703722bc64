"""What is on the stream, and what is delivered once more."""

import asyncio
import base64
from datetime import timedelta
from typing import Any

from outbox.envelope import Delivery, EventEnvelope, parse, with_registered_payload
from outbox.jetstream import provisioning
from outbox.jetstream.client import JetStreamClient


async def published(
    js_client: JetStreamClient,
    subject: str,
    *,
    within: timedelta | float = 10.0,
    event_id: str | None = None,
) -> EventEnvelope[Any]:
    """Return the newest event on `subject` once there is one.

    Args:
        subject: without wildcards.
        within: seconds, or a timedelta.
        event_id: wait for this event instead of any.

    Raises:
        TimeoutError: no such event was stored in time.
        LookupError: no stream takes `subject`.
        MalformedMessage: what was stored is no event.
    """
    stream = await _stream(js_client, subject)
    seconds = within.total_seconds() if isinstance(within, timedelta) else within
    found: EventEnvelope[Any] | None = None
    try:
        async with asyncio.timeout(seconds):
            stored = await js_client.js.subscribe(subject, stream=stream, ordered_consumer=True)
            try:
                while True:
                    message = await stored.next_msg(timeout=seconds)
                    facts = message.metadata
                    delivery = Delivery(1, stream, facts.sequence.stream, redelivered=False)
                    headers = dict(message.headers or {})
                    event = parse(message.data, subject=subject, headers=headers, delivery=delivery)
                    found = event if event_id in {None, event.event_id} else found
                    if found is not None and not facts.num_pending:
                        return with_registered_payload(found)
            finally:
                await stored.unsubscribe()
    except TimeoutError:
        what = "no event" if event_id is None else f"no event {event_id}"
        raise TimeoutError(f"{what} on {subject} within {seconds:g} s") from None


async def redeliver(
    js_client: JetStreamClient, subject: str, *, event_id: str | None = None
) -> int:
    """Store the newest event on `subject` once more; return the copy's stream sequence.

    The copy carries the same event under a new message id, as when a publisher repeats itself
    after the stream has forgotten the first: listeners see the event again, and each inbox has to
    absorb it.

    Args:
        event_id: this event instead of the newest.

    Raises:
        LookupError: no stream takes `subject`.
        TimeoutError: there is no such event.
    """
    event = await published(js_client, subject, event_id=event_id, within=5)
    stream, sequence = event.delivery.stream, event.delivery.sequence
    answer = await js_client.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence})
    body = base64.b64decode(answer["message"].get("data") or "")
    headers = dict(event.headers) | {"Nats-Msg-Id": f"{event.event_id}~again{sequence}"}
    headers.pop("Nats-Expected-Stream", None)
    ack = await js_client.js.publish(subject, body, headers=headers)
    return int(ack.seq)


async def _stream(js_client: JetStreamClient, subject: str) -> str:
    names = await provisioning.streams_for(js_client, subject)
    if not names:
        raise LookupError(f"no stream takes {subject}")
    return names[0]
