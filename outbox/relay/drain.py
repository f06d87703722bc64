"""Publishing what is pending, and knowing when nothing is left."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from outbox.errors import DatabaseUnavailable
from outbox.postgres import remaining
from outbox.postgres.driver import Driver
from outbox.postgres.remaining import Remaining

QUIET_LEASES = 3  # leases without any progress, before a drain says that it cannot


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a drain has come. `total` may grow: waiting rows become due."""

    published: int
    total: int


@dataclass(frozen=True, slots=True)
class Drained:
    """How a drain ended. Rows that wait for their time are no failure; they are counted."""

    published: int
    remaining: int
    scheduled: int  # not due yet
    backing_off: int  # failed, or behind a failed one
    reason: str | None = None  # why it ended with rows remaining

    @property
    def complete(self) -> bool:
        """True when everything that could be published was."""
        return self.reason is None


class Drain:
    """Watches the rows that were committed when it began."""

    def __init__(self, schema: str, patience: timedelta) -> None:
        self._schema = schema
        self._patience = patience.total_seconds()
        self._last: int | None = None
        self._total = 0
        self._left = 0
        self._moved_at = time.monotonic()

    async def look(self, driver: Driver, reason: str | None) -> tuple[Progress, Drained | None]:
        """Count what is left; return the end when there is one.

        Args:
            reason: what hinders the relay now, if anything.
        """
        if self._last is None:
            self._last = await remaining.newest(driver, self._schema)
        found = await remaining.count(driver, self._schema, self._last)
        if found.ready != self._left:
            self._left, self._moved_at = found.ready, time.monotonic()
        self._total = max(self._total, found.ready)
        progress = Progress(self._total - found.ready, self._total)
        if found.ready == 0 and not found.released:
            return progress, self._end(progress, found, None)
        if time.monotonic() - self._moved_at > self._patience:
            return progress, self._end(progress, found, reason or "nothing was published for long")
        return progress, None

    def unreachable(self, error: DatabaseUnavailable) -> Drained | None:
        """Return the end when the database was out for too long."""
        if time.monotonic() - self._moved_at <= self._patience:
            return None
        return Drained(self._total - self._left, self._left, 0, 0, str(error))

    def _end(self, progress: Progress, found: Remaining, reason: str | None) -> Drained:
        left = progress.total - progress.published
        return Drained(progress.published, left, found.scheduled, found.backing_off, reason)


Report = Callable[[Progress], None]
