"""Replay: archived events, published once more or handed to one listener."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.postgres import replaying, schema
from outbox.postgres.driver import translated
from outbox.postgres.replaying import Event, Window


@dataclass(frozen=True, slots=True)
class Target:
    """One listener, and where its inbox is."""

    listener: str
    engine: AsyncEngine
    schema: str = "outbox"


@dataclass(slots=True)
class Replayed:
    """How many events were found, and what became of them."""

    found: int = 0
    known: int = 0  # to the listener's inbox, which would skip them
    taken: int = 0  # published or handed over; of a dry run: what would be


def pattern_of(subject: str) -> str:
    """Return the regular expression of a subject with NATS wildcards."""
    tokens = (
        "[^.]+" if t == "*" else ".+" if t == ">" else re.escape(t) for t in subject.split(".")
    )
    return f"^{r'[.]'.join(tokens)}$"


async def replay(
    engine: AsyncEngine,
    schema_name: str,
    window: Window,
    *,
    by: str,
    to: Target | None = None,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """Take archived events once more, in the order of their publication; return how many.

    Without `to` they are published again under new message ids, so that the stream's duplicate
    window does not swallow them; every listener sees them, and inboxes skip what they know. With
    `to` that listener alone runs those that its inbox does not know, and nothing is published.

    A thousand events are a transaction. Repeated after an interruption it takes the first ones
    again, which inboxes absorb.

    Args:
        by: who does it; kept with what a listener is given.
        dry_run: count only.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    done = Replayed()
    last: Event | None = None
    with translated():
        await schema.check_version(engine, schema_name)
        if to is not None:
            await schema.check_version(to.engine, to.schema)
        async with engine.connect() as connection:
            run, now = await replaying.begin(connection, schema_name)
        # What this replay publishes is archived again, and must not be taken for more.
        window = replace(window, until=min(window.until or now, now))
        seen: set[int] = set()  # an event that was replayed before is archived more than once
        while events := await _page(engine, schema_name, window, last):
            last = events[-1]
            events = _unseen(events, seen)
            done.found += len(events)
            if to is not None:
                events = await _unknown(to, events)
                done.known = done.found - done.taken - len(events)
            done.taken += len(events)
            if events and not dry_run:
                await _take(engine, schema_name, events, run=run, by=by, to=to)
            progress(done.found)
    return done


def _unseen(events: list[Event], seen: set[int]) -> list[Event]:
    """Return the events that were not seen before, and note them as seen."""
    fresh: list[Event] = []
    for event in events:
        if event.event_id.int not in seen:
            seen.add(event.event_id.int)
            fresh.append(event)
    return fresh


async def _page(
    engine: AsyncEngine, schema_name: str, window: Window, last: Event | None
) -> list[Event]:
    async with engine.connect() as connection:
        return await replaying.page(connection, schema_name, window, last)


async def _unknown(to: Target, events: list[Event]) -> list[Event]:
    async with to.engine.connect() as connection:
        known = await replaying.known(connection, to.schema, to.listener, events)
    return [event for event in events if event.event_id not in known]


async def _take(
    engine: AsyncEngine,
    schema_name: str,
    events: list[Event],
    *,
    run: int,
    by: str,
    to: Target | None,
) -> None:
    if to is None:
        async with engine.begin() as connection:
            await replaying.publish(connection, schema_name, events, run)
        return
    async with to.engine.begin() as connection:
        await replaying.hand_over(connection, to.schema, to.listener, events, by)
