"""Delays double, end at a bound, and are spread."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from outbox.backoff import Backoff


def test_delays_double_up_to_the_longest() -> None:
    steady = Backoff(jitter=0)
    delays = [steady.delay(attempt).total_seconds() for attempt in range(1, 13)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


@given(st.integers(-5, 10**9), st.floats(0, 1))
def test_a_delay_is_within_its_bounds_whatever_the_attempt(attempt: int, jitter: float) -> None:
    backoff = Backoff(jitter=jitter)
    delay = backoff.delay(attempt)
    full = Backoff(jitter=0).delay(attempt)
    assert full * (1 - jitter) - timedelta(microseconds=2) <= delay <= full
    assert full <= backoff.longest


def test_delays_of_many_are_spread() -> None:
    assert len({Backoff().delay(5) for _ in range(100)}) > 90
