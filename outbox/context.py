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
