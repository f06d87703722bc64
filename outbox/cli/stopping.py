"""Signals: the first SIGTERM or SIGINT stops softly, a second one at once."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence

from outbox.lifecycle import Worker
from outbox.settings import Settings

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals() -> Iterator[asyncio.Event]:
    """Lend an event that the first signal sets; a second one ends the process at once."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def arrived(number: signal.Signals) -> None:
        if asked.is_set():
            os._exit(128 + number)  # nothing that hangs may hold it up
        logger.info("stopping", extra={"signal": number.name})
        asked.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, arrived, number)
    try:
        yield asked
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def serve(workers: Sequence[Worker], settings: Settings, asked: asyncio.Event) -> None:
    """Run all workers until `asked`, or until one ends; then stop the others softly.

    Raises:
        OutboxError: a worker failed for good.
    """
    running = [asyncio.create_task(worker.run(), name=worker.name) for worker in workers]
    waiting = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait({*running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        stops = (worker.stop(grace=settings.grace) for worker in workers)
        await asyncio.gather(*stops, return_exceptions=True)  # `run` raises the same errors
        await asyncio.wait(running)
    # Every error is looked at, or asyncio would log the others with their tracebacks.
    errors = [task.exception() for task in running if not task.cancelled()]
    for error in filter(None, errors):
        raise error
