"""The relay: holds a lane, or stands by for it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from typing_extensions import override

from outbox import findings
from outbox.errors import BrokerUnavailable, ConfigurationError, DatabaseUnavailable
from outbox.jetstream import examining, provisioning
from outbox.jetstream.client import JetStreamClient
from outbox.lifecycle import Worker
from outbox.postgres import driver, schema, wake
from outbox.postgres.driver import Driver
from outbox.relay import upkeep
from outbox.relay.drain import QUIET_LEASES, Drain, Drained, Report
from outbox.relay.health import Health
from outbox.relay.lane import Lane
from outbox.relay.lease import LaneLost, Lease
from outbox.relay.outage import Outage
from outbox.settings import Settings
from outbox.telemetry import Moment, Observer, Step

logger = logging.getLogger(__name__)
LANE = 0  # one lane owns all slots
UPKEEP = timedelta(minutes=1)
STANDBY_CHECKS = 10  # per lease
DRAIN_LOOK = 0.05


class Relay(Worker):
    """Publishes the events of one database to JetStream, at least once, until stopped.

    The engine lends one connection to a standby and three to an active relay; they are closed
    afterwards, not pooled. Several relays of one database share nothing but its tables: one is
    active, the others take over when its lease has ended.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        js_client: JetStreamClient,
        *,
        settings: Settings | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__("outbox-relay")
        self.settings = settings or Settings.defaults()
        self.grace = self.settings.grace
        self._engine = engine
        self._client = js_client
        self.observer = observer or Observer()
        self._lease = Lease(self.settings.schema_name, LANE, self.settings.lease)
        self._wake = asyncio.Event()
        self._lane: Lane | None = None
        self._broker = Outage("broker", self.observer)
        self._database = Outage("database", self.observer)
        # The connection that lease, upkeep and drain share, and who may use it now.
        self._shared: Driver | None = None
        self._turn = asyncio.Lock()

    @override
    def health(self) -> Health:
        """Return how this relay does, without asking anybody."""
        lane, now = self._lane, time.monotonic()
        acked = None if lane is None else lane.acked_at
        unanswered = None if lane is None else lane.unanswered_since
        return Health(
            running=self.running,
            lane_owned=self._lease.held,
            connected=self._client.is_connected,
            last_ack_seconds=None if acked is None else now - acked,
            unanswered_seconds=None if unanswered is None else now - unanswered,
            rows_below_floor=0 if lane is None else lane.below_floor,
            broker_outage=self._broker.reason,
            database_outage=self._database.reason,
        )

    async def drain(self, progress: Report | None = None) -> Drained:
        """Publish what is pending now; return once nothing of it is left, or why it cannot be.

        Beside an active relay it waits for that one's work, and after a dead one for its lease.

        Raises:
            ConfigurationError: settings, schema or stream do not fit.
        """
        patience = max(timedelta(seconds=30), QUIET_LEASES * self.settings.lease)
        watch = Drain(self.settings.schema_name, patience)
        with contextlib.suppress(DatabaseUnavailable):  # the relay waits for it, and tells
            async with driver.connection(self._engine) as (_, raw):
                await watch.look(raw, None)
        await self.start()
        self._awaited = True  # what ends the work is raised here, so it is not logged as well
        try:
            while True:
                end = await self._look(watch, progress)
                if end is not None:
                    return end
                if not self.running:
                    await self.run_out()
                await asyncio.sleep(DRAIN_LOOK)
        finally:
            self._awaited = False
            await self.stop()

    async def run_out(self) -> None:
        """Raise what ended the work for good."""
        await self.stop()
        raise ConfigurationError("the relay was stopped while it drained")

    async def _look(self, watch: Drain, progress: Report | None) -> Drained | None:
        if self._shared is None:
            return watch.unreachable(
                DatabaseUnavailable(self._database.reason or self._broker.reason or "not connected")
            )
        try:
            async with self._turn:
                if self._shared is None:
                    return None
                found, end = await watch.look(self._shared, self._hindrance())
        except DatabaseUnavailable as error:
            return watch.unreachable(error)
        if progress is not None:
            progress(found)
        return end

    def _hindrance(self) -> str | None:
        if not self._lease.held:
            return "the lane is held by another relay, which does not publish"
        return self._broker.reason or self._database.reason

    @override
    async def _live(self) -> None:
        loop = asyncio.get_running_loop()

        def woken() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._wake.set)

        unsubscribe = wake.subscribe(woken)
        stopping = asyncio.create_task(self._wake_at_stop(), name="outbox-relay-stop")
        try:
            await self._check()
            while not self.stopping.is_set():
                try:
                    await self._serve()
                except DatabaseUnavailable as error:
                    await self.pause(self._database.failed(str(error)))
                except LaneLost as error:
                    logger.warning("the lane is lost", extra={"reason": str(error)})
                    self.observer.on_step(Moment(Step.LANE_LOST, "relay", reason=str(error)))
        finally:
            unsubscribe()
            stopping.cancel()
            await asyncio.wait({stopping})

    async def _wake_at_stop(self) -> None:
        await self.stopping.wait()
        self._wake.set()

    async def _check(self) -> None:
        """Refuse to start on what does not fit; wait for servers that are out."""
        await self._retrying(self._check_database, self._database)
        await self._retrying(self._check_stream, self._broker)

    async def _retrying(self, check: Callable[[], Awaitable[None]], outage: Outage) -> None:
        while not self.stopping.is_set():
            try:
                await check()
            except (DatabaseUnavailable, BrokerUnavailable) as error:
                await self.pause(outage.failed(str(error)))
            else:
                outage.over()
                return

    async def _check_database(self) -> None:
        async with driver.connection(self._engine) as (held, raw):
            await driver.refuse_standby(raw)
            with driver.translated():
                await schema.check_version(held, self.settings.schema_name)

    async def _check_stream(self) -> None:
        subjects = [f"{prefix}>" for prefix in self.settings.subject_prefixes]
        if self.settings.create_stream:
            await provisioning.ensure_stream(
                self._client, self.settings.stream, [*subjects, "dlq.>"]
            )
        facts = await provisioning.check_stream(self._client, self.settings.stream, subjects)
        found = [
            *examining.stream(facts.config),
            *examining.version(self._client.server_version),
        ]
        findings.log(logger, found, stream=self.settings.stream)

    async def _serve(self) -> None:
        """Stand by for the lane, then work it; ends with an error, or at a stop."""
        async with self._connected() as (held, shared):
            while not self.stopping.is_set():
                async with self._turn:
                    taken = await self._lease.take(shared)
                self._database.over()
                if not taken:
                    await self.pause(self.settings.lease / STANDBY_CHECKS)
                    continue
                logger.info("took the lane", extra={"epoch": self._lease.epoch})
                self.observer.on_step(Moment(Step.LANE_TAKEN, "relay"))
                await self._work(held, shared)
                async with self._turn:
                    await self._lease.release(shared)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[AsyncConnection, Driver]]:
        async with driver.connection(self._engine) as (held, shared):
            await driver.refuse_standby(shared)
            with driver.translated():
                channel = wake.channel(self.settings.schema_name)
                await shared.add_listener(channel, lambda *_: self._wake.set())
            self._shared = shared
            try:
                yield held, shared
            finally:
                self._shared = None

    async def _work(self, held: AsyncConnection, shared: Driver) -> None:
        """Work the lane while its lease is renewed; whichever fails first ends the other."""
        self._lane = lane = Lane(
            self._engine,
            self._client,
            settings=self.settings,
            observer=self.observer,
            lease=self._lease,
            wake=self._wake,
            stopping=self.stopping,
            broker=self._broker,
        )
        working = asyncio.create_task(lane.run(), name="outbox-lane")
        keeping = asyncio.create_task(self._keep(held, shared), name="outbox-lease")
        both = {working, keeping}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                if not task.done():
                    task.cancel()
            await asyncio.wait(both)
        for task in (working, keeping):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _keep(self, held: AsyncConnection, shared: Driver) -> None:
        """Renew the lease at a third of it, and do the upkeep in between."""
        upkeep_at = time.monotonic()
        while True:
            await asyncio.sleep(self.settings.lease.total_seconds() / 3)
            async with self._turn:
                await self._renew(shared)
            if time.monotonic() >= upkeep_at:
                await self._tend(held, shared)
                upkeep_at = time.monotonic() + UPKEEP.total_seconds()

    async def _renew(self, shared: Driver) -> None:
        seconds = self.health().unanswered_seconds
        await self._lease.renew(
            shared,
            unanswered=None if seconds is None else timedelta(seconds=seconds),
            hindrance=None if self._broker.reason is None else self._broker.reason[:500],
        )

    async def _tend(self, held: AsyncConnection, shared: Driver) -> None:
        """Do the upkeep; what hinders it (a missing privilege, a lock) does not end the relay."""
        try:
            async with self._turn:
                await upkeep.turn_archive(shared, self.settings)
            for _ in range(upkeep.PRUNE_ROUNDS):
                async with self._turn:
                    more = await upkeep.prune_inbox(held, self.settings)
                    await self._renew(shared)
                if not more:
                    break
        except DatabaseUnavailable as error:
            logger.warning("the upkeep failed", extra={"reason": str(error)})
