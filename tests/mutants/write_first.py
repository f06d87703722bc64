"""The application's events are written when they are added, as ORM rows would be."""

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import text

from tests.chaos.app import LEDGER, NEXT, PLACED, Target
from tests.chaos.shared import CANARY, digest

TARGET = "tests.chaos.app:Writer._business"
FAULTS = ("connections_cut",)


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Draw the event's place in the outbox before the row of its key is locked."""

    async def business(self: Any, target: Target) -> None:
        key = f"order-{self._random.randrange(5)}"
        data = {"kind": "ok", "n": None, "canary": CANARY}
        event_id = self._events.add(target, PLACED, data, key=key)
        await self._events.flush(target)
        await asyncio.sleep(self._random.uniform(0.0, 0.03))
        last = await target.scalar(text(NEXT), {"key": key, "count": 1})
        values = {"event_id": event_id, "subject": PLACED, "key": key, "key_seq": last}
        values |= {"digest": digest(data | {"mark": ""}), "kind": "ok"}
        await target.execute(text(LEDGER), values)

    return business
