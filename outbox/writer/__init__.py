"""Adding events to a transaction: `Outbox`, and what the listener needs of it."""

from outbox.postgres.writing import PendingEvent
from outbox.writer.adding import Outbox, default_outbox, enqueue, write_buffered

__all__ = ["Outbox", "PendingEvent", "default_outbox", "enqueue", "write_buffered"]
