"""The relay copies what it has published into the archive, and leaves the row where it was."""

from collections.abc import Callable

TARGET = "outbox.postgres.pending:_from"
FAULTS = ("relay_killed",)


def broken(original: Callable[[str, str], str]) -> Callable[[str, str], str]:
    """Read the rows where they should be deleted."""

    def chosen(sql: str, source: str) -> str:
        copied = "SELECT * FROM {schema}.{source} WHERE"
        columns = "id, event_id, slot, key, subject, headers, body, created_at"
        if "INSERT INTO {schema}.archive" in sql:
            sql = sql.replace("DELETE FROM {schema}.{source} WHERE", copied)
            sql = sql.replace(f"RETURNING {columns}\n)", "\n)", 1).replace("*", columns, 1)
        return original(sql, source)

    return chosen
