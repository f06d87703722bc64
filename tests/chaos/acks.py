"""S11, while the run goes on: what a consumer's ack floor has passed is in the database."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import nats
import nats.errors
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.chaos.listeners import SUBJECTS
from tests.chaos.shared import STREAM
from tests.chaos.stage import Stage
from tests.chaos.stream import Stored, consumer, messages

PAUSE = 3.0
FINISHED = """
SELECT CAST(event_id AS text) FROM outbox.inbox
WHERE listener = :listener AND event_id = ANY(CAST(:ids AS uuid[]))
UNION ALL
SELECT CAST(event_id AS text) FROM outbox.dead_letter
WHERE listener = :listener AND event_id = ANY(CAST(:ids AS uuid[]))
UNION ALL
SELECT CAST(sequence AS text) FROM outbox.held
WHERE listener = :listener AND sequence = ANY(CAST(:sequences AS int8[]))
"""


@dataclass(slots=True)
class Acks:
    """Looks at every message once it is acked, before the next fault can mend what was missed."""

    stage: Stage
    looked_at: int = 0
    found: list[str] = field(default_factory=list)
    ended: bool = False  # the run; a cancellation might be taken for an outage
    _floors: dict[str, int] = field(default_factory=dict)  # looked at up to it

    async def watch(self) -> None:
        """Look again and again until the run has ended."""
        while not self.ended:
            with contextlib.suppress(OSError, SQLAlchemyError, nats.errors.Error):
                await self.look()
            await asyncio.sleep(PAUSE)

    async def look(self) -> None:
        """Compare what was acked since the last look; without a server there is nothing to see.

        On one connection: a broker that was restored in the middle has ended it. One that was
        restored before has set the floor back, and what comes after that is looked at anew.
        """
        client = await nats.connect(self.stage.nats.url, allow_reconnect=False, error_cb=_expected)
        try:
            for listener, beginning in SUBJECTS.items():
                info = await consumer(client, STREAM, listener)
                floor = int(info.get("ack_floor", {}).get("stream_seq", 0))
                low = self._floors.get(listener, 0)
                if floor < low:
                    low = 0
                async with self.stage.engine("warehouse") as engine, engine.connect() as connection:
                    async for page in messages(client, STREAM, low + 1, floor):
                        acked = [each for each in page if each.subject.startswith(beginning)]
                        await self._compare(connection, listener, acked)
                self._floors[listener] = floor
        finally:
            await client.close()

    async def _compare(
        self, connection: AsyncConnection, listener: str, acked: list[Stored]
    ) -> None:
        values = {
            "listener": listener,
            "ids": [each.event_id for each in acked],
            "sequences": [each.sequence for each in acked],
        }
        done = set((await connection.execute(text(FINISHED), values)).scalars())
        await connection.rollback()
        self.looked_at += len(acked)
        self.found += [
            f"{listener} {each.event_id} at {each.sequence}"
            for each in acked
            if not {each.event_id, str(each.sequence)} & done
        ]


async def _expected(_: Exception) -> None:
    """Say nothing of a connection that a fault has ended: the look fails by itself."""
