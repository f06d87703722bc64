"""`python -m tests.mutants [NAME …]`: exit 0 when the checker has caught every one."""

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import Plan, run
from tests.mutants import applying

ROUNDS = 3
SECONDS = 8.0


def caught(name: str) -> str:
    """Return what gave a mutant away, nothing when it was not found in three rounds."""
    for seed in range(1, ROUNDS + 1):
        folder = Path(tempfile.mkdtemp(prefix=f"outbox-mutant-{name}-"))
        try:
            plan = Plan(
                SECONDS,
                seed,
                faults=applying.module(name).FAULTS,
                mutant=name,
                drain_seconds=20.0,
            )
            outcome = asyncio.run(run(plan, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if outcome.violations:
            kinds = outcome.report.found.items()
            return ", ".join(f"{kind} ({len(found)})" for kind, found in sorted(kinds))
    return ""


def main() -> int:
    """Run all mutants, or those that are named."""
    chosen = sys.argv[1:] or applying.names()
    survivors = []
    for name in chosen:
        applying.check(name)
        by = caught(name)
        print(f"{name:<28}{by or 'NOT CAUGHT'}", flush=True)
        survivors += [] if by else [name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
