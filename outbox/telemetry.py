"""The steps of relay and listener, and the one observer that is told of them.

Metrics, traces and logs are observers. Tests wait on one, and kill the process in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple


class Step(StrEnum):
    """What has just happened. Relay steps are told per page, listener steps per event attempt."""

    # relay
    READ = "read"  # a page was read from the outbox
    SENT = "sent"  # its frames were handed to the connection
    CONFIRMED = "confirmed"  # the broker has answered for the page
    FAILED = "failed"  # rows of the page were not published; `reason` is a `FailureClass`
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


class FailureClass(StrEnum):
    """Whose fault it is that an event was not published."""

    UNAVAILABLE = "unavailable"  # an outage: nobody's, nothing is spent
    MISCONFIGURED = "misconfigured"  # of the stream, or of permissions: it waits
    REFUSED = "refused"  # of the event, perhaps: it spends an attempt
    IMPOSSIBLE = "impossible"  # of the event: it is given up


class Fact(NamedTuple):
    """One event that a moment concerns."""

    event_id: str
    subject: str
    added_at: float | None  # POSIX seconds; the relay knows it of ids of version 7 only


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
    seconds: float | None = None  # how long the handler, or the outage, took
    sequence: int | None = None
    events: Sequence[Fact] = ()  # of SETTLED and COMMITTED, for an observer that wants them


class Observer:
    """Told of every step, in the process and task that takes it.

    `on_step` is synchronous and must be quick; what it raises fails the step, as a crash would.
    """

    wants_events: ClassVar[bool] = False  # whether moments carry `events`, which costs a little

    def on_step(self, moment: Moment) -> None:
        """Take note of `moment`; the default does nothing."""
