"""`outbox trace` tells an event's whole life: retried, given up, requeued, handled, its effects."""

import json
import re
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings
from outbox.backoff import Backoff
from outbox.cli.main import main
from outbox.operate import redrive
from outbox.operate.trace import trace
from outbox.postgres import schema
from outbox.postgres.redrive import Filter
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count
from tests.servers.streams import change

PLACED = "evt.order.placed.v1"
SHIPPED = "evt.parcel.shipped.v1"
SECRET = "4111-1111-1111-1111"  # noqa: S105 - the point of the test
shop = Outbox("shop")


class Ship(Listener):
    """Fails until somebody has mended it; then ships."""

    subject = PLACED
    queue_group = "ship"
    service_name = "depot"
    max_attempts = 2
    _backoff = Backoff(first=timedelta(milliseconds=10))
    _broken = True

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        if Ship._broken:
            raise LookupError("no such parcel")
        events = Outbox("depot", settings=Settings.defaults(schema_name="depot"))
        events.add(session, SHIPPED, {"order": event.data["n"]})


async def lived(engine: AsyncEngine, client: JetStreamClient, stream: str) -> str:
    """Have an event of the shop retried, given up, requeued and handled by the depot."""
    await schema.upgrade(engine, schema="depot")
    settings = Settings.defaults(stream=stream)
    depot = Settings.defaults(stream=stream, schema_name="depot")
    sessions = async_sessionmaker(engine)
    async with sessions() as session, session.begin():
        event_id = shop.add(session, PLACED, {"n": 7, "card": SECRET}, key="order-7")
    assert (await Relay(engine, client, settings=settings).drain()).complete
    watch = Watch()
    Ship._broken = True
    async with Ship(client, sessions, settings=depot, observer=watch):
        await watch.until(Step.DEAD_LETTERED)
        Ship._broken = False
        letters = Filter(side="listener")
        acted = redrive.acted(
            engine, "depot", letters, action="requeued", by="me@here", note="mended"
        )
        assert await acted == 1
        await watch.until(Step.COMMITTED)
    return event_id


async def test_life_of_an_event_that_was_retried_given_up_requeued_and_handled(
    engine: AsyncEngine,
    database_url: str,
    nats_server: str,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Shop and depot have schemas of their own; each command looks at the one it is told."""
    event_id = await lived(engine, js_client, stream)
    in_shop = await trace(engine, "outbox", event_id, client=js_client)
    assert in_shop.added is not None
    assert in_shop.added["service"] == "shop"
    (published,) = in_shop.published
    assert (published["stream"], published["sequence"], published["on_stream"]) == (
        stream,
        1,
        "there",
    )
    in_depot = await trace(engine, "depot", event_id, client=js_client)
    (letter,) = in_depot.dead_letters
    assert (letter["reason"], letter["attempts"]) == ("attempts", 2)
    assert [each["action"] for each in letter["history"]] == ["requeued", "handled"]
    assert [(each["listener"], each["outcome"]) for each in in_depot.handled] == [
        ("depot-ship", "handled")
    ]
    caused = {each["subject"] for each in in_depot.caused}
    assert caused == {SHIPPED, "dlq.order.placed.v1"}
    assert in_shop.unseen == in_depot.unseen == []


@pytest.fixture
async def two(
    engine: AsyncEngine,
    database_url: str,
    nats_server: str,
    js_client: JetStreamClient,
    stream: str,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Environment of the commands, and the id of an event that lived in two schemas."""
    monkeypatch.setenv("OUTBOX_NATS_URL", nats_server)
    monkeypatch.setenv("OUTBOX_STREAM", stream)
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    return await lived(engine, js_client, stream)


def test_one_screen_in_the_order_of_time(two: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", two, "--schema", "depot"]) == 0
    out = capsys.readouterr().out
    told = [
        f"event {two}",
        "depot-ship: given up, attempts after 2: LookupError: no such parcel (dead letter 1)",
        "dead letter 1: requeued by me@here: mended",
        "dead letter 1: handled by depot-ship",
        "depot-ship: handled",
        SHIPPED,
    ]
    places = [out.index(each) for each in told[:3]]
    assert places == sorted(places)
    assert all(each in out for each in told)
    assert SECRET not in out
    assert main(["trace", two]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"added  {PLACED}, key order-7, from shop" in out
    assert "published to EVENTS at 1 (there)" in out
    assert SECRET not in out


def test_databases_are_looked_at_together_and_one_that_is_away_is_named(
    two: str, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [
        "--database",
        f"shop={database_url}",
        "--database",
        "mail=postgresql://u:pw1@127.0.0.1:1/x",
    ]
    assert main(["trace", two, *both]) == 1
    out = capsys.readouterr().out
    assert re.search(r"  shop  added", out)
    assert "! not seen: database mail: " in out
    assert "pw1" not in out
    assert main(["trace", two, *both[:2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"] is True
    assert found["databases"]["shop"]["published"][0]["sequence"] == 1


def test_unknown_event_fails_and_says_where_it_was_looked_for(
    two: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del two
    assert main(["trace", "00000000-0000-7000-8000-000000000000"]) == 1
    assert "nothing is known of it in this database" in capsys.readouterr().out
    assert main(["trace", "no uuid at all"]) == 1  # a stranger's id; listeners keep those too


async def test_event_that_waits_shows_why_and_a_table_too_large_is_said(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = async_sessionmaker(engine)
    async with sessions() as session, session.begin():
        event_id = shop.add(session, "cmd.nobody.takes.v1", {})
    await change(js_client, stream, subjects=["evt.>", "dlq.>"])
    settings = Settings.defaults(stream=stream, subject_prefixes=("evt.",))
    assert (await Relay(engine, js_client, settings=settings).drain()).complete
    assert await count(engine, "waiting") == 1
    (wait,) = (await trace(engine, "outbox", event_id)).waits
    assert (wait["table"], wait["reason"]) == ("waiting", "failed")
    assert "no stream takes" in wait["last_error"]
    monkeypatch.setattr(
        "outbox.postgres.lives.ARCHIVE", "SELECT pg_sleep(30) WHERE CAST(:id AS uuid) IS NOT NULL"
    )
    monkeypatch.setattr("outbox.postgres.lives.limit", _soon)
    life = await trace(engine, "outbox", event_id)
    assert [each.partition(":")[0] for each in life.unseen] == ["outbox and archive"]


async def _soon(connection: object) -> None:
    await connection.exec_driver_sql("SET LOCAL statement_timeout = '50ms'")  # type: ignore[attr-defined]
