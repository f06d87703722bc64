"""`outbox verify`: is everything on the stream that the archive says is there?"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import BrokerUnavailable
from outbox.jetstream import provisioning
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.jetstream.provisioning import StreamFacts
from outbox.jetstream.scanning import scan
from outbox.postgres import confirming, driver, schema
from outbox.postgres.confirming import Owned
from outbox.postgres.driver import Driver

ROWS = 20_000  # of the archive, compared at once
LISTED_MAX = 10_000  # missing events that are listed one by one; all are counted
AGE_MARGIN = timedelta(minutes=1)


class Missing(StrEnum):
    """Why an archived event is not on its stream."""

    EXPIRED = "expired"  # older than the stream's max_age
    LIMITS = "limits"  # dropped by the stream's limits, which discard old messages
    PURGED = "purged"  # below the first sequence, and neither of those
    DELETED = "deleted"  # a hole
    LOST = "lost"  # another message is there, or the stream ends before it


MENDED = frozenset({Missing.PURGED, Missing.DELETED, Missing.LOST})


@dataclass(slots=True)
class Verified:
    """What was found."""

    compared: int = 0
    missing: Counter[Missing] = field(default_factory=Counter)
    events: list[tuple[Missing, str, Owned]] = field(default_factory=list)  # with their stream
    repaired: int = 0

    @property
    def complete(self) -> bool:
        """True when nothing is missing but what the stream itself has expired."""
        return not any(n for why, n in self.missing.items() if why is not Missing.EXPIRED)


async def verify(
    engine: AsyncEngine,
    client: JetStreamClient,
    schema_name: str = "outbox",
    *,
    repair: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Verified:
    """Compare the archive with its streams, by ids alone; return what is missing, and why.

    Args:
        repair: have what people took away, and what was lost, published again.
        progress: told how many events were compared so far.

    Raises:
        BrokerUnavailable: a stream could not be read to its end.
        DatabaseUnavailable: PostgreSQL cannot be reached.
        ConfigurationError: there are no tables of this version; names the command to run.
    """
    found = Verified()
    with driver.translated():
        await schema.check_version(engine, schema_name)
    async with driver.connection(engine) as (_, raw):
        for stream in await confirming.streams(raw, schema_name):
            await _Stream(raw, client, schema_name, stream, found, progress).verify(repair=repair)
    return found


@dataclass(slots=True)
class _Stream:
    """Compares one stream."""

    driver: Driver
    client: JetStreamClient
    schema: str
    stream: str
    found: Verified
    progress: Callable[[int], None]

    async def verify(self, *, repair: bool) -> None:
        """Compare all archived events; the database is read before the stream."""
        newest = await confirming.newest(self.driver, self.schema, self.stream)
        oldest = await confirming.page(self.driver, self.schema, self.stream, 0, 1)
        if newest is None or not oldest:
            return
        facts = await self._facts()
        first, last = int(facts.state["first_seq"]), int(facts.state["last_seq"])
        begin = max(first, oldest[0].sequence)
        if begin > min(last, newest.sequence):
            await self._compare(facts, _nothing(), newest.sequence, repair=repair)
            return
        async with scan(
            self.client, self.stream, first=begin, last=min(last, newest.sequence)
        ) as s:
            await self._compare(facts, s.pages(), newest.sequence, repair=repair)

    async def _facts(self) -> StreamFacts:
        try:
            info = await self.client.api(f"STREAM.INFO.{self.stream}")
        except ApiError as error:
            if error.err_code != provisioning.STREAM_NOT_FOUND:
                raise BrokerUnavailable(f"stream {self.stream}: {error}") from error
            return StreamFacts(self.stream, {}, {"first_seq": 1, "last_seq": 0}, "")
        return StreamFacts(self.stream, info["config"], info["state"], str(info["created"]))

    async def _compare(
        self,
        facts: StreamFacts,
        pages: AsyncIterator[list[tuple[int, str]]],
        newest: int,
        *,
        repair: bool,
    ) -> None:
        """Walk through both in the order of sequences."""
        stored: dict[int, str] = {}
        reached, after = 0, 0
        last = int(facts.state["last_seq"])
        while rows := await confirming.page(self.driver, self.schema, self.stream, after, ROWS):
            rows = [row for row in rows if row.sequence <= newest]  # later ones came meanwhile
            if not rows:
                return
            after = rows[-1].sequence
            while reached < min(after, last) and (page := await anext(pages, None)) is not None:
                stored.update(page)
                reached = page[-1][0] if page else reached
            lost = list(self._missing(facts, rows, stored))
            stored = {sequence: each for sequence, each in stored.items() if sequence > after}
            self._note(lost)
            self.found.compared += len(rows)
            self.progress(self.found.compared)
            if repair:
                await self._repair(lost)

    def _missing(
        self, facts: StreamFacts, rows: list[Owned], stored: dict[int, str]
    ) -> Iterator[tuple[Missing, Owned]]:
        first, last = int(facts.state["first_seq"]), int(facts.state["last_seq"])
        for row in rows:
            message_id = stored.get(row.sequence)
            if message_id is not None:
                if message_id != row.event_id and not message_id.startswith(f"{row.event_id}~"):
                    yield Missing.LOST, row
            elif row.sequence > last:
                yield Missing.LOST, row
            elif row.sequence >= first:
                yield Missing.DELETED, row
            else:
                yield _why_gone(facts, row), row

    def _note(self, lost: list[tuple[Missing, Owned]]) -> None:
        for why, row in lost:
            self.found.missing[why] += 1
            if why is not Missing.EXPIRED and len(self.found.events) < LISTED_MAX:
                self.found.events.append((why, self.stream, row))

    async def _repair(self, lost: list[tuple[Missing, Owned]]) -> None:
        for why in MENDED:
            sequences = [row.sequence for each, row in lost if each is why]
            if sequences:
                error = f"outbox verify --repair: {why}"
                self.found.repaired += await confirming.give_back(
                    self.driver, self.schema, self.stream, sequences, error
                )


def _why_gone(facts: StreamFacts, row: Owned) -> Missing:
    """Tell what took away a message below the first sequence."""
    config: Any = facts.config
    if facts.max_age is not None and datetime.now(UTC) - row.published_at >= (
        facts.max_age - AGE_MARGIN
    ):
        return Missing.EXPIRED
    limits = (("max_msgs", "messages", 1.0), ("max_bytes", "bytes", 0.9))  # a block at a time
    full = any(
        int(config.get(limit) or -1) > 0
        and int(facts.state.get(state) or 0) >= share * int(config[limit])
        for limit, state, share in limits
    )
    return Missing.LIMITS if full and config.get("discard") == "old" else Missing.PURGED


async def _nothing() -> AsyncIterator[list[tuple[int, str]]]:
    """Yield no messages: the stream holds none where ours should be."""
    pages: tuple[list[tuple[int, str]], ...] = ()
    for page in pages:
        yield page
