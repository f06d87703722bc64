"""The archive's ring: 32 partitions by UTC day, emptied by TRUNCATE, never created or dropped.

TRUNCATE of one leaf blocks no settle into the others, while DROP or ATTACH would.
"""

import logging
from datetime import timedelta

import asyncpg

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.tables import ARCHIVE_RING_DAYS, raw

logger = logging.getLogger(__name__)
MARGIN_SECONDS = 600

NOW = """
SELECT CAST(floor(extract(epoch FROM now())) AS int8) / 86400,
       86400 - CAST(floor(extract(epoch FROM now())) AS int8) % 86400
"""
HOLDS_ROWS = "SELECT EXISTS (SELECT 1 FROM {schema}.archive_{leaf})"
COUNT = "SELECT count(*) FROM {schema}.archive_{leaf}"
EMPTY = "SET LOCAL lock_timeout = '2s'; TRUNCATE {schema}.archive_{leaf}"


async def turn(driver: Driver, schema: str, retention: timedelta) -> int:
    """Empty the leaves whose day is wholly past `retention`; return how many were emptied.

    A leaf that somebody reads is left for the next turn.
    """
    emptied = 0
    for leaf in await _stale(driver, retention):
        emptied += await _empty(driver, schema, leaf)
    return emptied


async def stale_rows(driver: Driver, schema: str, retention: timedelta) -> int:
    """Return how many rows the leaves hold that `turn` would empty."""
    rows = 0
    for leaf in await _stale(driver, retention):
        sql = raw(schema, COUNT.replace("{leaf}", f"{leaf:02d}"))
        with translated():
            found = await driver.fetchrow(sql, timeout=STATEMENT_SECONDS)
        rows += 0 if found is None else int(found[0])
    return rows


async def _stale(driver: Driver, retention: timedelta) -> list[int]:
    """Return the stale leaves by the database's clock."""
    with translated():
        row = await driver.fetchrow(NOW, timeout=STATEMENT_SECONDS)
    assert row is not None  # noqa: S101 - a scalar select always has a row
    return stale_leaves(int(row[0]), retention, near_midnight=int(row[1]) < MARGIN_SECONDS)


def stale_leaves(today: int, retention: timedelta, *, near_midnight: bool) -> list[int]:
    """Return the leaves without a day that `retention` still covers on day number `today`.

    The leaf that will be written tomorrow is left alone near midnight: a settle may be faster.
    """
    days = -(-retention // timedelta(days=1))  # rounded up
    kept = {(today - back) % ARCHIVE_RING_DAYS for back in range(days + 1)}
    if near_midnight:
        kept.add((today + 1) % ARCHIVE_RING_DAYS)
    return [leaf for leaf in range(ARCHIVE_RING_DAYS) if leaf not in kept]


async def _empty(driver: Driver, schema: str, leaf: int) -> bool:
    name = f"{leaf:02d}"
    with translated():
        row = await driver.fetchrow(
            raw(schema, HOLDS_ROWS.replace("{leaf}", name)), timeout=STATEMENT_SECONDS
        )
        if row is None or not row[0]:
            return False
        try:
            # One simple-protocol message is one transaction.
            await driver.execute(
                raw(schema, EMPTY.replace("{leaf}", name)), timeout=STATEMENT_SECONDS
            )
        except asyncpg.LockNotAvailableError:
            logger.info("an old partition of the archive is being read", extra={"leaf": leaf})
            return False
    return True
