"""`/readyz` follows the broker and the database, `/healthz` the process; `outbox health` asks."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import EventEnvelope, JetStreamClient, Listener, Outbox, Relay, Settings
from outbox.cli.main import main
from outbox.embedded import EmbeddedNats
from outbox.observe.serving import serving
from outbox.postgres.tables import raw
from tests.servers.events import insert

SETTINGS = Settings.defaults(stream="EVENTS", publish_timeout=2)


class Reader(Listener):
    """Reads parcels."""

    subject = "evt.parcel.>"
    queue_group = "reader"
    service_name = "depot"

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        pass


@asynccontextmanager
async def running(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession], server: EmbeddedNats
) -> AsyncIterator[httpx.AsyncClient]:
    """Run a relay and a listener, and lend a client of their port."""
    async with JetStreamClient(server.url) as client:
        await client.ensure_stream("EVENTS", ["evt.>", "cmd.>", "dlq.>"])
        relay = Relay(engine, client, settings=SETTINGS)
        reader = Reader(client, sessionmaker, settings=SETTINGS)
        async with (
            serving([relay, reader], port=0, host="127.0.0.1", engine=engine) as endpoint,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{endpoint.port}") as http,
            relay,
            reader,
        ):
            yield http


async def ready(http: httpx.AsyncClient, status: int, within: float) -> list[str]:
    """Return the reasons once `/readyz` answers `status`; fail when that takes too long."""
    reasons: list[str] = []
    try:
        async with asyncio.timeout(within):
            while True:
                answer = await http.get("/readyz")
                reasons = answer.json()["reasons"]
                assert (await http.get("/healthz")).status_code == 200
                if answer.status_code == status:
                    return reasons
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"/readyz was not {status} within {within} s: {reasons}") from None


async def test_ready_follows_the_broker_and_alive_does_not(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    private_nats: EmbeddedNats,
) -> None:
    async with running(engine, sessionmaker, private_nats) as http:
        await ready(http, 200, within=15)
        private_nats.stop()
        reasons = await ready(http, 503, within=15)
        assert any("broker" in reason for reason in reasons)
        private_nats.start()
        assert await ready(http, 200, within=30) == []


async def test_a_broker_that_acks_nothing_is_no_progress(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    private_nats: EmbeddedNats,
) -> None:
    """Its connections stay open; only that no ack comes tells."""
    async with running(engine, sessionmaker, private_nats) as http:
        await ready(http, 200, within=15)
        os.kill(private_nats.pid, signal.SIGSTOP)
        try:
            await insert(engine, ["k"])
            reasons = await ready(http, 503, within=15)
        finally:
            os.kill(private_nats.pid, signal.SIGCONT)
        assert any("relay" in reason for reason in reasons)
        assert await ready(http, 200, within=30) == []


async def test_tables_of_another_version_are_not_ready(
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    private_nats: EmbeddedNats,
) -> None:
    async with running(engine, sessionmaker, private_nats) as http:
        await ready(http, 200, within=15)
        async with engine.begin() as connection:
            await connection.exec_driver_sql(
                raw("outbox", "UPDATE {schema}.outbox_version SET version_num = 'ob9999'")
            )
        reasons = await ready(http, 503, within=25)
        assert any("the database cannot be used" in reason for reason in reasons)


async def test_a_worker_that_has_ended_is_not_alive_and_one_that_waits_to_begin_is(
    engine: AsyncEngine, js_client: JetStreamClient
) -> None:
    relay = Relay(engine, js_client, settings=SETTINGS)
    async with (
        serving([relay], port=0, host="127.0.0.1", engine=engine) as endpoint,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{endpoint.port}") as http,
    ):
        assert (await http.get("/healthz")).status_code == 200
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        await relay.start()
        await relay.stop()
        answer = await http.get("/healthz")
        assert (answer.status_code, answer.json()["ended"]) == (503, ["outbox-relay"])


# ---- commands -----------------------------------------------------------------------------------


@contextmanager
def answering(*command: str, database_url: str, nats_url: str, stream: str) -> Iterator[int]:
    """Run a worker's command with a port of its own choice; lend the port."""
    environment = os.environ | {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": nats_url,
        "OUTBOX_STREAM": stream,
        "OUTBOX_METRICS_HOST": "127.0.0.1",
        "OUTBOX_LOG_FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--metrics-port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said: dict[str, Any] = json.loads(line)
            if said["message"] == "metrics and health":
                yield int(said["port"])
                return
        raise AssertionError(f"{command} did not say its port")
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(timeout=20)


def test_health_command_says_what_the_port_says(
    database_url: str,
    nats_server: str,
    stream: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers = {"database_url": database_url, "nats_url": nats_server, "stream": stream}
    with answering("outbox.cli.relay", **servers) as port:
        for _ in range(150):
            if main(["health", "--metrics-port", str(port)]) == 0:
                break
        assert main(["health", "--metrics-port", str(port)]) == 0
        assert capsys.readouterr().out.endswith("ok\n")
        assert main(["health", "--live", "--json", "--metrics-port", str(port)]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "ok": True,
            "reasons": [],
            "answer": {"alive": True, "ended": []},
        }
        scraped = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert "outbox_lanes_owned" in scraped
        assert "process_resident_memory_bytes" in scraped  # the process's own registry
    assert main(["health", "--metrics-port", str(port)]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["health"]) == 2
    assert "OUTBOX_METRICS_PORT" in capsys.readouterr().err


async def test_listener_that_runs_by_itself_answers_what_it_has_handled(
    database_url: str,
    engine: AsyncEngine,
    sessionmaker: async_sessionmaker[AsyncSession],
    nats_server: str,
    stream: str,
    js_client: JetStreamClient,
) -> None:
    async with sessionmaker.begin() as session:
        for n in range(3):
            Outbox("shop").add(session, "evt.parcel.sent.v1", {"n": n})
    servers = {"database_url": database_url, "nats_url": nats_server, "stream": stream}
    command = ("outbox.cli.main", "listen", "tests.integration.test_health:Reader")
    handled = 'inbox_handled_events_total{listener="depot-reader",outcome="handled"} 3.0'
    with answering(*command, **servers) as port:
        async with (
            Relay(engine, js_client, settings=SETTINGS),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
            asyncio.timeout(20),
        ):
            while handled not in (await http.get("/metrics")).text:
                pass
            assert await ready(http, 200, within=15) == []


def test_port_that_is_taken_ends_the_command_with_the_reason(
    database_url: str, nats_server: str, stream: str
) -> None:
    servers = {"database_url": database_url, "nats_url": nats_server, "stream": stream}
    with answering("outbox.cli.relay", **servers) as port:
        environment = os.environ | {
            "OUTBOX_DATABASE_URL": database_url,
            "OUTBOX_NATS_URL": nats_server,
            "OUTBOX_METRICS_HOST": "127.0.0.1",
        }
        command = [sys.executable, "-m", "outbox.cli.relay", "--metrics-port", str(port)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 2
    assert f"metrics port 127.0.0.1:{port} cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr
