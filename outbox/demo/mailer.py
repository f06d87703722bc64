"""The mailer: one row in `effect` for each event that it handles. Says when it sees a repeat."""

import asyncio
import signal
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox.demo.shop import SUBJECT
from outbox.demo.tables import EFFECT
from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Listener
from outbox.settings import Settings
from outbox.telemetry import Moment, Observer, Step

DUPLICATE = "duplicate"  # the line that tells of one


class Mailer(Listener):
    """Sends one mail for each order."""

    subject = SUBJECT
    queue_group = "mails"
    service_name = "mailer"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        """Record the effect."""
        await session.execute(insert(EFFECT), {"event_id": UUID(event.event_id)})


class Watch(Observer):
    """Prints a line for each repeat."""

    @override
    def on_step(self, moment: Moment) -> None:
        """Tell of a repeat."""
        if moment.step is Step.DUPLICATE:
            print(DUPLICATE, flush=True)


async def main() -> None:
    """Listen until SIGTERM."""
    settings = Settings.from_environment()
    engine = create_async_engine(settings.database_url.get_secret_value())
    async with JetStreamClient.from_settings(settings) as client:
        mailer = Mailer(client, async_sessionmaker(engine), settings=settings, observer=Watch())
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
        async with mailer:
            await asked.wait()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
