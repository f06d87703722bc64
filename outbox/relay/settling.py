"""What follows a flight: confirmed rows leave the outbox, failed ones wait, dead ones are kept."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from outbox.backoff import Backoff
from outbox.envelope import added_at
from outbox.postgres import pending, waiting
from outbox.postgres.driver import Driver
from outbox.postgres.pending import Dead, Wait
from outbox.relay.flight import Flight
from outbox.relay.lease import LaneLost, Lease
from outbox.relay.page import State
from outbox.telemetry import Fact, Moment, Observer, Step

_BACKOFF = Backoff()
_MISCONFIGURED = Backoff(first=timedelta(seconds=1), longest=timedelta(minutes=1))
_MISCONFIGURED_MAX = 1000  # subjects remembered


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a page in the database."""

    moved: int
    barrier: int  # xid of the settling statement
    complete: bool  # no row of the page is left where it was read


class Settler:
    """Runs the statements that move rows on; one at a time, on a connection of its own."""

    def __init__(
        self,
        driver: Driver,
        *,
        schema: str,
        lease: Lease,
        archive: bool,
        observer: Observer,
    ) -> None:
        self._driver = driver
        self._schema = schema
        self._lease = lease
        self._archive = archive
        self._observer = observer
        self._misconfigured: dict[str, int] = {}  # subject: failures in a row

    async def settle(self, flight: Flight, source: Literal["pending", "waiting"]) -> Settled:
        """Move every decided row of `flight` on.

        Raises:
            LaneLost: another relay has the lane; it publishes the page again, with the same ids.
            DatabaseUnavailable: what was not moved is published again, with the same id.
        """
        for index in flight.page.having(State.CONFIRMED):
            if not self._misconfigured:
                break
            self._misconfigured.pop(flight.page.rows[index].subject, None)
        self._observer.on_step(Moment(Step.SETTLING, "relay", count=len(flight.confirmed)))
        flight.confirmed.sort()  # locks in id order
        found = await pending.settle(
            self._driver,
            self._schema,
            self._lease.fence,
            flight.confirmed,
            archive=self._archive,
            source=source,
        )
        if found is None:
            raise LaneLost("another relay took the lane")
        moved, barrier = found
        if flight.confirmed:
            facts = _facts(flight)[:moved] if self._observer.wants_events else ()
            self._observer.on_step(Moment(Step.SETTLED, "relay", count=moved, events=facts))
        await self._bury(flight, source)
        await self._hold(flight, source)
        left = flight.page.having(State.UNSENT, State.SENT, State.UNKNOWN)
        return Settled(moved, barrier, complete=not left)

    async def _bury(self, flight: Flight, source: Literal["pending", "waiting"]) -> None:
        dead = [
            Dead(flight.page.rows[index].id, verdict.reason, verdict.error[:8000], verdict.attempts)
            for index, verdict in sorted(flight.verdicts.items())
            if verdict.reason is not None
        ]
        if not dead:
            return
        if not await pending.move_to_dead_letters(
            self._driver,
            self._schema,
            self._lease.fence,
            dead,
            parks=flight.page.parks,
            source=source,
        ):
            raise LaneLost("another relay took the lane")
        for index, verdict in sorted(flight.verdicts.items()):
            if verdict.reason is not None:
                row = flight.page.rows[index]
                self._observer.on_step(
                    Moment(
                        Step.DEAD_LETTERED,
                        "relay",
                        event_id=row.event_id,
                        subject=row.subject,
                        reason=verdict.reason,
                        attempt=verdict.attempts,
                    )
                )

    async def _hold(self, flight: Flight, source: Literal["pending", "waiting"]) -> None:
        waits = self._waits(flight)
        if not waits:
            return
        move = pending.move_to_waiting if source == "pending" else waiting.postpone
        if not await move(self._driver, self._schema, self._lease.fence, waits):
            raise LaneLost("another relay took the lane")
        self._observer.on_step(Moment(Step.HELD, "relay", count=len(waits)))

    def _waits(self, flight: Flight) -> list[Wait]:
        page = flight.page
        waits: list[Wait] = []
        for index in page.having(State.FAILED, State.BLOCKED, State.SCHEDULED):
            row = page.rows[index]
            if page.states[index] is State.FAILED:
                verdict = flight.verdicts[index]
                again = row.republished if verdict.republished is None else verdict.republished
                delay = self._delay(row.subject, verdict.attempts, counted=verdict.counted)
                waits.append(
                    Wait(row.id, "failed", verdict.attempts, delay, again, verdict.error[:8000])
                )
            else:
                reason = "blocked" if page.states[index] is State.BLOCKED else "scheduled"
                waits.append(Wait(row.id, reason, row.attempts, republished=row.republished))
        return waits

    def _delay(self, subject: str, attempts: int, *, counted: bool) -> timedelta:
        if counted:
            return _BACKOFF.delay(attempts)
        if subject not in self._misconfigured and len(self._misconfigured) >= _MISCONFIGURED_MAX:
            self._misconfigured.clear()
        failures = self._misconfigured[subject] = self._misconfigured.get(subject, 0) + 1
        return _MISCONFIGURED.delay(failures)


def _facts(flight: Flight) -> list[Fact]:
    rows = (flight.page.rows[index] for index in flight.page.having(State.CONFIRMED))
    return [Fact(row.event_id, row.subject, added_at(row.event_id)) for row in rows]
