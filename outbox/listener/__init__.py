"""Handling events: each takes effect once per listener."""

from outbox.listener.batch import BatchListener
from outbox.listener.listener import Disposition, Listener

__all__ = ["BatchListener", "Disposition", "Listener"]
