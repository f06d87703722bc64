"""What only servers can tell: asked every few seconds, apart from any scrape."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import OutboxError
from outbox.jetstream.api import Api
from outbox.listener import Listener
from outbox.postgres import counting, schema
from outbox.postgres.counting import Backlog
from outbox.postgres.driver import translated

logger = logging.getLogger(__name__)

INTERVAL = timedelta(seconds=10)  # between two counts of the pending rows
DEADLINE = timedelta(seconds=8)  # of one sample; a slow server does not keep others waiting


@dataclass(frozen=True, slots=True)
class Unread:
    """What the stream holds for one listener."""

    messages: int  # not delivered, or not acked
    retention_ratio: float  # share of the stream's limits that the oldest of them has used up


@dataclass(slots=True)
class Sample:
    """What was seen last. What could not be asked is None or missing, never old."""

    backlog: Backlog | None = None
    database_problem: str | None = "the database was not asked yet"
    unread: dict[str, Unread] = field(default_factory=dict)  # by the listener's identity


class Sampler:
    """Asks the database, on a connection of its own, and the broker for each listener.

    Args:
        engine: None where no database is known; the gauges of the tables are missing then.
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        schema_name: str = "outbox",
        *,
        listeners: Sequence[Listener[Any]] = (),
    ) -> None:
        self._engine = engine
        self._schema = schema_name
        self._listeners = listeners
        self.sample = Sample()
        if engine is None:
            self.sample.database_problem = None

    async def look(self) -> None:
        """Take one sample; what hinders it is in the sample, never raised."""
        await asyncio.gather(self._look_at_tables(), self._look_at_streams())

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # a defect of ours; what is observed goes on
                logger.exception("a sample failed")
            await asyncio.sleep(INTERVAL.total_seconds())

    async def _look_at_tables(self) -> None:
        if self._engine is None:
            return
        try:
            async with asyncio.timeout(DEADLINE.total_seconds()):
                with translated():
                    async with self._engine.connect() as connection:
                        await schema.check_version(connection, self._schema)
                        self.sample.backlog = await counting.backlog(connection, self._schema)
        except (OutboxError, SQLAlchemyError, OSError) as error:  # a TimeoutError is an OSError
            self.sample.backlog = None
            reason = str(error) if isinstance(error, OutboxError) else type(error).__name__
            self.sample.database_problem = f"the database cannot be used: {reason}"
        else:
            self.sample.database_problem = None

    async def _look_at_streams(self) -> None:
        seen: dict[str, Unread] = {}
        for listener in self._listeners:
            with contextlib.suppress(OutboxError, OSError, KeyError, ValueError):
                async with asyncio.timeout(DEADLINE.total_seconds()):
                    seen[listener.identity] = await unread(
                        listener.client, listener.stream, listener.identity
                    )
        self.sample.unread = seen


async def unread(client: Api, stream: str, consumer: str) -> Unread:
    """Return what a consumer has not acked, and how near it is to being dropped.

    Raises:
        ApiError: there is no such consumer or stream.
        BrokerUnavailable: it cannot be asked.
    """
    info = await client.api(f"CONSUMER.INFO.{stream}.{consumer}")
    messages = int(info["num_pending"]) + int(info["num_ack_pending"])
    if not messages:
        return Unread(0, 0.0)
    held = await client.api(f"STREAM.INFO.{stream}")
    config, state = held["config"], held["state"]
    first = max(int(info["ack_floor"]["stream_seq"]) + 1, int(state["first_seq"]))
    ratios = [0.0]
    for limit, used in (("max_msgs", "messages"), ("max_bytes", "bytes")):
        most = int(config.get(limit) or 0)
        behind = (int(state["last_seq"]) - first + 1) / max(int(state["messages"]), 1)
        if most > 0:
            ratios.append(behind * int(state[used]) / most)
    max_age = int(config.get("max_age") or 0) / 1e9
    if max_age > 0:
        stored = await client.api(f"STREAM.MSG.GET.{stream}", _next(info["config"], first))
        age = datetime.now(UTC) - datetime.fromisoformat(str(stored["message"]["time"]))
        ratios.append(max(age.total_seconds(), 0.0) / max_age)
    return Unread(messages, max(ratios))


def _next(config: dict[str, Any], first: int) -> dict[str, Any]:
    """Return the request for the first message from `first` on that the consumer takes."""
    subject = config.get("filter_subject") or ">"
    return {"seq": first, "next_by_subj": subject}
