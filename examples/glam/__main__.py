"""Six GLAM services under faults, and whether every event had exactly its effects.

Run: python -m examples.glam [--merchants 300]
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator

import nats.errors

from examples.glam.stage import FAULTS, LOOK_SECONDS, Stage, set_up
from examples.glam.verdict import COLUMNS, Verdict
from outbox import BrokerUnavailable, OutboxError

INTERRUPTED = 130
# The broker's restart is one of the faults; what could not be done then is done again.
_AWAY = (BrokerUnavailable, nats.errors.Error, TimeoutError)
RICH = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
LINE_SECONDS = 2.0  # between plain lines of progress


async def perform(merchants: int) -> Verdict:
    """Run the services until all is done; return what was found."""
    async with contextlib.AsyncExitStack() as stack:
        print("starting PostgreSQL, nats-server and six services", flush=True)
        stage = await set_up(stack, merchants)
        with contextlib.ExitStack() as shown:
            show = shown.enter_context(_bar(merchants)) if RICH else _plain(stage)
            await _play(stage, show)
        for child in stage.children.values():
            await child.stop()
            child.check()
        return await stage.verdict()


async def _play(stage: Stage, show: Callable[[int, str | None], None]) -> None:
    """Show the progress, and let each fault happen at its time."""
    left = sorted(FAULTS)
    while True:
        with contextlib.suppress(*_AWAY):
            welcomed = await stage.welcomed()
            happened = None
            if left and welcomed >= left[0] * stage.merchants:
                happened = await stage.fault(left[0])
                left.pop(0)
            show(welcomed, happened)
            if not left and await stage.finished():
                return
        await asyncio.sleep(LOOK_SECONDS)


def _plain(stage: Stage) -> Callable[[int, str | None], None]:
    """Return what prints a line now and then, and each fault."""
    printed = 0.0

    def show(welcomed: int, happened: str | None) -> None:
        nonlocal printed
        now = time.monotonic()
        if happened is None and now - printed < LINE_SECONDS:
            return
        printed = now
        what = happened or f"{welcomed} of {stage.merchants} merchants are welcomed"
        print(f"{now - stage.began:5.1f} s  {what}", flush=True)

    return show


@contextlib.contextmanager
def _bar(merchants: int) -> Iterator[Callable[[int, str | None], None]]:
    """Show a bar of welcomed merchants, and the faults above it."""
    with importlib.import_module("rich.progress").Progress() as progress:
        task = progress.add_task("merchants welcomed", total=merchants)

        def show(welcomed: int, happened: str | None) -> None:
            progress.update(task, completed=welcomed)
            if happened is not None:
                progress.console.print(happened)

        yield show


def _report(verdict: Verdict, seconds: float) -> int:
    """Print the table and the verdict; return the exit code."""
    print()
    if RICH:
        table = importlib.import_module("rich.table").Table("service", *COLUMNS)
        for name, numbers in verdict.rows():
            table.add_row(name, *(f"{number:,}" for number in numbers))
        importlib.import_module("rich.console").Console().print(table)
    else:
        print("".join(f"{name:>21}" for name in ("service", *COLUMNS)))
        for name, numbers in verdict.rows():
            print(f"{name:>21}" + "".join(f"{number:>21,}" for number in numbers))
    faults = verdict.faults()
    if faults:
        print(f"\nFAILED after {seconds:.0f} s: {'; '.join(faults)}", flush=True)
        return 1
    print(f"\nOK after {seconds:.0f} s: every committed event had exactly its effects", flush=True)
    return 0


async def _until_asked(merchants: int) -> int:
    """Run until the end, Ctrl-C or SIGTERM; return the exit code."""
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    began = time.monotonic()
    work = asyncio.create_task(perform(merchants))
    stop = asyncio.create_task(asked.wait())
    await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
        return INTERRUPTED
    return _report(work.result(), time.monotonic() - began)


def main() -> int:
    """Run the demo; return its exit code."""
    logging.basicConfig(level=logging.ERROR)  # the outages are of our own making
    parser = argparse.ArgumentParser(prog="python -m examples.glam", description=__doc__)
    parser.add_argument("--merchants", type=int, default=300, metavar="N")
    try:
        return asyncio.run(_until_asked(parser.parse_args().merchants))
    except OutboxError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
