"""Adding events to a transaction: `Outbox`, and what the listener needs of it."""

from outbox.writer.adding import (
    Outbox,
    add_dead_letter,
    enqueue,
    environment_outbox,
    held_by,
    prepared,
    write_buffered,
)
from outbox.writer.buffers import PendingEvent

__all__ = [
    "Outbox",
    "PendingEvent",
    "add_dead_letter",
    "enqueue",
    "environment_outbox",
    "held_by",
    "prepared",
    "write_buffered",
]
