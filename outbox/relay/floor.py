"""The floor below which nothing can be unread. Pure.

Reading above it keeps the cost flat while dead rows cannot be vacuumed. Why it is right: a row
below the highest id of a page took its id before that page was read, in a transaction that had its
xid by then, and that xid is below the barrier, which was drawn after the page was read. Once the
oldest running transaction is not older than the barrier, all such transactions have ended, and the
read that tells us so has seen what they committed.
"""

from collections import deque


class Floor:
    """Tracks pages from read to settled; `value` is where the next read begins."""

    def __init__(self) -> None:
        self.value = 0
        self._reached = 0  # everything up to here was read or is gone
        self._barriers: deque[tuple[int, int]] = deque()  # (xid, highest id read before it)
        self._open: dict[int, int] = {}  # page number: its smallest id, read and not yet settled
        self._pages = 0

    def opened(self, *, xmin: int, first: int | None, last: int | None, full: bool) -> int:
        """Note a read with ids `first` to `last` (None when empty); return its page number.

        Args:
            xmin: the oldest transaction that was running at the read.
            full: rows above `last` were left out.
        """
        while self._barriers and self._barriers[0][0] <= xmin:
            highest = self._barriers[0][1]
            if full and last is not None and highest > last:
                self._reached = max(self._reached, last)
                break
            self._reached = max(self._reached, highest)
            self._barriers.popleft()
        self._pages += 1
        if first is not None:
            self._open[self._pages] = first
        self._advance()
        return self._pages

    def closed(self, page: int, *, barrier: int, last: int) -> None:
        """Note that all rows of `page` have left the table, in transaction `barrier` or before."""
        self._open.pop(page, None)
        self._barriers.append((barrier, last))
        self._advance()

    def reset(self, page: int | None = None) -> None:
        """Begin at 0 again: rows of `page` stay in the table, or the past is not known."""
        if page is not None:
            self._open.pop(page, None)
        self._barriers.clear()
        self._reached = 0
        self.value = 0

    def _advance(self) -> None:
        unsettled = min(self._open.values(), default=None)
        limit = self._reached if unsettled is None else min(self._reached, unsettled - 1)
        self.value = max(self.value, limit)
