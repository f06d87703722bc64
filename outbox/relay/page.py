"""What of a page may be sent now. Pure.

Events without a key are all sent at once; of each key one is in flight, and the next follows when
it is decided. A key that fails holds its later rows back. Two pages may be in flight, and of a key
in both the later page sends nothing before the earlier one has ended.
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


class Page:
    """The rows of one read, in id order, and how far each has come.

    Args:
        blocked: keys that have rows in `waiting`; rows of these go there too.
        busy: keys of the page before, which is still in flight; rows of these wait for `release`.
        parks: behind a dead row the later ones of its key are blocked, else they go on.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        blocked: Collection[str],
        busy: Collection[str] = (),
        *,
        parks: bool = False,
    ) -> None:
        self.rows = rows
        self.parks = parks
        self.states = [State.UNSENT] * len(rows)
        self.first: list[int] = []  # may be sent at once
        self.deferred: list[int] = []  # first of a busy key
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
                (self.deferred if row.key in busy else self.first).append(index)
        self.undecided = len(self.first) + len(self.deferred) + len(self._next)

    def keys_of(self, state: State) -> set[str]:
        """Return the keys of the rows that stand at `state`."""
        rows = (self.rows[index] for index in self.having(state))
        return {row.key for row in rows if row.key is not None}

    @property
    def keys(self) -> set[str]:
        """The keys of all rows."""
        return {row.key for row in self.rows if row.key is not None}

    def decide(self, index: int, state: State) -> int | None:
        """Note the end of row `index`; return the row of its key that may be sent now, if any."""
        self.states[index] = state
        self.undecided -= 1
        following = self._next.get(index)
        if following is None or state is State.CONFIRMED:
            return following
        if state is State.DEAD and not self.parks:
            return following
        # behind a failure: blocked; behind an outage: as it was
        self._leave(following, State.UNSENT if state is State.UNKNOWN else State.BLOCKED)
        return None

    def release(self, blocked: Collection[str], *, outage: bool) -> list[int]:
        """Decide on deferred rows once the page before has ended; return those to be sent now.

        Args:
            blocked: the keys that are blocked by now.
            outage: the page before ended in one, so what it held of a key may come again.
        """
        ready: list[int] = []
        for index in self.deferred:
            if outage:
                self._leave(index, State.UNSENT)
            elif self.rows[index].key in blocked:
                self._leave(index, State.BLOCKED)
            else:
                ready.append(index)
        self.deferred = []
        return ready

    def _leave(self, index: int | None, state: State) -> None:
        """Let row `index` and all behind it end as `state`, unsent."""
        while index is not None:
            self.undecided -= 1
            self.states[index] = state
            index = self._next.get(index)

    def give_up(self) -> None:
        """Make unknown what is still in flight: the broker has not answered."""
        for index, state in enumerate(self.states):
            if state is State.SENT:
                self.states[index] = State.UNKNOWN
        self.undecided = 0

    def having(self, *states: State) -> list[int]:
        """Return the rows that stand at one of `states`."""
        return [index for index, state in enumerate(self.states) if state in states]
