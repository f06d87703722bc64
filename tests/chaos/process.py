"""How every process of a run begins and ends."""

import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import JetStreamClient, Settings
from tests.chaos.failpoints import Failing
from tests.chaos.shared import (
    LEASE_SECONDS,
    STREAM,
    Failpoint,
    Journal,
    Orders,
    die_with_parent,
)
from tests.mutants import applying

logger = logging.getLogger(__name__)
Main = Callable[[Orders, Journal, Failing, asyncio.Event], Awaitable[None]]


def run(main: str, orders: Orders) -> None:
    """Run `module:function` as the whole process; SIGTERM asks it to stop.

    SIGUSR2 has it read a failpoint, SIGUSR1 forget it.
    """
    die_with_parent()
    log = os.open(orders.folder / f"{orders.role}-{orders.index}.log", os.O_CREAT | os.O_APPEND | 1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    if orders.mutant:
        applying.apply(orders.mutant)
    module, name = main.split(":")
    function: Main = getattr(importlib.import_module(module), name)
    sys.exit(asyncio.run(_life(function, orders)))


async def _life(function: Main, orders: Orders) -> int:
    journal = Journal(orders.folder)
    failing = Failing(orders.role, orders.failpoint, journal)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asked.set)
    loop.add_signal_handler(signal.SIGQUIT, _show_tasks)
    loop.add_signal_handler(signal.SIGUSR1, failing.arm, None)
    loop.add_signal_handler(signal.SIGUSR2, lambda: failing.arm(Failpoint.load(orders.told)))
    journal.note("started", role=orders.role, index=orders.index)
    try:
        await function(orders, journal, failing, asked)
    except Exception:  # what a failpoint raises ends the process; whoever runs the run starts anew
        logger.exception("the process failed")
        return 1
    journal.note("ended", role=orders.role, index=orders.index)
    return 0


def _show_tasks() -> None:
    """Write what every task waits for into the log."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)


def engine(orders: Orders, database: str, *, pool: int = 5) -> AsyncEngine:
    """Return an engine on one of the run's databases, through the role's proxy."""
    return create_async_engine(
        orders.urls[database],
        pool_size=pool,
        max_overflow=5,
        pool_pre_ping=True,
        pool_timeout=5,
        connect_args={
            "timeout": 3,
            "command_timeout": 5,
            "server_settings": {"application_name": f"{orders.role}-{os.getpid()}"},
        },
    )


def client(orders: Orders) -> JetStreamClient:
    """Return a client through the role's proxy."""
    return JetStreamClient(orders.urls["nats"])


def settings(**more: object) -> Settings:
    """Return settings with the short times of a run."""
    return Settings.defaults(
        stream=STREAM,
        lease=LEASE_SECONDS,
        publish_timeout=1.0,
        grace=5.0,
        publish_attempts_max=3,
        **more,
    )
