"""The commands, as processes: output, exit codes, signals."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.cli import options
from outbox.embedded import EmbeddedNats
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.settings import Settings
from tests.servers.events import count, insert, published

ENDED_SECONDS = 20.0
Command = tuple[str, ...]
OUTBOX: Command = (sys.executable, "-m", "outbox.cli.main")
RELAY: Command = (sys.executable, "-m", "outbox.cli.relay")
WORKERS = """
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from outbox.jetstream.client import JetStreamClient
from outbox.listener import Listener
from outbox.relay import Relay
from outbox.settings import Settings
from contextlib import asynccontextmanager

class Print(Listener):
    subject = "evt.test.>"
    queue_group = "print"
    service_name = "test"

    async def on_message(self, session, event):
        print("got", event.event_id, flush=True)

@asynccontextmanager
async def workers():
    settings = Settings.from_environment()
    engine = create_async_engine(settings.database_url.get_secret_value())
    async with JetStreamClient.from_settings(settings) as client:
        yield [Relay(engine, client), Print(client, async_sessionmaker(engine))]
    await engine.dispose()

@asynccontextmanager
async def listener():
    async with workers() as made:
        yield made[1:]

nothing = 5
"""
HANGS = """
import asyncio

class Hang(Listener):
    subject = "evt.test.>"
    queue_group = "hang"
    service_name = "test"

    async def on_message(self, session, event):
        print("hangs", flush=True)
        await asyncio.sleep(29)
"""
ADD = """
import asyncio, os
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from outbox.writer import Outbox
async def main():
    engine = create_async_engine(os.environ["OUTBOX_DATABASE_URL"])
    async with AsyncSession(engine) as session, session.begin():
        print(Outbox("test").add(session, "evt.test.added.v1", {"n": 1}))
    await engine.dispose()
asyncio.run(main())
"""


def run(command: Command, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(reached: Callable[[], bool]) -> None:
    """Wait until `reached`, within the deadline."""
    deadline = time.monotonic() + ENDED_SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def servers(database_url: str, nats_server: str, stream: str) -> dict[str, str]:
    """The variables that name the test's servers."""
    return {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": nats_server,
        "OUTBOX_STREAM": stream,
    }


@pytest.mark.parametrize(
    "command", [(), ("migrate",), ("status",), ("dev",), ("demo",), ("listen",), ("run",)]
)
def test_help_has_examples_and_exit_codes(command: Command, tmp_path: Path) -> None:
    done = run((*OUTBOX, *command, "--help"), tmp_path)
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "exit codes: 0 done, 1 failed" in done.stdout


def test_migrate_twice_then_status_as_json(tmp_path: Path, empty_database_url: str) -> None:
    plain = make_url(empty_database_url).set(drivername="postgres")
    flag = ("--database-url", plain.render_as_string(hide_password=False))
    before = run((*OUTBOX, "status", *flag), tmp_path)
    assert before.returncode == 2
    assert before.stderr.startswith("outbox: ")
    assert "outbox migrate" in before.stderr
    assert before.stderr.count("\n") == 1
    for _ in range(2):
        done = run((*OUTBOX, "migrate", *flag), tmp_path, OUTBOX_DATABASE_URL="postgres://no:1/x")
        assert done.returncode == 0, done.stderr
    found = run((*OUTBOX, "status", "--json", *flag), tmp_path)
    assert json.loads(found.stdout)["pending"] == 0
    assert "schema_version" in run((*OUTBOX, "status", *flag), tmp_path).stdout


def test_migrate_sql_needs_no_server_and_takes_the_schema_of_the_flag(tmp_path: Path) -> None:
    command = (*OUTBOX, "migrate", "--sql", "--schema", "mine")
    done = run(command, tmp_path, OUTBOX_SCHEMA="other")
    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE mine.pending" in done.stdout
    assert "other" not in done.stdout


