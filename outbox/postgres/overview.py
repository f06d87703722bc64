"""What `outbox status` shows beside the counts: rates, what waits, listeners. Nothing is changed.

Every statement is bounded: by rows, or by an index that it walks.
"""

from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.postgres.tables import distinct, statement

SECONDS = 60  # that rates are taken over
ROWS_MAX = 10_000

OLDEST = """
SELECT subject, key FROM (
  (SELECT id, subject, key, created_at FROM {schema}.pending
   WHERE deliver_at IS NULL OR deliver_at <= now() ORDER BY id LIMIT 1)
  UNION ALL
  (SELECT id, subject, key, created_at FROM {schema}.waiting
   WHERE NOT (reason = 'scheduled' AND due_at > now()) ORDER BY id LIMIT 1)
) AS both_tables ORDER BY created_at LIMIT 1
"""
WAITING = """
SELECT reason, count(*), max(attempts), min(last_error) FILTER (WHERE last_error IS NOT NULL)
FROM (SELECT reason, attempts, last_error FROM {schema}.waiting LIMIT :rows_max) AS chosen
GROUP BY reason ORDER BY reason
"""
# The newest rows of each stream, by its index; how many of them are of the last minute.
PUBLISHED = f"""
WITH RECURSIVE {distinct("archive", "stream")}
SELECT count(*) FILTER (WHERE published_at > now() - make_interval(secs => :seconds)),
       count(*), extract(epoch FROM now() - min(published_at))
FROM found AS f, LATERAL (
  SELECT published_at FROM {{schema}}.archive AS a WHERE a.stream = f.stream
  ORDER BY a.sequence DESC LIMIT :rows_max
) AS newest
WHERE f.stream IS NOT NULL
"""  # noqa: S608 - no value is built in
HANDLED = """
SELECT listener, count(*) FROM (
  SELECT listener FROM {schema}.inbox
  WHERE processed_at > now() - make_interval(secs => :seconds) LIMIT :rows_max
) AS recent GROUP BY listener
"""
LISTENERS = f"""
WITH RECURSIVE {distinct("inbox", "listener")}, names AS (
  SELECT listener FROM found WHERE listener IS NOT NULL
  UNION SELECT listener FROM {{schema}}.listener_lease
  UNION SELECT listener FROM (SELECT listener FROM {{schema}}.attempt LIMIT :rows_max) AS a
  UNION SELECT listener FROM (
    SELECT listener FROM {{schema}}.dead_letter
    WHERE state = 'open' AND listener IS NOT NULL LIMIT :rows_max) AS d
)
SELECT n.listener,
       (SELECT count(*) FROM (SELECT 1 FROM {{schema}}.attempt AS a
                              WHERE a.listener = n.listener LIMIT :rows_max) AS one),
       (SELECT count(*) FROM (SELECT 1 FROM {{schema}}.held AS h
                              WHERE h.listener = n.listener LIMIT :rows_max) AS one),
       (SELECT count(*) FROM (SELECT 1 FROM {{schema}}.dead_letter AS d
                              WHERE d.state = 'open' AND d.listener = n.listener
                              LIMIT :rows_max) AS one),
       (SELECT l.owner_name FROM {{schema}}.listener_lease AS l
        WHERE l.listener = n.listener AND l.expires_at > clock_timestamp())
FROM names AS n ORDER BY n.listener LIMIT 1000
"""  # noqa: S608 - as above


class Waiting(NamedTuple):
    """Rows of `waiting` of one reason."""

    reason: str
    events: int
    attempts: int  # the most of one of them
    last_error: str | None  # of one of them


class Known(NamedTuple):
    """A listener, as its tables know it. Counts are exact up to 10,000."""

    listener: str
    retrying: int
    held: int
    dead_letters: int
    active: str | None  # host and pid of the active instance of an ordered one


async def oldest(connection: AsyncConnection, schema: str) -> tuple[str, str | None] | None:
    """Return subject and key of the event that has waited for longest."""
    row = (await connection.execute(statement(schema, OLDEST))).one_or_none()
    return None if row is None else (str(row[0]), row[1])


async def waiting(connection: AsyncConnection, schema: str) -> list[Waiting]:
    """Return what waits, by reason."""
    found = await connection.execute(statement(schema, WAITING), {"rows_max": ROWS_MAX})
    return [Waiting(*row) for row in found]


async def published_per_second(connection: AsyncConnection, schema: str) -> float:
    """Return how many events a second were published in the last minute."""
    values = {"seconds": float(SECONDS), "rows_max": ROWS_MAX}
    row = (await connection.execute(statement(schema, PUBLISHED), values)).one()
    recent, seen, oldest_age = int(row[0]), int(row[1]), float(row[2] or 0.0)
    cut_off = recent == seen and recent >= ROWS_MAX  # all that was looked at is that young
    return recent / (max(oldest_age, 0.001) if cut_off else SECONDS)


async def handled_per_second(connection: AsyncConnection, schema: str) -> dict[str, float]:
    """Return how many events a second each listener has finished with in the last minute."""
    values = {"seconds": float(SECONDS), "rows_max": 100 * ROWS_MAX}
    found = await connection.execute(statement(schema, HANDLED), values)
    return {str(listener): int(number) / SECONDS for listener, number in found}


async def listeners(connection: AsyncConnection, schema: str) -> list[Known]:
    """Return the listeners that have left a trace in the tables."""
    found: Any = await connection.execute(statement(schema, LISTENERS), {"rows_max": ROWS_MAX})
    return [Known(*row) for row in found]
