"""The relay reads behind the highest id that it has seen."""

from collections.abc import Callable
from typing import Any

from outbox.relay.floor import Floor

TARGET = "outbox.relay.floor:Floor.opened"
FAULTS = ("app_killed",)


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Raise the floor to the last id of the page."""

    def opened(self: Floor, *, xmin: int, first: int | None, last: int | None, full: bool) -> int:
        number: int = original(self, xmin=xmin, first=first, last=last, full=full)
        self.value = max(self.value, last or 0)
        return number

    return opened
