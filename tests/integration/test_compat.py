"""GLAM's older classes run unchanged but for their imports and the sessionmaker."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

import outbox
from outbox import EventEnvelope, InvalidEvent, JetStreamClient, Outbox, Relay, Settings
from outbox.context import EventLogFilter
from outbox.contracts import (
    CatalogSyncFailedPayload,
    DataListener,
    EnvelopeListener,
    ErrorPayload,
    MerchantIdentifiers,
    Publisher,
    Subjects,
)
from outbox.contracts.compat import OlderListener
from outbox.telemetry import Step
from outbox.testing import pending
from tests.faults import Watch

SUBJECT = Subjects.ANALYTICS_TRACKED
MERCHANT = MerchantIdentifiers(
    merchant_id=UUID(int=7), platform_name="shopify", platform_shop_id="7", domain="tea.example"
)
DATA = {
    "identifiers": MERCHANT.model_dump(mode="json"),
    "name": "viewed",
    "occurred_at": "2026-11-25T07:00:00+00:00",
}


class MerchantPublisher(Publisher):
    @property
    @override
    def service_name(self) -> str:
        return "merchant-service"


class Lines(logging.Handler):
    """Keeps what a handler with our filter would have written."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.addFilter(EventLogFilter())

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def facts(self, message: str) -> dict[str, Any]:
        (record,) = [each for each in self.records if each.getMessage() == message]
        names = ("event_id", "event_type", "correlation_id", "source_service", "service")
        return {name: getattr(record, name) for name in (*names, "entry_point")}


@pytest.fixture
def lines() -> Any:
    handler = Lines()
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


