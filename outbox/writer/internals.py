"""The few things that only SQLAlchemy's private attributes tell, and checks that need them.

Read-only, the same in SQLAlchemy 2.0 and 2.1; `tests/integration/test_writer_*.py` would fail if
one of them changed its meaning.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, NestedTransaction, TwoPhaseTransaction, event
from sqlalchemy.orm import Session, SessionTransaction

from outbox.errors import InvalidSession

# ruff: noqa: SLF001 - the purpose of this module


def listen(target: Session | Connection, name: str, hook: Callable[..., None]) -> None:
    """Attach `hook` to this one session or connection, also while the event is being dispatched.

    A first `add` inside a user's own hook would otherwise change a deque that is iterated over.
    """
    hooks = getattr(target.dispatch, name)
    if isinstance(getattr(hooks, "listeners", None), deque):
        hooks.listeners = deque(hooks.listeners)
    event.listen(target, name, hook)


def held_connection(
    transaction: SessionTransaction, bind: Engine | Connection
) -> tuple[Connection, bool] | None:
    """Return the connection of `bind` in a transaction, and whether the session commits it."""
    entry = transaction._connections.get(bind)
    return None if entry is None else (entry[0], entry[2])


def engines(transaction: SessionTransaction) -> set[Engine]:
    """Return the engines that a session's root transaction has used."""
    return {entry[0].engine for entry in transaction._connections.values()}


def connections(session: Session) -> set[Connection]:
    """Return the connections that a session's transaction uses, and that it is bound to."""
    root = session.get_transaction()
    found = set() if root is None else {entry[0] for entry in root._connections.values()}
    return found | ({session.bind} if isinstance(session.bind, Connection) else set())


def is_ending(transaction: SessionTransaction) -> bool:
    """Return True while `commit` runs: SQL is allowed, for we are in its greenlet."""
    return transaction._current_fn is not None


def session_savepoints(transaction: SessionTransaction | None, connection: Connection) -> set[str]:
    """Return the savepoints on `connection` that a session's open transactions made."""
    names = set()
    while transaction is not None:
        entry = transaction._connections.get(connection)
        if entry is not None and isinstance(entry[1], NestedTransaction):
            names.add(entry[1]._savepoint)
        transaction = transaction.parent
    return names


def savepoints(connection: Connection) -> tuple[str, ...]:
    """Return the savepoints open on `connection`, outermost first."""
    nested = connection._nested_transaction
    if nested is None:
        return ()
    names: list[str] = []
    while nested is not None:
        names.append(nested._savepoint)
        nested = nested._previous_nested
    return tuple(reversed(names))


def is_twophase(connection: Connection) -> bool:
    """Return True inside a two-phase transaction."""
    return isinstance(connection.get_transaction(), TwoPhaseTransaction)


def check_database(bind: Engine | Connection, *, asynchronous: bool) -> None:
    """Check that events can be written through `bind`; no I/O.

    Raises:
        InvalidSession: it is no PostgreSQL, has the wrong driver, or is in AUTOCOMMIT.
    """
    dialect = bind.dialect
    if dialect.name != "postgresql":
        raise InvalidSession(f"events need PostgreSQL; this session's database is {dialect.name}")
    if asynchronous and dialect.driver != "asyncpg":
        raise InvalidSession(f"asynchronous sessions need asyncpg; this one's is {dialect.driver}")
    refuse_autocommit(bind)


def refuse_autocommit(bind: Engine | Connection) -> None:
    """Check that `bind` has transactions; no I/O.

    Raises:
        InvalidSession: it is in AUTOCOMMIT, or lost its connection.
    """
    level = bind.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(bind.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT":
        raise InvalidSession("an AUTOCOMMIT connection has no transaction for events to be part of")
    if isinstance(bind, Connection):
        _refuse_autocommit_set_by_hand(bind)


def _refuse_autocommit_set_by_hand(connection: Connection) -> None:
    if connection.closed or connection.invalidated:
        raise InvalidSession("the connection is closed or was lost")
    detect: Any = getattr(connection.dialect, "detect_autocommit_setting", None)
    driver = connection.connection.dbapi_connection
    if detect is not None and driver is not None and detect(driver):
        raise InvalidSession("an AUTOCOMMIT connection has no transaction for events to be part of")
