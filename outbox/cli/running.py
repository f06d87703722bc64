"""How every command runs: its errors become one line and an exit code."""

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from typing import Any

from outbox.cli.options import EXIT_FAILED, EXIT_USAGE
from outbox.errors import BrokerUnavailable, ConfigurationError, OutboxError
from outbox.jetstream.client import JetStreamClient

logger = logging.getLogger(__name__)
CONNECT_PAUSE = 1.0
_INTERRUPTED = 130


def finish(work: Coroutine[Any, Any, int]) -> int:
    """Run `work` to its end; return its exit code, or that of its error."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OutboxError as error:
        return report(error)


def report(error: OutboxError) -> int:
    """Print the error as one line on stderr; return its exit code."""
    reason = " ".join(str(error).split())
    print(f"outbox: {reason or type(error).__name__}", file=sys.stderr)
    return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILED


async def connect(client: JetStreamClient, asked: asyncio.Event) -> bool:
    """Connect, however long the broker is out; return False when asked to stop before."""
    while not asked.is_set():
        try:
            await client.connect()
        except BrokerUnavailable as error:
            logger.warning("waiting for NATS", extra={"reason": str(error)})
            await _pause(asked)
        else:
            return True
    return False


async def _pause(asked: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(CONNECT_PAUSE):
            await asked.wait()
    except TimeoutError:
        return
