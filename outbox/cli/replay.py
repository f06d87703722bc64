"""`outbox replay`: archived events, published once more or handed to one listener."""

import argparse
import dataclasses
import json
import sys

from pydantic import SecretStr

from outbox.cli import options
from outbox.cli.dead import whoami
from outbox.cli.values import moment
from outbox.errors import ConfigurationError
from outbox.operate.replay import Replayed, Target, pattern_of, replay
from outbox.postgres.replaying import Window
from outbox.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument("--since", type=moment, metavar="TIME", help="of publication, with a zone")
    parser.add_argument("--until", type=moment, metavar="TIME")
    parser.add_argument("--subject", metavar="SUBJECT", help="NATS wildcards allowed")
    parser.add_argument("--key", metavar="KEY")
    parser.add_argument("--to", metavar="LISTENER", help="hand them to this identity alone")
    parser.add_argument(
        "--listener-database",
        metavar="URL",
        help="where that listener's inbox is, if not in the outbox's database",
    )
    parser.add_argument("--dry-run", action="store_true", help="count, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--by", metavar="NAME", help="who does it (default: user@host)")


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Count, ask, and replay."""
    engine = options.engine(settings, "outbox replay")
    where = settings
    if given.listener_database is not None:
        secret = SecretStr(given.listener_database)
        where = settings.model_copy(update={"database_url": secret})
    other = options.engine(where, "outbox replay")
    subject = None if given.subject is None else pattern_of(given.subject)
    window = Window(given.since, given.until, subject, given.key)
    to = None if given.to is None else Target(given.to, other, settings.schema_name)
    by = given.by or whoami()
    try:
        counted = await replay(engine, settings.schema_name, window, by=by, to=to, dry_run=True)
        if given.dry_run or not _agreed(counted, given):
            print(_told(counted, given, done=False))
            return options.EXIT_OK if given.dry_run else options.EXIT_FAILED
        done = await replay(engine, settings.schema_name, window, by=by, to=to)
        print(_told(done, given, done=True))
    finally:
        await engine.dispose()
        await other.dispose()
    return options.EXIT_OK


def _agreed(counted: Replayed, given: argparse.Namespace) -> bool:
    if given.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigurationError(f"this would replay {counted.taken:,} events; add --yes to do it")
    answer = input(f"{_told(counted, given, done=False)}; go on? [y/N] ")
    return answer.strip().lower() in {"y", "yes"}


def _told(counted: Replayed, given: argparse.Namespace, *, done: bool) -> str:
    if given.json:
        return json.dumps(dataclasses.asdict(counted))
    what = "handed over" if given.to else "published again"
    verb = "will be" if done else "would be"
    known = f"; {counted.known:,} are known to {given.to}" if given.to else ""
    return f"{counted.found:,} archived events found{known}; {counted.taken:,} {verb} {what}"
