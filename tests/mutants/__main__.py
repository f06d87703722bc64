"""`python -m tests.mutants [NAME …]`: exit 0 when the checker has caught every one.

It must be content with the true build under the same faults.
"""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.run import Plan, run
from tests.mutants import applying

ROUNDS = 3
SECONDS = 8.0


def found(seed: int, faults: Sequence[str], mutant: str = "") -> str:
    """Return what the checker says of one short run, nothing when it is content."""
    folder = Path(tempfile.mkdtemp(prefix=f"outbox-mutant-{mutant}-"))
    try:
        plan = Plan(SECONDS, seed, faults=faults, mutant=mutant, drain_seconds=20.0)
        outcome = asyncio.run(run(plan, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kinds = sorted(outcome.report.found.items())
    return ", ".join(f"{kind} ({len(each)})" for kind, each in kinds)


def caught(name: str) -> str:
    """Return what gave a mutant away, nothing when it was not found in three rounds."""
    faults = applying.module(name).FAULTS
    return next(filter(None, (found(seed, faults, name) for seed in range(1, ROUNDS + 1))), "")


def control(names: Sequence[str]) -> str:
    """Return what the checker says of the true build under all their faults; it must be nothing."""
    faults = sorted({fault for name in names for fault in applying.module(name).FAULTS})
    return found(1, faults)


def main() -> int:
    """Run the true build, then all mutants, or those that are named."""
    chosen = sys.argv[1:] or applying.names()
    for name in chosen:
        applying.check(name)
    blamed = control(chosen)
    print(f"{'(the true build)':<28}{blamed or 'nothing found'}", flush=True)
    survivors = []
    for name in chosen:
        by = caught(name)
        print(f"{name:<28}{by or 'NOT CAUGHT'}", flush=True)
        survivors += [] if by else [name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors or blamed else 0


if __name__ == "__main__":
    sys.exit(main())
