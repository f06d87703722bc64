"""One trace from a request's handler to the last service, seen by OpenTelemetry's own SDK."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import (
    BatchListener,
    EventEnvelope,
    JetStreamClient,
    Listener,
    Outbox,
    Relay,
    Settings,
)
from outbox.backoff import Backoff
from outbox.observe import tracing
from outbox.postgres import schema
from outbox.telemetry import Step
from tests.faults import Watch
from tests.integration.traced_child import SCHEMA, SHIPPED

ROOT = Path(__file__).parents[2]
ORDERED = "evt.order.placed.v1"
SECRET = "a-payload-nobody-may-see"  # noqa: S105 - the point of the test
events = Outbox("shop")


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """Trace this process, and keep its spans."""
    found = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    tracing.instrument(provider)
    _Provider.current = provider
    yield found
    tracing.uninstrument()


class _Provider:
    current: ClassVar[TracerProvider]


class Invoice(Listener):
    """The last service: sends an invoice for what was shipped."""

    subject = SHIPPED
    queue_group = "invoice"
    service_name = "billing"
    _backoff = Backoff(first=timedelta(milliseconds=10))

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        if event.data.get("fails") and event.delivery.attempt == 1:
            raise ValueError(SECRET)


class InvoiceAll(BatchListener):
    """The same for many."""

    subject = SHIPPED
    queue_group = "invoices"
    service_name = "billing"

    @override
    async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope]) -> None:
        pass


def named(spans: Sequence[ReadableSpan], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


@asynccontextmanager
async def depot(database_url: str, nats_url: str, stream: str) -> AsyncIterator[list[Any]]:
    """Run the next service in a child; lend the spans that it has printed when it has ended."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.traced_child",
        *(database_url, nats_url, stream),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    spans: list[Any] = []
    try:
        yield spans
    finally:
        child.terminate()
        out, _ = await asyncio.wait_for(child.communicate(), 20)
        spans += [json.loads(line) for line in out.splitlines()]


async def test_one_trace_from_a_request_to_the_last_of_three_services(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    database_url: str,
    nats_server: str,
    js_client: JetStreamClient,
    stream: str,
    exporter: InMemorySpanExporter,
) -> None:
    """Shop and billing run here, the depot in a process of its own."""
    await schema.upgrade(engine, schema=SCHEMA)
    app = FastAPI()
    tracer = _Provider.current.get_tracer("web")

    @app.post("/orders/{number}")
    async def place(number: int) -> None:
        with tracer.start_as_current_span("POST /orders"):
            async with sessionmaker() as session, session.begin():
                events.add(session, ORDERED, {"number": number, "note": SECRET})

    settings = Settings.defaults(stream=stream)
    watch = Watch()
    async with (
        depot(database_url, nats_server, stream) as theirs,
        Relay(engine, js_client, settings=settings),
        Invoice(js_client, sessionmaker, settings=settings, observer=watch),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as http,
    ):
        assert (await http.post("/orders/7")).status_code == 200
        await watch.until(Step.ACKED, within=30)
    ours = exporter.get_finished_spans()
    (request,) = named(ours, "POST /orders")
    trace_id = trace_of(request)
    (shipping,) = [each for each in theirs if each["name"] == f"process {ORDERED}"]
    assert int(shipping["context"]["trace_id"], 16) == trace_id
    assert int(shipping["parent_id"], 16) == request.get_span_context().span_id  # type: ignore[union-attr]
    (invoicing,) = named(ours, f"process {SHIPPED}")
    assert trace_of(invoicing) == trace_id
    assert invoicing.parent is not None
    assert invoicing.parent.span_id == int(shipping["context"]["span_id"], 16)
    (publishing,) = named(ours, f"publish {ORDERED}")
    assert publishing.kind is SpanKind.PRODUCER
    assert linked(publishing) == {request.get_span_context().span_id}  # type: ignore[union-attr]
    (shipped,) = [each for each in theirs if each["name"] == f"publish {SHIPPED}"]
    assert shipped["links"][0]["context"]["span_id"] == shipping["context"]["span_id"]
    assert SECRET not in json.dumps(theirs)