@pytest.mark.parametrize(
    ("command", "settings", "code", "words"),
    [
        ((*OUTBOX, "status"), {}, 2, "OUTBOX_DATABASE_URL"),
        ((*OUTBOX, "nonsense"), {}, 2, "nonsense"),
        ((*OUTBOX, "status"), {"OUTBOX_STREAMS": "x"}, 2, "did you mean OUTBOX_STREAM"),
        ((*OUTBOX, "status", "--log-level", "loud"), {}, 2, "OUTBOX_LOG_LEVEL"),
        (
            (*OUTBOX, "status", "--database-url", "postgresql://x@127.0.0.1:1/x"),
            {},
            1,
            "refused",
        ),
        ((*RELAY, "--database-url", "mysql://x/y"), {}, 2, "postgresql+asyncpg"),
        ((*RELAY, "--database-url", "postgres://x:port/y"), {}, 2, "must be a number"),
        ((*RELAY, "--database-url", "postgres://x/y?sslrootcert=z"), {}, 2, "sslrootcert"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    command: Command, settings: dict[str, str], code: int, words: str, tmp_path: Path
) -> None:
    done = run(command, tmp_path, **settings)
    assert done.returncode == code, done.stderr
    assert words.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_database_url_is_taken_as_postgres_users_write_it() -> None:
    settings = Settings.defaults(database_url="postgres://u:p%40@h/d?sslmode=require")
    url = options.database_url(settings)
    assert url.drivername == "postgresql+asyncpg"
    assert (url.password, dict(url.query)) == ("p@", {"ssl": "require"})
    with pytest.raises(ConfigurationError, match="not a URL") as caught:
        options.database_url(Settings.defaults(database_url="secret"))
    assert "secret" not in str(caught.value)


async def test_drain_publishes_everything_and_says_so(
    servers: dict[str, str],
    engine: AsyncEngine,
    js_client: JetStreamClient,
    stream: str,
    tmp_path: Path,
) -> None:
    added = await insert(engine, 300)
    done = await asyncio.to_thread(run, (*RELAY, "--drain"), tmp_path, **servers)
    assert done.returncode == 0, done.stderr
    assert "published 300, 0 left" in done.stdout
    assert sorted(await published(js_client, stream)) == sorted(added)
    assert await count(engine, "pending") == 0


def test_drain_without_a_broker_fails_with_the_reason(
    servers: dict[str, str], tmp_path: Path
) -> None:
    done = run((*RELAY, "--drain"), tmp_path, **servers | {"OUTBOX_NATS_URL": "nats://127.0.0.1:1"})
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("outbox: ")
    assert "Traceback" not in done.stderr


def test_relay_ends_softly_at_the_first_signal(servers: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as target,
        subprocess.Popen(
            RELAY, cwd=tmp_path, env={**os.environ, **servers}, stderr=target
        ) as relay,
    ):
        wait_for(lambda: "took the lane" in log.read_text())
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(ENDED_SECONDS) == 0
    status = json.loads(run((*OUTBOX, "status", "--json"), tmp_path, **servers).stdout)
    assert status["lanes"][0]["owner"] is None  # given back, no lease to wait for


@pytest.mark.parametrize(
    "command",
    [
        (*OUTBOX, "listen", "workers:Print", "--source-service", "test"),
        (*OUTBOX, "listen", "workers:listener"),
        (*OUTBOX, "run", "workers:workers"),
    ],
    ids=["listen", "listen-made", "run"],
)
def test_listen_and_run_handle_events_until_sigterm(
    command: Command, servers: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    event_id = run((sys.executable, "-c", ADD), tmp_path, **servers).stdout.strip()
    assert event_id
    out = tmp_path / "out"
    with (
        out.open("w") as target,
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **servers}, stdout=target
        ) as process,
    ):
        wait_for(lambda: f"got {event_id}" in out.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDED_SECONDS) == 0


def test_listen_makes_the_stream_when_the_settings_say_so(
    database_url: str, private_nats: EmbeddedNats, tmp_path: Path
) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    settings = {
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_NATS_URL": private_nats.url,
        "OUTBOX_CREATE_STREAM": "true",
    }
    run((sys.executable, "-c", ADD), tmp_path, **settings)
    out = tmp_path / "out"
    command = (*OUTBOX, "listen", "workers:Print")
    with (
        out.open("w") as target,
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **settings}, stdout=target
        ) as process,
    ):
        wait_for(lambda: "got " in out.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDED_SECONDS) == 0


