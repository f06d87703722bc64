"""Reading events that are not published yet, for tests and people; nothing is locked or changed."""

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from outbox.postgres.tables import statement

UNPUBLISHED = """
SELECT subject, headers, body FROM (
  SELECT id, subject, headers, body FROM {schema}.pending
  UNION ALL
  SELECT id, subject, headers, body FROM {schema}.waiting
) AS unpublished
WHERE CAST(:subject AS text) IS NULL OR subject = CAST(:subject AS text)
ORDER BY id LIMIT 10000
"""


async def unpublished(
    connection: AsyncConnection | AsyncSession, schema: str, subject: str | None
) -> list[tuple[str, bytes, bytes]]:
    """Return subject, header lines and body of up to 10,000 unpublished events, in id order."""
    found = await connection.execute(statement(schema, UNPUBLISHED), {"subject": subject})
    return [(str(row[0]), bytes(row[1]), bytes(row[2])) for row in found]
