"""Handling events: each takes effect once per listener."""

from outbox.listener.batch import BatchListener
from outbox.listener.handling import Disposition
from outbox.listener.listener import Listener

__all__ = ["BatchListener", "Disposition", "Listener"]
