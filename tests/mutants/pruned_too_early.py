"""The relay's pruning takes no notice of how old a row is."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

TARGET = "outbox.postgres.inbox:prune"
FAULTS = ("relay_killed", "old_rows_pruned")


def broken(original: Callable[..., Any]) -> Callable[..., Any]:
    """Prune all there is."""

    async def prune(*given: Any, **named: Any) -> int:
        found: int = await original(*given, **named | {"older_than": timedelta(0)})
        return found

    return prune
