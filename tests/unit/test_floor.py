"""The floor never passes a row that is or may still come."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from outbox.relay.floor import Floor


def test_settled_page_raises_the_floor_only_once_older_transactions_have_ended() -> None:
    floor = Floor()
    page = floor.opened(xmin=10, first=1, last=5, full=False)
    floor.closed(page, barrier=20, last=5)
    floor.opened(xmin=19, first=None, last=None, full=False)
    assert floor.value == 0
    floor.opened(xmin=20, first=None, last=None, full=False)
    assert floor.value == 5


def test_full_page_raises_the_floor_to_its_own_end_only() -> None:
    floor = Floor()
    page = floor.opened(xmin=1, first=50, last=100, full=False)
    floor.closed(page, barrier=5, last=100)
    late = floor.opened(xmin=6, first=10, last=20, full=True)
    assert floor.value == 9
    floor.closed(late, barrier=7, last=20)
    assert floor.value == 20


def test_unsettled_page_holds_the_floor_back() -> None:
    floor = Floor()
    floor.opened(xmin=1, first=1, last=10, full=True)
    second = floor.opened(xmin=1, first=11, last=20, full=True)
    floor.closed(second, barrier=5, last=20)
    floor.opened(xmin=9, first=21, last=30, full=True)
    assert floor.value == 0


def test_reset_begins_at_zero() -> None:
    floor = Floor()
    page = floor.opened(xmin=1, first=1, last=10, full=False)
    floor.closed(page, barrier=2, last=10)
    second = floor.opened(xmin=3, first=11, last=12, full=False)
    assert floor.value == 10
    floor.reset(second)
    assert floor.value == 0


# A little database: each step opens a transaction (drawing an xid, then ids), commits or rolls back
# one, reads a page, or settles the oldest page in flight.
_STEPS = st.lists(
    st.sampled_from(["begin", "draw", "commit", "rollback", "read", "settle", "drop"]), max_size=120
)


class _Database:
    def __init__(self) -> None:
        self.next_xid = 1
        self.next_id = 1
        self.running: dict[int, list[int]] = {}  # xid: its ids
        self.rows: set[int] = set()

    def xmin(self) -> int:
        return min(self.running, default=self.next_xid)

    def assign(self) -> int:
        self.next_xid += 1
        return self.next_xid - 1

    def end(self, *, commit: bool, which: int) -> None:
        if self.running:
            xid = sorted(self.running)[which % len(self.running)]
            ids = self.running.pop(xid)
            if commit:
                self.rows.update(ids)


@given(_STEPS, st.integers(1, 4), st.data())
def test_no_row_ever_appears_below_the_floor(
    steps: Sequence[str], limit: int, data: st.DataObject
) -> None:
    database, floor = _Database(), Floor()
    pages: list[tuple[int, list[int]]] = []
    for step in steps:
        match step:
            case "begin":
                database.running[database.assign()] = []
            case "draw" if database.running:
                xid = data.draw(st.sampled_from(sorted(database.running)))
                database.running[xid].append(database.next_id)
                database.next_id += 1
            case "commit" | "rollback":
                database.end(commit=step == "commit", which=data.draw(st.integers(0, 9)))
            case "read":
                flying = {each for _, ids in pages for each in ids}
                below = {r for r in database.rows if r <= floor.value} - flying
                assert not below
                found = sorted(database.rows - flying)
                found = [row for row in found if row > floor.value]
                page = found[:limit]
                number = floor.opened(
                    xmin=database.xmin(),
                    first=page[0] if page else None,
                    last=page[-1] if page else None,
                    full=len(page) == limit,
                )
                if page:
                    pages.append((number, page))
            case "settle" if pages:
                number, ids = pages.pop(0)
                database.rows -= set(ids)
                floor.closed(number, barrier=database.assign(), last=ids[-1])
            case "drop" if pages:
                number, ids = pages.pop(0)
                floor.reset(number)
