"""What is handled or published now: read by `add` and by log lines, set by whoever does it.

A task that a handler started keeps a copy of its context, and may outlive it. So the context holds
one object, which is told when its time is over.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum

from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import override


@dataclass(slots=True)
class Running:
    """The event whose handler runs in this context, and the service that runs it."""

    event_id: str
    correlation_id: str
    service: str
    session: AsyncSession | None = None  # until the handler has ended


running: ContextVar[Running | None] = ContextVar("outbox_running", default=None)
correlation_id: ContextVar[str | None] = ContextVar("outbox_correlation_id", default=None)


def current_session() -> AsyncSession:
    """Return the session that the running handler's event was recorded in.

    What is written through it takes effect together with the inbox row. The listener commits.

    Raises:
        LookupError: no handler is running in this context, or it has ended.
    """
    now = running.get()
    if now is None or now.session is None:
        raise LookupError("no handler is running here: only a handler has a current session")
    return now.session


@contextmanager
def handling(now: Running) -> Iterator[None]:
    """Let `now` be the running event inside the block, for tasks begun in it too."""
    token = running.set(now)
    try:
        yield
    finally:
        now.session = None
        running.reset(token)


class EntryPoint(StrEnum):
    """By which door an event came into the process."""

    PUBLISHER = "event_publisher"
    LISTENER = "event_listener"


@dataclass(slots=True)
class LogFacts:
    """What every log line says while an event is published or handled."""

    entry_point: EntryPoint
    service: str
    event_id: str | None = None
    event_type: str | None = None
    correlation_id: str | None = None
    source_service: str | None = None
    over: bool = field(default=False, init=False)


_FACTS = ("entry_point", "service", "event_id", "event_type", "correlation_id", "source_service")
_logged: ContextVar[LogFacts | None] = ContextVar("outbox_logged", default=None)


@contextmanager
def logged(facts: LogFacts) -> Iterator[None]:
    """Have log lines inside the block carry `facts`, in tasks begun in it too; none afterwards."""
    token = _logged.set(facts)
    try:
        yield
    finally:
        facts.over = True
        _logged.reset(token)


class EventLogFilter(logging.Filter):
    """Adds event_id, event_type, correlation_id, source_service, service and entry_point.

    Add it to a handler, so that lines of all loggers pass it. Fields that a line gives by itself
    in `extra` stay; outside of events they are None, so that a format may name them always.
    """

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        facts = _logged.get()
        if facts is not None and facts.over:
            facts = None
        for name in _FACTS:
            if getattr(record, name, None) is None:
                value = None if facts is None else getattr(facts, name)
                setattr(record, name, None if value is None else str(value))
        return True
