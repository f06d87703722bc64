"""Rows of `pending`, made by SQL, and what a stream holds of them."""

import base64
from collections.abc import Sequence
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.jetstream.client import ApiError, JetStreamClient

INSERT = """
INSERT INTO outbox.pending (event_id, slot, key, subject, headers, body, deliver_at)
SELECT e, 0, k, :subject, CAST(:headers AS bytea), CAST(:body AS bytea),
       now() + CAST(:later AS interval)
FROM unnest(CAST(:ids AS uuid[]), CAST(:keys AS text[])) WITH ORDINALITY AS u(e, k, o)
WHERE pg_current_xact_id() IS NOT NULL ORDER BY o
"""


async def insert(
    engine: AsyncEngine,
    keys: Sequence[str | None] | int,
    *,
    subject: str = "evt.test.added.v1",
    body: bytes = b"{}",
    headers: bytes = b"",
    later: object = None,
    ids: Sequence[str] | None = None,
) -> list[str]:
    """Commit one event per key (or so many without); return their ids in order."""
    keys = [None] * keys if isinstance(keys, int) else list(keys)
    ids = ids or [str(uuid4()) for _ in keys]
    async with engine.begin() as connection:
        await connection.execute(
            text(INSERT),
            {
                "ids": list(ids),
                "keys": keys,
                "subject": subject,
                "headers": headers,
                "body": body,
                "later": later,
            },
        )
    return list(ids)


async def published(client: JetStreamClient, stream: str) -> list[str]:
    """Return the Msg-Id of every message of `stream`, in stream order."""
    state = (await client.get_stream_info(stream))["state"]
    found: list[str] = []
    for sequence in range(state["first_seq"], state["last_seq"] + 1):
        try:
            answer = await client.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence})
        except ApiError:
            continue
        block = base64.b64decode(answer["message"]["hdrs"]).decode()
        found.append(block.split("Nats-Msg-Id: ")[1].split("\r\n")[0])
    return found


async def count(engine: AsyncEngine, table: str, where: str = "true") -> int:
    """Return how many rows of `table` there are."""
    async with engine.connect() as connection:
        found = await connection.scalar(text(f"SELECT count(*) FROM outbox.{table} WHERE {where}"))
    return int(found or 0)
