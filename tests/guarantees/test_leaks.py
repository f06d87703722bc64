"""After many faults nothing is left behind, and memory does not follow the size of the outbox."""

import asyncio
import gc
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Relay, Settings
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count, insert

ROOT = Path(__file__).parents[2]
SUBJECT = "evt.leak.looked.v1"
BODY = (
    b'{"event_id":"%s","event_type":"evt.leak.looked.v1","source_service":"s",'
    b'"timestamp":"2026-11-25T07:00:00Z","data":{}}'
)
KILL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
BACKENDS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
FILL = """
INSERT INTO outbox.pending (event_id, slot, key, subject, headers, body)
SELECT gen_random_uuid(), 0, NULL, 'evt.leak.looked.v1', CAST('' AS bytea),
       CAST(repeat('x', :bytes) AS bytea)
FROM generate_series(1, :events)
"""


class Look(Listener):
    """Does nothing but what every listener does."""

    subject = SUBJECT
    queue_group = "look"
    service_name = "leaks"
    ack_wait = timedelta(seconds=1)
    max_attempts = 100

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("SELECT 1"))


class OrderedLook(Look):
    queue_group = "ordered-look"
    ordered = True


def _files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.long
@pytest.mark.linux
@pytest.mark.timeout(600)
async def test_hundred_fault_cycles_leak_no_task_connection_or_file(
    engine: AsyncEngine,
    database_url: str,
    sessionmaker: async_sessionmaker[AsyncSession],
    nats_server: str,
    stream: str,
) -> None:
    own = create_async_engine(database_url, poolclass=NullPool)  # of the test's statements
    settings = Settings.defaults(
        stream=stream, lease=timedelta(seconds=1), publish_timeout=timedelta(seconds=0.5)
    )
    tasks, files = len(asyncio.all_tasks()), _files()
    for number in range(100):
        watch = Watch()
        async with JetStreamClient(nats_server) as client:
            relay = Relay(engine, client, settings=settings, observer=watch)
            listeners = [
                kind(client, sessionmaker, settings=settings) for kind in (Look, OrderedLook)
            ]
            async with relay, listeners[0], listeners[1]:
                await insert(own, 3)
                if number % 2:
                    async with own.connect() as connection:
                        await connection.execute(text(KILL))
                else:
                    transport = client.client._transport
                    assert transport is not None
                    transport.close()  # type: ignore[no-untyped-call] # the network goes
                await watch.until_events(Step.SETTLED, 3, within=20)
    await engine.dispose()
    gc.collect()
    async with own.connect() as connection:
        assert await connection.scalar(text(BACKENDS)) == 0
    assert len(asyncio.all_tasks()) <= tasks
    assert _files() <= files + 1
    assert await count(own, "pending") == await count(own, "waiting") == 0


async def _peak_megabytes(engine: AsyncEngine, url: str, nats_url: str, *more: str) -> float:
    """Drain with the command; return the most memory that its process had."""
    command = (
        "import resource, sys; from outbox.cli.relay import main; code = main(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    arguments = ("--drain", "--database-url", url, "--nats-url", nats_url, *more)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert await count(engine, "pending") == 0
    peak = re.search(r"peak (\d+)", done.stdout)
    assert peak is not None
    return int(peak[1]) / 1024


@pytest.mark.long
@pytest.mark.linux
@pytest.mark.timeout(900)
async def test_memory_does_not_follow_the_number_of_pending_events(
    engine: AsyncEngine, database_url: str, nats_server: str, stream: str
) -> None:
    peaks = []
    for events in (10_000, 1_000_000):
        async with engine.begin() as connection:
            await connection.execute(text(FILL), {"events": events, "bytes": 100})
        peaks.append(await _peak_megabytes(engine, database_url, nats_server, "--stream", stream))
    print(f"peak memory: {peaks[0]:.0f} MB at 10,000, {peaks[1]:.0f} MB at 1,000,000 pending")
    assert peaks[1] - peaks[0] < 20


@pytest.mark.long
@pytest.mark.linux
@pytest.mark.timeout(300)
async def test_memory_stays_below_200_megabytes_with_megabyte_payloads(
    engine: AsyncEngine, database_url: str, nats_server: str, stream: str
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(FILL), {"events": 150, "bytes": 1_000_000})
    peak = await _peak_megabytes(engine, database_url, nats_server, "--stream", stream)
    print(f"peak memory: {peak:.0f} MB with payloads of 1 MB")
    assert peak < 200
