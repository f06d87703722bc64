"""What Prometheus scrapes while events flow, parsed with Prometheus's own parser."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Reject, Relay, Retry, Settings
from outbox.backoff import Backoff
from outbox.lifecycle import Worker
from outbox.observe.metrics import OTHER, ROOTS_MAX, Histogram, Metrics
from outbox.observe.serving import serving
from outbox.telemetry import Fact, Moment, Observer, Step
from tests.faults import Watch
from tests.servers.events import insert

events = Outbox("shop")
SUBJECT = "evt.parcel.sent.v1"
Samples = dict[tuple[str, ...], float]


class Both(Metrics):
    """Metrics, and a watch to wait on."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.seen = Watch()

    @override
    def on_step(self, moment: Moment) -> None:
        super().on_step(moment)
        self.seen.on_step(moment)


class Parcels(Listener):
    """Takes parcels; some come back, some are refused."""

    subject = "evt.parcel.>"
    queue_group = "parcels"
    service_name = "depot"
    _backoff = Backoff(first=timedelta(milliseconds=10))

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        if event.data["n"] == 3 and event.delivery.attempt == 1:
            raise Retry("later")
        if event.data["n"] == 4:
            raise Reject("never")


@asynccontextmanager
async def served(
    workers: list[Worker], engine: AsyncEngine, metrics: Metrics
) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(workers, port=0, host="127.0.0.1", engine=engine, metrics=metrics) as endpoint,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{endpoint.port}") as client,
    ):
        yield client


async def scrape(client: httpx.AsyncClient) -> Samples:
    """Return each sample by its name and label values."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    found: Samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


async def test_a_scrape_counts_what_flowed_exactly(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> None:
    """Twenty events, one of them handled twice over, one given up, two that do not fit."""
    settings = Settings.defaults(stream=stream, source_service="shop")
    metrics = Both()
    relay = Relay(engine, js_client, settings=settings, observer=metrics)
    parcels = Parcels(js_client, sessionmaker, settings=settings, observer=metrics)
    async with served([relay, parcels], engine, metrics) as client, relay, parcels:
        for n in range(20):
            async with sessionmaker() as session, session.begin():
                events.add(session, SUBJECT, {"n": n})
        await insert(engine, ["k"], body=b"x" * 1_100_000)  # too large for the server
        async with sessionmaker() as session, session.begin():
            events.add(session, "cmd.parcel.send.v1", {"n": 0})
        await metrics.seen.until_events(Step.COMMITTED, 19)
        await metrics.seen.until(Step.DEAD_LETTERED, 2)
        await metrics.seen.until_events(Step.SETTLED, 22)  # with the dead letter's own event
        await until(client, ("outbox_dead_letters", "listener", "rejected"), 1.0)
        found = await scrape(client)
    expected = {
        ("outbox_published_events_total", "evt"): 20,
        ("outbox_published_events_total", "cmd"): 1,
        ("outbox_published_events_total", "dlq"): 1,
        ("outbox_publish_failures_total", "impossible"): 1,
        ("outbox_repaired_events_total",): 0,
        ("outbox_publish_delay_seconds_count",): 21,  # the id of the dlq. event tells no time
        ("inbox_handled_events_total", "depot-parcels", "handled"): 19,
        ("inbox_handled_events_total", "depot-parcels", "retried"): 1,
        ("inbox_handled_events_total", "dead_lettered", "depot-parcels"): 1,
        ("inbox_handle_seconds_count", "depot-parcels"): 19,
        ("inbox_delivery_delay_seconds_count", "depot-parcels"): 19,
        ("outbox_pending_events",): 0,
        ("outbox_oldest_pending_age_seconds",): 0,
        ("outbox_scheduled_events",): 0,
        ("outbox_dead_letters", "relay", "too_large"): 1,
        ("outbox_dead_letters", "listener", "rejected"): 1,
        ("outbox_lanes_owned",): 1,
        ("outbox_rows_below_floor",): 0,
        ("outbox_broker_connected",): 1,
        ("inbox_unread_events", "depot-parcels"): 0,
        ("inbox_unread_retention_ratio", "depot-parcels"): 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert 0 < found["outbox_publish_delay_seconds_sum",] < 60
    assert 0 < found["inbox_delivery_delay_seconds_sum", "depot-parcels"] < 60
    assert found["outbox_last_ack_age_seconds",] < 30


async def until(client: httpx.AsyncClient, key: tuple[str, ...], value: float) -> None:
    """Return once a scrape shows `value`; fail when that takes longer than two samples."""
    async with asyncio.timeout(25):
        while (await scrape(client)).get(key) != value:  # noqa: ASYNC110 - a scrape is asked
            await asyncio.sleep(0.2)


async def test_backlog_is_shown_while_nobody_relays(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    async with sessionmaker() as session, session.begin():
        for n in range(7):
            events.add(session, SUBJECT, {"n": n})
    async with served([], engine, Metrics(CollectorRegistry())) as client:
        await until(client, ("outbox_pending_events",), 7.0)
        assert (await scrape(client))["outbox_oldest_pending_age_seconds",] > 0


async def test_tables_that_cannot_be_asked_leave_their_gauges_out() -> None:
    """An old figure would look like a healthy one."""
    gone = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/none")
    async with served([], gone, Metrics(CollectorRegistry())) as client:
        assert ("outbox_pending_events",) not in await scrape(client)


def test_labels_are_bounded_whatever_is_published() -> None:
    metrics = Metrics(CollectorRegistry())
    facts = [Fact(str(n), f"root{n}.x.v1", None) for n in range(1000)]
    metrics.on_step(Moment(Step.SETTLED, "relay", count=1000, events=facts))
    assert len(metrics.published) == ROOTS_MAX + 1
    assert metrics.published[OTHER] == 1000 - ROOTS_MAX


def test_buckets_are_cumulative_and_take_what_a_skewed_clock_makes_negative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (-5.0, 0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 3.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.total == 12.0


def test_moments_carry_events_for_who_wants_them_only() -> None:
    assert not Observer.wants_events
    assert Metrics.wants_events


def test_nothing_of_the_extra_is_imported_without_a_port() -> None:
    code = """
import sys
import outbox, outbox.cli.main, outbox.cli.relay, outbox.observe.serving
bad = [name for name in sys.modules if name.startswith(("prometheus_client", "opentelemetry"))]
sys.exit(f"imported: {bad}" if bad else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_scrape_without_the_extra_says_what_to_install(engine: AsyncEngine) -> None:
    nothing: Any = None
    async with served([], engine, nothing) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 501
    assert "outbox-jetstream[metrics]" in answer.text


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"rubbish\r\n\r\n", b"400"),
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET /healthz?a=b HTTP/1.0\r\nHost: x\r\n\r\n", b"200"),
    ],
)
async def test_rubbish_is_answered_and_the_endpoint_goes_on(
    engine: AsyncEngine, request_bytes: bytes, status: bytes
) -> None:
    async with serving([], port=0, host="127.0.0.1", engine=engine) as endpoint:
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(request_bytes)
        assert (await reader.readline()).split(b" ")[1] == status
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b"200 OK" in await reader.read()
        writer.close()


async def test_a_client_that_says_nothing_is_dropped(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.observe.endpoint.SECONDS_MAX", 0.2)
    async with serving([], port=0, host="127.0.0.1", engine=engine) as endpoint:
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
