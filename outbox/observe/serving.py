"""`/metrics`, `/healthz` and `/readyz` of a process that runs relays and listeners."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.lifecycle import Worker
from outbox.listener import Listener
from outbox.observe.endpoint import Answer, Endpoint, Request
from outbox.observe.readiness import ended, readiness
from outbox.observe.sampling import Sampler

if TYPE_CHECKING:
    from outbox.observe.metrics import Metrics

logger = logging.getLogger(__name__)

MISSING = "prometheus_client is missing; install it with `pip install outbox-jetstream[metrics]`\n"


@asynccontextmanager
async def serving(
    workers: Sequence[Worker],
    *,
    port: int,
    host: str = "0.0.0.0",  # noqa: S104 - probes and scrapes come from other hosts
    engine: AsyncEngine | None = None,
    schema_name: str = "outbox",
    metrics: "Metrics | None" = None,
) -> AsyncIterator[Endpoint]:
    """Answer probes and scrapes for `workers` while the block runs.

    Args:
        port: 0 takes a free one, see `Endpoint.port`.
        engine: is asked for the backlog every ten seconds; None leaves its gauges out.
        metrics: the observer that the workers tell; without it `/metrics` answers 501.

    Raises:
        ConfigurationError: the port cannot be opened.
    """
    listeners = [worker for worker in workers if isinstance(worker, Listener)]
    sampler = Sampler(engine, schema_name, listeners=listeners)
    if metrics is not None:
        metrics.watch(workers, sampler.sample)

    async def healthz(request: Request) -> Answer:
        del request
        over = ended(workers)
        status = HTTPStatus.SERVICE_UNAVAILABLE if over else HTTPStatus.OK
        return _json(status, {"alive": not over, "ended": over})

    async def readyz(request: Request) -> Answer:
        del request
        found = readiness(workers, sampler.sample)
        status = HTTPStatus.OK if found.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _json(status, asdict(found))

    async def scrape(request: Request) -> Answer:
        if metrics is None:
            return Answer(HTTPStatus.NOT_IMPLEMENTED, MISSING.encode(), "text/plain")
        body, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Answer(HTTPStatus.OK, body, content_type)

    routes = {"/metrics": scrape, "/healthz": healthz, "/readyz": readyz}
    async with Endpoint(host, port, routes) as endpoint:
        sampling = asyncio.create_task(sampler.run(), name="outbox-sampler")
        try:
            logger.info("metrics and health", extra={"host": host, "port": endpoint.port})
            yield endpoint
        finally:
            sampling.cancel()
            await asyncio.wait({sampling})


def _json(status: HTTPStatus, found: dict[str, Any]) -> Answer:
    return Answer(status, json.dumps(found, indent=2).encode() + b"\n")
