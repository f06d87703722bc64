"""This relay's hold on a lane, and the moment until which it may send."""

import os
import socket
import time
from datetime import timedelta
from uuid import UUID, uuid4

from outbox.errors import OutboxError
from outbox.postgres import lanes
from outbox.postgres.driver import Driver

# Runs on while the machine sleeps, so that a lease is not taken for valid after it.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LaneLost(OutboxError):  # noqa: N818 - a state, like the public errors
    """Another relay may hold the lane: nothing more is sent. Handled inside the relay."""


class Lease:
    """A lease on one lane, fenced by its epoch."""

    def __init__(self, schema: str, lane: int, duration: timedelta) -> None:
        self.lane = lane
        self.duration = duration
        self.owner: UUID = uuid4()
        self.epoch = 0
        self._schema = schema
        self._name = f"{socket.gethostname()}:{os.getpid()}"[:255]
        self._deadline = 0.0

    @property
    def held(self) -> bool:
        """True while no other relay can have taken the lane."""
        return now() < self._deadline

    @property
    def fence(self) -> tuple[int, UUID, int]:
        """Lane, owner and epoch, which each fenced write checks."""
        return (self.lane, self.owner, self.epoch)

    def check(self) -> None:
        """Raise `LaneLost` when the lease has run out here; called before each piece is sent."""
        if not self.held:
            raise LaneLost("the lease was not renewed in time")

    async def take(self, driver: Driver) -> bool:
        """Take the lane when it is free; return whether it is held now."""
        begun = now()  # before the statement is sent, so that our deadline is the earlier one
        epoch = await lanes.take(
            driver,
            self._schema,
            self.lane,
            owner=self.owner,
            owner_name=self._name,
            lease=self.duration,
        )
        if epoch is None:
            return False
        self.epoch = epoch
        self._deadline = begun + self.duration.total_seconds()
        return True

    async def renew(
        self,
        driver: Driver,
        *,
        unanswered: timedelta | None = None,
        hindrance: str | None = None,
    ) -> None:
        """Extend the lease, and say how it goes; see `lanes.renew`.

        Raises:
            LaneLost: another relay has it.
        """
        begun = now()
        if not await lanes.renew(
            driver,
            self._schema,
            self.fence,
            lease=self.duration,
            unanswered=unanswered,
            hindrance=hindrance,
        ):
            self._deadline = 0.0
            raise LaneLost("another relay took the lane")
        self._deadline = begun + self.duration.total_seconds()

    async def release(self, driver: Driver) -> None:
        """Give the lane back; nothing of it may be in flight."""
        self._deadline = 0.0
        await lanes.release(driver, self._schema, self.fence)


def now() -> float:
    """Return seconds of a clock that never goes back."""
    return time.clock_gettime(_CLOCK)
