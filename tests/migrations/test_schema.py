"""The migrated schema equals `tables.py`, and getting there is safe."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.config import Config
from alembic.operations.ops import OpContainer
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox.errors import ConfigurationError
from outbox.postgres import schema as migrated
from outbox.postgres.tables import metadata

CATALOG = """
SELECT c.relname || '.' || a.attname AS name,
       concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
                 pg_get_expr(d.adbin, d.adrelid)) AS definition
FROM pg_class c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('r', 'p')
UNION ALL
SELECT c.relname || ': ' || k.conname, pg_get_constraintdef(k.oid)
FROM pg_class c JOIN pg_constraint k ON k.conrelid = c.oid
WHERE c.relnamespace = CAST(:schema AS regnamespace) AND k.contype <> 'n'
UNION ALL
SELECT c.relname, replace(pg_get_indexdef(c.oid), CAST(:schema AS text) || '.', '')
FROM pg_class c WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind IN ('i', 'I')
UNION ALL
SELECT c.relname || ' partition key', pg_get_partkeydef(c.oid)
FROM pg_class c WHERE c.relnamespace = CAST(:schema AS regnamespace) AND c.relkind = 'p'
"""


def _ours(name: str) -> bool:
    return not name.startswith(("archive_0", "archive_1", "archive_2", "archive_3", "outbox_ver"))


async def _catalog(engine: AsyncEngine, schema: str) -> dict[str, str]:
    async with engine.connect() as connection:
        rows = await connection.execute(text(CATALOG), {"schema": schema})
        return {str(row.name): str(row.definition) for row in rows if _ours(row.name)}


def _differences(connection: Connection) -> list[Any]:
    def mine(name: str | None, kind: str, _parents: object) -> bool:
        if kind == "schema":
            return name == "outbox"
        return kind != "table" or _ours(str(name))

    options = {
        "include_schemas": True,
        "include_name": mine,
        "compare_type": True,
        "compare_server_default": True,
        "version_table": migrated.VERSION_TABLE,
        "version_table_schema": "outbox",
    }
    context = MigrationContext.configure(connection, opts=options)
    return list(compare_metadata(context, metadata("outbox")))


async def test_migrated_schema_equals_tables_for_alembic(engine: AsyncEngine) -> None:
    """Alembic finds nothing to change."""
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []


async def test_migrated_schema_equals_tables_in_the_catalog(engine: AsyncEngine) -> None:
    """Every column, default, constraint and index is the one that `tables.py` would make."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE SCHEMA modelled"))
        await connection.run_sync(metadata("modelled").create_all)
    assert await _catalog(engine, "outbox") == await _catalog(engine, "modelled")


async def test_archive_ring_and_first_lane_are_made(engine: AsyncEngine) -> None:
    """There are 32 partitions for the days 0 to 31, and one lane that owns every slot."""
    async with engine.connect() as connection:
        days = await connection.execute(
            text(
                "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i"
                " JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = CAST('outbox.archive' AS regclass)"
            )
        )
        expected = {(f"archive_{day:02}", f"FOR VALUES IN ('{day}')") for day in range(32)}
        assert {tuple(row) for row in days} == expected
        lanes = await connection.execute(
            text("SELECT lane, slot_low, slot_high, epoch FROM outbox.lane")
        )
        assert [tuple(row) for row in lanes] == [(0, 0, 1023, 0)]


async def test_hot_tables_have_their_storage_parameters(engine: AsyncEngine) -> None:
    """Autovacuum counts rows, not shares, and never locks the outbox to cut its tail."""
    async with engine.connect() as connection:
        found = await connection.execute(
            text(
                "SELECT relname, reloptions FROM pg_class"
                " WHERE relnamespace = CAST('outbox' AS regnamespace) AND reloptions IS NOT NULL"
            )
        )
        options: dict[str, list[str]] = {str(row.relname): row.reloptions for row in found}
    assert {"vacuum_truncate=false", "autovacuum_vacuum_threshold=5000"} <= set(options["pending"])
    assert "autovacuum_vacuum_insert_threshold=100000" in options["inbox"]


async def test_upgrading_twice_changes_nothing(engine: AsyncEngine) -> None:
    """The second upgrade leaves one version row and one lane, and gives the lock back."""
    await migrated.upgrade(engine)
    async with engine.connect() as connection:
        assert await migrated.version(connection) == migrated.head()
        count = text("SELECT count(*) FROM outbox.lane")
        assert (await connection.execute(count)).scalar_one() == 1
        locks = text(
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE locktype = 'advisory' AND d.datname = current_database()"
        )
        assert (await connection.execute(locks)).scalar_one() == 0
        timeout = (await connection.execute(text("SHOW lock_timeout"))).scalar_one()
        assert timeout == "0"


