"""The writer's INSERT into `pending`."""

import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Protocol

from sqlalchemy import Connection, TextClause
from sqlalchemy.exc import StatementError

from outbox.errors import hide_parameters
from outbox.postgres import wake
from outbox.postgres.tables import SLOTS, statement

INSERT_ROWS_MAX = 10_000
INSERT_BYTES_MAX = 16 * 1_048_576  # a statement above 1 GiB ends the connection inside a commit


class Row(Protocol):
    """A finished event, as it will be stored."""

    event_id: str  # canonical
    key: str | None
    subject: str
    headers: bytes
    body: bytes
    deliver_at: datetime | None


# The xid must exist before the first nextval(): the relay's floor is proven with it. The ORDER BY
# lies below nextval(), so ids follow the order of add. A transaction that carries events raises
# synchronous_commit for itself, else a published event could be of a transaction that a crash lost.
# Lines of text, where no value can hold a line break, and one piece for all headers and for all
# bodies: asyncpg looks at each element of an array, which is a fifth of the cost of an event. An
# empty line is NULL (a lone one makes an empty array, which unnest fills up with NULL).
# Scalar sub-selects, because PostgreSQL does not run a CTE that nothing reads.
_INSERT = """
INSERT INTO {schema}.pending (event_id, slot, key, subject, headers, body, deliver_at)
SELECT e, s, k, j,
       substring(CAST(:headers AS bytea) FROM CAST(sum(h) OVER sent AS int4) - h + 1 FOR h),
       substring(CAST(:bodies AS bytea) FROM CAST(sum(b) OVER sent AS int4) - b + 1 FOR b),
       d
FROM unnest(CAST(string_to_array(CAST(:event_ids AS text), E'\\n') AS uuid[]),
            CAST(string_to_array(CAST(:slots AS text), E'\\n') AS int2[]),
            string_to_array(CAST(:keys AS text), E'\\n', ''),
            string_to_array(CAST(:subjects AS text), E'\\n'),
            CAST(string_to_array(CAST(:header_sizes AS text), E'\\n') AS int4[]),
            CAST(string_to_array(CAST(:body_sizes AS text), E'\\n') AS int4[]),
            CAST(string_to_array(CAST(:deliver_ats AS text), E'\\n', '') AS timestamptz[])
           ) WITH ORDINALITY AS u(e, s, k, j, h, b, d, o)
WHERE pg_current_xact_id() IS NOT NULL
  AND (SELECT CASE WHEN current_setting('synchronous_commit') = 'off'
                   THEN set_config('synchronous_commit', 'on', true) ELSE '' END) IS NOT NULL{wake}
WINDOW sent AS (ORDER BY o ROWS UNBOUNDED PRECEDING)
ORDER BY o
"""
INSERT = _INSERT.replace("{wake}", "")
# NOTIFY in every commit would serialise all commits of the cluster, so one transaction carries it.
INSERT_AND_WAKE = _INSERT.replace(
    "{wake}",
    """
  AND (SELECT CASE WHEN pg_try_advisory_xact_lock(CAST(:gate_high AS int4),
                                                  CAST(:gate_low AS int4))
                   THEN CAST(pg_notify(CAST(:channel AS text), '') AS text)
                   ELSE '' END) IS NOT NULL""",
)


def insert(connection: Connection, schema: str, events: Sequence[Row], *, notify: bool) -> None:
    """Write `events` in their order into the caller's transaction.

    Args:
        notify: also wake the relay at COMMIT. False where COMMIT does not follow at once, since
            the gate is held until then, and in two-phase transactions, which refuse NOTIFY.

    Raises:
        sqlalchemy.exc.DBAPIError: passed through; the transaction can only be rolled back.
    """
    chunks = list(_chunks(events))
    for index, chunk in enumerate(chunks):
        parameters = _columns(chunk)
        if notify and index == len(chunks) - 1:
            high, low = wake.gate(schema)
            parameters |= {"gate_high": high, "gate_low": low, "channel": wake.channel(schema)}
            _execute(connection, statement(schema, INSERT_AND_WAKE), parameters)
        else:
            _execute(connection, statement(schema, INSERT), parameters)


def _execute(connection: Connection, sql: TextClause, parameters: dict[str, object]) -> None:
    try:
        connection.execute(sql, parameters)
    except StatementError as error:
        hide_parameters(error)
        raise


def _columns(events: Sequence[Row]) -> dict[str, object]:
    crc32 = zlib.crc32
    ids = [event.event_id for event in events]
    headers = [event.headers for event in events]
    bodies = [event.body for event in events]
    return {
        "event_ids": "\n".join(ids),
        "slots": "\n".join(
            [
                str(crc32((event.key or text).encode()) % SLOTS)
                for event, text in zip(events, ids, strict=True)
            ]
        ),
        "keys": "\n".join([event.key or "" for event in events]),
        "subjects": "\n".join([event.subject for event in events]),
        "headers": b"".join(headers),
        "header_sizes": "\n".join(map(str, map(len, headers))),
        "bodies": b"".join(bodies),
        "body_sizes": "\n".join(map(str, map(len, bodies))),
        "deliver_ats": "\n" * (len(events) - 1)
        if not any(event.deliver_at for event in events)
        else "\n".join(
            ["" if event.deliver_at is None else event.deliver_at.isoformat() for event in events]
        ),
    }


def _chunks(events: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut `events` so that no part exceeds the limits, but for one event alone."""
    total = sum([len(event.headers) + len(event.body) for event in events])
    if 0 < len(events) <= INSERT_ROWS_MAX and total <= INSERT_BYTES_MAX:
        yield events
        return
    start = size = 0
    for index, event in enumerate(events):
        grown = len(event.headers) + len(event.body)
        if index > start and (index - start >= INSERT_ROWS_MAX or size + grown > INSERT_BYTES_MAX):
            yield events[start:index]
            start, size = index, 0
        size += grown
    if start < len(events):
        yield events[start:]
