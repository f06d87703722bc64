"""Whom the relay blames for closed connections, over any mix of poison and restarts."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outbox.relay.caution import CLOSES_MAX, HANG_UPS_MAX, Caution, Suspicion

ROWS_MAX = 16


class Machine(RuleBasedStateMachine):
    """A queue of rows, one of which the server may hang up on; and servers that restart."""

    @initialize(rows=st.integers(1, 40), poison=st.integers(0, 60))
    def begin(self, rows: int, poison: int) -> None:
        """Queue rows; a poison beyond them is none."""
        self.queue = list(range(1, rows + 1))
        self.poison = poison
        self.caution = Caution()
        self.suspicion = Suspicion()
        self.blamed: set[int] = set()
        self.restarts = 0  # in a row, each at once and without a word
        self.poisoned = 0  # closes by the poison with no restart in between

    @precondition(lambda self: self.queue)
    @rule(refused=st.booleans())
    def fly(self, refused: bool) -> None:
        """Send the next page; the server answers all of it, or hangs up on the poison in it."""
        page = self._page()
        self.restarts = 0
        if self.poison in page:
            self.poisoned += 1
            self._closed(page, refused=refused, at_once=True)
        else:
            self._passed(page)

    @precondition(lambda self: self.queue and self.restarts < HANG_UPS_MAX)
    @rule(at_once=st.booleans())
    def restart(self, at_once: bool) -> None:
        """Let the server restart with a page in flight."""
        self.restarts += 1
        self.poisoned = 0
        self._closed(self._page(), refused=False, at_once=at_once)

    @rule(number=st.integers(1, 5))
    def add(self, number: int) -> None:
        """Queue more rows."""
        last = max([*self.queue, self.poison, 60])
        self.queue += range(last + 1, last + 1 + number)

    @invariant()
    def nobody_else_is_blamed(self) -> None:
        """A row that the server takes is never given up for a restart."""
        assert self.blamed <= {self.poison}

    @invariant()
    def poison_is_found_within_a_bound(self) -> None:
        """With the page cut to one row, a silent hang-up has to come a few times in a row."""
        assert self.poisoned <= CLOSES_MAX + ROWS_MAX + HANG_UPS_MAX + 2

    def _page(self) -> list[int]:
        return self.queue[: self.caution.cap or ROWS_MAX]

    def _passed(self, page: list[int]) -> None:
        self.caution.passed(ROWS_MAX)
        if self.suspicion.id in page:
            self.suspicion.clear()
        self.queue = self.queue[len(page) :]

    def _closed(self, page: list[int], *, refused: bool, at_once: bool) -> None:
        """Do as the lane does; see `Lane._watch_close`."""
        self.caution.closed()
        if len(page) > 1:
            return
        if not at_once:
            self.suspicion.clear()
        elif self.suspicion.hung_up(page[0], refused=refused, closes=self.caution.closes):
            self.blamed.add(page[0])
            self.queue.remove(page[0])


TestCaution = Machine.TestCase
TestCaution.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, derandomize=True
)
