"""The observer: does nothing unless it is overridden, and is told facts without payloads."""

from dataclasses import fields

from outbox.telemetry import Moment, Observer, Step


def test_the_default_observer_takes_every_step() -> None:
    for step in Step:
        Observer().on_step(Moment(step, "relay"))


def test_a_moment_carries_no_payload() -> None:
    assert {each.name for each in fields(Moment)}.isdisjoint({"payload", "data", "body", "headers"})
