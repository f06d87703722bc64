"""Dead letters of listeners: what gave up, kept with its reason and its bytes."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from outbox.postgres.tables import statement

TEXT_MAX = 8000  # characters kept of text that comes from outside


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a listener gave up."""

    listener: str
    event_id: UUID  # the inbox key
    event_text: str | None  # the id as it was written, when it is no UUID
    subject: str
    key: str | None
    headers: bytes
    body: bytes
    stream: str
    sequence: int
    reason: str
    error: str
    attempts: int
    created_at: datetime | None
    discarded: bool
    parks: bool = False  # later events of its key wait behind it


INSERT = """
INSERT INTO {schema}.dead_letter (side, listener, event_id, event_text, subject, key, headers,
  body, stream, sequence, reason, error, attempts, created_at, parks, state, state_at, state_by)
VALUES ('listener', CAST(:listener AS text), CAST(:event_id AS uuid), CAST(:event_text AS text),
  CAST(:subject AS text), CAST(:key AS text), CAST(:headers AS bytea), CAST(:body AS bytea),
  CAST(:stream AS text), CAST(:sequence AS int8), CAST(:reason AS text), CAST(:error AS text),
  CAST(:attempts AS int), CAST(:created_at AS timestamptz), CAST(:parks AS boolean),
  CASE WHEN CAST(:discarded AS boolean) THEN 'discarded' ELSE 'open' END,
  CASE WHEN CAST(:discarded AS boolean) THEN now() END,
  CASE WHEN CAST(:discarded AS boolean) THEN CAST(:listener AS text) END)
RETURNING id
"""


def printable(text: str) -> str:
    """Return text from outside as PostgreSQL and terminals take it: escaped, and cut."""
    cut = text[:TEXT_MAX]
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in cut)
    return shown[:TEXT_MAX]


async def insert(session: AsyncSession, schema: str, letter: DeadLetter) -> int:
    """Write a dead letter into the caller's transaction; return its id."""
    values = {
        "listener": letter.listener,
        "event_id": letter.event_id,
        "event_text": None if letter.event_text is None else printable(letter.event_text),
        "subject": printable(letter.subject),
        "key": None if letter.key is None else printable(letter.key),
        "headers": letter.headers,
        "body": letter.body,
        "stream": letter.stream,
        "sequence": letter.sequence,
        "reason": letter.reason,
        "error": printable(letter.error),
        "attempts": letter.attempts,
        "created_at": letter.created_at,
        "discarded": letter.discarded,
        "parks": letter.parks,
    }
    found = await session.execute(statement(schema, INSERT), values)
    return int(found.scalar_one())
