"""How fast events are published beside a subject, or a key, that fails.

A drain of the same events is timed three times in one run: alone, beside a subject that has reached
its own limit, and beside a key whose oldest event waits.

Run: python -m benchmarks.blockage [events]
"""

import asyncio
import sys
import time

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from typing_extensions import override

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.jetstream.client import JetStreamClient
from outbox.postgres import schema
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.telemetry import Moment, Observer, Step

EVENTS = 30_000
SHARE_WANTED = 0.9
FILL = """
INSERT INTO outbox.pending (event_id, slot, key, subject, headers, body)
SELECT gen_random_uuid(), 0, CASE WHEN n % 10 = 0 THEN CAST(:key AS text) END,
       CASE WHEN n % 10 = 0 AND CAST(:tenth AS text) <> '' THEN CAST(:tenth AS text)
            ELSE 'evt.bench.n' || n END,
       CAST('' AS bytea), CAST(repeat('x', 300) AS bytea)
FROM generate_series(1, :events) AS n
"""
HEAD = """
INSERT INTO outbox.waiting (id, event_id, slot, key, subject, headers, body, created_at, reason,
                            attempts, due_at, republished)
VALUES (0, gen_random_uuid(), 0, 'hot', 'evt.bench.hot', '', '', now(), 'failed', 1, 'infinity', 0)
"""


class Until(Observer):
    """Knows when so many events have been settled."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.done = asyncio.Event()

    @override
    def on_step(self, moment: Moment) -> None:
        """Count."""
        if moment.step is Step.SETTLED:
            self.left -= moment.count
            if self.left <= 0:
                self.done.set()


async def rate(
    engine: AsyncEngine, client: JetStreamClient, events: int, tenth: str, key: str | None
) -> float:
    """Return events per second of the nine tenths that nothing hinders."""
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE outbox.pending, outbox.waiting, outbox.archive"))
        if key is not None:
            await connection.execute(text(HEAD))
        await connection.execute(text(FILL), {"events": events, "tenth": tenth, "key": key})
    hindered = key is not None or tenth == "evt.bench.full"
    wanted = events * 9 // 10 if hindered else events
    watch = Until(wanted)
    settings = Settings.defaults(subject_prefixes=("evt.bench.",))
    begun = time.perf_counter()
    async with Relay(engine, client, settings=settings, observer=watch):
        await watch.done.wait()
        seconds = time.perf_counter() - begun
    return wanted / seconds


async def purge(client: JetStreamClient) -> None:
    """Empty all subjects but the full one."""
    await client.api("STREAM.PURGE.EVENTS")
    for n in range(5):
        await client.js.publish("evt.bench.full", str(n).encode())


async def measure(database_url: str, nats_url: str, events: int) -> float:
    """Print the rates; return the lower share."""
    engine = create_async_engine(database_url)
    await schema.upgrade(engine)
    async with JetStreamClient(nats_url) as client:
        await client.ensure_stream(
            "EVENTS", ["evt.bench.>"], max_msgs_per_subject=5, discard_new_per_subject=True
        )
        await purge(client)
        alone = await rate(engine, client, events, "", None)
        await purge(client)
        subject = await rate(engine, client, events, "evt.bench.full", None)
        await purge(client)
        key = await rate(engine, client, events, "evt.bench.hot", "hot")
    await engine.dispose()
    print(f"alone            {alone:10,.0f} events/s")
    print(
        f"beside a subject {subject:10,.0f} events/s, {subject / alone:.2f}, wanted {SHARE_WANTED}"
    )
    print(f"beside a key     {key:10,.0f} events/s, {key / alone:.2f}, wanted {SHARE_WANTED}")
    return min(subject, key) / alone


def main() -> None:
    """Run on embedded servers; exit 1 below the wanted share."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with EmbeddedPostgres() as postgres, EmbeddedNats() as nats:
        share = asyncio.run(measure(postgres.url, nats.url, events))
    sys.exit(share < SHARE_WANTED)


if __name__ == "__main__":
    main()
