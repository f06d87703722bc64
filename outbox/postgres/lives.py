"""What the tables know of one event: where its rows are, and which events it has caused.

Only `inbox` and `attempt` have an index for it. The others are read through within a few seconds;
what takes longer is left out, and said.
"""

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres.redrive import Letter
from outbox.postgres.tables import distinct, statement

SECONDS = 10  # for one look through a table
CAUSED_MAX = 100
_QUERY_CANCELED = "57014"

PENDING = """
SELECT subject, key, body, created_at, deliver_at FROM {schema}.pending WHERE event_id = :id
"""
WAITING = """
SELECT subject, key, body, created_at, reason, attempts, due_at, last_error
FROM {schema}.waiting WHERE event_id = :id
"""
ARCHIVE = """
SELECT subject, key, body, created_at, stream, sequence, published_at
FROM {schema}.archive WHERE event_id = :id ORDER BY published_at LIMIT 100
"""
LETTERS = """
SELECT id, side, CAST(event_id AS text), subject, listener, reason, attempts, failed_at, state,
       error, key, stream, sequence, state_at, state_by, parks
FROM {schema}.dead_letter WHERE event_id = :id ORDER BY id LIMIT 100
"""
# By the primary key, once for each listener that the table knows.
INBOX = f"""
WITH RECURSIVE {distinct("inbox", "listener")}
SELECT t.listener, t.outcome, t.processed_at FROM found AS f JOIN {{schema}}.inbox AS t
  ON t.listener = f.listener AND t.event_id = :id ORDER BY t.listener
"""  # noqa: S608 - no value is built in
ATTEMPTS = f"""
WITH RECURSIVE {distinct("attempt", "listener")}
SELECT t.listener, t.failed, t.started, t.next_at, t.last_error, t.updated_at
FROM found AS f JOIN {{schema}}.attempt AS t
  ON t.listener = f.listener AND t.event_id = :id ORDER BY t.listener
"""  # noqa: S608 - as above
HELD = """
SELECT listener, key, delivered, stored_at, due_at FROM {schema}.held
WHERE position(CAST(:needle AS bytea) IN body) > 0 LIMIT 100
"""
_CAUSED = """
SELECT CAST(event_id AS text), subject, created_at, body, '{table}' FROM {schema}.{table}
WHERE created_at >= :since AND event_id <> :id AND position(CAST(:needle AS bytea) IN body) > 0
LIMIT :rows_max
"""
CAUSED = [_CAUSED.replace("{table}", table) for table in ("archive", "waiting", "pending")]


class Row(NamedTuple):
    """The event in one of the tables that it is published from, or kept in afterwards."""

    table: str
    subject: str
    key: str | None
    body: bytes
    created_at: datetime
    more: dict[str, Any]


async def rows(connection: AsyncConnection, schema: str, event_id: UUID) -> list[Row]:
    """Return the event's rows in `pending`, `waiting` and `archive`."""
    found: list[Row] = []
    for table, sql in (("pending", PENDING), ("waiting", WAITING), ("archive", ARCHIVE)):
        result = await connection.execute(statement(schema, sql), {"id": event_id})
        for row in result.mappings():
            more = {name: value for name, value in row.items() if name not in Row._fields}
            found.append(
                Row(table, row["subject"], row["key"], row["body"], row["created_at"], more)
            )
    return found


async def letters(connection: AsyncConnection, schema: str, event_id: UUID) -> list[Letter]:
    """Return the event's dead letters, of relay and listeners."""
    found = await connection.execute(statement(schema, LETTERS), {"id": event_id})
    return [Letter(*row) for row in found]


async def of_listeners(
    connection: AsyncConnection, schema: str, event_id: UUID
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return who has finished with the event, and who has tried it without an end."""
    done = await connection.execute(statement(schema, INBOX), {"id": event_id})
    tried = await connection.execute(statement(schema, ATTEMPTS), {"id": event_id})
    return [dict(row) for row in done.mappings()], [dict(row) for row in tried.mappings()]


async def held(connection: AsyncConnection, schema: str, event_id: str) -> list[dict[str, Any]]:
    """Return the event's places in the queues of ordered listeners."""
    found = await connection.execute(statement(schema, HELD), {"needle": event_id.encode()})
    return [dict(row) for row in found.mappings()]


async def mentioning(
    connection: AsyncConnection, schema: str, event_id: UUID, since: datetime, sql: str
) -> list[tuple[str, str, datetime, bytes, str]]:
    """Return events added after `since` whose body has the id: event id, subject, time, body."""
    values = {
        "id": event_id,
        "needle": str(event_id).encode(),
        "since": since,
        "rows_max": CAUSED_MAX,
    }
    found = await connection.execute(statement(schema, sql), values)
    return [(row[0], row[1], row[2], bytes(row[3]), row[4]) for row in found]


async def limit(connection: AsyncConnection) -> None:
    """Have each statement of this transaction end after a few seconds."""
    await connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{SECONDS}s'")


def took_too_long(error: DBAPIError) -> bool:
    """Return whether a statement was ended by its time limit."""
    return getattr(error.orig, "sqlstate", None) == _QUERY_CANCELED
