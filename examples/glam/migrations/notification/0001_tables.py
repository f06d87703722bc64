"""The tables of the notification service."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "mail",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("template", sa.Text, nullable=False),
        sa.Column("recipient", sa.Text, nullable=False),
    )
    for name in ("told", "effect"):
        op.create_table(
            name,
            sa.Column("event_id", sa.Uuid, nullable=False),
            sa.Column("what", sa.Text, nullable=False),
        )


def downgrade() -> None:
    for name in ("effect", "told", "mail"):
        op.drop_table(name)
