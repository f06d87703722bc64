"""The schema's version: bring it up to date, or refuse to run on another one.

The migrations are an Alembic environment of the library's own, with its version table in the
library's schema. They run without Alembic's global proxies (`alembic.op`, `alembic.context`), so
that they may be called inside a migration of the application and beside other upgrades.
"""

import asyncio
import io
import time
import zlib
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, overload

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from outbox.errors import ConfigurationError
from outbox.postgres.tables import statement

VERSION_TABLE = "outbox_version"
LOCK_WAIT = timedelta(seconds=60)
_LOCK_PAUSE_SECONDS = 0.1
_LOCK_TIMEOUT = "3s"  # a migration that waits for a table lock holds up everybody behind it
_PACKAGE = Path(__file__).parents[1]

TRY_LOCK = text("SELECT pg_try_advisory_lock(CAST(:key AS bigint))")
TRY_LOCK_IN_TRANSACTION = text("SELECT pg_try_advisory_xact_lock(CAST(:key AS bigint))")
UNLOCK = text("SELECT pg_advisory_unlock(CAST(:key AS bigint))")
SET_LOCK_TIMEOUT = text(
    "SELECT current_setting('lock_timeout'),"
    " set_config('lock_timeout', CAST(:value AS text), CAST(:local AS boolean))"
)
SCHEMA_EXISTS = text("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = :schema)")
VERSION_EXISTS = text("SELECT to_regclass(CAST(:name AS text)) IS NOT NULL")


@overload
def upgrade(target: AsyncEngine, *, schema: str = "outbox") -> Coroutine[Any, Any, None]: ...
@overload
def upgrade(target: Connection, *, schema: str = "outbox") -> None: ...
def upgrade(
    target: AsyncEngine | Connection, *, schema: str = "outbox"
) -> Coroutine[Any, Any, None] | None:
    """Bring the tables in `schema` to this package's version; doing it twice is harmless.

    With an engine it is awaited, commits, and waits up to a minute for an upgrade that runs
    elsewhere. With a connection it runs at once; inside a transaction, such as that of the
    application's own migration (`outbox.upgrade(op.get_bind())`), that transaction decides.

    Raises:
        ConfigurationError: another upgrade did not end in time, or the schema's name is refused.
        sqlalchemy.exc.DBAPIError: passed through; finished migrations stay, the others do not.
    """
    if isinstance(target, Connection):
        _upgrade(target, schema)
        return None
    return _upgrade_engine(target, schema)


async def version(connection: AsyncConnection, schema: str = "outbox") -> str | None:
    """Return the version of the tables in `schema`, None when there are none."""
    select = statement(schema, "SELECT version_num FROM {schema}.outbox_version")
    name = f"{schema}.{VERSION_TABLE}"
    if not (await connection.execute(VERSION_EXISTS, {"name": name})).scalar_one():
        return None
    found = (await connection.execute(select)).scalar_one_or_none()
    return None if found is None else str(found)


async def check_version(target: AsyncEngine | AsyncConnection, schema: str = "outbox") -> None:
    """Return if the tables in `schema` are the ones that this package works with.

    Raises:
        ConfigurationError: they are missing, older or newer; names the command to run.
    """
    if isinstance(target, AsyncEngine):
        async with target.connect() as connection:
            found = await version(connection, schema)
    else:
        found = await version(target, schema)
    if found == head():
        return
    if found is None:
        raise ConfigurationError(
            f"the database has no outbox tables in schema {schema!r}: run `outbox migrate`"
        )
    if found not in {revision.revision for revision in _scripts().walk_revisions()}:
        raise ConfigurationError(
            f"schema {schema!r} is at version {found}, which is newer than this package "
            f"({head()}): install the newer outbox-jetstream (then `outbox migrate` is content)"
        )
    raise ConfigurationError(
        f"schema {schema!r} is at version {found}, this package needs {head()}: "
        "run `outbox migrate`"
    )


def head() -> str:
    """Return the version that this package works with."""
    return str(_scripts().get_current_head())


def offline_sql(schema: str = "outbox") -> str:
    """Return the script that makes the newest version from nothing, for `psql`."""
    script = io.StringIO()
    script.write(str(statement(schema, "CREATE SCHEMA IF NOT EXISTS {schema};\n\n")))
    context = MigrationContext.configure(
        dialect_name="postgresql",
        opts=migration_options(schema) | {"as_sql": True, "output_buffer": script},
    )
    context.run_migrations(execute=lambda sql: context.impl.static_output(f"{sql};"), schema=schema)
    return script.getvalue()


