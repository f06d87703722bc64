"""Retention by hand: what the active relay prunes once a minute, at once and to the end."""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.postgres import archive, driver, inbox, schema
from outbox.postgres.driver import translated
from outbox.settings import Settings

BATCH = 5000


@dataclass(frozen=True, slots=True)
class Pruned:
    """What is past its retention, or was until now. Dead letters never are."""

    inbox: int  # rows
    archive: int  # rows, in whole days of the ring


async def prune(
    engine: AsyncEngine,
    settings: Settings,
    *,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Pruned:
    """Delete what is older than the settings' retention; return how much.

    Each batch of the inbox is a transaction. A day of the archive that somebody reads stays.

    Args:
        dry_run: count only.
        progress: told how many rows of the inbox are gone.

    Raises:
        ConfigurationError: there are no tables of this version; names the command to run.
        DatabaseUnavailable: PostgreSQL cannot be reached; what was deleted stays deleted.
    """
    name, kept = settings.schema_name, settings.inbox_retention
    async with driver.connection(engine) as (held, raw):
        with translated():
            await schema.check_version(held, name)
            await held.rollback()
            archived = 0
            if settings.archive_retention is not None:
                archived = await archive.stale_rows(raw, name, settings.archive_retention)
            if dry_run:
                async with held.begin():
                    old = await inbox.count_older(held, name, older_than=kept)
                return Pruned(old, archived)
            if settings.archive_retention is not None:
                await archive.turn(raw, name, settings.archive_retention)
                left = await archive.stale_rows(raw, name, settings.archive_retention)
                archived -= left
            gone = 0
            while True:
                async with held.begin():
                    batch = await inbox.prune(held, name, older_than=kept, limit=BATCH)
                gone += batch
                progress(gone)
                if batch < BATCH:
                    return Pruned(gone, archived)
