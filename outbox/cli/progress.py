"""How a drain is shown: a bar on a terminal, plain lines elsewhere."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from outbox.relay.drain import Progress, Report

LINE_SECONDS = 1.0


@contextmanager
def shown() -> Iterator[Report]:
    """Lend what shows the progress of a drain."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Report]:
    rich = importlib.import_module("rich.progress")
    columns = (
        rich.TextColumn("published"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}/s"),
        rich.TimeRemainingColumn(),
    )
    began = time.monotonic()
    with rich.Progress(*columns) as bar:
        task = bar.add_task("drain", total=None, rate="0")

        def report(found: Progress) -> None:
            rate = f"{_rate(found, began):,.0f}"
            bar.update(task, completed=found.published, total=found.total, rate=rate)

        yield report


def _lines() -> Report:
    began = time.monotonic()
    last = 0.0

    def report(found: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last, rate = now, _rate(found, began)
        left = f", {(found.total - found.published) / rate:.0f} s left" if rate else ""
        print(f"published {found.published} of {found.total}, {rate:.0f}/s{left}", flush=True)

    return report


def _rate(found: Progress, began: float) -> float:
    return found.published / max(time.monotonic() - began, 0.001)
