"""The archive does not say where the stream holds an event."""

from collections.abc import Callable, Sequence
from typing import Any

TARGET = "outbox.postgres.pending:settle"
FAULTS = ("broker_restored",)


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Archive every row at sequence 0."""

    async def settle(
        driver: Any,
        schema: str,
        fence: Any,
        confirmed: Sequence[tuple[int, int, str]],
        **more: Any,
    ) -> Any:
        nowhere = [(each, 0, stream) for each, _, stream in confirmed]
        return await original(driver, schema, fence, nowhere, **more)

    return settle
