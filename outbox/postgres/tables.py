"""The tables, as SQLAlchemy Core, in a schema and a `MetaData` of their own.

The migrations make them; a test holds the two equal. What each column means is said here, once.
"""

from functools import lru_cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    FunctionElement,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    TextClause,
    Uuid,
    func,
    text,
)

from outbox.errors import ConfigurationError
from outbox.settings import SCHEMA_PATTERN

ARCHIVE_RING_DAYS = 32  # partitions of the archive: UTC day number mod 32
SLOTS = 1024  # slot = crc32(key, or event id) mod 1024, stored for ever
_Time = DateTime(timezone=True)


@lru_cache(maxsize=512)
def statement(schema: str, sql: str) -> TextClause:
    """Return `sql` with every `{schema}` replaced; the name is validated, nothing else is built.

    Raises:
        ConfigurationError: `schema` is not a plain lower-case identifier of up to 48 characters.
    """
    return text(raw(schema, sql))


@lru_cache(maxsize=512)
def raw(schema: str, sql: str) -> str:
    """Return `sql` with every `{schema}` replaced, for statements with driver parameters.

    Raises:
        ConfigurationError: `schema` is not a plain lower-case identifier of up to 48 characters.
    """
    if not SCHEMA_PATTERN.fullmatch(schema):
        raise ConfigurationError(f"schema {schema!r} must match {SCHEMA_PATTERN.pattern}")
    return sql.replace("{schema}", schema)


def distinct(table: str, column: str) -> str:
    """Return a CTE `found` of the distinct values of an index's first column, NULL at its end.

    A loose index scan: one step for each value, however many rows there are. It needs WITH
    RECURSIVE.
    """
    return f"""found AS (
  (SELECT {column} FROM {{schema}}.{table} ORDER BY {column} LIMIT 1)
  UNION ALL
  SELECT (SELECT i.{column} FROM {{schema}}.{table} AS i WHERE i.{column} > f.{column}
          ORDER BY i.{column} LIMIT 1)
  FROM found AS f WHERE f.{column} IS NOT NULL
)"""  # noqa: S608 - names of our own


def _event_columns(created: FunctionElement[Any] | None = None) -> list[Column[Any]]:
    """Return the columns that an event carries from table to table."""
    return [
        Column("event_id", Uuid, nullable=False),
        Column("slot", SmallInteger, nullable=False),
        Column("key", Text),  # events of one key are published in id order; NULL has no order
        Column("subject", Text, nullable=False),
        Column("headers", LargeBinary, nullable=False),  # finished lines, "Name: value\r\n" each
        Column("body", LargeBinary, nullable=False),  # finished bytes of the envelope
        Column("created_at", _Time, nullable=False, server_default=created),
    ]


