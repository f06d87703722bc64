"""The listener acks before its transaction is committed."""

from collections.abc import Callable
from typing import Any

TARGET = "outbox.listener.handling:Handling._try"
FAULTS = ("listener_killed", "listener_kill_at_step")


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Ack first."""

    async def attempt(self: Any, puller: Any, message: Any, work: Any, *, marked: bool) -> None:
        await puller.ack(message)
        await original(self, puller, message, work, marked=marked)

    return attempt
