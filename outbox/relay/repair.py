"""The confirm window: what the broker lost after it acknowledged is noticed and sent again.

`last_seq` proves nothing in a stream that other services write to. What proves is the message at
the sequence of our own newest archived event: another one there, or none where the stream should
have one, means that the stream lost its tail. Below `first_seq` it is expiry, limits or a purge,
and a hole inside is a deletion; both are other people's decisions, and `outbox verify` tells of
them.
"""

import base64
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from enum import Enum

from outbox.errors import BrokerUnavailable
from outbox.jetstream import provisioning, publishing
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.jetstream.provisioning import StreamFacts
from outbox.postgres import confirming
from outbox.postgres.confirming import Archived
from outbox.postgres.driver import Driver
from outbox.relay.lease import LaneLost, Lease
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)
CHECK = timedelta(minutes=1)
SECOND_LOOK = 2.0  # seconds; a miss counts only when the leader says it twice
RECREATED_WITHIN = 2 * CHECK  # what may have been published to a new stream before it was noticed
TAIL = "the stream lost it after it was acknowledged"
RECREATED = "the stream was created anew"


class Standing(Enum):
    """What the stream holds where an archived event should be."""

    STANDS = "stands"
    LOST = "lost"
    EXPIRED = "expired"  # below first_seq: expiry, limits, or a purge
    DELETED = "deleted"  # a hole


class Repair:
    """Compares the archive with its streams, for the holder of the lane."""

    def __init__(
        self,
        driver: Driver,
        client: JetStreamClient,
        *,
        schema: str,
        stream: str,
        lease: Lease,
        observer: Observer,
        pause: Callable[[float], Awaitable[bool]],
    ) -> None:
        self._driver = driver
        self._client = client
        self._schema = schema
        self._usual = stream
        self._lease = lease
        self._observer = observer
        self._pause = pause  # returns True when stopping
        self._checked_at: float | None = None

    def is_due(self) -> bool:
        """Return whether a minute has passed since the last check."""
        return (
            self._checked_at is None or time.monotonic() - self._checked_at >= CHECK.total_seconds()
        )

    async def check(self) -> bool:
        """Move what the streams have lost to `waiting`; return False when a stop cut it short.

        Nothing may be published or settled meanwhile, nor after a check that was cut short: what
        is published stands above what was lost, and hides it.

        Raises:
            BrokerUnavailable: nobody could tell; nothing was moved.
            DatabaseUnavailable: what was not moved is found again by the next check.
            LaneLost: another relay checks.
        """
        archived = await confirming.streams(self._driver, self._schema)
        for stream in dict.fromkeys([self._usual, *archived]):
            if not await self._check_stream(stream):
                return False
        self._checked_at = time.monotonic()
        return True

    async def _check_stream(self, stream: str) -> bool:
        """Check one stream; the database is read first, so that the stream knows of its rows."""
        newest = await confirming.newest(self._driver, self._schema, stream)
        before = await confirming.seen(self._driver, self._schema, stream)
        facts = await self._facts(stream)
        if facts is None:
            return True
        if before is None:
            await self._note(stream, facts, before)
        elif before != facts.created:
            await self._recreated(stream, facts, before)
            return True
        if newest is None or await self._standing(stream, facts, newest) is not Standing.LOST:
            return True
        if await self._pause(SECOND_LOOK):
            return False
        facts = await self._facts(stream)
        if facts is not None and await self._standing(stream, facts, newest) is Standing.LOST:
            survivor = await self._survivor(stream, facts, newest)
            await self._lose(stream, above=survivor, error=TAIL)
        return True

    async def _facts(self, stream: str) -> StreamFacts | None:
        """Return what the broker says of the stream; None when it is gone and was not the usual."""
        try:
            info = await self._client.api(f"STREAM.INFO.{stream}")
        except ApiError as error:
            if error.err_code == provisioning.STREAM_NOT_FOUND and stream != self._usual:
                return None
            raise BrokerUnavailable(f"stream {stream}: {error}") from error
        return StreamFacts(stream, info["config"], info["state"], str(info["created"]))

    async def _standing(self, stream: str, facts: StreamFacts, row: Archived) -> Standing:
        """Return what the stream's leader holds at the row's sequence."""
        if row.sequence < int(facts.state["first_seq"]):
            return Standing.EXPIRED
        if row.sequence > int(facts.state["last_seq"]):
            return Standing.LOST
        try:
            answer = await self._client.api(f"STREAM.MSG.GET.{stream}", {"seq": row.sequence})
        except ApiError as error:
            if error.err_code == publishing.NOT_FOUND:
                return Standing.DELETED
            raise BrokerUnavailable(f"stream {stream}: {error}") from error
        block = base64.b64decode((answer.get("message") or {}).get("hdrs") or "")
        stands = publishing.carries(block, row.event_id)
        return Standing.STANDS if stands else Standing.LOST

    async def _survivor(self, stream: str, facts: StreamFacts, newest: Archived) -> int:
        """Return a sequence up to which nothing of ours is lost, and beyond which all is."""
        alive, dead = int(facts.state["first_seq"]) - 1, newest.sequence
        while True:
            middle = (alive + dead) // 2
            between = (self._driver, self._schema, stream)
            row = await confirming.above(*between, max(middle, alive), dead)
            row = row or await confirming.below(*between, alive, middle + 1)
            if row is None:
                return alive
            if await self._standing(stream, facts, row) is Standing.LOST:
                dead = row.sequence
            else:
                alive = row.sequence

    async def _recreated(self, stream: str, facts: StreamFacts, before: str) -> None:
        """Take for lost all that was published before the stream was created anew.

        What was published to the new one before this was noticed comes last, and stands.
        """
        rows = await confirming.recent(
            self._driver, self._schema, stream, int(facts.state["last_seq"]), RECREATED_WITHIN
        )
        low, high = 0, len(rows)
        while low < high:
            middle = (low + high) // 2
            if await self._standing(stream, facts, rows[middle]) is Standing.STANDS:
                high = middle
            else:
                low = middle + 1
        first = rows[low] if low < len(rows) else None
        await self._lose(stream, above=0, before=first, max_age=facts.max_age, error=RECREATED)
        await self._note(stream, facts, before, since=first)

    async def _lose(self, stream: str, *, above: int, error: str, **more: object) -> None:
        self._lease.check()
        moved = await confirming.lose(
            self._driver,
            self._schema,
            self._lease.fence,
            stream,
            above=above,
            error=error,
            **more,  # type: ignore[arg-type]
        )
        if moved is None:
            raise LaneLost("another relay took the lane")
        if moved:
            logger.error(
                "the broker has lost events that it had acknowledged; they are published again",
                extra={"stream": stream, "count": moved, "reason": error},
            )
            self._observer.on_step(Moment(Step.REPAIRED, "relay", count=moved, reason=error))

    async def _note(
        self, stream: str, facts: StreamFacts, before: str | None, *, since: Archived | None = None
    ) -> None:
        await confirming.note(
            self._driver,
            self._schema,
            self._lease.fence,
            stream,
            created=facts.created,
            before=before,
            since=None if since is None else since.published_at,
        )
