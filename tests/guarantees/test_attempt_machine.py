"""What an event's attempts cost it: failures and starts that killed their process, nothing else.

A state machine drives the statements of `outbox.postgres.attempts` on a real database for several
events and workers, beside a model.
"""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID

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
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from outbox.postgres import attempts

SCHEMA, LISTENER = "outbox", "mail-machine"
EVENTS = st.integers(0, 2)


@dataclass
class Known:
    """What the model knows of an event."""

    running: int = 0  # marked starts whose worker is at work
    crashed: int = 0  # marked starts whose worker died
    failed: int = 0
    handled: bool = False


class Machine(RuleBasedStateMachine):
    """Workers of one listener, and three events that are delivered again and again."""

    runner: ClassVar[asyncio.Runner]
    sessions: ClassVar[async_sessionmaker[AsyncSession]]

    @initialize()
    def begin(self) -> None:
        """Begin with nothing known."""
        self.known = [Known() for _ in range(3)]
        self._run("TRUNCATE outbox.attempt")
        self._run("DELETE FROM outbox.inbox")

    @rule(event=EVENTS)
    def start(self, event: int) -> None:
        """Deliver again: the start is marked, unless the inbox knows the event."""
        known = self.known[event]
        found = self._do(attempts.start, event)
        if known.handled:
            assert found is None
            return
        assert found == (known.running + known.crashed, known.failed)
        known.running += 1

    @rule(event=EVENTS)
    def crash(self, event: int) -> None:
        """Kill the worker: nobody is left to tell."""
        known = self.known[event]
        if known.running:
            known.running -= 1
            known.crashed += 1

    @rule(event=EVENTS)
    def release(self, event: int) -> None:
        """End a start by an outage, or a stop: it costs nothing."""
        known = self.known[event]
        if known.running:
            self._do(attempts.release, event)
            known.running -= 1

    @rule(event=EVENTS, marked=st.booleans())
    def fail(self, event: int, marked: bool) -> None:
        """Fail: of a first delivery no start was marked."""
        known = self.known[event]
        if known.handled or (marked and not known.running):
            return
        known.running -= marked
        known.failed += 1
        again = timedelta(seconds=1)
        found = self._do(attempts.fail, event, marked=marked, delay=again, error="no")
        assert found == (known.running + known.crashed, known.failed)

    @rule(event=EVENTS)
    def handle(self, event: int) -> None:
        """Commit the event with its inbox row: what was known of its attempts is gone."""
        known = self.known[event]
        if known.handled:
            return
        insert = "INSERT INTO outbox.inbox (listener, event_id) VALUES ('mail-machine', :id)"
        self._run(insert, id=UUID(int=event))
        self._do(attempts.forget, event)
        self.known[event] = Known(handled=True)

    @invariant()
    def what_is_spent_is_what_the_model_says(self) -> None:
        """Compare each event; starts that are still at work count until they end."""
        for event, known in enumerate(self.known):
            seen = self._do(attempts.seen, event)
            assert seen == (known.running + known.crashed, known.failed)
            assert seen.spent == known.running + known.crashed + known.failed

    def _do(self, work: Any, event: int, **more: Any) -> Any:
        async def done() -> Any:
            async with self.sessions() as session, session.begin():
                return await work(
                    session, SCHEMA, listener=LISTENER, event_id=UUID(int=event), **more
                )

        return self.runner.run(done())

    def _run(self, sql: str, **values: Any) -> None:
        async def done() -> None:
            async with self.sessions() as session, session.begin():
                await session.execute(text(sql), values)

        self.runner.run(done())


@pytest.mark.timeout(180)
def test_attempts_cost_failures_and_crashes_and_nothing_else(database_url: str) -> None:
    with asyncio.Runner() as runner:
        engine = create_async_engine(database_url)
        Machine.runner, Machine.sessions = runner, async_sessionmaker(engine)
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=25,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        runner.run(engine.dispose())
