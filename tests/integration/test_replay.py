"""Archived events are taken once more: by everybody, or by one listener, and each inbox knows."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings
from outbox.cli.main import main
from outbox.operate.replay import Replayed, Target, pattern_of, replay
from outbox.postgres.replaying import Window
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count, published

events = Outbox("replay")


class Reader(Listener):
    """Notes each event that it handles."""

    subject = "evt.>"
    queue_group = "reader"
    service_name = "replay"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("INSERT INTO read VALUES (:n)"), {"n": event.data["n"]})


@pytest.fixture
async def sent(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> list[str]:
    """Ten published events: five of a key and subject, five others."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE read (n int)"))
    ids = []
    async with sessionmaker.begin() as session:
        for n in range(10):
            subject = f"evt.{'even' if n % 2 == 0 else 'odd'}.counted.v1"
            ids.append(events.add(session, subject, {"n": n}, key=f"k{n % 2}"))
    await Relay(engine, js_client, settings=Settings.defaults(stream=stream)).drain()
    return ids


async def read(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list(await connection.scalars(text("SELECT n FROM read ORDER BY n")))


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("evt.a.v1", "evt.a.v1", True),
        ("evt.a.v1", "evt.a.v12", False),
        ("evt.*.v1", "evt.a.v1", True),
        ("evt.*.v1", "evt.a.b.v1", False),
        ("evt.>", "evt.a.b.v1", True),
        ("evt.>", "evt", False),
        ("e.t.v1", "evt.v1", False),
    ],
)
def test_patterns_are_those_of_nats(pattern: str, subject: str, *, matches: bool) -> None:
    import re  # noqa: PLC0415 - as PostgreSQL would

    assert bool(re.search(pattern_of(pattern), subject)) is matches


async def test_replayed_events_are_stored_again_and_known_to_inboxes(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    sent: list[str],
) -> None:
    settings, watch, relayed = Settings.defaults(stream=stream), Watch(), Watch()
    async with (
        Relay(engine, js_client, settings=settings, observer=relayed),
        Reader(js_client, sessionmaker, settings=settings, observer=watch),
    ):
        await watch.until(Step.COMMITTED, 10)
        for time in (1, 2):  # a second time within the stream's duplicate window
            done = await replay(engine, "outbox", Window(key="k0"), by="me")
            assert done == Replayed(found=5, known=0, taken=5)
            await watch.until(Step.DUPLICATE, 5 * time)
            await relayed.until_events(Step.SETTLED, 5 * time)
    copies = Counter(each.partition("~")[0] for each in await published(js_client, stream))
    assert [copies[each] for each in sent[1::2]] == [1] * 5
    assert all(copies[each] >= 2 for each in sent[::2])
    assert await read(engine) == list(range(10))
    assert await count(engine, "waiting") == 0


async def test_new_listener_gets_what_it_has_missed_and_nothing_twice(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
    sent: list[str],
) -> None:
    await js_client.api(f"STREAM.PURGE.{stream}")  # a late listener finds nothing there
    settings, watch = Settings.defaults(stream=stream), Watch()
    reader = Reader(js_client, sessionmaker, settings=settings, observer=watch)
    to = Target(reader.identity, engine)
    async with reader:
        first = await replay(
            engine, "outbox", Window(subject=pattern_of("evt.odd.>")), by="me", to=to
        )
        assert first == Replayed(found=5, known=0, taken=5)
        await watch.until(Step.COMMITTED, 5, within=20)
        rest = await replay(engine, "outbox", Window(), by="me", to=to, dry_run=True)
        assert rest == Replayed(found=10, known=5, taken=5)
        assert await replay(engine, "outbox", Window(), by="me", to=to) == rest
        await watch.until(Step.COMMITTED, 10, within=20)
    assert await read(engine) == list(range(10))
    assert len(sent) == 10
    assert await published(js_client, stream) == []
    assert await count(engine, "dead_letter", "state = 'handled'") == 10


@pytest.mark.parametrize(
    ("window", "number"),
    [
        (Window(), 10),
        (Window(since=datetime.now(UTC) - timedelta(hours=1)), 10),
        (Window(until=datetime.now(UTC) - timedelta(hours=1)), 0),
        (Window(subject=pattern_of("evt.*.counted.v1")), 10),
        (Window(subject=pattern_of("evt.even.counted.v1"), key="k0"), 5),
        (Window(key="k1", subject=pattern_of("evt.even.>")), 0),
    ],
)
async def test_windows_narrow_down_what_is_taken(
    engine: AsyncEngine, sent: list[str], window: Window, number: int
) -> None:
    done = await replay(engine, "outbox", window, by="me", dry_run=True)
    assert done == Replayed(found=number, known=0, taken=number)
    assert await count(engine, "waiting") == 0
    assert sent


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["replay", *arguments])
    out, err = capsys.readouterr()
    return code, out.strip(), err


def test_command_counts_asks_and_replays(
    database_url: str,
    sent: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[Any],
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    assert len(sent) == 10
    code, out, _ = run(capsys, "--key", "k0", "--dry-run")
    assert (code, out) == (0, "5 archived events found; 5 would be published again")
    code, out, err = run(capsys, "--key", "k0")
    assert code == 2
    assert "this would replay 5 events; add --yes" in err
    code, out, _ = run(capsys, "--subject", "evt.odd.>", "--to", "replay-reader", "--yes", "--json")
    assert json.loads(out) == {"found": 5, "known": 0, "taken": 5}
    code, out, _ = run(capsys, "--key", "k0", "--yes")
    assert (code, out) == (0, "5 archived events found; 5 will be published again")
    for wrong in ("yesterday", "2026-11-25T07:00"):
        with pytest.raises(SystemExit) as ended:
            run(capsys, "--since", wrong)
        assert ended.value.code == 2
