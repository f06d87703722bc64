"""The tables of the analytics service."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "count",
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("events", sa.Integer, nullable=False),
    )
    for name in ("told", "effect"):
        op.create_table(
            name,
            sa.Column("event_id", sa.Uuid, nullable=False),
            sa.Column("what", sa.Text, nullable=False),
        )


def downgrade() -> None:
    for name in ("effect", "told", "count"):
        op.drop_table(name)
