"""The tables of the credit service."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("merchant_id", sa.Uuid, primary_key=True),
        sa.Column("balance", sa.Float, nullable=False),
    )
    for name in ("told", "effect"):
        op.create_table(
            name,
            sa.Column("event_id", sa.Uuid, nullable=False),
            sa.Column("what", sa.Text, nullable=False),
        )


def downgrade() -> None:
    for name in ("effect", "told", "account"):
        op.drop_table(name)
