"""Dead letters are looked at, run again and discarded, each with who did it and when."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Reject, Relay, Settings
from outbox.cli.main import main
from outbox.operate import redrive
from outbox.postgres.redrive import Filter
from outbox.telemetry import Step
from outbox.testing import Result, deliver
from tests.faults import Watch
from tests.servers.events import count, insert, published

SUBJECT = "evt.letter.written.v1"


class Postman(Listener):
    """Writes a row for each letter, while it is in the mood."""

    subject = SUBJECT
    queue_group = "postman"
    service_name = "post"
    _mood = "bad"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await session.execute(text("INSERT INTO posted VALUES (:id)"), {"id": event.event_id})
        if self._mood == "bad":
            raise Reject("not today")


class OrderedPostman(Postman):
    queue_group = "ordered-postman"
    ordered = True


@pytest.fixture(autouse=True)
async def _table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE posted (id text)"))


async def fetch(engine: AsyncEngine, sql: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(sql))]


async def actions(engine: AsyncEngine) -> list[tuple[str, str]]:
    sql = "SELECT action, by FROM outbox.dead_letter_action ORDER BY id"
    return [(str(a), str(b)) for a, b in await fetch(engine, sql)]


async def act(engine: AsyncEngine, action: str = "requeued", **chosen: Any) -> int:
    return await redrive.acted(engine, "outbox", Filter(**chosen), action=action, by="me@here")


@pytest.mark.parametrize("kind", [Postman, OrderedPostman])
async def test_requeued_letter_is_handled_once_by_its_listener_alone(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    nats_server: str,
    stream: str,
    kind: type[Postman],
) -> None:
    settings = Settings.defaults(stream=stream, lease=timedelta(seconds=1), publish_timeout=0.5)
    outcome = await deliver(kind(js_client, sessionmaker), SUBJECT, {"n": 1})
    assert outcome.result is Result.DEAD_LETTER
    before = (await js_client.get_stream_info(stream))["state"]["messages"]
    assert await act(engine) == 1
    assert await act(engine) == 0
    watch = Watch()
    async with JetStreamClient(nats_server) as other:
        first = kind(js_client, sessionmaker, settings=settings, observer=watch)
        second = kind(other, sessionmaker, settings=settings, observer=watch)
        first._mood = second._mood = "good"
        async with first, second:
            await watch.until(Step.COMMITTED, within=15)
    assert await fetch(engine, "SELECT id FROM posted") == [(outcome.event_id,)]
    assert await fetch(engine, "SELECT state FROM outbox.dead_letter") == [("handled",)]
    assert await fetch(engine, "SELECT outcome FROM outbox.inbox") == [("handled",)]
    assert await actions(engine) == [("requeued", "me@here"), ("handled", first.identity)]
    assert (await js_client.get_stream_info(stream))["state"]["messages"] == before
    again = await deliver(first, SUBJECT, {"n": 1}, event_id=outcome.event_id)
    assert again.result is Result.DUPLICATE


async def test_letter_that_fails_again_is_open_again(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> None:
    listener = Postman(js_client, sessionmaker, settings=Settings.defaults(stream=stream))
    await deliver(listener, SUBJECT, {"n": 1})
    await deliver(listener, SUBJECT, b"not json", event_id="1")
    assert await act(engine) == 2
    async with listener:
        async with asyncio.timeout(15):
            while await count(engine, "dead_letter_action", "action = 'failed'") < 2:
                await listener.pause(0.05)
    rows = await fetch(engine, "SELECT state, attempts, error FROM outbox.dead_letter ORDER BY id")
    assert [row[:2] for row in rows] == [("open", 2), ("open", 2)]
    assert rows[0][2] == "Reject: not today"
    assert await fetch(engine, "SELECT id FROM posted") == []
    assert await fetch(engine, "SELECT outcome FROM outbox.inbox") == [("dead",), ("dead",)]


async def test_letter_whose_event_was_handled_meanwhile_is_closed_without_a_run(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    js_client: JetStreamClient,
    stream: str,
) -> None:
    listener = Postman(js_client, sessionmaker, settings=Settings.defaults(stream=stream))
    await deliver(listener, SUBJECT, {"n": 1})
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE outbox.inbox SET outcome = 'handled'"))
    await act(engine)
    async with listener:
        async with asyncio.timeout(15):
            while await count(engine, "dead_letter", "state = 'handled'") < 1:
                await listener.pause(0.05)
    assert await fetch(engine, "SELECT id FROM posted") == []


async def test_requeued_event_of_the_relay_is_published_once(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str
) -> None:
    config = (await js_client.get_stream_info(stream))["config"]
    await js_client.api(f"STREAM.UPDATE.{stream}", config | {"max_msg_size": 200})
    settings = Settings.defaults(stream=stream, publish_attempts_max=1)
    ids = await insert(engine, ["k"], body=b"x" * 300)
    assert (await Relay(engine, js_client, settings=settings).drain()).complete
    assert await count(engine, "dead_letter", "side = 'relay'") == 1
    await js_client.api(f"STREAM.UPDATE.{stream}", config)
    assert await act(engine, side="relay") == 1
    assert await act(engine, side="relay") == 0
    assert (await Relay(engine, js_client, settings=settings).drain()).complete
    assert await published(js_client, stream) == ids
    assert await fetch(engine, "SELECT state, state_by FROM outbox.dead_letter") == [
        ("requeued", "me@here")
    ]
    assert await fetch(engine, "SELECT key FROM outbox.archive") == [("k",)]


LETTERS = """
INSERT INTO outbox.dead_letter (side, listener, event_id, subject, headers, body, reason, error,
                                attempts, failed_at)
