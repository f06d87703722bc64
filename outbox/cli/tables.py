"""`outbox migrate` and `outbox status`: what needs the database only."""

import argparse
import json
from typing import Any

from outbox.cli import options
from outbox.operate.status import status
from outbox.postgres import schema
from outbox.postgres.driver import translated
from outbox.settings import Settings


async def migrate(settings: Settings, given: argparse.Namespace) -> int:
    """Bring the tables to this package's version, or print the script that does."""
    name = settings.schema_name
    if given.sql:
        print(schema.offline_sql(name))
        return options.EXIT_OK
    engine = options.engine(settings, "outbox migrate", timeout=schema.LOCK_WAIT * 10)
    try:
        with translated():
            await schema.upgrade(engine, schema=name)
    finally:
        await engine.dispose()
    print(f"schema {name} is at version {schema.head()}")
    return options.EXIT_OK


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Print how the outbox does."""
    engine = options.engine(settings, "outbox status")
    try:
        found = await status(engine, settings.schema_name)
    finally:
        await engine.dispose()
    print(json.dumps(found, indent=2) if given.json else _table(found))
    return options.EXIT_OK


def _table(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if name in {"lanes", "estimated"}:
            continue
        about = "about " if name in found["estimated"] else ""
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"{name:<24}{about}{shown}")
    for lane in found["lanes"]:
        owner = lane["owner"] or "nobody"
        state = "alive" if lane["alive"] else "not alive"
        lines.append(f"lane {lane['lane']:<19}{owner}, {state}, epoch {lane['epoch']}")
        if lane["no_ack_seconds"] is not None:
            why = f": {lane['hindrance']}" if lane["hindrance"] else ""
            lines.append(f"{'':<24}no ack for {lane['no_ack_seconds']:.0f} s{why}")
    return "\n".join(lines)
