"""`outbox doctor`: what could break the promise, and what mends it."""

import argparse
import dataclasses
import json
from asyncio import Event

from outbox.cli import options
from outbox.cli.running import connect
from outbox.findings import Finding, Severity
from outbox.jetstream.client import JetStreamClient
from outbox.operate.doctor import examine
from outbox.settings import Settings


async def doctor(settings: Settings, given: argparse.Namespace) -> int:
    """Examine, and print what was found; return 1 when something breaks the promise."""
    engine = options.engine(settings, "outbox doctor")
    client = JetStreamClient.from_settings(settings, name="outbox-doctor")
    try:
        await connect(client, Event())
        found = await examine(engine, client, settings, monitor=given.monitor)
    finally:
        await client.close()
        await engine.dispose()
    if given.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        print(_text(found))
    broken = any(each.severity is Severity.ERROR for each in found)
    return options.EXIT_FAILED if broken else options.EXIT_OK


def _text(found: list[Finding]) -> str:
    lines = [
        f"{each.severity:<8}{each.what}\n{'':8}why:  {each.why}\n{'':8}mend: {each.mend}"
        for each in found
    ]
    worst = sum(each.severity is Severity.ERROR for each in found)
    lines.append(f"{worst} findings break the promise" if worst else "nothing breaks the promise")
    return "\n".join(lines)
