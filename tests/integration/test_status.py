"""`status`: exact to 10,000 rows, estimated and marked beyond."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from typing_extensions import override

from outbox import EventEnvelope, Listener, Outbox, Reject, Settings
from outbox.cli.main import main
from outbox.cli.status import show
from outbox.embedded import EmbeddedNats
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.operate.status import status
from outbox.postgres import counting, schema
from outbox.relay import Relay
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import insert

WAITING = """
INSERT INTO outbox.waiting (id, event_id, slot, subject, headers, body, created_at, reason,
                            attempts, due_at, republished)
SELECT 1000000 + n, gen_random_uuid(), 0, 'evt.a.b.v1', '', '', now() - interval '1 hour',
       CAST(:reason AS text), 0, now() + interval '1 hour', 0
FROM generate_series(1, CAST(:rows AS int8)) AS n
"""
LETTERS = """
INSERT INTO outbox.dead_letter (side, event_id, subject, headers, body, reason, error, attempts,
                                state)
SELECT 'relay', gen_random_uuid(), 'evt.a.b.v1', '', '', 'refused', '', 1, s
FROM unnest(ARRAY['open', 'open', 'discarded']) AS s
"""


async def test_status_of_empty_tables_has_every_key(engine: AsyncEngine) -> None:
    assert await status(engine) == {
        "pending": 0,
        "oldest_pending_seconds": None,
        "oldest_pending_subject": None,
        "oldest_pending_key": None,
        "scheduled": 0,
        "published": 0,
        "published_per_second": 0.0,
        "dead_letters": 0,
        "inbox": 0,
        "schema_version": schema.head(),
        "lanes": [
            {
                "lane": 0,
                "owner": None,
                "epoch": 0,
                "alive": False,
                "expires_in_seconds": None,
                "no_ack_seconds": None,
                "hindrance": None,
            }
        ],
        "waiting": [],
        "dead_letters_by": [],
        "listeners": [],
        "holders": [],
        "estimated": [],
        "unseen": [],
    }


async def test_status_counts_waiting_as_pending_and_scheduled_apart(engine: AsyncEngine) -> None:
    await insert(engine, 3)
    await insert(engine, 2, later=timedelta(hours=1))
    async with engine.begin() as connection:
        await connection.execute(text(WAITING), {"reason": "failed", "rows": 4})
        await connection.execute(text(WAITING.replace("1000000", "2")), _scheduled(5))
        await connection.execute(text(LETTERS))
    found = await status(engine)
    assert (found["pending"], found["scheduled"], found["dead_letters"]) == (7, 7, 2)
    assert 3600 <= found["oldest_pending_seconds"] < 3700
    assert found["estimated"] == []


def _scheduled(rows: int) -> dict[str, object]:
    return {"reason": "scheduled", "rows": rows}


async def test_status_estimates_beyond_the_limit(engine: AsyncEngine) -> None:
    await insert(engine, counting.EXACT_MAX)
    exact = await status(engine)
    assert (exact["pending"], exact["estimated"]) == (counting.EXACT_MAX, [])
    await insert(engine, 10_000)
    unknown = await status(engine)
    assert unknown["pending"] > counting.EXACT_MAX
    assert unknown["estimated"] == ["pending"]
    async with engine.begin() as connection:
        await connection.execute(text("ANALYZE outbox.pending"))
    assert (await status(engine))["pending"] == 20_000


async def test_status_shows_published_and_a_free_lane_after_a_drain(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    del stream
    await insert(engine, 20)
    assert (await Relay(engine, js_client).drain()).complete
    found = await status(engine)
    assert (found["pending"], found["published"]) == (0, 20)
    (lane,) = found["lanes"]
    assert (lane["owner"], lane["epoch"], lane["alive"]) == (None, 1, False)


async def test_status_names_the_command_when_there_are_no_tables(empty_database_url: str) -> None:
    engine = create_async_engine(empty_database_url)
    with pytest.raises(ConfigurationError, match="outbox migrate"):
        await status(engine)
    await engine.dispose()


async def test_status_names_what_waits_and_which_subject_has_waited_for_longest(
    engine: AsyncEngine,
) -> None:
    await insert(engine, ["k"], subject="evt.new.added.v1")
    async with engine.begin() as connection:
        await connection.execute(
            text(WAITING.replace("1000000", "2")), {"reason": "failed", "rows": 2}
        )
        await connection.execute(text("UPDATE outbox.waiting SET attempts = 3, last_error = 'no'"))
        await connection.execute(text(LETTERS))
    found = await status(engine)
    assert (found["oldest_pending_subject"], found["oldest_pending_key"]) == ("evt.a.b.v1", None)
    assert found["waiting"] == [
        {"reason": "failed", "events": 2, "attempts": 3, "last_error": "no"}
    ]
    assert found["dead_letters_by"] == [{"side": "relay", "reason": "refused", "count": 2}]


class Reader(Listener):
    """Reads what is added."""

    subject = "evt.test.>"
    queue_group = "reader"
    service_name = "mail"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        if event.data.get("reject"):
            raise Reject("no")


async def test_status_shows_how_far_each_listener_is(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> None:
    settings = Settings.defaults(stream=stream)
    events, watch = Outbox("shop"), Watch()
    async with sessionmaker() as session, session.begin():
        for n in range(6):
            events.add(session, "evt.test.added.v1", {"reject": n == 0})
    assert (await Relay(engine, js_client, settings=settings).drain()).complete
    async with Reader(js_client, sessionmaker, settings=settings, observer=watch):
        await watch.until(Step.ACKED, 6)
    async with sessionmaker() as session, session.begin():
        events.add(session, "evt.test.added.v1", {})
    assert (await Relay(engine, js_client, settings=settings).drain()).published == 2
    found = await status(engine, client=js_client, stream=stream)
    (reader,) = found["listeners"]
    assert reader == {
        "listener": "mail-reader",
        "unread": 1,
        "unacked": 0,
        "handled_per_second": 0.1,
        "retrying": 0,
        "held": 0,
        "dead_letters": 1,
        "active": None,
    }
    assert found["published_per_second"] == pytest.approx(8 / 60)
    assert found["unseen"] == []


async def test_status_names_who_holds_the_vacuum_back(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.operate.status.HELD_SINCE", timedelta(0))
    async with engine.connect() as connection:
        await connection.execute(text("SELECT pg_current_xact_id()"))
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        assert str(pid) in [each["name"] for each in (await status(engine))["holders"]]


# ---- command ------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["status", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_status_without_a_broker_says_what_it_cannot_see(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_NATS_URL", "nats://127.0.0.1:1")
    code, out, _ = run(capsys)
    assert code == 0
    assert "pending                 0" in out
    assert "! not seen: how far listeners are: cannot connect to NATS" in out


def test_status_of_several_databases_names_each_and_fails_for_one_that_is_away(
    database_url: str,
    nats_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUTBOX_NATS_URL", nats_server)
    away = "postgresql://u:hunter2@127.0.0.1:1/none"
    both = ("--database", f"shop={database_url}", "--database", f"mail={away}")
    code, out, err = run(capsys, *both)
    assert code == 1
    assert "shop:\n  pending" in out
    assert "mail:\n  error: " in out
    code, out, err = run(capsys, *both, "--json")
    assert code == 1
    found = json.loads(out)["databases"]
    assert found["shop"]["pending"] == 0
    assert "error" in found["mail"]
    assert "hunter2" not in out + err
    code, _, err = run(capsys, "--database", "postgresql://x")
    assert code == 2
    assert "NAME=URL" in err


async def test_watch_shows_outages_and_their_end(
    postgres_server: str,
    database_url: str,
    private_nats: EmbeddedNats,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = ""

    async def shown(wanted: str) -> None:
        nonlocal said
        said = ""
        async with asyncio.timeout(20):
            while wanted not in said:
                await asyncio.sleep(0.05)
                said += capsys.readouterr().out

    name = make_url(database_url).database
    private_nats.kill()
    settings = Settings.defaults(database_url=database_url, nats_url=private_nats.url)
    watching = asyncio.create_task(
        show(settings, argparse.Namespace(watch=True, json=True, databases=[]))
    )
    await shown('"how far listeners are')
    await asyncio.to_thread(private_nats.start)
    await shown('"unseen": []')
    server = create_async_engine(postgres_server, isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        await connection.execute(text(ended), {"name": name})
        await shown('"error": ')
        await connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    await server.dispose()
    await shown('"pending": 0')
    os.kill(os.getpid(), signal.SIGINT)
    assert await watching == 0


def test_watch_shows_again_until_it_is_stopped(
    database_url: str, nats_server: str, stream: str
) -> None:
    environment = os.environ | {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": nats_server,
        "OUTBOX_STREAM": stream,
    }
    command = [sys.executable, "-m", "outbox.cli.main", "status", "--watch", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        looks = 0
        for line in process.stdout:
            looks += line.startswith("}")
            if looks == 2:
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
