"""An outage of broker or database: nobody's failure, told once at its begin and once at its end."""

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta

from outbox.backoff import Backoff
from outbox.errors import OutboxError
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outage:
    """Whether there is one, and how long to wait before the next try."""

    listener: str
    observer: Observer
    _backoff: Backoff = field(
        default=Backoff(first=timedelta(seconds=0.2), longest=timedelta(seconds=10)), init=False
    )
    _tries: int = field(default=0, init=False)
    _since: float | None = field(default=None, init=False)
    reason: str | None = field(default=None, init=False)

    def began(self, error: Exception) -> timedelta:
        """Note a failed try; return how long to wait before the next."""
        self._tries += 1
        reason = type(error).__name__
        self.reason = f"{reason}: {error}" if isinstance(error, OutboxError) else reason
        if self._since is None:
            self._since = time.monotonic()
            logger.warning("outage began", extra={"listener": self.listener, "error_type": reason})
            self.observer.on_step(Moment(Step.OUTAGE_BEGAN, self.listener, reason=reason))
        return self._backoff.delay(self._tries)

    def ended(self) -> None:
        """Note that something went well; nothing happens without an outage."""
        if self._since is None:
            return
        seconds = time.monotonic() - self._since
        self._since, self._tries, self.reason = None, 0, None
        logger.warning("outage ended", extra={"listener": self.listener, "seconds": seconds})
        self.observer.on_step(Moment(Step.OUTAGE_ENDED, self.listener, seconds=seconds))
