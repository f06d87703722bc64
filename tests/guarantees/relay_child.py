"""A relay in a process of its own that ends itself at a step: database URL, NATS URL, step, nth."""

import asyncio
import sys

from sqlalchemy.ext.asyncio import create_async_engine

from outbox.jetstream.client import JetStreamClient
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Step
from tests.faults import KillAt


async def main(database_url: str, nats_url: str, step: str, nth: str) -> None:
    """Relay until killed."""
    engine = create_async_engine(database_url)
    async with JetStreamClient(nats_url) as client:
        settings = Settings.defaults(lease=2, publish_timeout=1, page_rows_max=100)
        observer = KillAt(Step(step), int(nth))
        await Relay(engine, client, settings=settings, observer=observer).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
