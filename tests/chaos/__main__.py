"""`python -m tests.chaos --minutes 5 --seed 1`: exit 0 when nothing was violated, else 1."""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.run import Plan, run, shown


def main() -> int:
    """Run once; keep the folder with logs and journal when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="outbox-chaos-"))
    outcome = asyncio.run(run(Plan(60 * given.minutes, seed), folder))
    print("\n".join(shown(outcome)))
    if outcome.violations or outcome.never_fired:
        print(f"logs and journal: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
