"""`outbox verify` says what is missing and why, and `--repair` brings it back, once."""

import json
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import JetStreamClient, Relay, Settings
from outbox.cli.main import main
from outbox.operate.verify import Missing, Verified, verify
from outbox.telemetry import Step
from tests.faults import Watch
from tests.servers.events import count, insert, published


@pytest.fixture
async def sent(engine: AsyncEngine, js_client: JetStreamClient, stream: str) -> list[str]:
    """Ten events that were published; those of another service stand between them."""
    ids = []
    for number in range(2):
        ids += await insert(engine, 5)
        await Relay(engine, js_client, settings=Settings.defaults(stream=stream)).drain()
        await js_client.js.publish("evt.other.v1", b"{}", headers={"Nats-Msg-Id": f"x{number}"})
    return ids


async def found(engine: AsyncEngine, client: JetStreamClient, **more: Any) -> Verified:
    return await verify(engine, client, **more)


async def test_nothing_is_missing(
    engine: AsyncEngine, js_client: JetStreamClient, sent: list[str]
) -> None:
    verified = await found(engine, js_client)
    assert (verified.compared, verified.missing, verified.complete) == (len(sent), Counter(), True)


@pytest.mark.parametrize("how", list(Missing))
async def test_each_kind_of_loss_is_told_apart(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, sent: list[str], how: Missing
) -> None:
    config = (await js_client.get_stream_info(stream))["config"]
    match how:
        case Missing.PURGED:
            await js_client.api(f"STREAM.PURGE.{stream}", {"seq": 4})
        case Missing.DELETED:
            for sequence in (2, 3, 5):
                await js_client.api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
        case Missing.LIMITS:
            more = {"max_msgs": 9, "discard": "old"}
            await js_client.api(f"STREAM.UPDATE.{stream}", config | more)
        case Missing.EXPIRED:
            await js_client.api(f"STREAM.PURGE.{stream}", {"seq": 4})
            hour = 3_600_000_000_000
            await js_client.api(f"STREAM.UPDATE.{stream}", config | {"max_age": hour})
            async with engine.begin() as connection:
                sql = "UPDATE outbox.archive SET published_at = now() - interval '2 h'"
                await connection.execute(text(f"{sql} WHERE sequence < 4"))
        case Missing.LOST:
            async with engine.begin() as connection:  # as if the stream held others there
                sql = "UPDATE outbox.archive SET event_id = gen_random_uuid()"
                await connection.execute(text(f"{sql} WHERE sequence IN (2, 3, 11)"))
    verified = await found(engine, js_client)
    assert verified.missing == Counter({how: 3})
    assert verified.complete is (how is Missing.EXPIRED)
    assert len(verified.events) == (0 if how is Missing.EXPIRED else 3)
    assert verified.compared == len(sent)


async def test_stream_that_ends_early_or_is_gone_has_lost_all(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, sent: list[str]
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE outbox.archive SET sequence = sequence + 100"))
    assert (await found(engine, js_client)).missing == Counter({Missing.LOST: len(sent)})
    await js_client.delete_stream(stream)
    assert (await found(engine, js_client)).missing == Counter({Missing.LOST: len(sent)})


async def test_repair_undoes_a_purge_within_the_duplicate_window(
    engine: AsyncEngine, js_client: JetStreamClient, stream: str, sent: list[str]
) -> None:
    await js_client.api(f"STREAM.PURGE.{stream}")
    verified = await found(engine, js_client, repair=True)
    assert (verified.missing, verified.repaired) == (Counter({Missing.PURGED: 10}), 10)
    assert (await found(engine, js_client, repair=True)).repaired == 0
    watch = Watch()
    settings = Settings.defaults(stream=stream)
    drained = await Relay(engine, js_client, settings=settings, observer=watch).drain()
    assert drained.complete
    message_ids = await published(js_client, stream)
    assert Counter(each.partition("~")[0] for each in message_ids) == Counter(sent)
    assert all("~r" in each for each in message_ids)  # the old ids are still in the window
    assert not watch.of(Step.DEAD_LETTERED)
    assert (await found(engine, js_client)).complete
    assert await count(engine, "archive") == 10


def test_command_prints_what_is_missing_and_fails(
    database_url: str,
    nats_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    purged: None,
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", database_url)
    monkeypatch.setenv("OUTBOX_NATS_URL", nats_server)
    assert main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["purged", "EVENTS", str(n)] for n in (1, 2, 3)
    ]
    assert lines[-1] == "10 archived events compared; missing: 3 purged"
    assert main(["verify", "--repair", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["missing"] == {"purged": 3}
    assert told["repaired"] == 3
    assert told["events"][0].keys() == {
        "why",
        "stream",
        "sequence",
        "event_id",
        "subject",
        "published_at",
    }
    assert main(["verify"]) == 0


@pytest.fixture
async def purged(js_client: JetStreamClient, stream: str, sent: list[str]) -> None:
    """A stream whose first three messages are gone."""
    assert sent
    await js_client.api(f"STREAM.PURGE.{stream}", {"seq": 4})
