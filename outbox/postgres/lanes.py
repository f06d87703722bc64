"""Leases on lanes: who may publish. The database's clock decides."""

from datetime import timedelta
from uuid import UUID

from outbox.postgres.driver import STATEMENT_SECONDS, Driver, translated
from outbox.postgres.tables import raw

# The condition of every write of the relay. $1 lane, $2 owner, $3 epoch.
FENCE = """fence AS (
  SELECT 1 FROM {schema}.lane WHERE lane = $1::int2 AND owner = $2::uuid AND epoch = $3::int8
  FOR SHARE
)"""
# More than two leases ahead: the clock was set back, which would keep a dead owner for that long.
TAKE = """
UPDATE {schema}.lane SET owner = $2::uuid, owner_name = $3::text, epoch = epoch + 1,
       expires_at = clock_timestamp() + $4::interval, unanswered_since = NULL, hindrance = NULL
WHERE lane = $1::int2
  AND (owner = $2::uuid OR expires_at < clock_timestamp()
       OR expires_at > clock_timestamp() + 2 * $4::interval)
RETURNING epoch
"""
RENEW = """
UPDATE {schema}.lane SET expires_at = clock_timestamp() + $4::interval,
       unanswered_since = clock_timestamp() - $5::interval, hindrance = $6::text
WHERE lane = $1::int2 AND owner = $2::uuid AND epoch = $3::int8 RETURNING epoch
"""
RELEASE = """
UPDATE {schema}.lane SET owner = NULL, owner_name = NULL, expires_at = '-infinity',
       unanswered_since = NULL, hindrance = NULL
WHERE lane = $1::int2 AND owner = $2::uuid AND epoch = $3::int8
"""


async def take(
    driver: Driver, schema: str, lane: int, *, owner: UUID, owner_name: str, lease: timedelta
) -> int | None:
    """Take `lane` when nobody holds it; return its new epoch, else None."""
    with translated():
        row = await driver.fetchrow(
            raw(schema, TAKE), lane, owner, owner_name, lease, timeout=STATEMENT_SECONDS
        )
    return None if row is None else int(row[0])


async def renew(
    driver: Driver,
    schema: str,
    fence: tuple[int, UUID, int],
    *,
    lease: timedelta,
    unanswered: timedelta | None = None,
    hindrance: str | None = None,
) -> bool:
    """Extend the lease of (lane, owner, epoch); return False when it was taken by another.

    Args:
        unanswered: how long something has waited for an ack; for `outbox status`.
        hindrance: what keeps the owner from publishing; for `outbox status`.
    """
    with translated():
        row = await driver.fetchrow(
            raw(schema, RENEW),
            *fence,
            lease,
            unanswered,
            hindrance,
            timeout=lease.total_seconds() / 2,
        )
    return row is not None


async def release(driver: Driver, schema: str, fence: tuple[int, UUID, int]) -> None:
    """Give the lane back, so that another takes it at once; harmless when it is lost already."""
    with translated():
        await driver.execute(raw(schema, RELEASE), *fence, timeout=STATEMENT_SECONDS)