def metadata(schema: str = "outbox") -> MetaData:
    """Return all tables of the library in `schema`."""
    tables = MetaData(schema=schema)
    Table(
        "pending",  # the outbox. INSERT and DELETE only, never updated
        tables,
        Column("id", BigInteger, Identity(always=True, cache=1)),  # a cached block breaks id order
        *_event_columns(func.clock_timestamp()),
        Column("deliver_at", _Time),  # not before this time; such a row moves on to `waiting`
        PrimaryKeyConstraint("id", name="pending_pkey"),
    )
    Table(
        "waiting",  # events that must wait; published from here in id order once due
        tables,
        Column("id", BigInteger, autoincrement=False),  # the id that it had in `pending`
        *_event_columns(),
        Column("reason", Text, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("due_at", _Time, nullable=False),
        Column("republished", Integer, nullable=False),  # n of the Msg-Id suffix ~rn; 0: no suffix
        Column("last_error", Text),
        PrimaryKeyConstraint("id", name="waiting_pkey"),
        CheckConstraint(
            "reason IN ('failed', 'blocked', 'scheduled', 'repaired', 'requeued', 'replayed')",
            name="waiting_reason",
        ),
        Index("waiting_due", "due_at", "id"),  # waiting.due
        Index("waiting_key", "key", "id"),  # waiting.blocked_keys
    )
    Table(
        "archive",  # published events, for the retention window; a ring of 32 daily partitions
        tables,
        Column("id", BigInteger, nullable=False, autoincrement=False),
        *_event_columns(),
        Column("stream", Text, nullable=False),
        Column("sequence", BigInteger, nullable=False),
        Column("published_at", _Time, nullable=False),
        Column("day", SmallInteger, nullable=False),  # UTC day number mod 32
        Index("archive_sequence", "stream", "sequence"),  # newest row of a stream, verification
        postgresql_partition_by="LIST (day)",
    )
    Table(
        "dead_letter",  # what gave up, on either side. Never deleted by itself
        tables,
        Column("id", BigInteger, Identity(always=True)),
        Column("side", Text, nullable=False),
        Column("listener", Text),  # identity of the listener; NULL for the relay
        Column("event_id", Uuid, nullable=False),
        Column("event_text", Text),  # the id as it was written, escaped, when it is no UUID
        Column("subject", Text, nullable=False),
        Column("key", Text),
        Column("headers", LargeBinary, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("stream", Text),
        Column("sequence", BigInteger),
        Column("reason", Text, nullable=False),
        Column("error", Text, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("created_at", _Time),
        Column("failed_at", _Time, nullable=False, server_default=func.now()),
        Column("state", Text, nullable=False, server_default=text("'open'")),
        Column("state_at", _Time),
        Column("state_by", Text),
        # later events of its key stay behind it until a person has decided
        Column("parks", Boolean, nullable=False, server_default=text("false")),
        Column("position", BigInteger),  # of the relay: its id in the outbox
        PrimaryKeyConstraint("id", name="dead_letter_pkey"),
        CheckConstraint("side IN ('relay', 'listener')", name="dead_letter_side"),
        CheckConstraint(
            "state IN ('open', 'requeued', 'handled', 'discarded')", name="dead_letter_state"
        ),
        Index("dead_letter_open", "id", postgresql_where=text("state = 'open'")),  # status
        Index(  # dead_letters.requeued
            "dead_letter_requeued", "listener", "id", postgresql_where=text("state = 'requeued'")
        ),
        Index(  # waiting.blocked_keys, ordering.ROW
            "dead_letter_parked",
            "key",
            postgresql_where=text("parks AND state IN ('open', 'requeued')"),
        ),
    )
    Table(
        "dead_letter_action",  # who did what with a dead letter, and when
        tables,
        Column("id", BigInteger, Identity(always=True)),
        Column("dead_letter_id", BigInteger, nullable=False),
        Column("action", Text, nullable=False),
        Column("at", _Time, nullable=False, server_default=func.now()),
        Column("by", Text, nullable=False),
        Column("note", Text),
        PrimaryKeyConstraint("id", name="dead_letter_action_pkey"),
        CheckConstraint(
            "action IN ('requeued', 'discarded', 'handled', 'failed')",
            name="dead_letter_action_action",
        ),
        Index("dead_letter_action_of", "dead_letter_id", "id"),  # redrive.history
    )
    Table(
        "inbox",  # what each listener has finished with; the guard against a second effect
        tables,
        Column("listener", Text),
        Column("event_id", Uuid),
        Column("outcome", Text, nullable=False, server_default=text("'handled'")),
        Column("processed_at", _Time, nullable=False, server_default=func.now()),
        PrimaryKeyConstraint("listener", "event_id", name="inbox_pkey"),
        CheckConstraint("outcome IN ('handled', 'dead', 'discarded')", name="inbox_outcome"),
        Index("inbox_processed", "processed_at", postgresql_using="brin"),  # inbox.prune
    )
    Table(
        "attempt",  # only events that failed or were redelivered
        tables,
        Column("listener", Text),
        Column("event_id", Uuid),
        Column("started", Integer, nullable=False),  # starts that have not ended
        Column("failed", Integer, nullable=False),
        Column("next_at", _Time, nullable=False, server_default=func.now()),
        Column("last_error", Text),
        Column("updated_at", _Time, nullable=False, server_default=func.now()),
        PrimaryKeyConstraint("listener", "event_id", name="attempt_pkey"),
    )
    Table(
        "listener_lease",  # which instance of an ordered listener is active
        tables,
        Column("listener", Text),
        Column("owner", Uuid),
        Column("owner_name", Text),  # host, pid: for people
        Column("epoch", BigInteger, nullable=False, server_default=text("0")),
        Column("expires_at", _Time, nullable=False, server_default=text("'-infinity'")),
        PrimaryKeyConstraint("listener", name="listener_lease_pkey"),
    )
    Table(
        "held",  # events of an ordered listener that wait for their turn; acked to the broker
        tables,
        Column("listener", Text),
        Column("created", Text),  # of the stream: the incarnation that the sequence is of
        Column("sequence", BigInteger, autoincrement=False),
        Column("key", Text),
        Column("subject", Text, nullable=False),
        Column("headers", LargeBinary, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("stored_at", _Time, nullable=False),  # on the stream
        Column("epoch", BigInteger, nullable=False),  # of the lease under which it came
        Column("delivered", Integer, nullable=False, server_default=text("0")),  # to the handler
        Column("due_at", _Time, nullable=False, server_default=func.now()),
        # a restored broker gives sequences out twice; the time tells the events apart
        PrimaryKeyConstraint("listener", "created", "sequence", "stored_at", name="held_pkey"),
        Index(  # ordering.next_of_key
            "held_key",
            "listener",
            "key",
            "created",
            "sequence",
            postgresql_where=text("key IS NOT NULL"),
        ),
    )
    Table(
        "stream",  # streams that events were published to, as the relay saw them last
        tables,
        Column("name", Text),
        Column("created", Text, nullable=False),  # as the broker writes it: the incarnation
        # what the archive holds from before is of an older incarnation
        Column("since", _Time, nullable=False, server_default=text("'-infinity'")),
        PrimaryKeyConstraint("name", name="stream_pkey"),
    )
    Table(
        "lane",  # relay leases; the number of rows is the number of lanes
        tables,
        Column("lane", SmallInteger, autoincrement=False),
        Column("slot_low", SmallInteger, nullable=False),
        Column("slot_high", SmallInteger, nullable=False),
        Column("owner", Uuid),
        Column("owner_name", Text),  # host, pid: for people
        Column("epoch", BigInteger, nullable=False, server_default=text("0")),
        Column("expires_at", _Time, nullable=False, server_default=text("'-infinity'")),
        Column("generation", Integer, nullable=False, server_default=text("0")),
        # what the owner says at each renewal: since when no ack comes, and what hinders it
        Column("unanswered_since", _Time),
        Column("hindrance", Text),
        PrimaryKeyConstraint("lane", name="lane_pkey"),
        CheckConstraint(
            "0 <= slot_low AND slot_low <= slot_high AND slot_high < 1024", name="lane_slots"
        ),
    )
    return tables
