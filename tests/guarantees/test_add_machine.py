"""Whatever a caller does with savepoints, flushes and ends: what COMMIT took is what it should.

A state machine drives every kind of session that `add` takes against a real database, and a model
of lists beside it.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from typing_extensions import override

from outbox import Outbox
from outbox.testing import added

SUBJECT = "evt.machine.moved.v1"
events = Outbox("machine")
KINDS = ("Session", "Connection", "AsyncSession", "AsyncConnection", "joined")


class Machine(RuleBasedStateMachine):
    """One session and its model; `frames` holds what each open savepoint has added."""

    sync_engine: ClassVar[Engine]
    async_engine: ClassVar[AsyncEngine]
    runner: ClassVar[asyncio.Runner]

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.frames: list[list[int]] = [[]]
        self.committed: list[int] = []
        self.flushed = False
        self.nested: list[Any] = []
        self.outer: Any = None

    @initialize(kind=st.sampled_from(KINDS))
    def open(self, kind: str) -> None:
        """Begin with an empty outbox."""
        with self.sync_engine.begin() as connection:
            connection.execute(text("TRUNCATE outbox.pending"))
        self.kind = kind
        match kind:
            case "Session":
                self.session: Any = Session(self.sync_engine)
            case "Connection":
                self.session = self.sync_engine.connect()
            case "AsyncSession":
                self.session = AsyncSession(self.async_engine)
            case "AsyncConnection":
                self.session = self.runner.run(_connected(self.async_engine))
            case _:
                self.outer = self.sync_engine.connect()
                self.outer_transaction = self.outer.begin()
                self.session = Session(self.outer, join_transaction_mode="create_savepoint")

    def _do(self, work: Callable[[], Any]) -> Any:
        """Call a method of the session, and run it if it is a coroutine."""
        if not self.kind.startswith("Async"):
            return work()

        async def run() -> Any:
            found = work()
            return await found if hasattr(found, "__await__") else found

        return self.runner.run(run())

    @rule()
    def add(self) -> None:
        """Add the next number."""
        self.number += 1
        self._do(lambda: events.add(self.session, SUBJECT, {"n": self.number}))
        self.frames[-1].append(self.number)

    @rule()
    def flush(self) -> None:
        """Write early."""
        self.runner.run(events.flush(self.session))
        self.flushed = True

    @precondition(lambda self: len(self.nested) < 3 and (self.number or self.nested))
    @rule()
    def begin_nested(self) -> None:
        """Open a savepoint; a connection begins by its first add."""
        if not self._do(self.session.in_transaction):
            return
        self.nested.append(self._do(self.session.begin_nested))
        self.frames.append([])

    @precondition(lambda self: self.nested)
    @rule()
    def release(self) -> None:
        """Release the innermost savepoint: what it has goes to the one around it."""
        self._do(self.nested.pop().commit)
        inner = self.frames.pop()
        self.frames[-1].extend(inner)

    @precondition(lambda self: self.nested)
    @rule()
    def roll_back_nested(self) -> None:
        """Roll the innermost savepoint back: what it has is gone."""
        self._do(self.nested.pop().rollback)
        self.frames.pop()

    @precondition(lambda self: not self.nested)
    @rule()
    def commit(self) -> None:
        """Commit everything."""
        self._do(self.session.commit)
        self.committed += self.frames[0]
        self.frames = [[]]

    @precondition(lambda self: not self.nested)
    @rule()
    def roll_back(self) -> None:
        """Roll everything back."""
        self._do(self.session.rollback)
        self.frames = [[]]

    @invariant()
    def the_kit_shows_what_is_held(self) -> None:
        """`added` agrees with the model at every moment."""
        held = sorted(n for frame in self.frames for n in frame)
        if self.kind == "joined":
            held = sorted(self.committed + held)
        shown = sorted(event.data["n"] for event in added(self.session))
        assert shown == held

    @override
    def teardown(self) -> None:
        """Compare what is in the table with what was committed."""
        if not hasattr(self, "kind"):
            return
        while self.nested:
            self._do(self.nested.pop().rollback)
        self._do(self.session.rollback)
        self._do(self.session.close)
        if self.outer is not None:
            self.outer_transaction.commit()
            self.outer.close()
        with self.sync_engine.connect() as connection:
            rows = connection.execute(text("SELECT body FROM outbox.pending ORDER BY id"))
            stored = [json.loads(bytes(row[0]))["data"]["n"] for row in rows]
        assert sorted(stored) == sorted(self.committed)
        if not self.flushed:
            assert stored == self.committed


async def _connected(engine: AsyncEngine) -> Any:
    return await engine.connect()


@pytest.mark.timeout(180)
def test_commit_takes_exactly_what_no_rollback_took(database_url: str) -> None:
    with asyncio.Runner() as runner:
        Machine.runner = runner
        Machine.async_engine = create_async_engine(database_url, poolclass=NullPool)
        Machine.sync_engine = create_engine(
            database_url.replace("+asyncpg", "+psycopg"), poolclass=NullPool
        )
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=60,
                stateful_step_count=25,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
        runner.run(Machine.async_engine.dispose())
        Machine.sync_engine.dispose()
