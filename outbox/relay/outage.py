"""An outage of the broker or the database: nobody's failure, told once when it begins and ends."""

import logging
import time
from datetime import timedelta

from outbox.backoff import Backoff
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)
_BACKOFF = Backoff(first=timedelta(seconds=0.1), longest=timedelta(seconds=5))


class Outage:
    """Whether `what` is out, since when, and how long to wait before the next try."""

    def __init__(self, what: str, observer: Observer) -> None:
        self.reason: str | None = None
        self._what = what
        self._observer = observer
        self._since = 0.0
        self._tries = 0

    def failed(self, reason: str) -> timedelta:
        """Note a failed try; return how long to wait."""
        self._tries += 1
        if self.reason is None:
            self._since = time.monotonic()
            logger.warning("the %s cannot be used", self._what, extra={"reason": reason})
            self._observer.on_step(
                Moment(Step.OUTAGE_BEGAN, "relay", reason=f"{self._what}: {reason}")
            )
        self.reason = reason
        return _BACKOFF.delay(self._tries)

    def over(self) -> None:
        """Note a success; cheap when there was no outage."""
        if self.reason is None:
            return
        seconds = time.monotonic() - self._since
        self.reason, self._tries = None, 0
        logger.warning("the %s can be used again", self._what, extra={"seconds": seconds})
        self._observer.on_step(
            Moment(Step.OUTAGE_ENDED, "relay", reason=self._what, seconds=seconds)
        )
