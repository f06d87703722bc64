"""Drain a backlog, and compare it with what the same server takes in raw frames.

The ceiling: HPUB frames built beforehand, written through a bare asyncio protocol, with as many in
flight as the relay has, into a stream of the same settings.

Run: python benchmarks/drain.py [events]
"""

import asyncio
import sys
import time
from urllib.parse import urlsplit
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from typing_extensions import override

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.publishing import frame, message_head
from outbox.postgres import schema
from outbox.relay import Relay
from outbox.settings import Settings

EVENTS = 60_000
BODY_BYTES = 300
WINDOW = 1000
RATIO_WANTED = 0.25
FILL = """
INSERT INTO outbox.pending (event_id, slot, key, subject, headers, body)
SELECT gen_random_uuid(), n % 1024, NULL, 'evt.bench.added.v1', CAST('' AS bytea),
       CAST(repeat('x', :bytes) AS bytea)
FROM generate_series(1, :events) AS n
"""


class Raw(asyncio.Protocol):
    """Writes frames and counts what comes back; nothing is parsed but the ends of acks."""

    def __init__(self) -> None:
        self.acked = 0
        self.changed = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        """Count acks."""
        self.acked += data.count(b'"seq":')
        self.changed.set()


async def ceiling(url: str, events: int) -> float:
    """Return events per second with frames that were built beforehand."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(Raw, address.hostname or "", address.port or 4222)
    transport = protocol.transport
    assert transport is not None  # noqa: S101 - connected
    transport.write(b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.raw.* 1\r\n')
    blobs = [
        b"".join(
            frame(
                message_head("evt.raw.added.v1", "RAW"),
                f"_INBOX.raw.{index}",
                str(uuid4()),
                b"",
                b"x" * BODY_BYTES,
            )
            for index in range(start, min(start + WINDOW // 2, events))
        )
        for start in range(0, events, WINDOW // 2)
    ]
    begun = time.perf_counter()
    for number, blob in enumerate(blobs):
        while protocol.acked < (number - 1) * (WINDOW // 2):
            protocol.changed.clear()
            await protocol.changed.wait()
        transport.write(blob)
    while protocol.acked < events:
        protocol.changed.clear()
        await protocol.changed.wait()
    rate = events / (time.perf_counter() - begun)
    transport.close()
    return rate


async def drain(engine: AsyncEngine, client: JetStreamClient, events: int) -> float:
    """Return events per second that the relay drains from a full outbox into its archive."""
    async with engine.begin() as connection:
        await connection.execute(text(FILL), {"events": events, "bytes": BODY_BYTES})
    await client.ensure_stream("EVENTS", ["evt.bench.>", "cmd.bench.>"])
    settings = Settings.defaults(subject_prefixes=("evt.bench.", "cmd.bench."))
    begun = time.perf_counter()
    drained = await Relay(engine, client, settings=settings).drain()
    seconds = time.perf_counter() - begun
    async with engine.connect() as connection:
        archived = await connection.scalar(text("SELECT count(*) FROM outbox.archive"))
    if not drained.complete or archived != events:
        sys.exit(f"{archived} of {events} archived; {drained}")
    return events / seconds


async def measure(database_url: str, nats_url: str, events: int) -> float:
    """Print both rates; return their ratio."""
    engine = create_async_engine(database_url)
    await schema.upgrade(engine)
    async with JetStreamClient(nats_url) as client:
        await client.ensure_stream("RAW", ["evt.raw.>"])
        top = await ceiling(nats_url, events)
        await client.delete_stream("RAW")
        rate = await drain(engine, client, events)
    await engine.dispose()
    print(f"raw frames  {top:10,.0f} events/s")
    print(f"drain       {rate:10,.0f} events/s, archive on")
    print(f"ratio       {rate / top:10.2f}, wanted {RATIO_WANTED}")
    return rate / top


def main() -> None:
    """Run on embedded servers; exit 1 below the wanted ratio."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with EmbeddedPostgres() as postgres, EmbeddedNats() as nats:
        ratio = asyncio.run(measure(postgres.url, nats.url, events))
    sys.exit(ratio < RATIO_WANTED)


if __name__ == "__main__":
    main()
