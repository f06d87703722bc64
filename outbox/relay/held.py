"""Which rows of `waiting` may be published now, and which keys they block."""

from collections.abc import Sequence

from outbox.postgres import waiting
from outbox.postgres.driver import Driver
from outbox.postgres.pending import Row
from outbox.postgres.waiting import Head
from outbox.relay.page import Page, State
from outbox.settings import Settings


class Blocked:
    """The blocked keys; kept by the one relay that holds the lane."""

    def __init__(self) -> None:
        self.keys: set[str] = set()  # later rows of these go to `waiting` too
        self.released: set[str] = set()  # of them: the head has left, the followers may go
        self.parked: set[str] = set()  # of them: the head is a dead letter that a person decides on


class HeldRows:
    """Reads `waiting` for the holder of the lane."""

    def __init__(self, driver: Driver, settings: Settings, blocked: Blocked) -> None:
        self._driver = driver
        self._schema = settings.schema_name
        self._rows_max = settings.page_rows_max
        self._bytes_max = settings.page_bytes_max
        self._blocked = blocked

    async def load(self) -> None:
        """Learn the blocked keys, at take-over."""
        self._note(await waiting.blocked_keys(self._driver, self._schema))

    async def due(self) -> tuple[list[Row], list[Row]]:
        """Return the rows to publish now, and those that must go behind a blocked key."""
        limits = {"rows_max": self._rows_max, "bytes_max": self._bytes_max}
        await self._look_at_parked()
        due = await waiting.due(self._driver, self._schema, **limits)
        behind = [
            row for row in due if row.reason not in {"failed", "blocked"} and self._is_blocked(row)
        ]
        rows = [row for row in due if row not in behind] if behind else due
        if self._blocked.released:
            freed = await waiting.followers(
                self._driver, self._schema, self._blocked.released, **limits
            )
            rows = sorted({row.id: row for row in (*rows, *freed)}.values())
            if not freed:
                await self.refresh(set(self._blocked.released))
        return rows, behind

    def hold_behind(self, page: Page, behind: Sequence[Row]) -> None:
        """Add `behind` to `page` as blocked rows, to be moved with it."""
        page.rows = [*page.rows, *behind]
        page.states.extend(State.BLOCKED for _ in behind)

    async def refresh(self, keys: set[str]) -> None:
        """Learn again which of `keys` are blocked."""
        if not keys:
            return
        self._blocked.keys -= keys
        self._blocked.released -= keys
        self._blocked.parked -= keys
        self._note(await waiting.blocked_keys(self._driver, self._schema, keys))

    async def _look_at_parked(self) -> None:
        """Let go the keys whose dead head was discarded; a requeued one is a failed row again."""
        if self._blocked.parked:
            still = await waiting.parked_keys(self._driver, self._schema, self._blocked.parked)
            await self.refresh(self._blocked.parked - still)

    def _note(self, found: dict[str, Head]) -> None:
        self._blocked.keys |= set(found)
        self._blocked.released |= {key for key, head in found.items() if head is Head.NONE}
        self._blocked.parked |= {key for key, head in found.items() if head is Head.DEAD}

    def _is_blocked(self, row: Row) -> bool:
        return row.key is not None and row.key in self._blocked.keys
