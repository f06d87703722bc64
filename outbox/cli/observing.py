"""Metrics and health of the commands that run workers."""

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from outbox.cli import options
from outbox.lifecycle import Worker
from outbox.observe.serving import serving
from outbox.settings import Settings

if TYPE_CHECKING:
    from outbox.observe.metrics import Metrics


def add_port(
    target: argparse.ArgumentParser, text: str = "serve /metrics, /healthz and /readyz"
) -> None:
    """Add the flag of the port."""
    target.add_argument(
        "--metrics-port",
        dest="metrics_port",
        type=int,
        metavar="PORT",
        help=f"{text} (OUTBOX_METRICS_PORT)",
    )


def observer(settings: Settings, workers: Sequence[Worker] = ()) -> "Metrics | None":
    """Return what workers tell their steps to, when there is a port for it and the extra.

    Args:
        workers: may have theirs already; it is returned then.
    """
    if settings.metrics_port is None:
        return None
    try:
        from outbox.observe.metrics import Metrics  # noqa: PLC0415 - an extra
    except ImportError:
        return None
    told = (getattr(worker, "observer", None) for worker in workers)
    return next((each for each in told if isinstance(each, Metrics)), None) or Metrics()


def instrument() -> None:
    """Trace this process when OpenTelemetry is installed; its own settings say where to."""
    try:
        from outbox.observe import tracing  # noqa: PLC0415 - an extra
    except ImportError:
        return
    tracing.instrument()


@asynccontextmanager
async def observed(
    workers: Sequence[Worker], settings: Settings, metrics: "Metrics | None", name: str
) -> AsyncIterator[None]:
    """Serve metrics and health of `workers` while the block runs, if the settings say so.

    The tables are asked on a connection of its own: what is observed may be out of connections.
    """
    if settings.metrics_port is None:
        yield
        return
    known = bool(settings.database_url.get_secret_value())
    engine = options.engine(settings, f"{name} metrics", size=1) if known else None
    try:
        async with serving(
            workers,
            port=settings.metrics_port,
            host=settings.metrics_host,
            engine=engine,
            schema_name=settings.schema_name,
            metrics=metrics,
        ):
            yield
    finally:
        if engine is not None:
            await engine.dispose()
