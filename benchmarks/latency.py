"""From a service's COMMIT to the COMMIT of the handler in another database, on idle servers.

Run: python benchmarks/latency.py [events]
"""

import asyncio
import statistics
import sys
import time

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Observer, Outbox, Relay, upgrade
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.telemetry import Moment, Step

EVENTS = 300
WANTED_MS = 15.0


class Nothing(Listener):
    """Has no effect but its inbox row."""

    subject = "evt.bench.added.v1"
    queue_group = "latency"
    service_name = "bench-listener"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        del session, event


class Commits(Observer):
    """Notes when the handler's transaction has committed."""

    def __init__(self) -> None:
        self.at = 0.0
        self.happened = asyncio.Event()

    @override
    def on_step(self, moment: Moment) -> None:
        if moment.step is Step.COMMITTED:
            self.at = time.perf_counter()
            self.happened.set()


async def measure(database: str, other: str, broker: str, events: int) -> list[float]:
    """Return the delay of each event in milliseconds; one event at a time."""
    here, there = create_async_engine(database), create_async_engine(other)
    for engine in (here, there):
        await upgrade(engine)
    sessions = async_sessionmaker(here)
    commits, delays = Commits(), []
    outbox = Outbox("bench")
    async with JetStreamClient(broker) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
        async with (
            Relay(here, client),
            Nothing(client, async_sessionmaker(there), observer=commits),
        ):
            for number in range(events + 20):
                commits.happened.clear()
                async with sessions() as session:
                    outbox.add(session, "evt.bench.added.v1", {"number": number})
                    await session.commit()
                committed = time.perf_counter()
                async with asyncio.timeout(30):
                    await commits.happened.wait()
                delays.append((commits.at - committed) * 1000)
    await here.dispose()
    await there.dispose()
    return delays[20:]  # the first ones warm caches


def main() -> int:
    """Print the figures; 1 when the median is not as wanted."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with EmbeddedPostgres() as postgres, EmbeddedNats() as broker:
        other = postgres.create_database("other")
        delays = sorted(asyncio.run(measure(postgres.url, other, broker.url, events)))
    median = statistics.median(delays)
    print(
        f"commit to handler's commit, {events} events: median {median:.1f} ms, "
        f"p95 {delays[int(len(delays) * 0.95)]:.1f} ms, max {delays[-1]:.1f} ms "
        f"(wanted: median under {WANTED_MS:g} ms)"
    )
    return int(median >= WANTED_MS)


if __name__ == "__main__":
    sys.exit(main())
