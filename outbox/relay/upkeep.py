"""What the active relay does once a minute: turn the archive's ring, prune the inbox."""

import logging

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres import archive, inbox
from outbox.postgres.driver import Driver, translated
from outbox.settings import Settings

logger = logging.getLogger(__name__)
PRUNE_ROWS = 5000
PRUNE_ROUNDS = 20  # bounded, so that the lease on the same connection is renewed in time


async def turn_archive(driver: Driver, settings: Settings) -> None:
    """Empty the archive's partitions that are past retention."""
    if settings.archive_retention is None:
        return
    emptied = await archive.turn(driver, settings.schema_name, settings.archive_retention)
    if emptied:
        logger.info("emptied old partitions of the archive", extra={"count": emptied})


async def prune_inbox(connection: AsyncConnection, settings: Settings) -> bool:
    """Delete one batch of old inbox rows; return whether there may be more."""
    with translated():
        async with connection.begin():
            pruned = await inbox.prune(
                connection,
                settings.schema_name,
                older_than=settings.inbox_retention,
                limit=PRUNE_ROWS,
            )
    return pruned >= PRUNE_ROWS
