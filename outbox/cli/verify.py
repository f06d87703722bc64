"""`outbox verify`: what the archive says is on the stream, and is not."""

import argparse
import json
import sys
from asyncio import Event

from outbox.cli import options
from outbox.cli.running import connect
from outbox.jetstream.client import JetStreamClient
from outbox.operate.verify import LISTED_MAX, Verified, verify
from outbox.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument(
        "--repair",
        action="store_true",
        help="publish again what was purged, deleted or lost; undoes a purge",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Compare, and print what is missing; return 1 when anything is but what has expired."""
    engine = options.engine(settings, "outbox verify")
    client = JetStreamClient.from_settings(settings, name="outbox-verify")
    try:
        await connect(client, Event())
        found = await verify(
            engine, client, settings.schema_name, repair=given.repair, progress=_progress
        )
    finally:
        await client.close()
        await engine.dispose()
    print(_json(found) if given.json else _table(found))
    return options.EXIT_OK if found.complete else options.EXIT_FAILED


def _progress(compared: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{compared:,} compared", end="", file=sys.stderr, flush=True)


def _json(found: Verified) -> str:
    return json.dumps(
        {
            "compared": found.compared,
            "missing": {str(why): number for why, number in sorted(found.missing.items())},
            "events": [
                {"why": why, "stream": stream, **row._asdict()} for why, stream, row in found.events
            ],
            "repaired": found.repaired,
        },
        indent=2,
        default=str,
    )


def _table(found: Verified) -> str:
    lines = [
        f"{why:<8} {stream} {row.sequence} {row.event_id} {row.subject}"
        for why, stream, row in found.events
    ]
    unlisted = sum(n for why, n in found.missing.items() if why != "expired") - len(lines)
    if unlisted > 0:
        lines.append(f"and {unlisted:,} more, beyond the first {LISTED_MAX:,}")
    kinds = ", ".join(f"{number:,} {why}" for why, number in sorted(found.missing.items()))
    lines.append(f"{found.compared:,} archived events compared; missing: {kinds or 'none'}")
    if found.repaired:
        lines.append(f"{found.repaired:,} will be published again")
    return "\n".join(lines)
