"""`outbox prune`: deletes what is past its retention, as the active relay does by itself."""

import argparse
import dataclasses
import json
import sys

from outbox.cli import options
from outbox.operate.prune import Pruned, prune
from outbox.settings import Settings


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    target.add_argument("--dry-run", action="store_true", help="count, and delete nothing")
    target.add_argument("--json", action="store_true", help="print JSON")


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Prune, and print how much."""
    engine = options.engine(settings, "outbox prune")
    try:
        found = await prune(engine, settings, dry_run=given.dry_run, progress=_progress)
    finally:
        await engine.dispose()
    print(json.dumps(dataclasses.asdict(found)) if given.json else _text(found, given))
    return options.EXIT_OK


def _text(found: Pruned, given: argparse.Namespace) -> str:
    would = "would be " if given.dry_run else ""
    return f"{found.inbox:,} rows of the inbox and {found.archive:,} of the archive {would}deleted"


def _progress(gone: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{gone:,} rows of the inbox deleted", end="", file=sys.stderr, flush=True)
