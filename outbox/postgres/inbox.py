"""The inbox: what each listener has finished with, recorded in the transaction of the effect."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from outbox.postgres.tables import statement

# A transaction whose commit is followed by an ack must be on disk, so it raises synchronous_commit
# for itself. The bare ON CONFLICT and RETURNING of a function need the INSERT privilege alone. A
# second INSERT of the same key waits for the first transaction to end.
# It also waits for no more than a moment while another transaction records the same event; the
# lock_timeout that the handler finds is its own again, put back once the row is written.
_WAIT = """
WITH own AS MATERIALIZED (
  SELECT current_setting('lock_timeout') AS lock_timeout,
         set_config('lock_timeout', '2s', true) AS changed
)"""
_RESTORED = "(SELECT set_config('lock_timeout', own.lock_timeout, true) FROM own) AS restored"
_SYNCHRONOUS = """(SELECT CASE WHEN current_setting('synchronous_commit') = 'off'
        THEN set_config('synchronous_commit', 'on', true) ELSE '' END) IS NOT NULL"""
RECORD = f"""
{_WAIT} INSERT INTO {{schema}}.inbox (listener, event_id)
SELECT CAST(:listener AS text), CAST(:event_id AS uuid) FROM own WHERE {_SYNCHRONOUS}
ON CONFLICT DO NOTHING RETURNING CAST(pg_current_xact_id() AS text), {_RESTORED}
"""  # noqa: S608 - no value is built in
RECORD_MANY = f"""
{_WAIT} INSERT INTO {{schema}}.inbox (listener, event_id)
SELECT CAST(:listener AS text), e FROM own, unnest(CAST(:event_ids AS uuid[])) AS e
WHERE {_SYNCHRONOUS} ORDER BY e
ON CONFLICT DO NOTHING RETURNING event_id, CAST(pg_current_xact_id() AS text), {_RESTORED}
"""  # noqa: S608 - no value is built in
CURRENT = "SELECT CAST(pg_current_xact_id_if_assigned() AS text)"
# `override` closes an event whose inbox row a handler committed on its own.
CLOSE = f"""
INSERT INTO {{schema}}.inbox AS i (listener, event_id, outcome)
SELECT CAST(:listener AS text), CAST(:event_id AS uuid), CAST(:outcome AS text)
WHERE {_SYNCHRONOUS}
ON CONFLICT (listener, event_id) DO UPDATE SET outcome = excluded.outcome, processed_at = now()
  WHERE i.outcome = 'handled' AND CAST(:override AS boolean)
RETURNING true
"""
# An attempt row outlives its event when a consumer was made again; it goes with the inbox row.
PRUNE = """
WITH attempts AS (
  DELETE FROM {schema}.attempt WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {schema}.attempt
    WHERE updated_at < now() - CAST(:older_than AS interval) LIMIT CAST(:limit AS int)
  ))
)
DELETE FROM {schema}.inbox WHERE ctid = ANY(ARRAY(
  SELECT ctid FROM {schema}.inbox
  WHERE processed_at < now() - CAST(:older_than AS interval) LIMIT CAST(:limit AS int)
))
"""
COUNT_OLDER = """
SELECT count(*) FROM {schema}.inbox WHERE processed_at < now() - CAST(:older_than AS interval)
"""
KNOWN = """
SELECT event_id FROM {schema}.inbox
WHERE listener = CAST(:listener AS text) AND event_id = ANY(CAST(:event_ids AS uuid[]))
"""


async def known(
    session: AsyncSession, schema: str, *, listener: str, event_ids: Sequence[UUID]
) -> set[UUID]:
    """Return those of `event_ids` that the listener has finished with."""
    values = {"listener": listener, "event_ids": list(event_ids)}
    return set((await session.execute(statement(schema, KNOWN), values)).scalars())


async def record(
    session: AsyncSession, schema: str, *, listener: str, event_id: UUID
) -> str | None:
    """Record an event as handled by `listener`; return the transaction's xid, None if known.

    It waits up to 2 s while another transaction that records the same event is open.

    Raises:
        sqlalchemy.exc.DBAPIError: 55P03 when that transaction stays open.
    """
    found = await session.execute(
        statement(schema, RECORD), {"listener": listener, "event_id": event_id}
    )
    row = found.one_or_none()
    return None if row is None else str(row[0])


async def record_many(
    session: AsyncSession, schema: str, *, listener: str, event_ids: Sequence[UUID]
) -> tuple[set[UUID], str | None]:
    """Record events, in sorted order so that two batches cannot deadlock.

    Returns:
        The ids that were new, and the transaction's xid, None when no id was.
    """
    rows = (
        await session.execute(
            statement(schema, RECORD_MANY),
            {"listener": listener, "event_ids": sorted(event_ids)},
        )
    ).all()
    return {row[0] for row in rows}, (rows[0][1] if rows else None)


async def current_xid(session: AsyncSession, schema: str) -> str | None:
    """Return the xid of the running transaction, None when it has none.

    Raises:
        sqlalchemy.exc.DBAPIError: 25P02 when a statement of the transaction had failed before.
    """
    xid: str | None = (await session.execute(statement(schema, CURRENT))).scalar_one_or_none()
    return xid


async def close(
    session: AsyncSession,
    schema: str,
    *,
    listener: str,
    event_id: UUID,
    outcome: str,
    override: bool,
) -> bool:
    """Record that `listener` is done with an event that it did not handle; False if it was."""
    found = await session.execute(
        statement(schema, CLOSE),
        {
            "listener": listener,
            "event_id": event_id,
            "outcome": outcome,
            "override": override,
        },
    )
    return found.scalar_one_or_none() is not None


async def count_older(connection: AsyncConnection, schema: str, *, older_than: timedelta) -> int:
    """Return how many rows `prune` would delete."""
    values = {"older_than": older_than}
    found = await connection.execute(statement(schema, COUNT_OLDER), values)
    return int(found.scalar_one())


async def prune(
    connection: AsyncConnection, schema: str, *, older_than: timedelta, limit: int
) -> int:
    """Delete up to `limit` rows older than `older_than`; return how many were."""
    found = await connection.execute(
        statement(schema, PRUNE), {"older_than": older_than, "limit": limit}
    )
    return found.rowcount
