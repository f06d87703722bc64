"""Which event the server hangs up on: fewer rows at a time, and what speaks against one. Pure."""

from dataclasses import dataclass

CLOSES_MAX = 2  # with a page in flight, before its rows are sent one by one
HANG_UPS_MAX = 6  # in a row on the same event, without a word of the server, before it is blamed
AT_ONCE = 1.0  # seconds from the frame to the disconnect, for it to be an answer to the frame


@dataclass(slots=True)
class Caution:
    """How many rows of one table may be in flight: one after closes, then twice as many each."""

    closes: int = 0  # in a row
    cap: int = 0  # 0: no limit

    def closed(self) -> None:
        """Note that the connection closed with rows in flight."""
        self.closes += 1
        if self.closes >= CLOSES_MAX:
            self.cap = 1

    def passed(self, rows_max: int) -> None:
        """Note that all rows in flight were answered."""
        self.cap = 0 if self.cap * 2 >= rows_max else self.cap * 2
        if not self.cap:
            self.closes = 0


@dataclass(slots=True)
class Suspicion:
    """The event that was alone in flight when the server hung up, and how often in a row."""

    id: int = 0
    hang_ups: int = 0
    blamed: bool = False

    def hung_up(self, row: int, *, refused: bool, closes: int) -> bool:
        """Note one more; return whether the event is to be blamed.

        Args:
            refused: the server gave an error, so nats-py closed for good.
            closes: with its page in flight, this one included.
        """
        if row != self.id:
            self.id, self.hang_ups, self.blamed = row, 0, False
        self.hang_ups += 1
        if (refused and closes > CLOSES_MAX) or self.hang_ups > HANG_UPS_MAX:
            self.blamed = True
        return self.blamed

    def clear(self) -> None:
        """Forget it: the event, or the broker without it, did otherwise."""
        self.id, self.hang_ups, self.blamed = 0, 0, False
