"""The GLAM demo ends well under its faults, shows a table, and leaves nothing running."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = (sys.executable, "-m", "examples.glam")
pytestmark = pytest.mark.xdist_group("demo")


def test_every_committed_event_has_exactly_its_effects() -> None:
    done = subprocess.run(
        [*DEMO, "--merchants", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if words}
    committed, published, handled, duplicates, dead = (
        int(number.replace(",", "")) for number in rows["all"]
    )
    assert committed == published > 400
    assert handled > committed
    assert duplicates > 0
    assert dead == 1
    assert rows["catalog"][-1] == "1"
    for fault in ("merchant service: SIGKILL", "nats-server: SIGKILL", "delivered once more"):
        assert fault in done.stdout
    assert "OK after" in done.stdout
    assert done.stderr == ""


@pytest.mark.linux  # only Linux ties a child to its parent's end
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    marked = {**os.environ, "DEMO_OF": str(tmp_path)}
    with subprocess.Popen(
        [*DEMO, "--merchants", "60"], cwd=ROOT, env=marked, stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if re.search(r"merchants are welcomed", line):
                break
        demo.send_signal(number)
        demo.communicate(timeout=40)
    assert demo.returncode == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 20
    while left := _marked_with(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _marked_with(mark: str) -> list[str]:
    """Return the command lines of processes that were started with `mark`."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"DEMO_OF={mark}".encode() in (each / "environ").read_bytes():
                found.append((each / "cmdline").read_text().replace("\0", " ")[:200])
    return found


def test_service_in_forty_lines_is_one() -> None:
    page = (ROOT / "examples/glam/README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    names: dict[str, object] = {"__name__": "credit"}
    exec(compile(program, "README", "exec"), names)  # noqa: S102 - its classes are checked as made
    assert "GrantTrial" in names
