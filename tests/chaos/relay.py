"""A relay process: one relay for each database."""

import asyncio

from outbox import Relay
from tests.chaos import process
from tests.chaos.failpoints import Failing
from tests.chaos.shared import Journal, Orders


async def main(orders: Orders, journal: Journal, failing: Failing, asked: asyncio.Event) -> None:
    """Relay both databases until asked to stop; whichever fails ends the process."""
    settings = process.settings(**orders.options)
    engines = [process.engine(orders, name) for name in ("shop", "warehouse")]
    async with process.client(orders) as client:
        relays = [Relay(each, client, settings=settings, observer=failing) for each in engines]
        runs = [asyncio.create_task(relay.run()) for relay in relays]
        stop = asyncio.create_task(asked.wait())
        seen = 0
        while not asked.is_set():
            await asyncio.wait({*runs, stop}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            below = sum(relay.health().rows_below_floor for relay in relays)
            if below > seen:
                seen = below
                journal.note("below_floor", rows=below)
            if any(run.done() for run in runs):
                break
        for relay in relays:
            await relay.stop()
        stop.cancel()
        ended = await asyncio.gather(*runs, return_exceptions=True)
    for each in engines:
        await each.dispose()
    failures = [each for each in ended if isinstance(each, Exception)]
    if failures:
        raise ExceptionGroup("relays failed", failures)
