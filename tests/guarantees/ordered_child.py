"""An ordered listener in a process of its own that ends itself at a step: URLs, step, nth."""

import asyncio
import sys
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Listener
from outbox.settings import Settings
from outbox.telemetry import Step
from tests.faults import KillAt

SETTINGS = Settings.defaults(lease=timedelta(seconds=1), publish_timeout=timedelta(seconds=0.5))


class OrderedEffect(Listener):
    """Writes one effect row for each event, in the order of its key."""

    subject = "evt.order.created.v1"
    queue_group = "ordered-effects"
    service_name = "mail"
    ack_wait = timedelta(seconds=1)
    max_attempts = 30
    ordered = True

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        insert = text("INSERT INTO effect (key, n) VALUES (:key, :n)")
        await session.execute(insert, {"key": event.key, "n": event.data["n"]})


async def main(database_url: str, nats_url: str, step: str, nth: str) -> None:
    """Listen until killed."""
    engine = create_async_engine(database_url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    observer = KillAt(Step(step), int(nth))
    async with JetStreamClient(nats_url) as client:
        await OrderedEffect(client, sessions, settings=SETTINGS, observer=observer).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
