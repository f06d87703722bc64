"""${message}."""

from collections.abc import Callable

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade(execute: Callable[[str], object], schema: str) -> None:
    raise NotImplementedError
