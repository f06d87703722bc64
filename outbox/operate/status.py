"""How the outbox does, from the database alone."""

from dataclasses import asdict
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.postgres import counting, schema
from outbox.postgres.driver import translated


async def status(engine: AsyncEngine, schema_name: str = "outbox") -> dict[str, Any]:
    """Return the figures of `outbox status --json`, as of one moment.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    with translated():
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="REPEATABLE READ")
            await schema.check_version(connection, schema_name)
            version = await schema.version(connection, schema_name)
            counts = await counting.count(connection, schema_name)
            lanes = await counting.lanes(connection, schema_name)
    numbers = counts.numbers
    oldest = counts.oldest
    return {
        "pending": numbers["pending"],
        "oldest_pending_seconds": None if oldest is None else round(oldest.total_seconds(), 3),
        "scheduled": numbers["scheduled"],
        "published": numbers["published"],
        "dead_letters": numbers["dead_letters"],
        "inbox": numbers["inbox"],
        "schema_version": version,
        "lanes": [asdict(lane) for lane in lanes],
        "estimated": counts.estimated,
    }
