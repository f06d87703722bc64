"""The floor is raised without a proof that all older transactions have ended."""

from collections.abc import Callable
from typing import Any

from outbox.relay.floor import Floor

TARGET = "outbox.relay.floor:Floor.closed"
FAULTS = ("app_killed",)


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take a settled page's end for reached."""

    def closed(self: Floor, page: int, *, barrier: int, last: int) -> None:
        self._reached = max(self._reached, last)
        original(self, page, barrier=barrier, last=last)

    return closed
