"""The checker catches deliberately broken builds, so its silence means something."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import applying

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", applying.names())
def test_the_function_that_a_mutant_replaces_exists(name: str) -> None:
    """A renamed function would leave a mutant that breaks nothing."""
    applying.check(name)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_mutant_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants"],
        cwd=ROOT,
        timeout=1700,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
