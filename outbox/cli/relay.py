"""`outbox-relay`: publishes what services have added."""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from outbox.cli import logs, observing, options
from outbox.cli.progress import shown
from outbox.cli.running import connect, finish, report
from outbox.cli.stopping import serve, signals
from outbox.errors import OutboxError
from outbox.jetstream.client import JetStreamClient
from outbox.relay import Relay
from outbox.settings import Settings

EXAMPLES = """  outbox-relay                  relay until SIGTERM; several may run, one is active
  outbox-relay --drain          publish what is pending, then end
  OUTBOX_CREATE_STREAM=true outbox-relay --log-format json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        **options.parser("outbox-relay", "Publishes events of the outbox to JetStream.", EXAMPLES)
    )
    parser.add_argument("--drain", action="store_true", help="end when nothing is pending")
    observing.add_port(parser)
    options.add_flags(parser)
    given = parser.parse_args(arguments)
    try:
        settings = options.settings_of(given)
        logs.configure(settings)
    except OutboxError as error:
        return report(error)
    return finish(_drain(settings) if given.drain else _relay(settings))


async def _relay(settings: Settings) -> int:
    engine = options.engine(settings, "outbox-relay")
    client = JetStreamClient.from_settings(settings, name="outbox-relay")
    try:
        with signals() as asked:
            observing.instrument()
            metrics = observing.observer(settings)
            relay = Relay(engine, client, settings=settings, observer=metrics)
            async with observing.observed([relay], settings, metrics, "outbox-relay"):
                if await connect(client, asked):
                    await serve([relay], settings, asked)
    finally:
        await client.close()
        await engine.dispose()
    return options.EXIT_OK


async def _drain(settings: Settings) -> int:
    engine = options.engine(settings, "outbox-relay --drain")
    try:
        async with JetStreamClient.from_settings(settings, name="outbox-relay") as client:
            relay = Relay(engine, client, settings=settings)
            with shown() as progress, _soft(relay):
                drained = await relay.drain(progress)
    finally:
        await engine.dispose()
    waits = f", {drained.scheduled} scheduled, {drained.backing_off} backing off"
    print(f"published {drained.published}, {drained.remaining} left{waits}", flush=True)
    if drained.reason is None:
        return options.EXIT_OK
    print(f"outbox: not drained: {drained.reason}", file=sys.stderr)
    return options.EXIT_FAILED


@contextmanager
def _soft(relay: Relay) -> Iterator[None]:
    """Stop the relay at the first signal: the drain then says that it was stopped."""
    with signals() as asked:

        async def stop() -> None:
            await asked.wait()
            relay.stopping.set()

        task = asyncio.create_task(stop())
        try:
            yield
        finally:
            task.cancel()


if __name__ == "__main__":
    sys.exit(main())
