"""One line for each change of state: an outage when it begins, and with its length when it ends."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import JetStreamClient
from outbox.embedded import EmbeddedNats
from tests.servers.events import count, insert

SECRET = b'{"card": "4111-1111-1111-1111"}'
Process = asyncio.subprocess.Process


@pytest.fixture
async def relay(
    database_url: str, private_nats: EmbeddedNats, engine: AsyncEngine
) -> AsyncIterator[Process]:
    """`outbox-relay` with logs as JSON."""
    del engine
    environment = os.environ | {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": private_nats.url,
        "OUTBOX_CREATE_STREAM": "true",
        "OUTBOX_LOG_FORMAT": "json",
        "OUTBOX_PUBLISH_TIMEOUT": "1",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "outbox.cli.relay"), env=environment, stderr=subprocess.PIPE
    )
    yield process
    if process.returncode is None:
        process.kill()
        await process.wait()


async def until(process: Process, message: str, seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Read lines into `seen` until one says `message`; return it."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while line := await process.stderr.readline():
            found: dict[str, Any] = json.loads(line)
            seen.append(found)
            if found["message"] == message:
                return found
    raise AssertionError(f"never said {message!r}: {seen}")


async def test_outage_is_one_line_at_its_begin_and_one_with_its_length_at_its_end(
    relay: Process, private_nats: EmbeddedNats, engine: AsyncEngine
) -> None:
    """However often the relay has tried meanwhile. Every line is JSON, and shows no payload."""
    seen: list[dict[str, Any]] = []
    await until(relay, "took the lane", seen)
    private_nats.stop()
    await insert(engine, ["k"] * 3, body=SECRET)
    began = await until(relay, "the broker cannot be used", seen)
    assert began["level"] == "WARNING"
    assert began["reason"]
    await asyncio.sleep(1.6)  # an outage of some length, in which the relay says nothing more
    private_nats.start()
    ended = await until(relay, "the broker can be used again", seen)
    assert ended["seconds"] >= 1.5
    async with asyncio.timeout(20), JetStreamClient(private_nats.url) as client:
        while await count(engine, "pending"):  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.05)
        assert (await client.get_stream_info("EVENTS"))["state"]["messages"] == 3
    relay.terminate()
    assert relay.stderr is not None
    async with asyncio.timeout(20):
        rest = await relay.stderr.read()
    seen += [json.loads(line) for line in rest.splitlines()]
    said = [each["message"] for each in seen]
    assert (
        said.count("the broker cannot be used") == said.count("the broker can be used again") == 1
    )
    assert "4111" not in json.dumps(seen)
    assert all({"time", "level", "logger", "message"} <= each.keys() for each in seen)