def test_several_failed_workers_are_one_line(servers: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    missing = servers | {"OUTBOX_STREAM": "MISSING"}
    done = run((*OUTBOX, "listen", "workers:Print"), tmp_path, **missing)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_second_signal_ends_at_once(servers: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS + HANGS)
    run((sys.executable, "-c", ADD), tmp_path, **servers)
    out = tmp_path / "out"
    command = (*OUTBOX, "listen", "workers:Hang")
    with (
        out.open("w") as target,
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **servers}, stdout=target, stderr=target
        ) as process,
    ):
        wait_for(lambda: "hangs" in out.read_text())
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "stopping" in out.read_text())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDED_SECONDS) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5  # the grace is 10 s


@pytest.mark.parametrize(
    "command", [("listen", "workers:nothing"), ("listen", "none:X"), ("run", "workers:nothing")]
)
def test_listen_and_run_refuse_what_is_none(
    command: Command, servers: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    done = run((*OUTBOX, *command), tmp_path, **servers)
    assert done.returncode == 2, done.stderr
    assert command[1].split(":")[0] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("demo")
def test_dev_prints_both_urls_and_ends_at_sigint(tmp_path: Path) -> None:
    with subprocess.Popen(
        (*OUTBOX, "dev"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(ENDED_SECONDS) == 0
    assert any(line.startswith("export OUTBOX_DATABASE_URL=postgresql") for line in lines)
    assert any(line.startswith("export OUTBOX_NATS_URL=nats://127.0.0.1:") for line in lines)


STUBBORN = """
import asyncio
from outbox.lifecycle import Worker

class Stubborn(Worker):
    async def _live(self):
        print("alive", flush=True)
        await asyncio.sleep(300)

workers = [Stubborn("stubborn")]
"""


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_first_signal_waits_for_the_grace_and_a_second_ends_at_once(
    signals: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    grace = "1" if signals == 1 else "300"
    log = tmp_path / "log"
    with (
        log.open("w") as target,
        subprocess.Popen(
            (*OUTBOX, "run", "stubborn:workers"),
            cwd=tmp_path,
            env={**os.environ, "OUTBOX_GRACE": grace},
            stdout=target,
            stderr=target,
        ) as process,
    ):
        wait_for(lambda: "alive" in log.read_text())
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in log.read_text())
        assert process.wait(ENDED_SECONDS) == code


async def test_drain_on_a_terminal_shows_a_bar(
    servers: dict[str, str], engine: AsyncEngine, tmp_path: Path
) -> None:
    await insert(engine, 50)
    ours, theirs = os.openpty()
    command = [*RELAY, "--drain"]
    env = {**os.environ, **servers, "TERM": "xterm", "COLUMNS": "100"}
    drain = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=env, stdout=theirs, stderr=asyncio.subprocess.DEVNULL
    )
    os.close(theirs)
    shown = await asyncio.to_thread(_read_all, ours)
    assert await drain.wait() == 0
    assert "50/50" in shown
    assert "━" in shown
    assert "published 50, 0 left" in shown


def _read_all(terminal: int) -> str:
    """Return all that is written to a terminal until the other side is closed."""
    found = b""
    with os.fdopen(terminal, "rb", buffering=0) as source, contextlib.suppress(OSError):
        while part := source.read(4096):
            found += part
    return found.decode()
