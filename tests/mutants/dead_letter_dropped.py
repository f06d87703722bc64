"""A listener that gives up acks and keeps nothing."""

from collections.abc import Callable
from typing import Any

TARGET = "outbox.postgres.dead_letters:insert"
FAULTS = ("listener_stopped",)


def broken(_: Callable[..., Any]) -> Callable[..., Any]:
    """Write no row."""

    async def insert(*_: Any) -> int:
        return 0

    return insert
