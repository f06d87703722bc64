"""What is being handled now: read by `add`, set by the listener."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Running:
    """The event whose handler runs in this context, and the service that runs it."""

    event_id: str
    correlation_id: str
    service: str


running: ContextVar[Running | None] = ContextVar("outbox_running", default=None)
correlation_id: ContextVar[str | None] = ContextVar("outbox_correlation_id", default=None)


def current_correlation_id() -> str | None:
    """Return the correlation id of this context: the one set by hand, else the running event's."""
    by_hand = correlation_id.get()
    if by_hand is not None:
        return by_hand
    event = running.get()
    return None if event is None else event.correlation_id
