"""The tree of errors: what may be caught together, and what a message may show."""

import inspect
import pickle
from datetime import timedelta

import pytest

from outbox import errors
from outbox.errors import (
    BrokerUnavailable,
    HandlerError,
    InvalidEvent,
    InvalidSession,
    OutboxError,
    PublishError,
    Reject,
    Retry,
    shorten,
)

CLASSES = [
    each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)
]


@pytest.mark.parametrize("each", CLASSES)
def test_every_error_is_an_outbox_error_and_drawn_in_the_tree(each: type[Exception]) -> None:
    assert issubclass(each, OutboxError)
    assert errors.__doc__ is not None
    assert each.__name__ in errors.__doc__


def test_a_callers_mistakes_are_pythons_own_too() -> None:
    assert issubclass(InvalidEvent, ValueError)
    assert issubclass(InvalidSession, TypeError)


def test_an_invalid_event_names_field_and_rule_and_shortens_the_value() -> None:
    error = InvalidEvent("key", "1 to 255 visible ASCII characters", "a\x1b[2J" + "b" * 10_000)
    assert error.field == "key"
    assert error.rule == "1 to 255 visible ASCII characters"
    assert str(error).startswith("key: 1 to 255 visible ASCII characters (got 'a\\x1b[2J")
    assert len(str(error)) < 120


@pytest.mark.parametrize(
    "value",
    ["", "x" * 40, "x" * 41, "\x1b[31m", "\u202e" * 50, "ü" * 39, "\ud800", "'\\\n\r\0", None, 7],
)
def test_what_is_shown_is_short_printable_ascii(value: object) -> None:
    shown = shorten(value)
    assert len(shown) <= 40
    assert shown.removesuffix("…").isascii()
    assert shown.isprintable()


def test_a_publish_error_says_whether_the_event_was_refused() -> None:
    assert not PublishError("7", "no answer").refused
    assert PublishError("7", "too large", refused=True).refused
    assert str(PublishError("7", "no answer")) == "event 7 was not confirmed: no answer"


def test_a_handler_error_names_listener_and_event() -> None:
    error = HandlerError("mailer-receipts", "7", "timed out")
    assert str(error) == "mailer-receipts failed on event 7: timed out"


def test_retry_takes_a_timedelta_or_seconds() -> None:
    assert Retry("busy", after=1.5).after == timedelta(seconds=1.5)
    assert Retry("busy", after=timedelta(seconds=2)).after == timedelta(seconds=2)
    assert Retry().after is None
    assert Reject("unknown").reason == "unknown"


def test_errors_without_own_facts_survive_pickling() -> None:
    assert str(pickle.loads(pickle.dumps(BrokerUnavailable("down")))) == "down"  # noqa: S301
