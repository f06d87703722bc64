"""The embedded servers start, survive restarts with their data, and leave nothing behind."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from outbox import embedded
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.errors import ConfigurationError
from tests.servers import jetstream

HOLD = """
import json, signal, sys, time
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    with EmbeddedPostgres() as postgres, EmbeddedNats() as nats:
        print(json.dumps([postgres.pid, nats.pid, str(postgres.directory), str(nats.directory)]))
        sys.stdout.flush()
        while True:  # not signal.pause: it misses a signal that comes just before
            time.sleep(1)
except KeyboardInterrupt:
    sys.exit(130)
"""


async def _execute(url: str, *statements: str) -> object:
    engine = create_async_engine(url, poolclass=NullPool)
    result: object = None
    async with engine.begin() as connection:
        for statement in statements:
            found = await connection.execute(text(statement))
            result = found.scalar() if found.returns_rows else None
    return result


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.02)


async def test_postgres_keeps_commits_over_every_kind_of_end(
    private_postgres: EmbeddedPostgres,
) -> None:
    """Committed rows are there after immediate and fast restarts, SIGKILL, and a stop."""
    server = private_postgres
    assert await _execute(server.url, "SHOW fsync") == "on"
    await _execute(server.url, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (1)")
    url, count = server.url, "SELECT count(*) FROM kept"
    server.restart("immediate")
    assert await _execute(url, count) == 1
    server.restart("fast")
    assert await _execute(url, count) == 1
    server.kill()
    assert not server.running
    server.start()
    assert await _execute(url, count) == 1
    server.stop()
    server.start()
    assert await _execute(url, count) == 1


async def test_postgres_is_version_18_and_makes_databases(
    private_postgres: EmbeddedPostgres,
) -> None:
    """The version is pinned; a database can be made and is reachable over TCP and the socket."""
    url = private_postgres.create_database("shop")
    assert str(await _execute(url, "SHOW server_version")).startswith("18.")
    where = f"host={private_postgres.socket_directory}&port={private_postgres.port}"
    socket_url = f"postgresql+asyncpg://postgres@/shop?{where}"
    assert await _execute(socket_url, "SELECT current_database()") == "shop"
    with pytest.raises(ConfigurationError, match="must match"):
        private_postgres.create_database("no; DROP")
    with pytest.raises(ConfigurationError, match="already exists"):
        private_postgres.create_database("shop")


def test_nats_keeps_its_streams_over_every_kind_of_end(private_nats: EmbeddedNats) -> None:
    """File streams are there after SIGKILL and after a stop."""
    url = private_nats.url
    jetstream.create_stream(url, "KEPT")
    private_nats.kill()
    private_nats.start()
    assert jetstream.api(url, "STREAM.NAMES")["streams"] == ["KEPT"]
    private_nats.stop()
    private_nats.start()
    assert jetstream.api(url, "STREAM.NAMES")["streams"] == ["KEPT"]


def test_nats_takes_configuration() -> None:
    """Added lines reach the server; a mistake in them is shown."""
    with EmbeddedNats(
        config="accounts { A { jetstream: enabled, users: [{user: a, password: b}] } }"
    ) as nats:
        with_user = nats.url.replace("//", "//a:b@")
        assert jetstream.api(with_user, "STREAM.NAMES")["total"] == 0
    with pytest.raises(ConfigurationError, match="nats-server did not start"):
        EmbeddedNats(config="port: 'none'").start()


def test_given_directory_keeps_its_data(tmp_path: Path) -> None:
    """A directory that the caller names survives; a temporary one is removed."""
    with EmbeddedNats(tmp_path / "nats") as nats:
        jetstream.create_stream(nats.url, "KEPT")
    with EmbeddedNats(tmp_path / "nats") as nats:
        assert jetstream.api(nats.url, "STREAM.NAMES")["streams"] == ["KEPT"]
    with EmbeddedNats() as nats:
        temporary = nats.directory
        assert temporary.exists()
    assert not temporary.exists()


@pytest.mark.linux  # PR_SET_PDEATHSIG
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_server_outlives_its_parent(number: signal.Signals) -> None:
    """SIGKILL, SIGTERM and Ctrl-C of the parent end both servers."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        *pids, postgres, nats = json.loads(parent.stdout.readline())
        assert all(_alive(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait(20)
    _wait_until_gone(pids)
    if number == signal.SIGINT:
        assert not Path(postgres).exists()
        assert not Path(nats).exists()


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"outbox-jetstream\[embedded\]"):
        EmbeddedPostgres().start()
    monkeypatch.setattr(importlib.metadata, "files", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"outbox-jetstream\[embedded\]"):
        EmbeddedNats().start()


async def test_only_root_runs_a_copy_where_nobody_cannot_reach_the_wheel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A virtual environment below a 0700 home is no obstacle, and its modes stay.

    An ordinary user runs PostgreSQL as himself, from the wheel.
    """
    answers = iter([True, False])  # the temporary directory is reachable, the wheel is not
    monkeypatch.setattr(embedded, "_reachable", lambda _path: next(answers))
    with EmbeddedPostgres(options={"fsync": "off"}) as server:
        assert (server.directory / "wheel").exists() is (os.geteuid() == 0)
        assert await _execute(server.url, "SELECT 1") == 1
