"""What people do with dead letters: look at them, requeue them, discard them."""

from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.postgres import redrive, schema
from outbox.postgres.driver import translated
from outbox.postgres.redrive import Filter, Letter

LISTED_MAX = 10_000


async def listed(engine: AsyncEngine, schema_name: str, chosen: Filter) -> list[Letter]:
    """Return up to 10,000 dead letters, the oldest first.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    found: list[Letter] = []
    with translated():
        await schema.check_version(engine, schema_name)
        async with engine.connect() as connection:
            while len(found) < LISTED_MAX:
                after = found[-1].id if found else 0
                page = await redrive.letters(connection, schema_name, chosen, after=after)
                if not page:
                    break
                found += page
    return found[:LISTED_MAX]


async def shown(
    engine: AsyncEngine, schema_name: str, letter: int
) -> tuple[Letter, bytes, bytes, list[dict[str, Any]]] | None:
    """Return a dead letter with its header lines, its body and its history; None without one."""
    chosen = Filter(ids=[letter], state=None)
    with translated():
        await schema.check_version(engine, schema_name)
        async with engine.connect() as connection:
            found = await redrive.letters(connection, schema_name, chosen)
            if not found:
                return None
            headers, body = await redrive.content(connection, schema_name, letter)
            return found[0], headers, body, await redrive.history(connection, schema_name, letter)


async def counted(engine: AsyncEngine, schema_name: str, chosen: Filter) -> int:
    """Return how many dead letters there are."""
    with translated():
        await schema.check_version(engine, schema_name)
        async with engine.connect() as connection:
            return await redrive.count(connection, schema_name, chosen)


async def acted(
    engine: AsyncEngine,
    schema_name: str,
    chosen: Filter,
    *,
    action: str,
    by: str,
    note: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Requeue or discard all open ones of `chosen`, a thousand at a time; return how many.

    Each thousand is a transaction, with a row for each that says who did it and when. Repeated
    after it was interrupted it goes on with the rest.

    Args:
        action: `requeued` or `discarded`.
        progress: told how many are done.
    """
    done = 0
    while True:
        with translated():
            async with engine.begin() as connection:
                number = await redrive.act(
                    connection, schema_name, chosen, action=action, by=by, note=note
                )
        if not number:
            return done
        done += number
        progress(done)
