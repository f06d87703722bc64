"""A relay decides about rows without looking whether the lane is still its own."""

from collections.abc import Callable, Sequence
from typing import Any

from outbox.postgres import pending
from outbox.postgres.driver import Driver
from outbox.postgres.lanes import FENCE
from outbox.postgres.pending import Wait
from outbox.postgres.tables import raw

TARGET = "outbox.postgres.pending:move_to_waiting"
FAULTS = ("lane_taken_away",)
NO_FENCE = "fence AS (SELECT $1::int2, $2::uuid, $3::int8)"


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Move the rows in any case."""
    sql = pending.MOVE_TO_WAITING.replace(FENCE, NO_FENCE)
    assert sql != pending.MOVE_TO_WAITING

    async def move(driver: Driver, schema: str, fence: Any, waits: Sequence[Wait]) -> bool:
        await driver.fetchrow(raw(schema, sql), *fence, *pending.wait_columns(waits))
        return True

    return move
