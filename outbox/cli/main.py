"""`outbox`: the commands that people type."""

import argparse
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from outbox.cli import (
    contracts,
    dead,
    dev,
    doctor,
    health,
    logs,
    migrate,
    observing,
    options,
    prune,
    replay,
    services,
    status,
    tail,
    trace,
    verify,
)
from outbox.cli.running import finish, report
from outbox.errors import OutboxError
from outbox.settings import Settings

Command = Callable[[Settings, argparse.Namespace], Coroutine[Any, Any, int]]
EXAMPLES = """  outbox migrate                          make or upgrade the tables
  outbox migrate --sql | psql             the same as a script
  outbox status --json                    how much is pending, and who relays
  outbox dev                              PostgreSQL and nats-server until Ctrl-C
  outbox demo                             killed relays, repeated messages, one effect each
  outbox listen app.events:SendMail       run a listener and a relay
  outbox run app.main:workers             run relays and listeners of your own making
  outbox contracts --import app.events list   payloads and their subjects"""
_EACH = {
    "migrate": (migrate.migrate, "make or upgrade the tables", "  outbox migrate"),
    "status": (
        status.show,
        "show how the outbox does",
        """  outbox status --watch
  outbox status --json
  outbox status --database shop=postgresql://… --database mail=postgresql://…""",
    ),
    "dev": (dev.dev, "run both servers until Ctrl-C", "  outbox dev --directory .outbox"),
    "demo": (dev.demo, "show exactly one effect per event", "  outbox demo"),
    "listen": (services.listen, "run listener classes", "  outbox listen app.events:SendMail"),
    "run": (services.run, "run workers of your own making", "  outbox run app.main:workers"),
    "doctor": (
        doctor.doctor,
        "find what could break the promise, and what mends it",
        """  outbox doctor --json     exit 1 when something breaks it
  outbox doctor --monitor http://nats:8222""",
    ),
    "health": (
        health.health,
        "ask a running relay or listener whether it is well",
        """  outbox health --metrics-port 9464          exit 1, with reasons, when it is not ready
  outbox health --live --metrics-port 9464   exit 1 when it has to be started again""",
    ),
    "dead": (
        dead.dead,
        "list, show, requeue and discard dead letters",
        """  outbox dead list --listener mailer-receipts
  outbox dead show 17 --payload
  outbox dead requeue 17 18 --note "mail server is back"
  outbox dead discard --reason rejected --older-than 7d --yes""",
    ),
    "trace": (
        trace.show,
        "show one event's life",
        """  outbox trace 01a21395-0c14-7000-840c-e7c34cc33f3d
  outbox trace 01a21395-0c14-7000-840c-e7c34cc33f3d \\
    --database shop=postgresql://… --database mail=postgresql://…""",
    ),
    "tail": (
        tail.show,
        "print events as they are published",
        """  outbox tail --subject 'evt.order.>'
  outbox tail --key order-7 --since 2026-11-25T07:00Z --payload
  outbox tail --json --count 10""",
    ),
    "prune": (
        prune.show,
        "delete what is past its retention, as the active relay does once a minute",
        """  outbox prune --dry-run
  outbox prune""",
    ),
    "replay": (
        replay.show,
        "take archived events once more",
        """  outbox replay --since 2026-11-25T07:00Z --subject 'evt.order.>' --dry-run
  outbox replay --key order-7 --to mailer-receipts""",
    ),
    "verify": (
        verify.show,
        "compare the archive with the stream, by ids",
        """  outbox verify            exit 1 when anything is missing but what has expired
  outbox verify --repair   publish again what was purged, deleted or lost""",
    ),
    "contracts": (
        contracts.contracts,
        "list payloads, print their schemas, find breaking changes",
        """  outbox contracts --import app.events list
  outbox contracts --import app.events schema evt.order.placed.v1
  outbox contracts --import app.events freeze schemas.json
  outbox contracts --import app.events check schemas.json   exit 1 when something breaks""",
    ),
}


RUNNING = {services.listen, services.run, dev.dev, dev.demo}  # their logs tell what they do


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    given = _parser().parse_args(arguments)
    work: Command = given.work
    try:
        settings = options.settings_of(given)
        logs.configure(settings, quiet=work not in RUNNING)
    except OutboxError as error:
        return report(error)
    return finish(work(settings, given))


def _parser() -> argparse.ArgumentParser:
    summary = "Transactional outbox and inbox on PostgreSQL and NATS JetStream."
    parser = argparse.ArgumentParser(**options.parser("outbox", summary, EXAMPLES))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (work, text, example) in _EACH.items():
        shared = options.parser(f"outbox {name}", text, example)
        made[name] = commands.add_parser(name, help=text, **shared)
        made[name].set_defaults(work=work)
    _add_own(made)
    for each in made.values():
        options.add_flags(each)
    return parser


def _add_own(made: dict[str, argparse.ArgumentParser]) -> None:
    """Add the arguments that only one command has."""
    made["migrate"].add_argument("--sql", action="store_true", help="print the script, run nothing")
    status.add_arguments(made["status"])
    made["dev"].add_argument(
        "--directory", type=Path, metavar="PATH", help="keep the data here (default: temporary)"
    )
    made["demo"].add_argument(
        "--events", type=int, default=3000, metavar="N", help="events to add (default: 3000)"
    )
    made["listen"].add_argument("objects", nargs="+", metavar="MODULE:CLASS")
    made["listen"].add_argument(
        "--no-relay", action="store_true", help="run no relay for what the handlers add"
    )
    made["doctor"].add_argument("--json", action="store_true", help="print JSON")
    made["doctor"].add_argument(
        "--monitor",
        metavar="URL",
        help="monitoring port of nats-server, to see when it syncs its disk: http://nats:8222",
    )
    health.add_arguments(made["health"])
    dead.add_arguments(made["dead"])
    trace.add_arguments(made["trace"])
    tail.add_arguments(made["tail"])
    prune.add_arguments(made["prune"])
    replay.add_arguments(made["replay"])
    verify.add_arguments(made["verify"])
    contracts.add_arguments(made["contracts"])
    made["run"].add_argument("object", metavar="MODULE:NAME")
    for name in ("listen", "run"):
        observing.add_port(made[name])


if __name__ == "__main__":
    sys.exit(main())
