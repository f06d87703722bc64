"""Faults at a step: a worker fails there as if its process had died."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from outbox.listener import Listener
from outbox.relay import Relay
from outbox.telemetry import Moment, Step


class InjectedFault(Exception):  # noqa: N818 - a fault is what it is
    """What `fail_at` raises at a step."""


@contextmanager
def fail_at(
    worker: "Relay | Listener[Any]",
    step: Step | str,
    *,
    error: BaseException | None = None,
    times: int = 1,
) -> Iterator[None]:
    """Make `worker` fail when it takes `step`, the first `times` times inside the block.

    What came before the step is done, what follows it is not, as after a crash. A relay ends with
    the error, and publishes the page again when it is started once more. A listener rolls back up
    to `committed`; from there on the effect stays, and the message comes again all the same.

    Args:
        step: of a relay `read`, `sent`, `confirmed`, `settling` or `settled`; of a listener
            `received`, `recorded`, `handled`, `flushed`, `committed` or `acked`.
        error: default: an `InjectedFault` that names the step.

    Raises:
        AssertionError: the block ended and the worker never took the step.
    """
    wanted = Step(step)
    source = worker.identity if isinstance(worker, Listener) else "relay"
    observer = worker.observer
    told, left = observer.on_step, times

    def on_step(moment: Moment) -> None:
        nonlocal left
        told(moment)
        if left > 0 and moment.step is wanted and moment.source == source:
            left -= 1
            raise error or InjectedFault(f"at {wanted}")

    observer.on_step = on_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        observer.on_step = told  # type: ignore[method-assign]
    if left == times:
        raise AssertionError(f"{worker.name} never took the step {wanted}")