@pytest.fixture
async def publish(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> AsyncIterator[Callable[..., Any]]:
    """A running relay, and a function that commits one event of SUBJECT."""

    async def work(**changed: Any) -> str:
        async with sessionmaker.begin() as session:
            return await MerchantPublisher().publish_event(session, SUBJECT, DATA | changed)

    async with Relay(engine, js_client, settings=Settings.defaults(stream=stream)):
        yield work


async def rows(sessionmaker: async_sessionmaker[AsyncSession], sql: str) -> list[tuple[Any, ...]]:
    async with sessionmaker() as session:
        return [tuple(row) for row in (await session.execute(text(sql))).all()]


async def run(listener: OlderListener, watch: Watch, step: Step, times: int = 1) -> None:
    async with listener:
        await watch.until(step, times)


# ---- Publisher -------------------------------------------------------------------------------


async def test_publisher_takes_the_older_constructor_and_argument_names(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    publisher = MerchantPublisher(object(), logging.getLogger("x"))
    async with sessionmaker.begin() as session:
        first = await publisher.publish_event(session, SUBJECT.value, DATA, "c-1", {"m": 1})
        second = await publisher.publish_event(session, event_type=SUBJECT, data=DATA)
        third = await publisher.publish_event(session, SUBJECT, DATA, key="other")
        with pytest.raises(TypeError, match="subject is missing"):
            await publisher.publish_event(session, payload=DATA)
        with pytest.raises(TypeError, match="payload and data are the same"):
            await publisher.publish_event(session, SUBJECT, DATA, data=DATA)
        with pytest.raises(InvalidEvent, match="is no AnalyticsTrackedPayload"):
            await publisher.publish_event(session, SUBJECT, {"name": "viewed"})
    stored = await pending(engine)
    assert [event.event_id for event in stored] == [first, second, third]
    assert [event.key for event in stored] == [str(MERCHANT.merchant_id)] * 2 + ["other"]
    assert stored[0].correlation_id == "c-1"
    assert stored[0].metadata == {"m": 1}
    assert stored[0].source_service == "merchant-service"


async def test_publisher_without_a_service_name_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Publisher()  # type: ignore[abstract]


async def test_dead_letter_of_the_publisher_is_an_error_payload_on_dlq(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    error = ErrorPayload(
        identifiers=MERCHANT, error_code="", error_message="", failed_operation="sync"
    )
    subject = Subjects.CATALOG_SYNC_STARTED
    async with sessionmaker.begin() as session:
        publisher = MerchantPublisher()
        await publisher.publish_to_dlq(session, subject, error, "c-2", ValueError("no stock"))
        with pytest.raises(InvalidEvent, match="is no ErrorPayload: identifiers"):
            await publisher.publish_to_dlq(session, subject, {}, "c-2", "x")
        with pytest.raises(InvalidEvent, match="subject"):
            await publisher.publish_to_dlq(session, "dlq.x.v1", error, "c-2", "x")
    (event,) = await pending(engine)
    assert (event.event_type, event.key) == ("dlq.catalog.sync.started.v1", None)
    assert event.correlation_id == "c-2"
    assert event.headers == {"Outbox-Original-Subject": subject.value}
    found = ErrorPayload.model_validate(event.data)
    assert (found.error_code, found.error_message) == ("ValueError", "no stock")


async def test_failure_events_are_error_payloads(
    sessionmaker: async_sessionmaker[AsyncSession],
) -> None:
    failed = CatalogSyncFailedPayload(
        identifiers=MERCHANT, error_code="x", error_message="y", failed_operation="sync"
    )
    async with sessionmaker.begin() as session:
        assert Outbox("catalog-service").add(session, failed)
    assert isinstance(failed, ErrorPayload)


# ---- listeners -------------------------------------------------------------------------------


class Tracked(DataListener):
    """As the older generation writes it: properties, and no session anywhere."""

    max_deliver = 3

    @property
    @override
    def subject(self) -> str:  # type: ignore[override]
        return SUBJECT.value

    @property
    @override
    def queue_group(self) -> str:  # type: ignore[override]
        return "tracked"

    @property
    @override
    def service_name(self) -> str:  # type: ignore[override]
        return "analytics-service"

    @override
    async def on_message(self, data: dict[str, Any]) -> None:  # type: ignore[override]
        self.logger.info("handling")
        if data["name"] == "broken":
            raise ValueError("cannot be counted")
        await outbox.current_session().execute(text("CREATE TABLE handled AS SELECT 1"))

    @override
    async def on_error(self, error: Exception, data: dict[str, Any]) -> bool:  # type: ignore[override]
        return isinstance(error, ValueError) and data["name"] == "broken" and "discard" in data


async def test_older_class_runs_inside_our_transaction(
    publish: Callable[..., Any],
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    lines: Lines,
) -> None:
    event_id = await publish()
    watch = Watch()
    logger = logging.getLogger("analytics")
    settings = Settings.defaults(stream=stream)
    listener = Tracked(js_client, logger, sessionmaker, settings=settings, observer=watch)
    assert (listener.identity, Tracked.max_attempts) == ("analytics-service-tracked", 3)
    await run(listener, watch, Step.ACKED)
    assert await rows(sessionmaker, "SELECT * FROM handled") == [(1,)]
    assert lines.facts("handling") == {
        "event_id": event_id,
        "event_type": SUBJECT.value,
        "correlation_id": event_id,
        "source_service": "merchant-service",
        "service": "analytics-service",
        "entry_point": "event_listener",
    }
    assert lines.facts("added an event") == {
        "event_id": event_id,
        "event_type": SUBJECT.value,
        "correlation_id": event_id,
        "source_service": "merchant-service",
        "service": "merchant-service",
        "entry_point": "event_publisher",
    }


@pytest.mark.parametrize(
    ("changed", "step", "wanted"),
    [
        ({"name": "broken", "discard": 1}, Step.DEAD_LETTERED, ("discarded", "discarded", 1)),
        ({"name": "broken"}, Step.DEAD_LETTERED, ("attempts", "open", 3)),
    ],
)
async def test_true_of_on_error_discards_and_false_repeats_up_to_max_deliver(
    publish: Callable[..., Any],
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    changed: dict[str, Any],
    step: Step,
    wanted: tuple[str, str, int],
) -> None:
    await publish(**changed)
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    await run(Tracked(js_client, sessionmaker, settings=settings, observer=watch), watch, step)
    sql = "SELECT reason, state, attempts FROM outbox.dead_letter"
    assert await rows(sessionmaker, sql) == [wanted]


async def test_handler_that_commits_its_own_session_is_warned_of_once(
    publish: Callable[..., Any],
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class OwnSession(EnvelopeListener):
        subject = SUBJECT
        queue_group = "own"
        service_name = "analytics-service"

        @override
        async def on_message(self, envelope: EventEnvelope) -> None:  # type: ignore[override]
            async with sessionmaker.begin() as session:
                await session.execute(text("SELECT 1"))

    for _ in range(3):
        await publish()
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    await run(
        OwnSession(js_client, sessionmaker, settings=settings, observer=watch), watch, Step.ACKED, 3
    )
    warnings = [each for each in caplog.records if "session of its own" in each.getMessage()]
    assert len(warnings) == 1
    assert "OwnSession" in cast("str", vars(warnings[0])["listener_class"])
    assert await rows(sessionmaker, "SELECT count(*) FROM outbox.inbox") == [(3,)]


def test_property_that_needs_an_instance_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Odd\.subject needs an instance"):

        class Odd(DataListener):
            queue_group = "odd"

            @property
            @override
            def subject(self) -> str:  # type: ignore[override]
                return str(self.no_such_thing)  # type: ignore[attr-defined]


def test_missing_sessionmaker_is_named(js_client: JetStreamClient) -> None:
    with pytest.raises(TypeError, match="Tracked needs a sessionmaker"):
        Tracked(js_client, logging.getLogger("x"))


# ---- what ends with the handler --------------------------------------------------------------


async def test_session_and_log_facts_end_with_the_handler_in_its_tasks_too(
    publish: Callable[..., Any],
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    lines: Lines,
) -> None:
    ended = asyncio.Event()
    left_over: list[asyncio.Task[None]] = []

    async def outlive() -> None:
        logging.getLogger("task").info("inside")
        await ended.wait()
        logging.getLogger("task").info("outside")
        outbox.current_session()

    class Spawns(EnvelopeListener):
        subject = SUBJECT
        queue_group = "spawns"
        service_name = "analytics-service"

        @override
        async def on_message(self, envelope: EventEnvelope) -> None:  # type: ignore[override]
            left_over.append(asyncio.create_task(outlive()))
            await asyncio.sleep(0)

    event_id = await publish()
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    async with Spawns(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED)
    ended.set()
    with pytest.raises(LookupError, match="only a handler has a current session"):
        await left_over[0]
    assert lines.facts("inside")["event_id"] == event_id
    assert set(lines.facts("outside").values()) == {None}


def test_outside_of_handlers_there_is_no_session() -> None:
    with pytest.raises(LookupError):
        outbox.current_session()


def test_facts_that_a_line_gives_by_itself_stay(lines: Lines) -> None:
    event_id = str(uuid4())
    logging.getLogger("own").warning("own", extra={"event_id": event_id})
    assert lines.facts("own")["event_id"] == event_id
