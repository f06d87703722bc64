"""A listener one of whose events kills the process that handles it: URLs, id of that event."""

import asyncio
import os
import signal
import sys

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from tests.guarantees.listener_child import Effect


class Poisoned(Effect):
    """Dies of one event; the others take a moment, so that several are in hand."""

    max_attempts = 3
    _poison = ""

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await super().on_message(session, event)
        if event.event_id == self._poison:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.1)


async def main(database_url: str, nats_url: str, poison: str) -> None:
    """Listen until killed."""
    Poisoned._poison = poison
    engine = create_async_engine(database_url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with JetStreamClient(nats_url) as client:
        await Poisoned(client, sessions).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
