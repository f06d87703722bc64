"""`outbox status`: how the outbox does, once or until Ctrl-C."""

import argparse
import asyncio
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.cli import asking, options
from outbox.cli.stopping import signals
from outbox.cli.values import short
from outbox.errors import ConfigurationError, OutboxError
from outbox.operate.status import status
from outbox.settings import Settings

WIDTH = 60  # of an error in the table
INTERVAL = 2.0  # seconds between two looks of --watch
Rows = list[tuple[str, ...]]


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    target.add_argument("--json", action="store_true", help="print JSON")
    target.add_argument("--watch", action="store_true", help="look every two seconds until Ctrl-C")
    asking.add_databases(target)


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Print how the outbox does; return 1 when a database could not be asked."""
    async with asking.databases(settings, given, "outbox status") as engines:
        if given.watch:
            return await _watch(engines, settings, given)
        found = await _look(engines, settings)
    print(_json(found) if given.json else "\n".join(_lines(found)))
    return _code(found)


async def _watch(
    engines: Mapping[str, AsyncEngine], settings: Settings, given: argparse.Namespace
) -> int:
    """Show the newest look in place on a terminal; elsewhere one below the other.

    Once it has begun, an outage is shown like anything else.
    """
    live = _live() if not given.json else None
    begun = False
    with signals() as asked:
        while not asked.is_set():
            found = await _look(engines, settings, outages=begun)
            begun = True
            if live is not None:
                live(_lines(found))
            else:
                print(_json(found) if given.json else "\n".join([*_lines(found), ""]), flush=True)
            try:
                async with asyncio.timeout(INTERVAL):
                    await asked.wait()
            except TimeoutError:
                continue
    return options.EXIT_OK


async def _look(
    engines: Mapping[str, AsyncEngine], settings: Settings, *, outages: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the figures of each database, or its error.

    Args:
        outages: return also the error of a database that is the only one, instead of raising it.
    """
    found: dict[str, dict[str, Any]] = {}
    async with asking.broker(settings, "outbox-status") as client:
        known = None if isinstance(client, str) else client
        for name, engine in engines.items():
            try:
                found[name] = await status(
                    engine, settings.schema_name, client=known, stream=settings.stream
                )
            except OutboxError as error:
                if not name and not outages:
                    raise
                found[name] = {"error": str(error), "usage": isinstance(error, ConfigurationError)}
                continue
            if isinstance(client, str):
                found[name]["unseen"].append(f"how far listeners are: {client}")
    return found


def _code(found: Mapping[str, Mapping[str, Any]]) -> int:
    return options.EXIT_FAILED if any("error" in each for each in found.values()) else 0


def _json(found: Mapping[str, Any]) -> str:
    shown = found.get("", {"databases": found})
    return json.dumps(shown, indent=2)


def _live() -> Any:
    """Return what replaces the shown lines; None where there is no terminal, or no rich."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None
    console = importlib.import_module("rich.console").Console()
    text = importlib.import_module("rich.text").Text

    def show_lines(lines: Sequence[str]) -> None:
        console.clear()
        for line in lines:
            console.print(text(line, style=_style(line)), soft_wrap=True)

    return show_lines


def _style(line: str) -> str:
    if line.lstrip().startswith(("!", "error")):
        return "bold red"
    return "bold" if line and not line.startswith(" ") and line.endswith(":") else ""


# ---- text ----------------------------------------------------------------------------------------


def _lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for name, each in found.items():
        if name:
            lines += [f"{name}:"]
        indent = "  " if name else ""
        own = [f"error: {each['error']}"] if "error" in each else _database(each)
        lines += [f"{indent}{line}" for line in own]
    return lines


def _database(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{name:<24}{value}" for name, value in _counts(found)]
    for lane in found["lanes"]:
        lines += _lane(lane)
    lines += _table(
        ("waiting", "events", "attempts", "last error"),
        [
            (
                w["reason"],
                f"{w['events']:,}",
                str(w["attempts"]),
                short(w["last_error"] or "-", WIDTH),
            )
            for w in found["waiting"]
        ],
    )
    lines += _table(
        ("dead letters", "side", "count"),
        [(d["reason"], d["side"], f"{d['count']:,}") for d in found["dead_letters_by"]],
    )
    lines += _table(
        ("listener", "unread", "unacked", "handled/s", "retrying", "held", "dead", "active"),
        [_listener(each) for each in found["listeners"]],
    )
    lines += [
        f"! {h['kind']} {h['name']} ({h['application'] or 'no name'}) open for {h['age']:.0f} s "
        "holds vacuum and the relay's floor back"
        for h in found["holders"]
    ]
    return [*lines, *(f"! not seen: {each}" for each in found["unseen"])]


def _counts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name in ("pending", "oldest_pending_seconds", "scheduled", "published", "dead_letters"):
        about = "about " if name in found["estimated"] else ""
        rows.append((name, about + _number(found[name])))
    if found["oldest_pending_subject"] is not None:
        key = found["oldest_pending_key"]
        of_key = f", key {key}" if key is not None else ""
        rows.insert(2, ("oldest_pending_subject", f"{found['oldest_pending_subject']}{of_key}"))
    about = "about " if "inbox" in found["estimated"] else ""
    rate = ("published_per_second", f"{found['published_per_second']:,.1f}")
    return [
        *rows,
        rate,
        ("inbox", about + _number(found["inbox"])),
        ("schema_version", str(found["schema_version"])),
    ]


def _number(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _lane(lane: Mapping[str, Any]) -> list[str]:
    owner = lane["owner"] or "nobody"
    state = "alive" if lane["alive"] else "not alive"
    lines = [f"lane {lane['lane']:<19}{owner}, {state}, epoch {lane['epoch']}"]
    if lane["no_ack_seconds"] is not None:
        why = f": {lane['hindrance']}" if lane["hindrance"] else ""
        lines.append(f"{'':<24}no ack for {lane['no_ack_seconds']:.0f} s{why}")
    return lines


def _listener(found: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (found["unread"], found["unacked"])
    counts = (found["retrying"], found["held"], found["dead_letters"])
    return (
        found["listener"],
        *map(_number, numbers),
        f"{found['handled_per_second']:,.1f}",
        *map(_number, counts),
        found["active"] or "-",
    )


def _table(head: tuple[str, ...], rows: Rows) -> list[str]:
    """Return aligned columns, nothing without rows."""
    if not rows:
        return []
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
