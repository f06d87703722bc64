"""A relay writes without looking whether the lane is still its own."""

from collections.abc import Callable

from outbox.postgres.lanes import FENCE

TARGET = "outbox.postgres.pending:raw"
FAULTS = ("lane_taken_away",)
NO_FENCE = "fence AS (SELECT $1::int2, $2::uuid, $3::int8)"


def broken(original: Callable[[str, str], str]) -> Callable[[str, str], str]:
    """Take the fence out of every statement that moves rows."""

    def raw(schema: str, sql: str) -> str:
        return original(schema, sql.replace(FENCE, NO_FENCE))

    return raw
