"""The FastAPI example, served by uvicorn, with real requests."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi"


@pytest.fixture
async def api(database_url: str, nats_server: str, stream: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running example."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": nats_server,
        "OUTBOX_STREAM": stream,
    }
    command = (sys.executable, "-m", "uvicorn", "app:app", "--port", str(port))
    server = subprocess.Popen(command, cwd=EXAMPLE, env={**os.environ, **settings})  # noqa: ASYNC220
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            async with asyncio.timeout(30):
                while not await _answers(client):
                    assert server.poll() is None
                    await asyncio.sleep(0.05)
            yield client
    finally:
        server.terminate()
        code = await asyncio.to_thread(server.wait, 20)
    assert code in {0, -15}  # uvicorn ends itself with the signal that it was stopped by


async def _answers(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/mails")).is_success
    return False


async def test_example_mails_once_for_each_committed_order(api: httpx.AsyncClient) -> None:
    wanted = [f"{number}@customer.example" for number in range(5)]
    for email in wanted:
        answer = await api.post("/orders", json={"id": str(uuid4()), "email": email})
        assert answer.status_code == 201, answer.text
        assert answer.json()["event_id"]
    blocked = {"id": str(uuid4()), "email": "x@blocked.example"}
    assert (await api.post("/orders", json=blocked)).status_code == 403
    last = {"id": str(uuid4()), "email": "z@customer.example"}
    assert (await api.post("/orders", json=last)).status_code == 201
    wanted.append(last["email"])
    async with asyncio.timeout(20):
        while len(found := (await api.get("/mails")).json()) < len(wanted):  # noqa: ASYNC110 - HTTP  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert found == wanted
