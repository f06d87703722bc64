"""Compare an archive of a million events with its stream, as `outbox verify` does.

Run: python benchmarks/verify.py [events]
"""

import asyncio
import sys
import time
from hashlib import md5
from urllib.parse import urlsplit

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.drain import WINDOW, Raw
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.publishing import frame, message_head
from outbox.operate.verify import verify
from outbox.postgres import schema

EVENTS = 1_000_000
BODY = b"x" * 300
SECONDS_WANTED = 60.0
FILL = """
INSERT INTO outbox.archive (id, event_id, slot, key, subject, headers, body, created_at, stream,
                            sequence, published_at, day)
SELECT n, CAST(md5(CAST(n AS text)) AS uuid), 0, NULL, 'evt.bench.added.v1', CAST('' AS bytea),
       CAST(repeat('x', 300) AS bytea), now(), 'BENCH', n, now(), 0
FROM generate_series(1, :events) AS n
"""


def event_id(number: int) -> str:
    """Return the id that the archive's row has."""
    digits = md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


async def publish(url: str, events: int) -> None:
    """Store the events, in raw frames."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(Raw, address.hostname or "", address.port or 4222)
    assert protocol.transport is not None  # noqa: S101 - connected
    protocol.transport.write(b'CONNECT {"verbose":false,"headers":true}\r\nSUB _INBOX.raw.* 1\r\n')
    head = message_head("evt.bench.added.v1", "BENCH")
    for start in range(1, events + 1, WINDOW):
        numbers = range(start, min(start + WINDOW, events + 1))
        frames = (frame(head, "_INBOX.raw.1", event_id(n), b"", BODY) for n in numbers)
        protocol.transport.write(b"".join(frames))
        while protocol.acked < numbers[-1]:
            protocol.changed.clear()
            await protocol.changed.wait()
    protocol.transport.close()


async def measure(database_url: str, nats_url: str, events: int) -> float:
    """Print the time; return it in seconds."""
    engine = create_async_engine(database_url)
    await schema.upgrade(engine)
    async with JetStreamClient(nats_url) as client:
        await client.ensure_stream("BENCH", ["evt.bench.>"], max_msgs=-1)
        await publish(nats_url, events)
        async with engine.begin() as connection:
            await connection.execute(text(FILL), {"events": events})
        begun = time.perf_counter()
        found = await verify(engine, client)
        seconds = time.perf_counter() - begun
    await engine.dispose()
    if found.compared != events or not found.complete:
        sys.exit(f"compared {found.compared} of {events}, missing {found.missing}")
    print(f"verify      {events:,} events in {seconds:.1f} s, wanted below {SECONDS_WANTED:.0f} s")
    return seconds


def main() -> None:
    """Run on embedded servers; exit 1 when it takes too long."""
    events = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with EmbeddedPostgres() as postgres, EmbeddedNats() as nats:
        seconds = asyncio.run(measure(postgres.url, nats.url, events))
    sys.exit(seconds > SECONDS_WANTED)


if __name__ == "__main__":
    main()
