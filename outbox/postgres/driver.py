"""The relay's own connections: the asyncpg connection below SQLAlchemy, which is faster by far."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, cast

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.errors import ConfigurationError, DatabaseUnavailable, hide_parameters

STATEMENT_SECONDS = 30.0  # asyncpg has no deadline of its own, and a dead link answers nothing
# A role may carry other values; each one is needed. force_custom_plan: a generic plan made while
# the table was empty reads the whole table in a burst.
SESSION = """
SET statement_timeout = '30s'; SET lock_timeout = '5s'; SET plan_cache_mode = force_custom_plan;
SET idle_in_transaction_session_timeout = '60s';
SET default_transaction_isolation = 'read committed'
"""


class Driver(Protocol):
    """What is used of an asyncpg connection. Each statement is a transaction of its own."""

    async def execute(  # the driver's own deadlines
        self,
        query: str,
        *args: object,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> str:
        """Run `query`; return its command tag."""

    async def fetch(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Sequence[Sequence[Any]]:
        """Return all rows."""

    async def fetchrow(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Sequence[Any] | None:
        """Return the first row."""

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        """Have `callback` called for each NOTIFY on `channel`."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn whatever the database or its connection raises into `DatabaseUnavailable`."""
    try:
        yield
    except (
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,  # a connection that was lost in the middle of a statement
        SQLAlchemyError,
        OSError,  # TimeoutError is one
    ) as error:
        hide_parameters(error)
        # What the driver says; SQLAlchemy would add the statement.
        said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        raise DatabaseUnavailable(f"{type(said).__name__}: {said}") from error


@asynccontextmanager
async def connection(
    engine: AsyncEngine, *, asynchronous: bool = False
) -> AsyncIterator[tuple[AsyncConnection, Driver]]:
    """Lend a connection that is closed, never pooled again: its session settings are ours.

    Args:
        asynchronous: commit without waiting for the disk; only for what may be done twice.

    Raises:
        DatabaseUnavailable: it cannot be opened.
    """
    with translated():
        held = await engine.connect()
    try:
        with translated():
            fairy = await held.get_raw_connection()
            driver = cast("Driver", fairy.driver_connection)
            extra = "; SET synchronous_commit = 'off'" if asynchronous else ""
            await driver.execute(SESSION + extra, timeout=STATEMENT_SECONDS)
        yield held, driver
    finally:
        await held.invalidate()
        await held.close()


async def refuse_standby(driver: Driver) -> None:
    """Check that the server takes writes.

    Raises:
        ConfigurationError: it is a standby, whose rows may be of a failed primary.
    """
    with translated():
        row = await driver.fetchrow("SELECT pg_is_in_recovery()", timeout=STATEMENT_SECONDS)
    if row is None or row[0]:
        raise ConfigurationError("the database is a standby; the relay needs the primary")
