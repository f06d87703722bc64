"""The gap alarm: the stream dropped messages that this listener had not read."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from outbox.errors import OutboxError
from outbox.jetstream import examining
from outbox.jetstream.client import JetStreamClient
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)

INTERVAL = timedelta(minutes=1)


class GapWatch:
    """Compares what the stream still has with how far the listener has come.

    The broker moves a consumer's ack floor along with a purge (measured with nats-server 2.15), so
    an operator's purge raises no alarm; dropping by `max_age` or a limit does. A consumer that
    reads only some of the stream's subjects keeps its floor while the others move on: that nothing
    was left to read at some moment is remembered here for the time that follows.
    """

    def __init__(
        self, client: JetStreamClient, stream: str, identity: str, observer: Observer
    ) -> None:
        self._client = client
        self._stream = stream
        self._identity = identity
        self._observer = observer
        self._created = ""
        self._known = 0  # all up to this sequence was read, or was told as a gap

    async def run(self, pause: Callable[[timedelta], Awaitable[bool]]) -> None:
        """Look once a minute until stopped; an outage is somebody else's to tell."""
        while not await pause(INTERVAL):
            with contextlib.suppress(OutboxError):
                await self.look()

    async def look(self) -> int:
        """Return how many messages were newly found dropped unread, at most; tell of them.

        Raises:
            BrokerUnavailable: it cannot be asked.
        """
        before = await self._client.api(f"STREAM.INFO.{self._stream}")
        consumer = await self._client.api(f"CONSUMER.INFO.{self._stream}.{self._identity}")
        after = await self._client.api(f"STREAM.INFO.{self._stream}")
        if before["created"] != after["created"]:
            return 0  # another stream by now; the next look is at that
        self._remember(before, consumer)
        floor = max(self._known, int(consumer["ack_floor"]["stream_seq"]))
        gone = int(after["state"]["first_seq"]) - floor - 1
        if gone <= 0:
            return 0
        self._known = floor + gone
        exact = examining.takes_all(consumer["config"], after["config"])
        logger.error(
            "the stream dropped messages that this listener had not read",
            extra={
                "listener": self._identity,
                "stream": self._stream,
                "count": gone,
                "exact": exact,
                "mend": f"outbox replay --to {self._identity} in each publisher's database",
            },
        )
        self._observer.on_step(Moment(Step.GAP, self._identity, count=gone))
        return gone

    def _remember(self, stream: dict[str, Any], consumer: dict[str, Any]) -> None:
        """Note how far everything was read when `consumer` was asked for."""
        state = stream["state"]
        if stream["created"] != self._created or int(state["last_seq"]) < self._known:
            self._created, self._known = stream["created"], 0
            if not consumer["delivered"]["consumer_seq"]:  # what went before it began is no gap
                self._known = int(state["first_seq"]) - 1
        if not consumer.get("num_pending") and not consumer.get("num_ack_pending"):
            self._known = max(self._known, int(state["last_seq"]))
