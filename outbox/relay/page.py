"""What of a page may be sent now. Pure.

Events without a key are all sent at once; of each key one is in flight, and the next follows when
it is decided. A key that fails holds its later rows back.
"""

from collections.abc import Collection, Sequence
from enum import StrEnum

from outbox.postgres.pending import Row


class State(StrEnum):
    """Where a row of the page stands."""

    UNSENT = "unsent"  # also: behind a row whose outcome is unknown
    SENT = "sent"
    CONFIRMED = "confirmed"
    SCHEDULED = "scheduled"  # its time has not come
    BLOCKED = "blocked"  # behind a failed row of its key
    FAILED = "failed"  # its own failure: it waits
    DEAD = "dead"  # it can never be published
    UNKNOWN = "unknown"  # an outage: it is read again


_PASSES = frozenset({State.CONFIRMED, State.DEAD})  # the next of the key may go


class Page:
    """The rows of one read, in id order, and how far each has come."""

    def __init__(self, rows: Sequence[Row], blocked: Collection[str]) -> None:
        self.rows = rows
        self.states = [State.UNSENT] * len(rows)
        self.first: list[int] = []  # may be sent at once
        self._next: dict[int, int] = {}  # row: the next of its key
        latest: dict[str, int] = {}
        for index, row in enumerate(rows):
            if row.early:
                self.states[index] = State.SCHEDULED
            elif row.key is None:
                self.first.append(index)
            elif row.key in blocked:
                self.states[index] = State.BLOCKED
            elif row.key in latest:
                self._next[latest[row.key]] = index
                latest[row.key] = index
            else:
                latest[row.key] = index
                self.first.append(index)
        self.undecided = len(self.first) + len(self._next)

    def decide(self, index: int, state: State) -> int | None:
        """Note the end of row `index`; return the row of its key that may be sent now, if any."""
        self.states[index] = state
        self.undecided -= 1
        following = self._next.get(index)
        if following is None or state in _PASSES:
            return following
        while following is not None:  # behind a failure: blocked; behind an outage: as it was
            self.undecided -= 1
            if state is State.FAILED:
                self.states[following] = State.BLOCKED
            following = self._next.get(following)
        return None

    def give_up(self) -> None:
        """Make unknown what is still in flight: the broker has not answered."""
        for index, state in enumerate(self.states):
            if state is State.SENT:
                self.states[index] = State.UNKNOWN
        self.undecided = 0

    def having(self, *states: State) -> list[int]:
        """Return the rows that stand at one of `states`."""
        return [index for index, state in enumerate(self.states) if state in states]
