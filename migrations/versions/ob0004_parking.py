"""What keeps the followers of a dead letter behind it, and events of reused sequences apart.

Beside the grants of the migrations before, an ordered listener's role needs

    GRANT SELECT ON outbox.dead_letter TO listener;
"""

from collections.abc import Callable

revision = "ob0004"
down_revision = "ob0003"
branch_labels = None
depends_on = None

POSITION = "ALTER TABLE {schema}.dead_letter ADD COLUMN position bigint"
DROP_PARKED = "DROP INDEX {schema}.dead_letter_parked"
PARKED = """
CREATE INDEX dead_letter_parked ON {schema}.dead_letter (key)
WHERE parks AND state IN ('open', 'requeued')
"""
# A broker that was restored from a backup gives sequences out twice.
HELD_PKEY = """
ALTER TABLE {schema}.held DROP CONSTRAINT held_pkey,
    ADD CONSTRAINT held_pkey PRIMARY KEY (listener, created, sequence, stored_at)
"""


def upgrade(execute: Callable[[str], object], schema: str) -> None:
    for sql in (POSITION, DROP_PARKED, PARKED, HELD_PKEY):
        execute(sql.strip().replace("{schema}", schema))
