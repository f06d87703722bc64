"""What ordered listeners keep, and what a lane's owner says of the broker.

Beside the grants of ob0001 and ob0002 such a listener's role needs

    GRANT SELECT, INSERT, UPDATE, DELETE ON outbox.listener_lease, outbox.held TO listener;
"""

from collections.abc import Callable

revision = "ob0003"
down_revision = "ob0002"
branch_labels = None
depends_on = None

LEASE = """
CREATE TABLE {schema}.listener_lease (
    listener text NOT NULL,
    owner uuid,
    owner_name text,
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT listener_lease_pkey PRIMARY KEY (listener)
) WITH (fillfactor = 50)
"""
HELD = """
CREATE TABLE {schema}.held (
    listener text NOT NULL,
    created text NOT NULL,
    sequence bigint NOT NULL,
    key text,
    subject text NOT NULL,
    headers bytea NOT NULL,
    body bytea NOT NULL,
    stored_at timestamptz NOT NULL,
    epoch bigint NOT NULL,
    delivered integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT held_pkey PRIMARY KEY (listener, created, sequence)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000,
    vacuum_truncate = false
)
"""
HELD_KEY = """
CREATE INDEX held_key ON {schema}.held (listener, key, created, sequence) WHERE key IS NOT NULL
"""


LANE = """
ALTER TABLE {schema}.lane
    ADD COLUMN unanswered_since timestamptz,
    ADD COLUMN hindrance text
"""


def upgrade(execute: Callable[[str], object], schema: str) -> None:
    for sql in (LEASE, HELD, HELD_KEY, LANE):
        execute(sql.strip().replace("{schema}", schema))
