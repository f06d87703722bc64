"""What `outbox doctor` asks the database; nothing is changed."""

from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres.tables import distinct, statement

ROWS_MAX = 100
POOL_PROBES = 6  # transactions that should all have one backend


class Server(NamedTuple):
    """Settings that a commit depends on."""

    standby: bool
    synchronous_commit: str
    fsync: str
    full_page_writes: str
    version: int  # 180004
    now: datetime


class Holder(NamedTuple):
    """Who keeps old row versions alive, and the relay's floor back."""

    kind: str  # session, prepared transaction, replication slot
    name: str  # pid, gid, slot
    application: str
    age: timedelta


SERVER = """
SELECT pg_is_in_recovery(), current_setting('synchronous_commit'), current_setting('fsync'),
       current_setting('full_page_writes'), CAST(current_setting('server_version_num') AS int),
       clock_timestamp()
"""
UNLOGGED = """
SELECT relname FROM pg_class
WHERE relnamespace = CAST(:schema AS regnamespace) AND relkind IN ('r', 'p')
  AND relpersistence = 'u' ORDER BY relname
"""
HOLDERS = """
SELECT 'session', CAST(pid AS text), coalesce(application_name, ''), now() - xact_start
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
  AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL)
  AND xact_start < now() - CAST(:older_than AS interval)
UNION ALL
SELECT 'prepared transaction', gid, owner, now() - prepared FROM pg_prepared_xacts
WHERE database = current_database() AND prepared < now() - CAST(:older_than AS interval)
UNION ALL
SELECT 'replication slot', slot_name, coalesce(plugin, slot_type), interval '0'
FROM pg_replication_slots WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
ORDER BY 4 DESC LIMIT 100
"""
# What the relay does: see the grants in the migrations.
PRIVILEGES = """
SELECT p.what FROM (VALUES
  ('pending', 'SELECT'), ('pending', 'INSERT'), ('pending', 'DELETE'), ('waiting', 'INSERT'),
  ('waiting', 'UPDATE'), ('waiting', 'DELETE'), ('lane', 'UPDATE'), ('archive', 'INSERT'),
  ('archive', 'DELETE'), ('dead_letter', 'INSERT'), ('inbox', 'DELETE'), ('stream', 'INSERT')
) AS needed(relation, privilege),
LATERAL (SELECT privilege || ' ON ' || relation AS what) AS p
WHERE NOT has_table_privilege(CAST(:schema AS text) || '.' || relation, privilege)
"""
LISTENERS = f"""
WITH RECURSIVE {distinct("inbox", "listener")}
SELECT listener FROM found WHERE listener IS NOT NULL LIMIT 100
"""  # noqa: S608 - no value is built in


async def server(connection: AsyncConnection, schema: str) -> Server:
    """Return what the server says of itself."""
    return Server(*(await connection.execute(statement(schema, SERVER))).one())


async def unlogged(connection: AsyncConnection, schema: str) -> list[str]:
    """Return our tables that a crash empties."""
    found = await connection.execute(statement(schema, UNLOGGED), {"schema": schema})
    return [str(name) for name in found.scalars()]


async def holders(connection: AsyncConnection, schema: str, older_than: timedelta) -> list[Holder]:
    """Return what has been open for longer than `older_than`, the oldest first."""
    found = await connection.execute(statement(schema, HOLDERS), {"older_than": older_than})
    return [Holder(*row) for row in found]


async def missing_privileges(connection: AsyncConnection, schema: str) -> list[str]:
    """Return what the relay does and this role may not."""
    found = await connection.execute(statement(schema, PRIVILEGES), {"schema": schema})
    return [str(what) for what in found.scalars()]


async def listeners(connection: AsyncConnection, schema: str) -> list[str]:
    """Return the identities that have handled something here."""
    found: Any = await connection.execute(statement(schema, LISTENERS))
    return [str(name) for name in found.scalars()]


async def backends(connection: AsyncConnection, schema: str) -> int:
    """Return how many backends served a few transactions of this one connection."""
    seen = set()
    for _ in range(POOL_PROBES):
        found = await connection.execute(statement(schema, "SELECT pg_backend_pid()"))
        seen.add(found.scalar_one())
        await connection.rollback()
    return len(seen)
