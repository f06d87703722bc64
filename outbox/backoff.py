"""When to try again. Pure: no clock, no sleep."""

import random
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential delays with jitter: the first is about `first`, each next about twice it."""

    first: timedelta = timedelta(seconds=0.5)
    longest: timedelta = timedelta(minutes=5)
    jitter: float = 0.25  # share of the delay that is random

    def delay(self, attempt: int) -> timedelta:
        """Return the delay after failure number `attempt` (from 1); never above `longest`."""
        doublings = min(max(attempt, 1) - 1, 32)
        full = min(self.first.total_seconds() * 2**doublings, self.longest.total_seconds())
        return timedelta(seconds=full * (1 - self.jitter * random.random()))  # noqa: S311 - jitter