SELECT 'listener', 'post-' || n % 3, gen_random_uuid(), 'evt.a' || n % 2 || '.b.v1',
       'Outbox-Key: k', '{"secret": 1}', CASE n % 5 WHEN 0 THEN 'rejected' ELSE 'attempts' END,
       'it failed', n, now() - n * interval '1 hour'
FROM generate_series(1, :rows) AS n
"""


@pytest.fixture
async def letters(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(LETTERS), {"rows": 30})


@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        ({"listener": "post-0"}, 10),
        ({"subject": "evt.a1.b.v1"}, 15),
        ({"reason": "rejected"}, 6),
        ({"older_than": timedelta(hours=20)}, 11),
        ({"newer_than": timedelta(hours=5, minutes=30)}, 5),
        ({"ids": [1, 2, 99]}, 2),
        ({"side": "relay"}, 0),
        ({"listener": "post-0", "reason": "rejected"}, 2),
    ],
)
async def test_filters_narrow_down_what_is_acted_on(
    engine: AsyncEngine, letters: None, chosen: dict[str, Any], number: int
) -> None:
    assert await redrive.counted(engine, "outbox", Filter(**chosen)) == number
    assert len(await redrive.listed(engine, "outbox", Filter(**chosen))) == number
    assert await act(engine, "discarded", **chosen) == number
    assert await redrive.counted(engine, "outbox", Filter()) == 30 - number
    assert len(await actions(engine)) == number


async def test_many_are_acted_on_in_bounded_transactions(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(LETTERS), {"rows": 2500})
    told: list[int] = []
    done = await redrive.acted(
        engine, "outbox", Filter(), action="discarded", by="me", progress=told.append
    )
    assert (done, told) == (2500, [1000, 2000, 2500])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["dead", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_command_lists_shows_and_acts(
    database_url: str,
    letters: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    code, out, _ = run(capsys, "list", "--json", "--reason", "rejected")
    found = json.loads(out)
    assert code == 0
    assert len(found) == 6
    assert found[0].keys() >= {
        *("id", "side", "event_id", "subject", "listener", "reason", "attempts", "failed_at")
    }
    code, out, _ = run(capsys, "list")
    assert "30 dead letters" in out
    code, out, _ = run(capsys, "show", "7")
    assert code == 0
    assert "secret" not in out
    code, out, _ = run(capsys, "show", "7", "--payload", "--json")
    assert json.loads(out)["body"] == '{"secret": 1}'
    code, out, err = run(capsys, "discard", "--listener", "post-1")
    assert (code, out) == (2, "")
    assert "this would discard 10; add --yes" in err
    assert (
        run(capsys, "discard", "--listener", "post-1", "--yes", "--note", "old")[1]
        == "discarded 10\n"
    )
    assert run(capsys, "requeue", "3", "--by", "eve")[1] == "requeued 1\n"
    assert run(capsys, "requeue", "3")[:2] == (0, "requeued 0\n")
    assert "19 dead letters" in run(capsys, "list")[1]
    assert "30 dead letters" in run(capsys, "list", "--all")[1]
    code, out, _ = run(capsys, "show", "3")
    assert "requeued" in out
    assert "eve" in out
    for wrong in (["requeue"], ["show"], ["show", "99"], ["show", "1", "2"]):
        assert run(capsys, *wrong)[0] == 2


async def test_letters_of_several_databases_are_listed_by_name(
    engine: AsyncEngine, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO outbox.dead_letter (side, event_id, subject, headers, body, reason,"
                " error, attempts) VALUES ('relay', gen_random_uuid(), 'evt.a', '', '', 'refused',"
                " 'no', 1)"
            )
        )
    here = ["--database", f"shop={database_url}"]
    assert await asyncio.to_thread(main, ["dead", "list", *here, "--json"]) == 0
    (letter,) = json.loads(capsys.readouterr().out)
    assert (letter["database"], letter["reason"]) == ("shop", "refused")
    away = ["--database", "mail=postgresql://u:pw1@127.0.0.1:1/x"]
    assert await asyncio.to_thread(main, ["dead", "list", *here, *away]) == 1
    out, err = capsys.readouterr()
    assert "shop       1  " in out
    assert "outbox: database mail was not seen: " in err
    assert "pw1" not in out + err
    assert await asyncio.to_thread(main, ["dead", "discard", "1", *here, *away]) == 2
    assert "one --database" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["dead", "discard", "1", *here]) == 0