async def test_four_upgrades_at_once_make_one_schema(empty_database_url: str) -> None:
    """Upgrades that start together all succeed, and only one of them does the work."""
    engines = [create_async_engine(empty_database_url, poolclass=NullPool) for _ in range(4)]
    await asyncio.gather(*(migrated.upgrade(engine) for engine in engines))
    async with engines[0].connect() as connection:
        assert await migrated.version(connection) == migrated.head()


async def test_upgrade_gives_up_while_another_holds_the_lock(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is not given back ends the wait with an error that says so."""
    monkeypatch.setattr(migrated, "LOCK_WAIT", timedelta(seconds=0.2))
    async with engine.connect() as holder:
        await holder.execute(migrated.TRY_LOCK, {"key": migrated._lock_key("outbox")})
        with pytest.raises(ConfigurationError, match="another upgrade"):
            await migrated.upgrade(engine)
        await holder.invalidate()  # the lock belongs to the session
    await migrated.upgrade(engine)


async def test_schema_name_is_free(empty_database_url: str) -> None:
    """Two schemas of one database hold two independent outboxes."""
    engine = create_async_engine(empty_database_url, poolclass=NullPool)
    await migrated.upgrade(engine, schema="first_outbox")
    await migrated.upgrade(engine, schema="second_outbox")
    await migrated.check_version(engine, "first_outbox")
    assert await _catalog(engine, "first_outbox") == await _catalog(engine, "second_outbox")
    with pytest.raises(ConfigurationError):
        await migrated.upgrade(engine, schema='x"; DROP TABLE y; --')


async def test_check_version_names_the_command(empty_database_url: str) -> None:
    """Missing, older and newer tables are refused with what to do."""
    engine = create_async_engine(empty_database_url, poolclass=NullPool)
    with pytest.raises(ConfigurationError, match=r"no outbox tables.*`outbox migrate`"):
        await migrated.check_version(engine)
    await migrated.upgrade(engine)
    await migrated.check_version(engine)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE outbox.outbox_version SET version_num = 'ob9999'"))
    with pytest.raises(ConfigurationError, match=r"ob9999.*newer.*`outbox migrate`"):
        await migrated.check_version(engine)


async def test_offline_script_makes_the_same_schema(
    engine: AsyncEngine, empty_database_url: str
) -> None:
    """What `migrate --sql` prints is what `migrate` does."""
    other = create_async_engine(empty_database_url, poolclass=NullPool)
    async with other.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute(migrated.offline_sql())
    await migrated.check_version(other)
    assert await _catalog(other, "outbox") == await _catalog(engine, "outbox")


def test_upgrade_inside_the_applications_transaction(empty_database_url: str) -> None:
    """A host's migration decides: rolled back, nothing is left; committed, all is there."""
    url = make_url(empty_database_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, poolclass=NullPool)
    exists = text("SELECT to_regclass('outbox.pending') IS NOT NULL")
    with engine.connect() as connection:
        with connection.begin() as transaction:
            migrated.upgrade(connection)
            assert connection.execute(exists).scalar_one()
            transaction.rollback()
        assert not connection.execute(exists).scalar_one()
        connection.rollback()
        with connection.begin():
            migrated.upgrade(connection)
        assert connection.execute(exists).scalar_one()


def _host_operations(connection: Connection, *, include_schemas: bool) -> list[str]:
    def host(name: str | None, kind: str, _parents: object) -> bool:
        return not (kind == "schema" and name == "outbox")

    options: dict[str, Any] = {"target_metadata": MetaData(), "include_schemas": include_schemas}
    if include_schemas:
        options["include_name"] = host
    context = MigrationContext.configure(connection, opts=options)
    upgrade = produce_migrations(context, MetaData()).upgrade_ops
    assert isinstance(upgrade, OpContainer)
    return [repr(operation) for operation in upgrade.ops]


@pytest.mark.parametrize("include_schemas", [False, True])
async def test_hosts_autogenerate_leaves_our_tables_alone(
    engine: AsyncEngine, *, include_schemas: bool
) -> None:
    """The application's `revision --autogenerate` neither drops nor re-creates anything."""
    async with engine.connect() as connection:
        found = await connection.run_sync(
            lambda c: _host_operations(c, include_schemas=include_schemas)
        )
    assert found == []


def _command_upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrated.location()))
    config.attributes.update(connection=connection, schema="by_command")
    command.upgrade(config, "head")


async def test_alembics_own_command_works_on_the_environment(empty_database_url: str) -> None:
    """`alembic.command.upgrade` with a connection in the attributes makes the same version."""
    engine = create_async_engine(empty_database_url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_command_upgrade)
    await migrated.check_version(engine, "by_command")
