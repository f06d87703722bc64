"""`outbox dead`: the dead letters of relay and listeners, and what becomes of them."""

import argparse
import getpass
import json
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.cli import asking, options
from outbox.cli.values import age, short
from outbox.errors import ConfigurationError, OutboxError
from outbox.operate import redrive
from outbox.postgres.redrive import Filter, Letter
from outbox.settings import Settings

WIDTH = 100  # of an error in the list
ACTIONS = ("list", "show", "requeue", "discard")
_DONE = {"requeue": "requeued", "discard": "discarded"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this command has."""
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("ids", nargs="*", type=int, metavar="ID")
    chosen = parser.add_argument_group("which ones")
    chosen.add_argument("--side", choices=("relay", "listener"))
    chosen.add_argument("--subject", metavar="SUBJECT")
    chosen.add_argument("--listener", metavar="IDENTITY")
    chosen.add_argument("--reason", metavar="REASON")
    chosen.add_argument("--older-than", type=age, metavar="AGE", help="such as 90s, 15m, 2h, 7d")
    chosen.add_argument("--newer-than", type=age, metavar="AGE")
    chosen.add_argument("--all", action="store_true", help="list closed ones too")
    asking.add_databases(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--payload", action="store_true", help="show the body too")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--note", metavar="TEXT", help="why; kept with the action")
    parser.add_argument("--by", metavar="NAME", help="who does it (default: user@host)")


async def dead(settings: Settings, given: argparse.Namespace) -> int:
    """List, show, requeue or discard dead letters."""
    async with asking.databases(settings, given, "outbox dead") as engines:
        if given.action == "list":
            return await _list(engines, settings.schema_name, given)
        if len(engines) != 1:
            raise ConfigurationError(f"{given.action} takes one --database: ids are its own")
        (engine,) = engines.values()
        act = _show if given.action == "show" else _act
        return await act(engine, settings.schema_name, given)


def _filter(given: argparse.Namespace, *, state: str | None) -> Filter:
    return Filter(
        ids=given.ids or None,
        side=given.side,
        subject=given.subject,
        listener=given.listener,
        reason=given.reason,
        older_than=given.older_than,
        newer_than=given.newer_than,
        state=state,
    )


async def _list(engines: Mapping[str, AsyncEngine], schema: str, given: argparse.Namespace) -> int:
    """List those of every database; return 1 when one could not be asked."""
    chosen = _filter(given, state=None if given.all else "open")
    found: list[tuple[str, Letter]] = []
    away: dict[str, str] = {}
    for name, engine in engines.items():
        try:
            found += [(name, each) for each in await redrive.listed(engine, schema, chosen)]
        except OutboxError as error:
            if not name:
                raise
            away[name] = str(error)
    if given.json:
        named = [({"database": name} if name else {}) | each._asdict() for name, each in found]
        print(json.dumps(named, indent=2, default=str))
    else:
        for name, each in found:
            print("\n".join(_lines_of(name, each)))
        print(f"{len(found):,} dead letters")
    for name, reason in away.items():
        print(f"outbox: database {name} was not seen: {reason}", file=sys.stderr)
    return options.EXIT_FAILED if away else options.EXIT_OK


def _lines_of(name: str, letter: Letter) -> list[str]:
    who = letter.listener or "relay"
    state = "" if letter.state == "open" else f" [{letter.state}]"
    when = letter.failed_at.strftime("%Y-%m-%d %H:%M:%S")
    where = f"{name}  " if name else ""
    lines = [
        f"{where}{letter.id:>6}  {when}  {who}  {letter.subject}  {letter.event_id}{state}",
        f"{'':>8}{letter.reason} after {letter.attempts}: {short(letter.error, WIDTH)}",
    ]
    if letter.parks and letter.state in {"open", "requeued"}:
        lines.append(f"{'':>8}later events of key {letter.key} wait behind it")
    return lines


async def _show(engine: AsyncEngine, schema: str, given: argparse.Namespace) -> int:
    if len(given.ids) != 1:
        raise ConfigurationError("show needs one id; `outbox dead list` has them")
    found = await redrive.shown(engine, schema, given.ids[0])
    if found is None:
        raise ConfigurationError(f"there is no dead letter {given.ids[0]}")
    letter, headers, body, history = found
    facts: dict[str, Any] = letter._asdict() | {
        "headers": headers.decode(errors="backslashreplace").splitlines(),
        "body_bytes": len(body),
        "history": history,
    }
    if given.payload:
        facts["body"] = body.decode(errors="backslashreplace")
    if given.json:
        print(json.dumps(facts, indent=2, default=str))
        return options.EXIT_OK
    for name, value in facts.items():
        if value not in (None, [], ""):
            print(f"{name:<12}{_lines(value)}")
    return options.EXIT_OK


def _lines(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"\n{'':12}".join(
        " ".join(str(v) for v in each.values() if v is not None) if isinstance(each, dict) else each
        for each in value
    )


async def _act(engine: AsyncEngine, schema: str, given: argparse.Namespace) -> int:
    chosen = _filter(given, state="open")
    if chosen == Filter():
        raise ConfigurationError("name ids, or narrow them down by --listener, --reason, …")
    if not given.yes and not await _agreed(engine, schema, chosen, given):
        return options.EXIT_FAILED
    by = given.by or whoami()
    done = await redrive.acted(
        engine, schema, chosen, action=_DONE[given.action], by=by, note=given.note
    )
    print(f"{_DONE[given.action]} {done:,}")
    return options.EXIT_OK


async def _agreed(
    engine: AsyncEngine, schema: str, chosen: Filter, given: argparse.Namespace
) -> bool:
    """Ask before more than the ids that were typed are acted on."""
    if given.ids:
        return True
    number = await redrive.counted(engine, schema, chosen)
    if not sys.stdin.isatty():
        raise ConfigurationError(f"this would {given.action} {number:,}; add --yes to do it")
    answer = input(f"{given.action} {number:,} dead letters? [y/N] ")  # noqa: ASYNC250 - alone
    return answer.strip().lower() in {"y", "yes"}


def whoami() -> str:
    """Return who runs the command, as it is kept with what is done."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
