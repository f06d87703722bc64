"""The steps of relay and listener, and the one observer that is told of them.

Metrics, traces and logs are observers. Tests wait on one, and kill the process in one.
"""

from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """What has just happened. Relay steps are told per page, listener steps per event attempt."""

    # relay
    READ = "read"  # a page was read from the outbox
    SENT = "sent"  # its frames were handed to the connection
    CONFIRMED = "confirmed"  # the broker has answered for the page
    SETTLING = "settling"  # the settling statement is about to run
    SETTLED = "settled"  # confirmed rows have left the outbox
    HELD = "held"  # rows have moved to `waiting`
    REPAIRED = "repaired"  # the stream had lost events, which will be published again
    LANE_TAKEN = "lane_taken"
    LANE_LOST = "lane_lost"
    # listener
    RECEIVED = "received"  # a message is in hand
    RECORDED = "recorded"  # its inbox row is written, uncommitted
    HANDLED = "handled"  # the handler has returned
    FLUSHED = "flushed"  # the handler's own events are written, uncommitted
    COMMITTED = "committed"
    ACKED = "acked"
    DUPLICATE = "duplicate"  # listener: the inbox knew it; relay: the stream knew it
    RETRIED = "retried"  # the attempt failed and will be repeated
    GAP = "gap"  # the stream dropped messages that were not read; `count` of them at most
    # both
    DEAD_LETTERED = "dead_lettered"
    OUTAGE_BEGAN = "outage_began"
    OUTAGE_ENDED = "outage_ended"


@dataclass(frozen=True, slots=True)
class Moment:
    """One step, with the facts known at it. Payloads are never among them."""

    step: Step
    source: str  # "relay", or the listener's identity
    count: int = 1  # events concerned
    event_id: str | None = None
    subject: str | None = None
    reason: str | None = None
    attempt: int | None = None
    seconds: float | None = None  # how long the step, or the outage, took
    delay_seconds: float | None = None  # since the event was added
    sequence: int | None = None


class Observer:
    """Told of every step, in the process and task that takes it.

    `on_step` is synchronous and must be quick; what it raises fails the step, as a crash would.
    """

    def on_step(self, moment: Moment) -> None:
        """Take note of `moment`; the default does nothing."""
