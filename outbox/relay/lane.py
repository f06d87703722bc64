"""The work of the relay that holds a lane: read, publish, settle, each page beside its neighbours.

Two pages may be in flight while a third is read and the one before them is settled. Of a key that
is in both flights the later page sends nothing before the earlier one has ended, so that a key is
never in flight twice.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import tracing
from outbox.errors import BrokerUnavailable
from outbox.jetstream import provisioning
from outbox.jetstream.client import ApiError, JetStreamClient
from outbox.jetstream.provisioning import StreamFacts
from outbox.jetstream.publishing import AckInbox
from outbox.postgres import driver, pending
from outbox.postgres.driver import Driver
from outbox.postgres.pending import Read, Row
from outbox.relay.caution import AT_ONCE, Caution, Suspicion
from outbox.relay.flight import Flight
from outbox.relay.floor import Floor
from outbox.relay.held import Blocked, HeldRows
from outbox.relay.lease import Lease
from outbox.relay.outage import Outage
from outbox.relay.page import Page, State
from outbox.relay.repair import Repair
from outbox.relay.settling import Settled, Settler
from outbox.relay.verdict import DeadReason
from outbox.settings import OnDead, Settings
from outbox.telemetry import FailureClass, Moment, Observer, Step

logger = logging.getLogger(__name__)
SWEEP = timedelta(seconds=30)
IDLE_FIRST = 0.002
WAITING_CHECK = 0.5
STREAMS_MAX = 1000  # subjects whose stream is remembered


@dataclass(slots=True)
class Air:
    """A page of `pending` in flight."""

    flight: Flight
    task: asyncio.Task[None]
    number: int  # of the page
    last: int  # its highest id
    partial: bool = False  # rows of the page were left out


class Lane:
    """Publishes the rows of one lane until stopped, or until an error ends the session."""

    def __init__(
        self,
        engine: AsyncEngine,
        client: JetStreamClient,
        *,
        settings: Settings,
        observer: Observer,
        lease: Lease,
        wake: asyncio.Event,
        stopping: asyncio.Event,
        broker: Outage,
    ) -> None:
        self._engine = engine
        self._client = client
        self._settings = settings
        self._schema = settings.schema_name
        self._parks = settings.on_dead is OnDead.PARK_KEY
        self._observer = observer
        self._lease = lease
        self._wake = wake
        self._stopping = stopping
        self._broker = broker
        self._inbox = AckInbox(client)
        self._floor = Floor()
        self._blocked = Blocked()
        self._in_flight: dict[int, list[int]] = {}  # page number: its ids, read and not settled
        self._reading: asyncio.Task[tuple[int, Read]] | None = None
        self._air: Air | None = None
        self._settling: asyncio.Task[None] | None = None
        self._token = 0
        self._facts_of = -1  # the connection on which the stream was asked for its limits
        self._subjects_limited = False
        self._trusted = -1  # the connection on which the streams were found to hold all
        self._close_seen = -1  # the connection whose close was taken note of
        self._streams: dict[str, str] = {}
        self._pending = Caution()
        self._waiting = Caution()
        self._suspicion = Suspicion()
        self._swept = time.monotonic()
        self._owes = False  # rows of `waiting` are due, and the broker did not answer
        self.below_floor = 0  # rows that were found below the floor; must stay 0
        self.acked_at: float | None = None  # monotonic
        self.unanswered_since: float | None = None

    async def run(self) -> None:
        """Work until `stopping` is set; nothing is in flight afterwards.

        Raises:
            LaneLost: the lease has run out or was taken.
            DatabaseUnavailable: begin again with new connections.
        """
        async with self._connections() as (reader, settler):
            held = HeldRows(reader, self._settings, self._blocked)
            await held.load()
            repair = self._make_repair(reader)
            checked = 0.0
            idle = IDLE_FIRST
            try:
                while not self._stopping.is_set():
                    self._lease.check()
                    if self._is_wary() or not self._inbox.current:
                        await self._land(settler)
                    if not await self._broker_ready() or not await self._confirmed(repair, settler):
                        continue
                    if time.monotonic() - checked >= WAITING_CHECK or self._blocked.released:
                        await self._land(settler)
                        await self._settled()
                        await self._reader_free()
                        await self._publish_held(held, settler)
                        checked = time.monotonic()
                    if await self._publish_pending(reader, settler):
                        idle = IDLE_FIRST
                    else:
                        idle = await self._rest(idle)
                await self._land(settler)
                await self._settled()
            finally:
                await self._end_tasks()
                await self._inbox.close()

    @asynccontextmanager
    async def _connections(self) -> AsyncIterator[tuple[Driver, Settler]]:
        async with (
            driver.connection(self._engine) as (_, reader),
            driver.connection(self._engine, asynchronous=True) as (_, writer),
        ):
            yield (
                reader,
                Settler(
                    writer,
                    schema=self._schema,
                    lease=self._lease,
                    archive=self._settings.archive_retention is not None,
                    observer=self._observer,
                ),
            )

    async def _broker_ready(self) -> bool:
        """Return whether frames can be sent; wait a little when not."""
        try:
            await self._inbox.open()
            if self._is_wary():
                await self._inbox.probe()  # a close after this answers what is sent next
        except BrokerUnavailable as error:
            self._suspicion.clear()
            await self._back_off(str(error))
            return False
        return True

    def _is_wary(self) -> bool:
        """Return whether the connection closed lately with events in flight."""
        return bool(self._pending.closes or self._waiting.closes or self._suspicion.hang_ups)

    async def _back_off(self, reason: str) -> None:
        await self._settled()
        await self._discard_read()
        self.unanswered_since = self.unanswered_since or time.monotonic()
        self._trusted = -1
        delay = self._broker.failed(self._client.last_error or reason)
        await self._pause(delay.total_seconds())

    def _make_repair(self, reader: Driver) -> Repair:
        return Repair(
            reader,
            self._client,
            schema=self._schema,
            stream=self._settings.stream,
            lease=self._lease,
            observer=self._observer,
            pause=self._pause,
        )

    async def _confirmed(self, repair: Repair, settler: Settler) -> bool:
        """Return whether the streams hold what they acknowledged, or it is on its way again.

        Looked at once a minute, and after each (re)connect and outage before anything is published.
        """
        if self._settings.archive_retention is None:
            return True
        if self._trusted == self._inbox.generation and not repair.is_due():
            return True
        await self._land(settler)
        await self._settled()
        await self._reader_free()
        try:
            if not await repair.check():
                return False
        except BrokerUnavailable as error:
            await self._back_off(str(error))
            return False
        self._trusted = self._inbox.generation
        return True

    async def _pause(self, seconds: float) -> bool:
        """Sleep, cut short by a stop; return True when stopping."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _rest(self, idle: float) -> float:
        """Sleep until woken, at most the poll interval; return the next time to sleep."""
        await self._settled()
        try:
            async with asyncio.timeout(idle):
                await self._wake.wait()
        except TimeoutError:
            return min(max(idle * 2, 0.005), self._settings.poll_interval_max.total_seconds())
        finally:
            self._wake.clear()
        return IDLE_FIRST

    # --- pending -----------------------------------------------------------------------------

    async def _publish_pending(self, reader: Driver, settler: Settler) -> bool:
        """Start the next page, and land the one before; return False when there is neither."""
        task = self._reading or asyncio.create_task(self._read(reader))
        self._reading = task
        number, read = await task
        self._reading = None
        if not read.rows:
            landed = await self._land(settler)
            if not landed and not self._owes:  # nothing waits for an ack
                self.unanswered_since = None
                self._broker.over()
            return landed
        self._observer.on_step(Moment(Step.READ, "relay", count=len(read.rows)))
        cap = self._pending.cap
        rows = read.rows[:cap] if cap else read.rows
        if cap:
            await self._land(settler)  # what closes the connection must fly alone
        else:
            self._reading = asyncio.create_task(self._read(reader))
        before = self._air
        busy = frozenset[str]() if before is None else before.flight.page.keys
        flight = await self._prepared(Page(rows, self._blocked.keys, busy, parks=self._parks))
        self._air = Air(
            flight,
            asyncio.create_task(self._fly(flight, self._pending), name=f"page {number}"),
            number,
            read.rows[-1].id,
            partial=len(rows) < len(read.rows),
        )
        if before is not None:
            outage = await self._landed(settler, before, following=self._air)
            if outage is not None:
                await self._land(settler, outage)
        if cap:
            await self._land(settler)
            await self._settled()
        return True

    async def _land(self, settler: Settler, outage: str | None = None) -> bool:
        """Wait until nothing is in flight; return False when nothing was.

        Args:
            outage: of the flight before; it is sat out, as is this flight's.
        """
        if self._air is None:
            return False
        outage = await self._landed(settler, self._air) or outage
        self._air = None
        if outage is not None:
            await self._back_off(outage)
        return True

    async def _landed(self, settler: Settler, air: Air, following: Air | None = None) -> str | None:
        """Wait for one flight and begin to settle it; return why it was cut short, if it was.

        Args:
            following: the flight after it, whose deferred rows may go now.
        """
        await air.task
        flight = air.flight
        self._note_blocked(flight)
        if following is not None:
            following.flight.release(self._blocked.keys, outage=flight.outage is not None)
        await self._settled()
        self._settling = asyncio.create_task(self._conclude(settler, air), name="settle")
        if flight.outage is not None:
            await self._settled()
        return flight.outage

    async def _read(self, reader: Driver) -> tuple[int, Read]:
        sweep = time.monotonic() - self._swept >= SWEEP.total_seconds()
        floor = self._floor.value
        read = await pending.read(
            reader,
            self._schema,
            floor=0 if sweep else floor,
            in_flight=[each for ids in self._in_flight.values() for each in ids],
            rows_max=self._settings.page_rows_max,
            bytes_max=self._settings.page_bytes_max,
        )
        rows = read.rows
        if sweep:
            self._swept = time.monotonic()
            below = sum(row.id <= floor for row in rows)
            if below:
                self.below_floor += below
                logger.error("rows were found below the floor", extra={"count": below})
        number = self._floor.opened(
            xmin=read.xmin,
            first=rows[0].id if rows else None,
            last=rows[-1].id if rows else None,
            full=read.full,
        )
        if rows:
            self._in_flight[number] = [row.id for row in rows]
        return number, read

    def _note_blocked(self, flight: Flight) -> None:
        """Block the keys of failed rows at once: the next page has been read already."""
        self._blocked.keys |= flight.page.keys_of(State.FAILED)
        if self._parks:
            parked = flight.page.keys_of(State.DEAD)
            self._blocked.keys |= parked
            self._blocked.parked |= parked

    async def _conclude(self, settler: Settler, air: Air) -> None:
        done: Settled = await settler.settle(air.flight, "pending")
        if done.complete and not air.partial:
            self._floor.closed(air.number, barrier=done.barrier, last=air.last)
        else:
            self._floor.reset(air.number)
        self._in_flight.pop(air.number, None)

    async def _settled(self) -> None:
        """Wait until the page before is settled."""
        task, self._settling = self._settling, None
        if task is not None:
            await task

    async def _reader_free(self) -> None:
        """Wait until the page that is read ahead has come; it stays for later."""
        if self._reading is not None:
            await asyncio.wait({self._reading})

    async def _discard_read(self) -> None:
        """Forget a page that was read ahead: it is read again, behind what is unsettled."""
        task, self._reading = self._reading, None
        if task is not None:
            number, _ = await task
            self._floor.reset(number)
            self._in_flight.pop(number, None)

    async def _end_tasks(self) -> None:
        flying = None if self._air is None else self._air.task
        tasks = [task for task in (self._reading, self._settling, flying) if task is not None]
        self._reading = self._settling = self._air = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- waiting -----------------------------------------------------------------------------

    async def _publish_held(self, held: HeldRows, settler: Settler) -> None:
        """Publish what is due of `waiting`."""
        rows, behind = await held.due()
        self._owes = False
        if not rows and not behind:
            return
        if self._waiting.cap:
            rows = rows[: self._waiting.cap]
        page = Page(rows, (), parks=self._parks)
        flight = await self._prepared(page)
        await self._fly(flight, self._waiting)
        held.hold_behind(page, behind)
        await settler.settle(flight, "waiting")
        self._note_blocked(flight)
        await held.refresh({row.key for row in (*rows, *behind) if row.key is not None})
        if flight.outage is not None:
            self._owes = True
            await self._back_off(flight.outage)

    # --- both --------------------------------------------------------------------------------

    async def _prepared(self, page: Page) -> Flight:
        flight = Flight(
            page,
            self._inbox,
            self._client,
            self._settings.stream,
            self._token,
            self._settings.publish_timeout,
            self._settings.publish_attempts_max,
            self._lease.check,
            self._told_sent(),
            streams=await self._streams_of(page.rows),
            limits_subjects=await self._limits_subjects(),
        )
        self._token += len(page.rows)
        return flight

    async def _fly(self, flight: Flight, caution: Caution) -> None:
        """Send the page, wait for its acks, and find out what their absence means."""
        self.unanswered_since = self.unanswered_since or time.monotonic()
        with tracing.publishing(self._settings.stream, flight.page.rows):
            await flight.run()
        refused = self._inbox.refused  # while the error is known: a new connection forgets it
        at_once = flight.sent_at is not None and time.monotonic() - flight.sent_at <= AT_ONCE
        disconnected = flight.outage is not None and not flight.connected
        await self._explain_full(flight)
        await self._explain(flight)
        if disconnected:
            self._watch_close(flight, caution, refused=refused, at_once=at_once)
        elif flight.outage is None:
            caution.passed(self._settings.page_rows_max)
        if not disconnected and any(row.id == self._suspicion.id for row in flight.page.rows):
            self._suspicion.clear()
        self._observer.on_step(Moment(Step.CONFIRMED, "relay", count=len(flight.confirmed)))
        if flight.duplicates:
            self._observer.on_step(Moment(Step.DUPLICATE, "relay", count=flight.duplicates))
        if flight.confirmed or flight.outage is None:
            self.acked_at = time.monotonic()
            self.unanswered_since = self.acked_at if self._inbox.takers else None
        self._tell_failures(flight)
        if flight.outage is None:
            self._broker.over()

    def _tell_failures(self, flight: Flight) -> None:
        unknown = len(flight.page.having(State.UNKNOWN)) if flight.outage is not None else 0
        if not flight.verdicts and not unknown:
            return
        classes = Counter(verdict.failure for verdict in flight.verdicts.values())
        classes[FailureClass.UNAVAILABLE] += unknown
        for failure, count in classes.items():
            if count:
                self._observer.on_step(Moment(Step.FAILED, "relay", count=count, reason=failure))

    def _told_sent(self) -> Callable[[int], None]:
        return lambda count: self._observer.on_step(Moment(Step.SENT, "relay", count=count))

    def _watch_close(
        self, flight: Flight, caution: Caution, *, refused: bool, at_once: bool
    ) -> None:
        """Find the row on which the server closes the connection, by sending fewer at a time.

        The server may hang up before its error line is read; then it looks like a restart, and only
        that it comes at once, each time, after a connection that answered, tells them apart.
        """
        unknown = flight.page.having(State.UNKNOWN)
        if not unknown or flight.sent_at is None or flight.generation == self._close_seen:
            return  # of two pages that one close ended, the first has counted it
        self._close_seen = flight.generation
        caution.closed()
        if len(flight.page.rows) > 1:
            return
        if not at_once:
            self._suspicion.clear()
            return
        row = flight.page.rows[unknown[0]]
        if self._suspicion.hung_up(row.id, refused=refused, closes=caution.closes):
            flight.page.undecided += 1
            flight.fail(
                unknown[0],
                "the server closed the connection on it",
                counted=True,
                reason=DeadReason.CLOSES_CONNECTION,
            )

    async def _explain(self, flight: Flight) -> None:
        """Tell an outage from a subject that no stream takes, or that we may not publish to."""
        if flight.outage is None:
            return
        page = flight.page
        suspects = [i for i in flight.no_responders if page.states[i] is State.UNKNOWN]
        denied = self._client.denied_subjects
        for index in page.having(State.UNKNOWN):
            if page.rows[index].subject in denied:
                page.undecided += 1
                flight.fail(index, "permissions violation", counted=False)
        answers: dict[str, bool] = {}
        for index in suspects:
            subject = page.rows[index].subject
            if subject not in answers and len(answers) < 20:  # noqa: PLR2004 - the rest comes again
                answers[subject] = await self._is_homeless(subject)
            if answers.get(subject) and page.states[index] is State.UNKNOWN:
                page.undecided += 1
                flight.fail(index, f"no stream takes {subject}", counted=False)
        if not page.having(State.UNKNOWN):
            flight.outage = None

    async def _limits_subjects(self) -> bool:
        """Return whether the stream limits single subjects, as it said on this connection."""
        if self._facts_of != self._inbox.generation:
            facts = await self._stream_facts()
            if facts is None:
                return False
            self._facts_of, self._subjects_limited = self._inbox.generation, facts.limits_subjects
        return self._subjects_limited

    async def _stream_facts(self) -> StreamFacts | None:
        """Return what the broker says of the stream, None when it does not say."""
        name = self._settings.stream
        try:
            info = await self._client.api(f"STREAM.INFO.{name}")
        except (BrokerUnavailable, ApiError):
            return None
        return StreamFacts(name, info["config"], info["state"], str(info["created"]))

    async def _explain_full(self, flight: Flight) -> None:
        """Tell a full stream, an outage, from a subject at a limit of its own: only that waits."""
        if not flight.full:
            return
        facts = await self._stream_facts()
        if facts is None or facts.is_full:
            flight.outage = flight.outage or "the stream is full"
            return
        for index in flight.full:
            if flight.page.states[index] is State.UNKNOWN:
                flight.page.undecided += 1
                flight.fail(index, "the stream holds its most of this subject", counted=False)

    async def _is_homeless(self, subject: str) -> bool:
        """Return whether the broker says that no stream of ours takes `subject`."""
        self._streams.pop(subject, None)
        try:
            names = await provisioning.streams_for(self._client, subject)
        except (BrokerUnavailable, ApiError):
            return False
        return not names

    async def _streams_of(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return the stream of each `dlq.` subject that is not the usual one."""
        found: dict[str, str] = {}
        for subject in {row.subject for row in rows if row.subject.startswith("dlq.")}:
            if subject not in self._streams:
                try:
                    names = await provisioning.streams_for(self._client, subject)
                except (BrokerUnavailable, ApiError):
                    continue  # the flight will tell
                if len(self._streams) >= STREAMS_MAX:
                    self._streams.clear()
                usual = self._settings.stream
                self._streams[subject] = usual if usual in names or not names else names[0]
            found[subject] = self._streams[subject]
        return found
