"""`outbox dev` and `outbox demo`: everything on one machine, without a server installed."""

import argparse
import contextlib
import logging
from pathlib import Path

from outbox.cli import options
from outbox.cli.stopping import signals
from outbox.demo.show import show
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.jetstream.provisioning import ensure_stream
from outbox.postgres import schema
from outbox.settings import Settings

EVENTS_MIN = 500  # fewer are published before the relay can be killed amid work


async def dev(settings: Settings, given: argparse.Namespace) -> int:
    """Run both servers until Ctrl-C, with tables and stream made."""
    home: Path | None = given.directory
    async with contextlib.AsyncExitStack() as stack:
        asked = stack.enter_context(signals())
        postgres = EmbeddedPostgres(home / "postgres" if home else None)
        nats = EmbeddedNats(home / "nats" if home else None)
        stack.enter_context(postgres)
        stack.enter_context(nats)
        changes = {"database_url": postgres.url, "nats_url": nats.url}
        own = Settings.from_environment(**{**_named(settings), **changes})
        engine = options.engine(own, "outbox dev", timeout=schema.LOCK_WAIT * 10)
        stack.push_async_callback(engine.dispose)
        await schema.upgrade(engine, schema=own.schema_name)
        async with JetStreamClient(nats.url) as client:
            subjects = [f"{prefix}>" for prefix in own.subject_prefixes]
            await ensure_stream(client, own.stream, [*subjects, "dlq.>"])
        print(f"PostgreSQL   {postgres.url}\nnats-server  {nats.url}\n")
        print(f"export OUTBOX_DATABASE_URL={postgres.url}\nexport OUTBOX_NATS_URL={nats.url}\n")
        print("Ctrl-C ends both.", flush=True)
        await asked.wait()
    return options.EXIT_OK


async def demo(settings: Settings, given: argparse.Namespace) -> int:
    """Show that killed relays and repeated messages leave every effect exactly once."""
    del settings
    if given.events < EVENTS_MIN:
        raise ConfigurationError(f"--events must be at least {EVENTS_MIN}")
    logging.getLogger().setLevel(logging.ERROR)  # its own lines tell the story
    with signals() as asked:
        return await show(asked, events=given.events)


def _named(settings: Settings) -> dict[str, str]:
    return {"schema_name": settings.schema_name, "stream": settings.stream}
