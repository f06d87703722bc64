"""Service, relay and listener while the servers die under them: effects equal commits."""

import asyncio
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.envelope import EventEnvelope
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Listener
from outbox.postgres.schema import upgrade
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Step
from outbox.writer import Outbox
from tests.faults import Watch

SUBJECT = "evt.order.created.v1"
COMMITS_PER_PHASE = 60


class Effect(Listener):
    """Writes one effect row for each event."""

    subject = SUBJECT
    queue_group = "effects"
    service_name = "mail"
    ack_wait = timedelta(seconds=2)

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:id)"), {"id": event.event_id})


async def commit_some(sessions: async_sessionmaker[AsyncSession], count: int) -> None:
    """Commit `count` events with a ledger row each; what fails is tried again as a new event."""
    events = Outbox("shop")
    done = 0
    async with asyncio.timeout(60):
        while done < count:
            try:
                async with sessions() as session:
                    event_id = events.add(session, SUBJECT, {"n": done}, key=f"k{done % 5}")
                    insert = text("INSERT INTO ledger VALUES (:id)")
                    await session.execute(insert, {"id": event_id})
                    if done % 7 == 3:
                        ghost = events.add(session, SUBJECT, {"ghost": True})
                        await session.rollback()
                        assert ghost
                    else:
                        await session.commit()
                    done += 1
            except (SQLAlchemyError, OSError) as error:
                assert isinstance(error, DBAPIError | OSError)
                await asyncio.sleep(0.05)  # the server is restarting


async def ids(engine: AsyncEngine, table: str) -> list[str]:
    """Return the ids in `table`, sorted, with repeats."""
    async with engine.connect() as connection:
        return sorted(row[0] for row in await connection.execute(text(f"TABLE {table}")))


async def test_broker_and_database_die_and_every_commit_has_one_effect(
    private_postgres: EmbeddedPostgres, private_nats: EmbeddedNats
) -> None:
    """nats-server by SIGKILL, PostgreSQL by `restart -m immediate`, both while events flow."""
    engine = create_async_engine(private_postgres.url)
    await upgrade(engine)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE ledger (event_id text)"))
        await connection.execute(text("CREATE TABLE effect (event_id text)"))
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    watch = Watch()
    settings = Settings.defaults(lease=3, publish_timeout=1)
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
        async with (
            Relay(engine, client, settings=settings, observer=watch),
            Effect(client, sessions, settings=settings, observer=watch),
        ):
            await commit_some(sessions, COMMITS_PER_PHASE)
            await watch.until(Step.ACKED, 10)
            private_nats.kill()
            await commit_some(sessions, COMMITS_PER_PHASE)
            private_nats.start()
            await commit_some(sessions, COMMITS_PER_PHASE)
            private_postgres.restart("immediate")
            await commit_some(sessions, COMMITS_PER_PHASE)
            async with asyncio.timeout(60):
                while True:
                    acked = len(watch.of(Step.ACKED))  # before the look, so that none is missed
                    if await ids(engine, "effect") == await ids(engine, "ledger"):
                        break
                    await watch.until(Step.ACKED, acked + 1, within=50)
    assert await ids(engine, "effect") == await ids(engine, "ledger")
    async with engine.connect() as connection:
        found = await connection.execute(text("SELECT count(*) FROM outbox.dead_letter"))
        assert found.scalar_one() == 0
    await engine.dispose()
