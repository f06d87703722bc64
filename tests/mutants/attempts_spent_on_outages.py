"""The relay counts an outage of the broker as each event's own failure."""

from collections.abc import Callable
from typing import Any

from outbox.relay.flight import Flight
from outbox.relay.page import State

TARGET = "outbox.relay.lane:Lane._explain"
FAULTS = ("stream_full", "nats_paused")


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Have every row fail that has no answer."""

    async def explain(self: Any, flight: Flight) -> None:
        del self
        for index in flight.page.having(State.UNKNOWN):
            flight.page.undecided += 1
            flight.fail(index, str(flight.outage), counted=True)
        flight.outage = None

    return explain
