"""`outbox tail`: events as they are published, until Ctrl-C."""

import argparse
import asyncio
import json
from asyncio import Event
from collections.abc import AsyncIterator
from datetime import datetime

from outbox.cli import options
from outbox.cli.running import connect
from outbox.cli.stopping import signals
from outbox.cli.values import moment
from outbox.jetstream.client import JetStreamClient
from outbox.operate.tail import Seen, tail
from outbox.settings import Settings


def add_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    target.add_argument("--subject", default=">", metavar="SUBJECT", help="NATS wildcards: evt.>")
    target.add_argument("--key", metavar="KEY", help="events of one key only")
    target.add_argument("--since", type=moment, metavar="TIME", help="begin in the past")
    target.add_argument("--count", type=int, metavar="N", help="end after so many")
    target.add_argument("--payload", action="store_true", help="show bodies; they may hold secrets")
    target.add_argument("--json", action="store_true", help="print one JSON object a line")


async def show(settings: Settings, given: argparse.Namespace) -> int:
    """Print events until stopped; a broker that is away is waited for."""
    client = JetStreamClient.from_settings(settings, name="outbox-tail")
    try:
        with signals() as asked:
            printing = asyncio.create_task(_print(client, settings, given, asked))
            stopped = asyncio.create_task(asked.wait())
            await asyncio.wait({printing, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in (printing, stopped):
                task.cancel()
            await asyncio.wait({printing, stopped})
            if not printing.cancelled():
                printing.result()
    finally:
        await client.close()
    return options.EXIT_OK


async def _print(
    client: JetStreamClient, settings: Settings, given: argparse.Namespace, asked: Event
) -> None:
    if not await connect(client, asked):
        return
    events = tail(client, settings.stream, subject=given.subject, since=given.since)
    left = given.count
    async for event in _of_key(events, given.key):
        print(_json(event, given) if given.json else _line(event, given), flush=True)
        left = None if left is None else left - 1
        if left is not None and left <= 0:
            return


async def _of_key(events: AsyncIterator[Seen], key: str | None) -> AsyncIterator[Seen]:
    async for event in events:
        if key is None or event.key == key:
            yield event


def _line(event: Seen, given: argparse.Namespace) -> str:
    time = _time(event.stored_at)
    key = "" if event.key is None else f"  key {event.key}"
    source = "" if event.source_service is None else f"  from {event.source_service}"
    line = f"{time}  {event.sequence:>8}  {event.subject}  {event.event_id or '-'}{key}{source}"
    shown = ascii(event.body.decode(errors="backslashreplace"))[1:-1] if given.payload else ""
    return f"{line}\n    {shown}" if shown else line


def _json(event: Seen, given: argparse.Namespace) -> str:
    found = {
        "time": _time(event.stored_at),
        "sequence": event.sequence,
        "subject": event.subject,
        "key": event.key,
        "event_id": event.event_id,
        "source_service": event.source_service,
        "correlation_id": event.correlation_id,
    }
    if given.payload:
        found["body"] = event.body.decode(errors="backslashreplace")
    return json.dumps(found)


def _time(moment_: datetime) -> str:
    return moment_.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
