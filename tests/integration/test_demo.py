"""The demo ends well, and leaves nothing running whatever ends it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outbox.demo.report import Result

DEMO = (sys.executable, "-m", "outbox.cli.main", "demo")
ENDED_SECONDS = 20.0
pytestmark = pytest.mark.xdist_group("demo")


def _result(effects: list[str]) -> Result:
    return Result(["a", "b"], ["c"], 2, 2, 1, 1, effects)


@pytest.mark.parametrize(
    ("effects", "fault"),
    [
        (["a"], "1 commits without an effect"),
        (["a", "b", "b"], "1 events with more than one effect"),
        (["a", "b", "c"], "1 effects of what was rolled back"),
    ],
)
def test_verdict_names_what_is_wrong(effects: list[str], fault: str) -> None:
    assert _result(["b", "a"]).faults() == []
    assert fault in _result(effects).faults()


def test_demo_shows_one_effect_for_each_commit(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--events", "1000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    table = {row[0].strip(): row[1] for row in rows if len(row) == 2}
    assert table["added"] == table["published"] == table["effects"] == "1,000"
    assert table["relays killed"] == "2"
    assert int(table["duplicates seen"]) >= int(table["redelivered on purpose"]) > 0
    assert int(table["rolled back"]) > 0
    assert "OK:" in done.stdout


@pytest.mark.linux  # only Linux ties a child to its parent's end
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    marked = {**os.environ, "DEMO_OF": str(tmp_path)}
    with subprocess.Popen(
        DEMO, cwd=tmp_path, env=marked, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "the shop adds" in line:
                break
        assert len(_marked(tmp_path)) >= 5  # demo, PostgreSQL, nats-server, relay, mailer, shop
        demo.send_signal(number)
        assert demo.wait(ENDED_SECONDS) != 0
    deadline = time.monotonic() + ENDED_SECONDS
    while (left := _marked(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def _marked(mark: Path) -> list[str]:
    """Return the command of every process whose environment carries the mark."""
    wanted, found = f"DEMO_OF={mark}".encode(), []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and wanted in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found
