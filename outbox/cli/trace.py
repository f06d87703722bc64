"""`outbox trace`: one event's life on one screen."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from outbox.cli import asking, options
from outbox.cli.values import short
from outbox.errors import OutboxError
from outbox.operate.trace import Life, trace
from outbox.settings import Settings

WIDTH = 140  # of a wide terminal
Line = tuple[datetime, str, str]  # when, which database, what


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    target.add_argument("event_id", metavar="EVENT_ID")
    target.add_argument("--json", action="store_true", help="print JSON")
    asking.add_databases(target)


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Print what is known of an event; return 1 when nothing is, or a database is away."""
    lives: dict[str, Life] = {}
    unseen: list[str] = []
    failed = False
    async with (
        asking.databases(settings, given, "outbox trace") as engines,
        asking.broker(settings, "outbox-trace") as client,
    ):
        if isinstance(client, str):
            unseen.append(f"the stream: {client}")
        for name, engine in engines.items():
            try:
                known = None if isinstance(client, str) else client
                lives[name] = await trace(
                    engine, settings.schema_name, given.event_id, client=known
                )
            except OutboxError as error:
                if not name:
                    raise
                failed = True
                unseen.append(f"database {name}: {error}")
    unseen += [_labelled(name, each) for name, life in lives.items() for each in life.unseen]
    found = any(life.found for life in lives.values())
    print(
        _json(given.event_id, lives, unseen)
        if given.json
        else "\n".join(_lines(given.event_id, lives, unseen))
    )
    return options.EXIT_OK if found and not failed else options.EXIT_FAILED


def _labelled(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _json(event_id: str, lives: Mapping[str, Life], unseen: list[str]) -> str:
    databases = {name or "default": dataclasses.asdict(life) for name, life in lives.items()}
    return json.dumps(
        {
            "event_id": event_id,
            "found": any(life.found for life in lives.values()),
            "databases": databases,
            "unseen": unseen,
        },
        indent=2,
        default=str,
    )


def _lines(event_id: str, lives: Mapping[str, Life], unseen: list[str]) -> list[str]:
    moments = sorted(line for name, life in lives.items() for line in _moments(name, life))
    width = max((len(name) for name in lives), default=0)
    lines = [f"event {event_id}"]
    for at, name, what in moments:
        where = f"  {name:<{width}}" if width else ""
        lines.append(f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + f"{where}  {what}")
    now = [_labelled(name, each) for name, life in lives.items() for each in _waits(life)]
    if not moments and not now:
        where = ", ".join(name for name in lives if name) or "this database"
        lines.append(f"nothing is known of it in {where}: outbox, archive, inbox, dead letters")
    return [*lines, *now, *(f"! not seen: {each}" for each in unseen)]


def _moments(name: str, life: Life) -> list[Line]:
    """Return what has happened to it, and when."""
    found: list[Line] = []
    if life.added is not None:
        found.append((life.added["at"], name, _added(life.added)))
    for each in life.published:
        there = f" ({each['on_stream']})" if each["on_stream"] else ""
        text = f"published to {each['stream']} at {each['sequence']}{there}"
        found.append((each["published_at"], name, text))
    for each in life.dead_letters:
        who = each["listener"] or "relay"
        text = f"{who}: given up, {each['reason']} after {each['attempts']}: {each['error']}"
        found.append((each["failed_at"], name, f"{_line(text)} (dead letter {each['id']})"))
        for action in each["history"]:
            note = f": {action['note']}" if action["note"] else ""
            text = f"dead letter {each['id']}: {action['action']} by {action['by']}{note}"
            found.append((action["at"], name, _line(text)))
    for each in life.attempts:
        text = (
            f"{each['listener']}: {each['failed']} failures, {each['started']} starts without end"
        )
        found.append((each["updated_at"], name, _line(f"{text}: {each['last_error'] or '-'}")))
    found += [
        (each["processed_at"], name, f"{each['listener']}: {each['outcome']}")
        for each in life.handled
    ]
    found += [
        (each["at"], name, f"caused {each['event_id']}  {each['subject']} (in {each['table']})")
        for each in life.caused
    ]
    return found


def _added(added: Mapping[str, Any]) -> str:
    parts = [f"added  {added['subject']}"]
    for label, value in (
        ("key", added["key"]),
        ("from", added["service"]),
        ("correlation", added["correlation_id"]),
        ("caused by", added["causation_id"]),
    ):
        if value is not None:
            parts.append(f"{label} {value}")
    return ", ".join([*parts, f"{added['bytes']:,} bytes"])


def _waits(life: Life) -> list[str]:
    """Return where it is now, if it is on its way."""
    found: list[str] = []
    for each in life.waits:
        if each["table"] == "pending":
            later = f", not before {each['deliver_at']}" if each["deliver_at"] else ""
            found.append(f"is pending{later}")
        else:
            error = f": {each['last_error']}" if each["last_error"] else ""
            text = f"waits ({each['reason']}), {each['attempts']} attempts{error}"
            found.append(_line(text))
    found += [
        f"is in the queue of {each['listener']}, delivered {each['delivered']} times"
        for each in life.held
    ]
    found += [
        f"{each['listener']} tries again at {each['next_at'].astimezone(UTC):%H:%M:%S} UTC"
        for each in life.attempts
    ]
    return found


def _line(text: str) -> str:
    return short(text, WIDTH)
