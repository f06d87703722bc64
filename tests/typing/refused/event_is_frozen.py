"""An event is what happened; nobody changes it."""

from outbox import EventEnvelope


def refused(event: EventEnvelope) -> None:
    event.event_id = "another"  # refused
