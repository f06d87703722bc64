"""Whatever is late, and whoever sleeps: a lane has one holder, and a former one writes nothing.

Time passes on both clocks at once: the relays' is moved on, and the lane's expiry is moved back. A
statement may take long on its way there and on its way back, and others act meanwhile.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import make_url

from outbox.postgres import lanes
from outbox.postgres.driver import Driver
from outbox.postgres.tables import raw
from outbox.relay import lease as lease_module
from outbox.relay.lease import LaneLost, Lease

SCHEMA = "outbox"
LEASE = timedelta(seconds=10)
FENCED = "WITH {fence} SELECT count(*) FROM fence".replace("{fence}", lanes.FENCE)
RELAYS = st.integers(0, 2)
SECONDS = st.sampled_from([0.0, 1.0, 4.0, 6.0, 9.0, 11.0, 25.0])


class Slow:
    """A connection on which time passes before and after each statement."""

    def __init__(self, inner: Driver, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        self._inner = inner
        self._before = before
        self._after = after

    async def fetchrow(self, *given: Any, **named: Any) -> Any:
        await self._before()
        row = await self._inner.fetchrow(*given, **named)
        await self._after()
        return row


class Machine(RuleBasedStateMachine):
    """Three relays and one lane."""

    runner: ClassVar[asyncio.Runner]
    driver: ClassVar[Driver]
    passed: ClassVar[float]  # seconds, beside the real ones

    @initialize()
    def begin(self) -> None:
        """Begin with a free lane."""
        type(self).passed = 0.0
        self.leases = [Lease(SCHEMA, 0, LEASE) for _ in range(3)]
        self.epochs: list[int] = []
        free = "UPDATE outbox.lane SET owner = NULL, expires_at = '-infinity'"
        self.runner.run(self.driver.execute(free))

    @rule(relay=RELAYS, before=SECONDS, after=SECONDS)
    def take(self, relay: int, before: float, after: float) -> None:
        """Try to take the lane; nobody else does meanwhile."""
        self.runner.run(self._taken(relay, before, after))

    @rule(relay=RELAYS, after=SECONDS, other=RELAYS)
    def take_and_be_overtaken(self, relay: int, after: float, other: int) -> None:
        """Take the lane; another takes it before the answer has come."""
        self.runner.run(self._taken(relay, 0.0, after, other))

    @rule(relay=RELAYS, before=SECONDS, after=SECONDS)
    def renew(self, relay: int, before: float, after: float) -> None:
        """Renew, as the relay does while it believes in its lease, and also later."""
        lease = self.leases[relay]
        if not lease.epoch:
            return

        async def renewed() -> None:
            slow: Any = Slow(self.driver, self._passing(before), self._passing(after))
            try:
                await lease.renew(slow)
            except LaneLost:
                assert not lease.held

        self.runner.run(renewed())

    @rule(relay=RELAYS)
    def release(self, relay: int) -> None:
        """Give the lane back; a former holder changes nothing by that."""
        self.runner.run(self.leases[relay].release(self.driver))
        assert not self.leases[relay].held

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.runner.run(self._pass(seconds))

    @rule(relay=RELAYS)
    def a_lane_that_nobody_renews_is_free_after_one_lease(self, relay: int) -> None:
        """Take the lane of relays that are gone."""

        async def taken() -> None:
            await self._pass(LEASE.total_seconds() + 0.1)
            assert await self.leases[relay].take(self.driver)
            self.epochs.append(self.leases[relay].epoch)

        self.runner.run(taken())

    @invariant()
    def one_relay_at_most_holds_the_lane(self) -> None:
        """Count those that would send."""
        assert sum(lease.held for lease in self.leases) <= 1

    @invariant()
    def the_holder_may_write_and_former_ones_may_not(self) -> None:
        """Ask the fence for each."""
        may = [self.runner.run(self._fenced(lease)) for lease in self.leases]
        assert sum(may) <= 1
        for lease, passes in zip(self.leases, may, strict=True):
            assert passes or not lease.held

    @invariant()
    def epochs_only_grow(self) -> None:
        """Compare those that were given out."""
        assert self.epochs == sorted(set(self.epochs))

    async def _taken(self, relay: int, before: float, after: float, other: int = -1) -> None:
        lease = self.leases[relay]

        async def later() -> None:
            self.epochs.append(await self._epoch())
            await self._pass(after)
            if other not in {-1, relay} and await self.leases[other].take(self.driver):
                self.epochs.append(self.leases[other].epoch)

        seen = await self._epoch()
        slow: Any = Slow(self.driver, self._passing(before), later)
        if await lease.take(slow):
            assert lease.epoch > seen
        self.epochs = list(dict.fromkeys(self.epochs))

    async def _epoch(self) -> int:
        row = await self.driver.fetchrow("SELECT epoch FROM outbox.lane WHERE lane = 0")
        assert row is not None
        return int(row[0])

    async def _fenced(self, lease: Lease) -> bool:
        row = await self.driver.fetchrow(raw(SCHEMA, FENCED), *lease.fence)
        assert row is not None
        return bool(row[0])

    def _passing(self, seconds: float) -> Callable[[], Any]:
        async def passing() -> None:
            await self._pass(seconds)

        return passing

    async def _pass(self, seconds: float) -> None:
        type(self).passed += seconds
        back = "UPDATE outbox.lane SET expires_at = expires_at - make_interval(secs => $1::float8)"
        await self.driver.execute(back, seconds)


@pytest.mark.timeout(180)
def test_lane_has_one_holder_and_a_former_one_writes_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lease_module.now
    monkeypatch.setattr(lease_module, "now", lambda: real() + Machine.passed)
    Machine.passed = 0.0
    with asyncio.Runner() as runner:
        url = make_url(database_url).set(drivername="postgresql")
        connection = runner.run(asyncpg.connect(url.render_as_string(hide_password=False)))
        Machine.runner, Machine.driver = runner, connection
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=80,
                stateful_step_count=25,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        runner.run(connection.close())
