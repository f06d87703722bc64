"""What the confirm window and the actions on dead letters remember.

Beside the grants of ob0001 the relay's role needs

    GRANT DELETE ON outbox.archive TO relay;
    GRANT INSERT, UPDATE ON outbox.stream TO relay;

a listener's

    GRANT UPDATE ON outbox.dead_letter, outbox.inbox TO listener;
    GRANT INSERT ON outbox.dead_letter_action TO listener;

and that of the people who run `outbox dead` all of SELECT, INSERT, UPDATE and DELETE.
"""

from collections.abc import Callable

revision = "ob0002"
down_revision = "ob0001"
branch_labels = None
depends_on = None

STREAM = """
CREATE TABLE {schema}.stream (
    name text NOT NULL,
    created text NOT NULL,
    since timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT stream_pkey PRIMARY KEY (name)
)
"""
DROP_REASON = "ALTER TABLE {schema}.waiting DROP CONSTRAINT waiting_reason"
# NOT VALID and then VALIDATE: the table is not locked against writers while its rows are looked at.
ADD_REASON = """
ALTER TABLE {schema}.waiting ADD CONSTRAINT waiting_reason CHECK (
    reason IN ('failed', 'blocked', 'scheduled', 'repaired', 'requeued', 'replayed')) NOT VALID
"""
VALIDATE_REASON = "ALTER TABLE {schema}.waiting VALIDATE CONSTRAINT waiting_reason"
DROP_STATE = "ALTER TABLE {schema}.dead_letter DROP CONSTRAINT dead_letter_state"
ADD_STATE = """
ALTER TABLE {schema}.dead_letter ADD CONSTRAINT dead_letter_state CHECK (
    state IN ('open', 'requeued', 'handled', 'discarded')) NOT VALID
"""
VALIDATE_STATE = "ALTER TABLE {schema}.dead_letter VALIDATE CONSTRAINT dead_letter_state"
PARKS = "ALTER TABLE {schema}.dead_letter ADD COLUMN parks boolean NOT NULL DEFAULT false"
DEAD_LETTER_REQUEUED = """
CREATE INDEX dead_letter_requeued ON {schema}.dead_letter (listener, id) WHERE state = 'requeued'
"""
DEAD_LETTER_PARKED = """
CREATE INDEX dead_letter_parked ON {schema}.dead_letter (key) WHERE parks AND state = 'open'
"""
ACTION = """
CREATE TABLE {schema}.dead_letter_action (
    id bigint GENERATED ALWAYS AS IDENTITY,
    dead_letter_id bigint NOT NULL,
    action text NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    by text NOT NULL,
    note text,
    CONSTRAINT dead_letter_action_pkey PRIMARY KEY (id),
    CONSTRAINT dead_letter_action_action
        CHECK (action IN ('requeued', 'discarded', 'handled', 'failed'))
)
"""
ACTION_OF = """
CREATE INDEX dead_letter_action_of ON {schema}.dead_letter_action (dead_letter_id, id)
"""


def upgrade(execute: Callable[[str], object], schema: str) -> None:
    statements = [
        STREAM,
        *(DROP_REASON, ADD_REASON, VALIDATE_REASON),
        *(DROP_STATE, ADD_STATE, VALIDATE_STATE),
        *(PARKS, DEAD_LETTER_REQUEUED, DEAD_LETTER_PARKED),
        *(ACTION, ACTION_OF),
    ]
    for sql in statements:
        execute(sql.strip().replace("{schema}", schema))
