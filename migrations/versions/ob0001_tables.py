"""All tables of the first release.

Statements go through `execute`, not `alembic.op`: see `outbox.postgres.schema`.

Nothing is granted here; names of roles are the application's. A role that only adds events needs

    GRANT USAGE ON SCHEMA outbox TO writer;
    GRANT INSERT ON outbox.pending TO writer;

and the relay's role, which owns nothing,

    GRANT USAGE ON SCHEMA outbox TO relay;
    GRANT SELECT ON ALL TABLES IN SCHEMA outbox TO relay;
    GRANT INSERT, DELETE ON outbox.pending TO relay;
    GRANT INSERT, UPDATE, DELETE ON outbox.waiting, outbox.lane TO relay;
    GRANT INSERT ON outbox.archive, outbox.dead_letter TO relay;
    GRANT TRUNCATE ON outbox.archive_00, …, outbox.archive_31 TO relay;
    GRANT DELETE ON outbox.inbox TO relay;

and a listener's, beside what its handlers need,

    GRANT USAGE ON SCHEMA outbox TO listener;
    GRANT SELECT ON outbox.outbox_version TO listener;
    GRANT SELECT, INSERT ON outbox.inbox TO listener;
    GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.attempt TO listener;
    GRANT INSERT ON outbox.pending, outbox.dead_letter TO listener;
"""

from collections.abc import Callable

revision = "ob0001"
down_revision = None
branch_labels = ("outbox",)
depends_on = None

ARCHIVE_PARTITIONS = 32

PENDING = """
CREATE TABLE {schema}.pending (
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1),
    event_id uuid NOT NULL,
    slot smallint NOT NULL,
    key text,
    subject text NOT NULL,
    headers bytea NOT NULL,
    body bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deliver_at timestamptz,
    CONSTRAINT pending_pkey PRIMARY KEY (id)
) WITH (
    fillfactor = 100, -- insert and delete only
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = false -- cutting the tail off takes an ACCESS EXCLUSIVE lock
)
"""
WAITING = """
CREATE TABLE {schema}.waiting (
    id bigint NOT NULL,
    event_id uuid NOT NULL,
    slot smallint NOT NULL,
    key text,
    subject text NOT NULL,
    headers bytea NOT NULL,
    body bytea NOT NULL,
    created_at timestamptz NOT NULL,
    reason text NOT NULL,
    attempts integer NOT NULL,
    due_at timestamptz NOT NULL,
    republished integer NOT NULL,
    last_error text,
    CONSTRAINT waiting_pkey PRIMARY KEY (id),
    CONSTRAINT waiting_reason
        CHECK (reason IN ('failed', 'blocked', 'scheduled', 'repaired'))
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000,
    vacuum_truncate = false
)
"""
WAITING_DUE = "CREATE INDEX waiting_due ON {schema}.waiting (due_at, id)"
WAITING_KEY = "CREATE INDEX waiting_key ON {schema}.waiting (key, id)"
ARCHIVE = """
CREATE TABLE {schema}.archive (
    id bigint NOT NULL,
    event_id uuid NOT NULL,
    slot smallint NOT NULL,
    key text,
    subject text NOT NULL,
    headers bytea NOT NULL,
    body bytea NOT NULL,
    created_at timestamptz NOT NULL,
    stream text NOT NULL,
    sequence bigint NOT NULL,
    published_at timestamptz NOT NULL,
    day smallint NOT NULL
) PARTITION BY LIST (day)
"""
ARCHIVE_PARTITION = """
CREATE TABLE {schema}.archive_{number} PARTITION OF {schema}.archive FOR VALUES IN ({day})
"""
ARCHIVE_SEQUENCE = "CREATE INDEX archive_sequence ON {schema}.archive (stream, sequence)"
DEAD_LETTER = """
CREATE TABLE {schema}.dead_letter (
    id bigint GENERATED ALWAYS AS IDENTITY,
    side text NOT NULL,
    listener text,
    event_id uuid NOT NULL,
    event_text text,
    subject text NOT NULL,
    key text,
    headers bytea NOT NULL,
    body bytea NOT NULL,
    stream text,
    sequence bigint,
    reason text NOT NULL,
    error text NOT NULL,
    attempts integer NOT NULL,
    created_at timestamptz,
    failed_at timestamptz NOT NULL DEFAULT now(),
    state text NOT NULL DEFAULT 'open',
    state_at timestamptz,
    state_by text,
    CONSTRAINT dead_letter_pkey PRIMARY KEY (id),
    CONSTRAINT dead_letter_side CHECK (side IN ('relay', 'listener')),
    CONSTRAINT dead_letter_state CHECK (state IN ('open', 'requeued', 'discarded'))
)
"""
DEAD_LETTER_OPEN = """
CREATE INDEX dead_letter_open ON {schema}.dead_letter (id) WHERE state = 'open'
"""
INBOX = """
CREATE TABLE {schema}.inbox (
    listener text NOT NULL,
    event_id uuid NOT NULL,
    outcome text NOT NULL DEFAULT 'handled',
    processed_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT inbox_pkey PRIMARY KEY (listener, event_id),
    CONSTRAINT inbox_outcome CHECK (outcome IN ('handled', 'dead', 'discarded'))
) WITH (
    fillfactor = 100, -- insert and delete only
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000
)
"""
INBOX_PROCESSED = "CREATE INDEX inbox_processed ON {schema}.inbox USING brin (processed_at)"
ATTEMPT = """
CREATE TABLE {schema}.attempt (
    listener text NOT NULL,
    event_id uuid NOT NULL,
    started integer NOT NULL,
    failed integer NOT NULL,
    next_at timestamptz NOT NULL DEFAULT now(),
    last_error text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT attempt_pkey PRIMARY KEY (listener, event_id)
) WITH (
    fillfactor = 70, -- updated in place: room for heap-only tuples
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000
)
"""
LANE = """
CREATE TABLE {schema}.lane (
    lane smallint NOT NULL,
    slot_low smallint NOT NULL,
    slot_high smallint NOT NULL,
    owner uuid,
    owner_name text,
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    generation integer NOT NULL DEFAULT 0,
    CONSTRAINT lane_pkey PRIMARY KEY (lane),
    CONSTRAINT lane_slots
        CHECK (0 <= slot_low AND slot_low <= slot_high AND slot_high < 1024)
) WITH (fillfactor = 50)
"""
FIRST_LANE = "INSERT INTO {schema}.lane (lane, slot_low, slot_high) VALUES (0, 0, 1023)"


def upgrade(execute: Callable[[str], object], schema: str) -> None:
    partitions = [
        ARCHIVE_PARTITION.replace("{number}", f"{day:02}").replace("{day}", str(day))
        for day in range(ARCHIVE_PARTITIONS)
    ]
    statements = [
        PENDING,
        *(WAITING, WAITING_DUE, WAITING_KEY),
        *(ARCHIVE, *partitions, ARCHIVE_SEQUENCE),
        *(DEAD_LETTER, DEAD_LETTER_OPEN),
        *(INBOX, INBOX_PROCESSED),
        ATTEMPT,
        *(LANE, FIRST_LANE),
    ]
    for sql in statements:
        execute(sql.strip().replace("{schema}", schema))