def location() -> Path:
    """Return the directory of the Alembic environment: in a wheel, or beside the package."""
    shipped = _PACKAGE / "_migrations"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "migrations"


def migration_options(schema: str) -> dict[str, Any]:
    """Return what `MigrationContext` has to know; `migrations/env.py` uses it too."""
    scripts = _scripts()
    return {
        "version_table": VERSION_TABLE,
        "version_table_schema": schema,
        "transaction_per_migration": True,
        # what alembic.command.upgrade does; it has no public name
        "fn": lambda revision, _context: scripts._upgrade_revs("head", revision),  # noqa: SLF001
    }


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(location()).replace("%", "%%"))
    return ScriptDirectory.from_config(config)


async def _upgrade_engine(engine: AsyncEngine, schema: str) -> None:
    async with engine.connect() as connection:
        # an engine set to AUTOCOMMIT would leave a failed migration half done
        careful = await connection.execution_options(isolation_level="READ COMMITTED")
        await careful.run_sync(_upgrade, schema)


def _upgrade(connection: Connection, schema: str) -> None:
    """Run the missing migrations, alone in `schema`."""
    create = statement(schema, "CREATE SCHEMA {schema}")
    with _alone(connection, schema):
        # CREATE SCHEMA IF NOT EXISTS asks for the privilege even when there is nothing to do
        inside = connection.in_transaction()
        if not connection.execute(SCHEMA_EXISTS, {"schema": schema}).scalar_one():
            connection.execute(create)
        if not inside:
            connection.commit()  # Alembic begins one transaction per migration by itself
        context = MigrationContext.configure(connection, opts=migration_options(schema))
        context.run_migrations(execute=connection.exec_driver_sql, schema=schema)
        if not inside:
            connection.commit()


@contextmanager
def _alone(connection: Connection, schema: str) -> Iterator[None]:
    """Hold the upgrade lock and a short `lock_timeout`; put both back afterwards."""
    key = {"key": _lock_key(schema)}
    inside = connection.in_transaction()
    _take(connection, TRY_LOCK_IN_TRANSACTION if inside else TRY_LOCK, key, inside=inside)
    try:
        timeout = {"value": _LOCK_TIMEOUT, "local": inside}
        before = connection.execute(SET_LOCK_TIMEOUT, timeout).scalar_one()
        _end(connection, inside=inside)
        yield
        connection.execute(SET_LOCK_TIMEOUT, {"value": before, "local": inside})
        _end(connection, inside=inside)
    except BaseException:
        # the session may be in any state: closing it frees the lock, whatever happens
        if not inside:
            connection.invalidate()
        raise
    if not inside:
        held = connection.execute(UNLOCK, key).scalar_one()
        connection.commit()
        if not held:
            raise ConfigurationError(
                "the upgrade lock moved to another session: `outbox migrate` needs a direct "
                "connection, not a transaction pooler; the tables themselves are up to date"
            )


def _take(connection: Connection, lock: TextClause, key: dict[str, int], *, inside: bool) -> None:
    """Poll for the lock: a blocking wait deadlocks with CREATE INDEX CONCURRENTLY elsewhere."""
    deadline = time.monotonic() + LOCK_WAIT.total_seconds()
    while not connection.execute(lock, key).scalar_one():
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"another upgrade has held its lock for {LOCK_WAIT.total_seconds():.0f} seconds; "
                "wait for it, or end its session, and run `outbox migrate` again"
            )
        _end(connection, inside=inside)
        _pause()
    _end(connection, inside=inside)


def _end(connection: Connection, *, inside: bool) -> None:
    if not inside:
        connection.commit()


def _pause() -> None:
    """Let a moment pass, and the event loop run when the connection belongs to one."""
    if in_greenlet():
        await_only(asyncio.sleep(_LOCK_PAUSE_SECONDS))
    else:
        time.sleep(_LOCK_PAUSE_SECONDS)


def _lock_key(schema: str) -> int:
    return (zlib.crc32(b"outbox upgrade") << 31) ^ zlib.crc32(schema.encode())
