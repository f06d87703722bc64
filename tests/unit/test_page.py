"""One event of a key is in flight; a failed one holds the later ones back, no others."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from outbox.postgres.pending import Row
from outbox.relay.page import Page, State


def rows(keys: Sequence[str | None], early: Sequence[int] = ()) -> list[Row]:
    return [Row(n, str(n), key, "evt.a", b"", b"", n in early) for n, key in enumerate(keys)]


def test_events_without_a_key_and_heads_of_keys_go_first() -> None:
    page = Page(rows([None, "a", "a", "b", None]), ())
    assert page.first == [0, 1, 3, 4]
    assert page.undecided == 5


def test_next_of_the_key_follows_when_its_head_is_confirmed() -> None:
    page = Page(rows(["a", "a", "a"]), ())
    assert page.decide(0, State.CONFIRMED) == 1
    assert page.decide(1, State.DEAD) == 2
    assert page.decide(2, State.CONFIRMED) is None
    assert page.undecided == 0


def test_failure_blocks_the_later_rows_of_its_key_only() -> None:
    page = Page(rows(["a", "b", "a", "a"]), ())
    assert page.decide(0, State.FAILED) is None
    assert page.states == [State.FAILED, State.UNSENT, State.BLOCKED, State.BLOCKED]
    assert page.undecided == 1


def test_outage_leaves_the_later_rows_untouched() -> None:
    page = Page(rows(["a", "a"]), ())
    page.decide(0, State.UNKNOWN)
    assert page.states == [State.UNKNOWN, State.UNSENT]
    assert page.undecided == 0


def test_scheduled_row_does_not_block_its_key() -> None:
    page = Page(rows(["a", "a"], early=[0]), ())
    assert page.states[0] is State.SCHEDULED
    assert page.first == [1]


def test_rows_of_a_blocked_key_are_not_sent() -> None:
    page = Page(rows(["a", None, "b"]), {"a"})
    assert page.first == [1, 2]
    assert page.states[0] is State.BLOCKED


def test_rows_of_a_busy_key_wait_for_the_page_before() -> None:
    page = Page(rows(["a", None, "a", "b"]), (), busy={"a"})
    assert page.first == [1, 3]
    assert page.undecided == 4
    assert page.release((), outage=False) == [0]
    assert page.decide(0, State.CONFIRMED) == 2


def test_deferred_rows_are_blocked_when_the_page_before_failed_on_their_key() -> None:
    page = Page(rows(["a", "a", "b"]), (), busy={"a", "b"})
    assert page.release({"a"}, outage=False) == [2]
    assert page.states == [State.BLOCKED, State.BLOCKED, State.UNSENT]
    assert page.undecided == 1


def test_deferred_rows_stay_when_the_page_before_ended_in_an_outage() -> None:
    page = Page(rows(["a", "a"]), (), busy={"a"})
    assert page.release((), outage=True) == []
    assert page.states == [State.UNSENT, State.UNSENT]
    assert page.undecided == 0


@given(
    st.lists(st.one_of(st.none(), st.sampled_from("abc")), max_size=30),
    st.lists(st.sampled_from(list(State)[3:]), min_size=40, max_size=40),
    st.randoms(),
)
def test_a_key_is_in_flight_once_and_never_after_a_failure(
    keys: list[str | None], outcomes: list[State], random: object
) -> None:
    outcomes = [each for each in outcomes if each in _ENDS] or [State.CONFIRMED]
    page = Page(rows(keys), ())
    flying = list(page.first)
    stopped: set[str] = set()
    last: dict[str, int] = {}
    turn = 0
    while flying:
        index = flying.pop(getattr(random, "randrange")(len(flying)))  # noqa: B009 - typed as object
        key = keys[index]
        outcome = outcomes[turn % len(outcomes)]
        turn += 1
        if key is not None:
            assert key not in stopped
            assert index > last.get(key, -1)
            last[key] = index
            if outcome in {State.FAILED, State.UNKNOWN}:
                stopped.add(key)
        following = page.decide(index, outcome)
        if following is not None:
            flying.append(following)
    assert page.undecided == 0


_ENDS = {State.CONFIRMED, State.DEAD, State.FAILED, State.UNKNOWN}
