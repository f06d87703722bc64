"""What the six services share: a ledger of what they told, a count of effects, and a process."""

import asyncio
import logging
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from alembic import command
from alembic.config import Config
from pydantic import BaseModel
from sqlalchemy import Column, Connection, MetaData, Table, Text, Uuid, insert
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

import outbox
from outbox import EventEnvelope, JetStreamClient, Listener, Observer, Relay, Settings
from outbox.registry import registry
from outbox.telemetry import Moment, Step

HERE = Path(__file__).parent
shared = MetaData()
# Neither has a unique key: the verdict counts, and the library has to keep the counts right.
told = Table("told", shared, Column("event_id", Uuid), Column("what", Text))
effect = Table("effect", shared, Column("event_id", Uuid), Column("what", Text))


async def tell(session: AsyncSession, payload: BaseModel, subject: str | None = None) -> None:
    """Add the event, and a ledger row, which is the truth that the verdict compares with."""
    if subject is None:
        event_id = outbox.add(session, payload)
        (subject,) = registry.subjects_of(type(payload))
    else:
        event_id = outbox.add(session, subject, payload)
    await session.execute(insert(told), {"event_id": UUID(event_id), "what": subject})


P_co = TypeVar("P_co", covariant=True)


class GlamListener(Listener[P_co]):
    """Counts an effect around every handler, in the handler's own transaction."""

    ack_wait = timedelta(seconds=3)  # how long what a killed process had in hand stays away

    @override
    async def handle(self, session: AsyncSession, event: EventEnvelope[P_co]) -> None:
        """Call the handler, and note its effect."""
        await super().handle(session, event)
        await session.execute(insert(effect), {"event_id": event.event_id, "what": self.identity})


async def migrate(engine: AsyncEngine, service: str) -> None:
    """Bring our tables and the service's own to their newest versions, each in its own history."""

    def own(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(HERE / "migrations"))
        config.set_main_option("version_locations", str(HERE / "migrations" / service))
        config.set_main_option("path_separator", "newline")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    await outbox.upgrade(engine)
    async with engine.begin() as connection:
        await connection.run_sync(own)


class Repeats(Observer):
    """Prints a line for each event that an inbox knew already; the parent counts them."""

    @override
    def on_step(self, moment: Moment) -> None:
        """Tell of a repeat."""
        if moment.step is Step.DUPLICATE and moment.source != "relay":
            print(moment.source, flush=True)


async def run(listeners: Sequence[type[Listener[Any]]], *also: Any) -> None:
    """Run a service until SIGTERM: its relay, its listeners, and what else it does."""
    settings = Settings.from_environment()
    logging.basicConfig(level=settings.log_level)
    engine = create_async_engine(settings.database_url.get_secret_value(), pool_size=20)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with JetStreamClient.from_settings(settings) as client, asyncio.TaskGroup() as tasks:
        workers = [Relay(engine, client, settings=settings)] + [
            each(client, sessions, settings=settings, observer=Repeats()) for each in listeners
        ]
        running = [tasks.create_task(worker.run()) for worker in workers]
        running += [tasks.create_task(work(sessions)) for work in also]
        await asked.wait()
        for worker in workers:
            await worker.stop()
        for task in running:
            task.cancel()
    await engine.dispose()
