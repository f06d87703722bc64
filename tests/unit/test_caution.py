"""Which event is blamed for closed connections."""

from outbox.relay.caution import CLOSES_MAX, HANG_UPS_MAX, Caution, Suspicion


def test_rows_in_flight_are_one_after_closes_and_double_with_each_success() -> None:
    caution = Caution()
    caution.closed()
    assert caution.cap == 0
    caution.closed()
    assert caution.cap == 1
    caution.passed(8)
    assert caution.cap == 2
    caution.closed()
    assert caution.cap == 1
    for _ in range(3):
        caution.passed(8)
    assert caution == Caution()


def test_refused_event_is_blamed_once_it_was_alone() -> None:
    suspicion = Suspicion()
    assert not suspicion.hung_up(7, refused=True, closes=CLOSES_MAX)
    assert suspicion.hung_up(7, refused=True, closes=CLOSES_MAX + 1)
    assert suspicion.hung_up(7, refused=False, closes=1)  # known by now
    assert not suspicion.hung_up(8, refused=False, closes=9)


def test_silent_hang_ups_count_for_one_event_in_a_row_only() -> None:
    suspicion = Suspicion()
    for _ in range(HANG_UPS_MAX):
        assert not suspicion.hung_up(7, refused=False, closes=99)
    suspicion.clear()
    for _ in range(HANG_UPS_MAX):
        assert not suspicion.hung_up(7, refused=False, closes=99)
    assert suspicion.hung_up(7, refused=False, closes=99)
