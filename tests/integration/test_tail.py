"""`outbox tail` prints what is published, without payloads, and survives the broker's restart."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from outbox import JetStreamClient
from outbox.cli.main import main
from outbox.embedded import EmbeddedNats
from outbox.errors import ConfigurationError
from outbox.operate.tail import Seen, tail

SECRET = "nobody-may-see-this"  # noqa: S105 - the point of the test
START = datetime(2020, 1, 1, tzinfo=UTC)


async def publish(client: JetStreamClient, subject: str, key: str | None = None) -> None:
    body: dict[str, Any] = {"event_id": "e-1", "source_service": "shop", "data": {"card": SECRET}}
    headers = {} if key is None else {"Outbox-Key": key}
    await client.js.publish(subject, json.dumps(body).encode(), headers=headers)


async def take(events: AsyncIterator[Seen], number: int) -> list[Seen]:
    found: list[Seen] = []
    async with asyncio.timeout(20):
        async for each in events:
            found.append(each)
            if len(found) == number:
                break
    return found


async def test_events_come_in_order_from_a_time_on_and_no_listener_notices(
    js_client: JetStreamClient, stream: str
) -> None:
    for n in range(3):
        await publish(js_client, f"evt.a.b{n}", "k")
    first, second = await take(tail(js_client, stream, subject="evt.a.>", since=START), 2)
    assert [each.subject for each in (first, second)] == ["evt.a.b0", "evt.a.b1"]
    assert (first.sequence, first.key, first.event_id, first.source_service) == (
        1,
        "k",
        "e-1",
        "shop",
    )
    assert (await js_client.get_stream_info(stream))["state"]["messages"] == 3


async def test_it_goes_on_after_a_restart_without_gap_or_repeat(
    private_nats: EmbeddedNats,
) -> None:
    async with JetStreamClient(private_nats.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>"])
        await publish(client, "evt.first")
        events = tail(client, "EVENTS", since=START)
        assert [each.subject for each in await take(events, 1)] == ["evt.first"]
        coming = asyncio.create_task(take(events, 1))
        private_nats.kill()
        private_nats.start()
        async with JetStreamClient(private_nats.url) as other:
            await publish(other, "evt.second")
        assert [each.sequence for each in await coming] == [2]


async def test_unknown_stream_and_a_subject_that_is_none_are_said(
    js_client: JetStreamClient, stream: str
) -> None:
    with pytest.raises(ConfigurationError, match="no stream ABSENT"):
        await take(tail(js_client, "ABSENT"), 1)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        await take(tail(js_client, stream, subject="evt..x"), 1)


@pytest.fixture
def environment(nats_server: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("OUTBOX_NATS_URL", nats_server)
    monkeypatch.setenv("OUTBOX_STREAM", stream)
    return dict(os.environ)


@pytest.fixture
async def three(js_client: JetStreamClient, stream: str) -> None:
    for n in range(3):
        await publish(js_client, "evt.a.b", f"k{n}")
    del stream


def test_command_prints_a_line_each_and_payloads_only_when_asked(
    three: None, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    del three, environment
    past = ["tail", "--since", (datetime.now(UTC) - timedelta(hours=1)).isoformat()]
    assert main([*past, "--count", "3"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "evt.a.b  e-1  key k2  from shop" in out
    assert SECRET not in out
    assert main([*past, "--count", "1", "--key", "k1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["sequence"] == 2
    assert SECRET not in line
    assert main([*past, "--count", "1", "--payload"]) == 0
    assert SECRET in capsys.readouterr().out


async def test_command_ends_in_peace_at_ctrl_c(
    js_client: JetStreamClient, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "outbox.cli.main", "tail", "--since", "2020-01-01T00:00Z"]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE
    )
    try:
        await publish(js_client, "evt.a.b")
        assert process.stdout is not None
        assert b"evt.a.b" in await asyncio.wait_for(process.stdout.readline(), 20)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