async def test_process_spans_follow_the_conventions_for_messaging(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    exporter: InMemorySpanExporter,
) -> None:
    """Each attempt has a span of its own; a failed one names the error's type, never its text."""
    settings = Settings.defaults(stream=stream)
    watch = Watch()
    with _Provider.current.get_tracer("web").start_as_current_span("request"):
        async with sessionmaker() as session, session.begin():
            event_id = events.add(session, SHIPPED, {"fails": True, "note": SECRET})
    async with (
        Relay(engine, js_client, settings=settings),
        Invoice(js_client, sessionmaker, settings=settings, observer=watch),
    ):
        await watch.until(Step.ACKED)
    spans = exporter.get_finished_spans()
    failed, handled = named(spans, f"process {SHIPPED}")
    assert dict(handled.attributes or {}) == {
        "messaging.system": "nats",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": SHIPPED,
        "messaging.consumer.group.name": "billing-invoice",
        "messaging.message.id": event_id,
        "outbox.delivery.attempt": 2,
    }
    assert handled.kind is SpanKind.CONSUMER
    assert handled.status.status_code is StatusCode.UNSET
    assert (failed.attributes or {})["error.type"] == "ValueError"
    assert failed.status.status_code is StatusCode.ERROR
    assert trace_of(failed) == trace_of(handled) == trace_of(*named(spans, "request"))
    assert SECRET not in "".join(span.to_json() for span in spans)


async def test_a_page_of_several_events_has_one_span_with_links_and_a_batch_too(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    exporter: InMemorySpanExporter,
) -> None:
    settings = Settings.defaults(stream=stream)
    tracer = _Provider.current.get_tracer("web")
    added = []
    for _ in range(3):
        with tracer.start_as_current_span("request") as span:
            async with sessionmaker() as session, session.begin():
                events.add(session, SHIPPED, {})
            added.append(span.get_span_context().span_id)
    async with sessionmaker() as session, session.begin():
        events.add(session, SHIPPED, {})  # of no trace
    watch = Watch()
    await Relay(engine, js_client, settings=settings).drain()
    async with InvoiceAll(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until_events(Step.COMMITTED, 4)
    spans = exporter.get_finished_spans()
    (publishing,) = named(spans, f"publish {stream}")
    assert linked(publishing) == set(added)
    assert (publishing.attributes or {})["messaging.batch.message_count"] == 4
    batches = named(spans, f"process {SHIPPED}")
    continued = {span.parent.span_id for span in batches if span.parent is not None}  # alone
    assert continued.union(*(linked(span) for span in batches)) == set(added)
    assert all(span.parent is None for span in batches if span.links)


async def test_a_trace_that_the_caller_gives_wins_and_one_that_is_not_recorded_is_not_linked(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    exporter: InMemorySpanExporter,
) -> None:
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    with _Provider.current.get_tracer("web").start_as_current_span("request"):
        async with sessionmaker() as session, session.begin():
            events.add(session, SHIPPED, {}, headers={"Traceparent": given})
    async with (
        Relay(engine, js_client, settings=settings),
        Invoice(js_client, sessionmaker, settings=settings, observer=watch),
    ):
        await watch.until(Step.ACKED)
    spans = exporter.get_finished_spans()
    assert not [span for span in spans if span.name.startswith("publish")]
    assert not named(spans, f"process {SHIPPED}")  # the caller's trace is not sampled


async def test_repeat_under_another_span_is_the_same_event(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    exporter: InMemorySpanExporter,
) -> None:
    del engine, exporter
    tracer = _Provider.current.get_tracer("web")
    event_id = "01a21395-0c14-7000-840c-e7c34cc33f3d"
    async with sessionmaker() as session, session.begin():
        for _ in range(2):
            with tracer.start_as_current_span("try"):
                events.add(session, SHIPPED, {"n": 1}, event_id=event_id)


async def test_nothing_travels_without_a_tracer(
    sessionmaker: async_sessionmaker[AsyncSession], js_client: JetStreamClient, stream: str
) -> None:
    engine = sessionmaker.kw["bind"]
    async with sessionmaker() as session, session.begin():
        events.add(session, SHIPPED, {})
    assert (
        await Relay(engine, js_client, settings=Settings.defaults(stream=stream)).drain()
    ).complete
    message = await js_client.js.get_msg(stream, 1)
    assert "traceparent" not in {name.lower() for name in message.headers or {}}
