"""The next service in a process of its own: handles orders, ships parcels, prints its spans."""

import asyncio
import signal
import sys
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings
from outbox.observe import tracing

SCHEMA = "depot"
SHIPPED = "evt.parcel.shipped.v1"


class Printing(SpanExporter):
    """Prints each span on one line."""

    @override
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            print(span.to_json(indent=None), flush=True)
        return SpanExportResult.SUCCESS


class Ship(Listener):
    """Ships what was ordered."""

    subject = "evt.order.placed.v1"
    queue_group = "ship"
    service_name = "depot"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        events = Outbox("depot", settings=Settings.defaults(schema_name=SCHEMA))
        events.add(session, SHIPPED, {"order": event.data["number"]})


async def main(database_url: str, nats_url: str, stream: str) -> None:
    """Relay and listen until SIGTERM."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Printing()))
    tracing.instrument(provider)
    settings = Settings.defaults(stream=stream, schema_name=SCHEMA)
    engine = create_async_engine(database_url)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with (
        JetStreamClient(nats_url) as client,
        Relay(engine, client, settings=settings),
        Ship(client, async_sessionmaker(engine), settings=settings),
    ):
        await stopped.wait()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
