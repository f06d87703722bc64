"""Half a minute of every fault at once: nothing lost, nothing doubled, nothing silent."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def chaos(minutes: float, seed: int, seconds: float) -> str:
    """Run in a process of its own, since the run forks; return what it prints."""
    command = [sys.executable, "-m", "tests.chaos", "--minutes", str(minutes), "--seed", str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_half_a_minute_of_all_faults_violates_no_invariant() -> None:
    """Two apps, two relays, three listeners of two workers; each kind of fault has fired."""
    assert "violations: 0" in chaos(0.5, 20261125, 280)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_five_minutes_of_all_faults_violate_no_invariant(seed: int) -> None:
    """At least 20,000 committed events, three seeds in a row."""
    said = chaos(5, seed, 1780)
    assert "violations: 0" in said
    committed = next(line for line in said.splitlines() if line.startswith("committed: "))
    assert int(committed.split()[1].replace(",", "")) >= 20_000
