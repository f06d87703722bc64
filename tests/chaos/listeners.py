"""The listeners: one effect row for each event, in a table that would take two."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from typing_extensions import override

from outbox import BatchListener, EventEnvelope, Listener, Outbox, Reject, Retry
from outbox.backoff import Backoff
from tests.chaos import process
from tests.chaos.failpoints import Failing
from tests.chaos.shared import CANARY, STREAM, Journal, Orders, digest

PACKED = "evt.followup.packed.v1"
BACKOFF = Backoff(first=timedelta(seconds=0.1), longest=timedelta(seconds=1))
EFFECT = """
INSERT INTO effects (listener, event_id, key, key_seq, digest, mark, failed)
VALUES (:listener, :event_id, :key, :n, :digest, :mark, :failed)
"""
LEDGER = """
INSERT INTO ledger (event_id, subject, digest, kind)
VALUES (:event_id, :subject, :digest, :kind)
"""
AMNESTY = "SELECT 1 FROM amnesty WHERE event_id = CAST(:event_id AS uuid)"
_events = Outbox("warehouse")


async def apply(session: AsyncSession, listener: str, event: EventEnvelope) -> None:
    """Write the effect of one event, or fail as its kind says, with traces that must not stay."""
    kind = event.data["kind"]
    fails = kind != "ok" and not await _forgiven(session, event, kind)
    mark = event.headers.get("Mark", "")
    found = digest({**event.data, "mark": mark})
    values: dict[str, Any] = {"listener": listener, "event_id": event.event_id}
    values |= {"key": event.key, "n": event.data["n"], "mark": mark}
    values |= {"digest": found, "failed": fails}
    await session.execute(text(EFFECT), values)
    if event.event_type != PACKED and (fails or int(found, 16) % 8 == 0):
        await _follow_up(session, failed=fails)
    if fails:
        await _fail(session, kind)


async def _forgiven(session: AsyncSession, event: EventEnvelope, kind: str) -> bool:
    if kind == "flaky":
        return event.delivery.attempt >= 3
    if kind == "reject":
        values = {"event_id": event.event_id}
        return (await session.scalar(text(AMNESTY), values)) is not None
    return False


async def _follow_up(session: AsyncSession, *, failed: bool) -> None:
    """Add an event of this service's own, in the transaction of the effect."""
    data: dict[str, Any] = {"kind": "failed" if failed else "ok", "n": None, "canary": CANARY}
    event_id = _events.add(session, PACKED, data)
    values = {"event_id": event_id, "subject": PACKED, "kind": data["kind"]}
    await session.execute(text(LEDGER), values | {"digest": digest(data | {"mark": ""})})


async def _fail(session: AsyncSession, kind: str) -> None:
    match kind:
        case "flaky":
            raise Retry("not yet", after=timedelta(seconds=0.1))
        case "reject":
            raise Reject("the business says no")
        case "commits":
            await session.commit()
        case "swallows":
            try:
                await session.execute(text("SELECT 1/0"))
            except DBAPIError:
                return
        case _:
            raise ValueError(kind)


class Plain(Listener):
    """Shares the work between two instances."""

    subject = "evt.order.>"
    queue_group = "plain"
    service_name = "warehouse"
    stream_name = STREAM
    max_attempts = 12
    timeout = timedelta(seconds=8)
    ack_wait = timedelta(seconds=2)
    _backoff: ClassVar[Backoff] = BACKOFF

    @override
    async def on_message(self, session: AsyncSession, event: EventEnvelope) -> None:
        await apply(session, self.identity, event)


class Ordered(Plain):
    """One active instance, one event of a key at a time."""

    queue_group = "ordered"
    ordered = True


class Batch(BatchListener):
    """Takes everything, many in one transaction."""

    subject = "evt.>"
    queue_group = "batch"
    service_name = "warehouse"
    stream_name = STREAM
    max_attempts = 12
    timeout = timedelta(seconds=8)
    ack_wait = timedelta(seconds=2)
    _backoff: ClassVar[Backoff] = BACKOFF

    @override
    async def on_batch(self, session: AsyncSession, events: Sequence[EventEnvelope]) -> None:
        for event in events:
            await apply(session, self.identity, event)


LISTENERS: dict[str, Any] = {"plain": Plain, "ordered": Ordered, "batch": Batch}
SUBJECTS = {
    "warehouse-plain": "evt.order.",
    "warehouse-ordered": "evt.order.",
    "warehouse-batch": "evt.",
}


async def main(orders: Orders, journal: Journal, failing: Failing, asked: asyncio.Event) -> None:
    """Listen until asked to stop."""
    del journal
    engine = process.engine(orders, "warehouse", pool=10)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    async with process.client(orders) as client:
        listener = LISTENERS[orders.listener](
            client, sessions, settings=process.settings(), observer=failing
        )
        run = asyncio.create_task(listener.run())
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait({run, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        await listener.stop()
        await asyncio.wait({run})
    await engine.dispose()
    if not run.cancelled() and (error := run.exception()) is not None:
        raise error
