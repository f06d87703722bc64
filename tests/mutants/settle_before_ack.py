"""The relay takes what it has sent for stored."""

import asyncio
from collections.abc import Callable
from typing import Any

from outbox.relay.flight import Flight
from outbox.relay.page import State

TARGET = "outbox.relay.flight:Flight._wait"
FAULTS = ("nats_killed",)


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Confirm at once."""

    async def wait(flight: Flight) -> None:
        while flight.page.undecided:
            flight._event.clear()
            for index in flight.page.having(State.SENT):
                flight._confirm(index, 1, flight.stream)
            ready, flight._ready = flight._ready, []
            if ready:
                await flight._follow(ready)
            elif flight.page.undecided:
                await asyncio.wait_for(flight._event.wait(), 5)

    return wait
