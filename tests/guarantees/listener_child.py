"""A listener in a process of its own that ends itself at a step: URLs, step, nth."""

import asyncio
import sys
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Listener
from outbox.telemetry import Step
from outbox.writer import Outbox
from tests.faults import KillAt

FOLLOW_UP = "evt.mail.sent.v1"


class Effect(Listener):
    """Writes one effect row and adds one event for each event."""

    subject = "evt.order.created.v1"
    queue_group = "effects"
    service_name = "mail"
    ack_wait = timedelta(seconds=1)
    max_attempts = 30
    _events = Outbox("mail")

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        insert = text("INSERT INTO effect VALUES (:id)")
        await session.execute(insert, {"id": event.event_id})
        self._events.add(session, FOLLOW_UP, {"cause": event.event_id})


async def main(database_url: str, nats_url: str, step: str, nth: str) -> None:
    """Listen until killed."""
    engine = create_async_engine(database_url)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with JetStreamClient(nats_url) as client:
        await Effect(client, sessions, observer=KillAt(Step(step), int(nth))).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
