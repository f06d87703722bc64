"""`add` in every kind of transaction, against a real PostgreSQL."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from sqlalchemy.orm import sessionmaker as sync_sessionmaker

from outbox.embedded import EmbeddedPostgres
from outbox.envelope import decode_headers
from outbox.errors import InvalidEvent, InvalidSession
from outbox.postgres import wake, writing
from outbox.settings import Settings
from outbox.writer import Outbox, PendingEvent, enqueue, write_buffered
from tests.servers import databases

events = Outbox("tests")
SUBJECT = "evt.thing.made.v1"


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="")


@pytest.fixture(autouse=True)
async def _thing(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@pytest.fixture
async def sync_engine(database_url: str) -> AsyncIterator[Engine]:
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    yield engine
    engine.dispose()


async def stored(engine: AsyncEngine) -> list[int]:
    """Return the `n` of every committed event, in id order."""
    async with engine.connect() as connection:
        rows = await connection.execute(
            text(
                "SELECT CAST(convert_from(body, 'UTF8') AS json) -> 'data' ->> 'n'"
                " FROM outbox.pending ORDER BY id"
            )
        )
        return [int(row[0]) for row in rows]


async def things(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT id FROM thing ORDER BY 1"))).scalars())


def add(session: Any, n: int, **more: Any) -> str:
    return events.add(session, SUBJECT, {"n": n}, **more)


# ---- the promise ---------------------------------------------------------------------------


async def test_commit_stores_and_rollback_does_not(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        add(session, 1)
        add(session, 2)
        await session.commit()
        add(session, 3)
        await session.rollback()
        add(session, 4)
        await session.commit()
        add(session, 5)
    assert await stored(engine) == [1, 2, 4]


async def test_begin_block_that_fails_stores_nothing(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what fails
        async with sessionmaker.begin() as session:
            add(session, 1)
            raise ZeroDivisionError
    assert await stored(engine) == []


async def test_row_holds_what_was_added(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    async with sessionmaker() as session:
        event_id = add(session, 1, key="k-1", headers={"traceparent": "00-x"}, deliver_at=at)
        plain = add(session, 2)
        await session.commit()
    async with engine.connect() as connection:
        rows = (await connection.execute(text("SELECT * FROM outbox.pending ORDER BY id"))).all()
    assert str(rows[0].event_id) == event_id
    assert (rows[0].key, rows[0].subject, rows[0].deliver_at) == ("k-1", SUBJECT, at)
    assert decode_headers(rows[0].headers) == {"Outbox-Key": "k-1", "traceparent": "00-x"}
    assert rows[0].slot == zlib.crc32(b"k-1") % 1024
    assert rows[1].slot == zlib.crc32(plain.encode()) % 1024
    assert (rows[1].key, rows[1].headers, rows[1].deliver_at) == (None, b"", None)


async def test_sync_session_and_scoped_session_work(
    sync_engine: Engine, engine: AsyncEngine
) -> None:
    with Session(sync_engine) as session:
        add(session, 1, key="a", deliver_at=datetime.now(UTC))
        with session.begin_nested():
            add(session, 2)
        session.commit()
    scoped = scoped_session(sync_sessionmaker(sync_engine))
    add(scoped, 3)
    scoped.commit()
    scoped.remove()
    with sync_engine.connect() as connection:
        add(connection, 4)
        connection.commit()
        add(connection, 5)
    assert await stored(engine) == [1, 2, 3, 4]


async def test_async_scoped_session_works(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    scoped = async_scoped_session(sessionmaker, scopefunc=asyncio.current_task)
    add(scoped, 1)
    await scoped.commit()
    await scoped.remove()
    assert await stored(engine) == [1]


async def test_async_connection_works(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        add(connection, 1)
        await connection.commit()
        add(connection, 2)
        await connection.rollback()
        add(connection, 3)
        await connection.commit()
        add(connection, 4)
    async with engine.begin() as connection:
        add(connection, 5)
    assert await stored(engine) == [1, 3, 5]


async def test_later_changes_of_the_payload_have_no_effect(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    payload = {"n": 1}
    async with sessionmaker() as session:
        events.add(session, SUBJECT, payload)
        payload["n"] = 2
        await session.commit()
    assert await stored(engine) == [1]


async def test_insert_is_cut_into_parts(
    sessionmaker: async_sessionmaker[AsyncSession],
    engine: AsyncEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "INSERT_ROWS_MAX", 3)
    monkeypatch.setattr(writing, "INSERT_BYTES_MAX", 500)
    async with sessionmaker() as session:
        for n in range(10):
            add(session, n)
        await session.commit()
    assert await stored(engine) == list(range(10))


# ---- savepoints ----------------------------------------------------------------------------


async def test_savepoints_released_rolled_back_and_nested(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        add(session, 1)
        async with session.begin_nested():
            add(session, 2)
            inner = await session.begin_nested()
            add(session, 3)
            await inner.rollback()
            async with session.begin_nested():
                add(session, 4)
        outer = await session.begin_nested()
        async with session.begin_nested():
            add(session, 5)
        await outer.rollback()
        add(session, 6)
        await session.commit()
    assert await stored(engine) == [1, 2, 4, 6]


async def test_savepoint_of_a_failed_flush_drops_its_events(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        await session.flush()
        with pytest.raises(DBAPIError):  # noqa: PT012 - the block is what fails
            async with session.begin_nested():
                add(session, 1)
                await session.execute(text("INSERT INTO thing VALUES (1, '')"))
        with pytest.raises(DBAPIError):  # noqa: PT012 - the block is what fails
            async with session.begin_nested():
                add(session, 2)
                session.add(Thing(id=2**40))  # no int4: the flush fails
                await session.flush()
        add(session, 3)
        await session.commit()
    assert await stored(engine) == [3]


async def test_connection_savepoint_under_a_session_drops_its_events(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        connection = await session.connection()
        add(session, 1)
        savepoint = await connection.begin_nested()
        add(session, 2)
        await savepoint.rollback()
        kept = await connection.begin_nested()
        add(session, 3)
        inside = await connection.begin_nested()
        add(session, 4)
        await inside.rollback()
        await kept.commit()
        await session.commit()
    assert await stored(engine) == [1, 3]


async def test_connection_savepoints(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        add(connection, 1)
        outer = await connection.begin_nested()
        add(connection, 2)
        inner = await connection.begin_nested()
        add(connection, 3)
        await inner.commit()
        await outer.rollback()
        async with connection.begin_nested():
            add(connection, 4)
        await connection.commit()
    assert await stored(engine) == [1, 4]


# ---- sessions that end without COMMIT --------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset", "invalidate", "rollback"])
async def test_reused_session_does_not_publish_what_it_dropped(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine, end: str
) -> None:
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        await session.flush()
        add(session, 1)
        await getattr(session, end)()
        add(session, 2)
        await session.commit()
    assert await stored(engine) == [2]


async def test_failed_commit_keeps_failing_until_rollback(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text("ALTER TABLE outbox.pending ADD CONSTRAINT no_k CHECK (key <> 'bad')")
        )
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        add(session, 1, key="bad")
        with pytest.raises(DBAPIError):
            await session.commit()
        with pytest.raises((DBAPIError, PendingRollbackError, InvalidRequestError)):
            await session.commit()
        await session.rollback()
        add(session, 2)
        await session.commit()
    assert await stored(engine) == [2]
    assert await things(engine) == []


async def test_client_side_error_keeps_the_buffer(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    broken = PendingEvent(
        str(uuid4()), "\ud800", SUBJECT, b"", b"{}", None
    )  # asyncpg cannot encode it
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        enqueue(session, broken, schema="outbox")
        for _ in range(2):
            with pytest.raises(Exception, match=r".") as caught:
                await session.commit()
            assert not isinstance(caught.value, AssertionError)
        await session.rollback()
    assert await things(engine) == []


async def test_deferred_constraint_that_fails_commit_stores_nothing(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE unique_late (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )
    async with sessionmaker() as session:
        await session.execute(text("INSERT INTO unique_late VALUES (1), (1)"))
        add(session, 1)
        with pytest.raises(DBAPIError):
            await session.commit()
        with pytest.raises((InvalidRequestError, PendingRollbackError)):
            await session.commit()
        with pytest.raises(InvalidSession, match="roll back first"):
            add(session, 2)
        await session.rollback()
    assert await stored(engine) == []


# ---- before_commit is not the last moment ----------------------------------------------------


async def test_hook_registered_later_may_add(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        add(session, 1)

        def late(sync: Session) -> None:
            add(sync, 2)

        event.listen(session.sync_session, "before_commit", late)
        await session.commit()
    assert await stored(engine) == [1, 2]


@pytest.mark.parametrize("first", [True, False])
async def test_after_flush_of_the_commit_may_add(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine, *, first: bool
) -> None:
    async with sessionmaker() as session:
        if not first:
            add(session, 1)

        def domain_events(sync: Session, context: object) -> None:
            for each in sync.new:
                if isinstance(each, Thing):
                    add(sync, each.id)

        event.listen(session.sync_session, "after_flush", domain_events)
        session.add(Thing(id=2))
        await session.commit()
    assert await stored(engine) == ([2] if first else [1, 2])


@pytest.mark.parametrize("work", [True, False])
async def test_first_add_inside_before_commit(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine, *, work: bool
) -> None:
    async with sessionmaker() as session:

        def audit(sync: Session) -> None:
            add(sync, 1)

        def second(sync: Session) -> None:
            add(sync, 2)

        event.listen(session.sync_session, "before_commit", audit)
        event.listen(session.sync_session, "before_commit", second)
        if work:
            session.add(Thing(id=1))
        else:
            _ = await session.begin()
        await session.commit()
    assert await stored(engine) == [1, 2]


async def test_add_in_after_commit_is_refused(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    refused: list[InvalidSession] = []
    async with sessionmaker() as session:

        def late(sync: Session) -> None:
            try:
                add(sync, 2)
            except InvalidSession as error:
                refused.append(error)

        event.listen(session.sync_session, "after_commit", late)
        add(session, 1)
        await session.commit()
    assert refused
    assert await stored(engine) == [1]


async def test_objects_are_flushed_before_ids_are_drawn(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    statements: list[str] = []

    def seen(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement.split()[2])

    event.listen(engine.sync_engine, "before_cursor_execute", seen)
    async with sessionmaker() as session:
        add(session, 1)
        session.add(Thing(id=1))
        await session.commit()
    assert statements[-2:] == ["thing", "outbox.pending"]


# ---- somebody else commits -------------------------------------------------------------------


async def test_joined_session_that_only_flushes(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        async with AsyncSession(connection) as session:
            session.add(Thing(id=1))
            add(session, 1)
            await session.flush()
            await connection.commit()
    assert await stored(engine) == [1]


async def test_joined_session_that_is_closed_before_the_commit(engine: AsyncEngine) -> None:
    async with engine.begin() as connection, AsyncSession(connection) as session:
        session.add(Thing(id=1))
        add(session, 1)
        await session.flush()
        await session.close()
    assert await stored(engine) == [1]


async def test_joined_session_closed_and_outer_rolled_back(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        async with AsyncSession(connection) as session:
            add(session, 1)
            await session.flush()
        await connection.rollback()
        add(connection, 2)
        await connection.commit()
    assert await stored(engine) == [2]


async def test_joined_session_that_commits_and_outer_commits_or_not(engine: AsyncEngine) -> None:
    for outer in ("commit", "rollback"):
        async with engine.connect() as connection:
            _ = await connection.begin()
            async with AsyncSession(connection) as session:
                add(session, 1)
                await session.commit()
                add(session, 2)
                await session.flush()
            await getattr(connection, outer)()
    assert await stored(engine) == [1, 2]


async def test_joined_session_that_rolls_back(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        async with AsyncSession(connection) as session:
            add(session, 1)
            await session.rollback()
        if connection.in_transaction():
            await connection.commit()
    assert await stored(engine) == []


async def test_joined_session_commit_inside_a_foreign_savepoint(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        session = AsyncSession(connection, join_transaction_mode="rollback_only")
        session.add(Thing(id=1))
        await session.flush()
        add(session, 1)
        savepoint = await connection.begin_nested()
        add(session, 2)
        await session.commit()
        await savepoint.rollback()
        await session.close()
        await connection.commit()
    assert await things(engine) == [1]
    assert await stored(engine) == [1]


async def test_create_savepoint_fixture_shows_rows_and_leaves_none(engine: AsyncEngine) -> None:
    count = text("SELECT count(*) FROM outbox.pending")
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Thing(id=1))
            add(session, 1)
            await session.commit()
            assert (await connection.execute(count)).scalar() == 1
            add(session, 2)
            await session.rollback()
            async with session.begin_nested():
                add(session, 3)
            session.add(Thing(id=2))
            await session.commit()
            assert (await connection.execute(count)).scalar() == 2
            add(session, 4)
            await session.flush()
        assert (await connection.execute(count)).scalar() == 2
        await outer.rollback()
    assert await stored(engine) == []


async def test_create_savepoint_session_closed_without_commit_drops(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            add(session, 1)
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            session.add(Thing(id=1))
            await session.flush()
            add(session, 2)
        add(connection, 3)
        await connection.commit()
    assert await stored(engine) == [3]


async def test_create_savepoint_after_flush_of_the_commit_is_visible(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            add(session, 1)

            def late(sync: Session) -> None:
                add(sync, 2)

            event.listen(session.sync_session, "before_commit", late)
            await session.commit()
            rows = await connection.execute(text("SELECT count(*) FROM outbox.pending"))
            assert rows.scalar() == 2
        await outer.rollback()


async def test_control_fully_session_closes_the_transaction(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        _ = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="control_fully") as session:
            session.add(Thing(id=1))
            await session.flush()
            add(session, 1)
        add(connection, 2)
        await connection.commit()
    assert await stored(engine) == [2]


# ---- two-phase -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared_url() -> Iterator[str]:
    """URL of a migrated database on a server that allows prepared transactions."""
    with EmbeddedPostgres(options={"max_prepared_transactions": "10", "fsync": "off"}) as server:
        databases.migrate(server.url)
        yield server.url


async def test_two_phase(prepared_url: str) -> None:
    engine = create_async_engine(prepared_url)
    sync_engine = create_engine(engine.url.set(drivername="postgresql+psycopg"))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine, twophase=True) as session:
        session.add(Thing(id=1))
        add(session, 1)
        await session.commit()
    with Session(sync_engine, twophase=True) as plain:
        add(plain, 2)

        def late(sync: Session) -> None:
            add(sync, 3)

        event.listen(plain, "before_commit", late)
        plain.prepare()
        plain.commit()
    with sync_engine.connect() as direct:
        for n, prepare in ((4, True), (5, False)):
            transaction = direct.begin_twophase()
            add(direct, n)
            if prepare:
                transaction.prepare()
            transaction.commit()
    async with AsyncSession(engine, twophase=True) as session:
        add(session, 6)
        await session.rollback()
    sync_engine.dispose()
    assert await stored(engine) == [1, 2, 3, 4, 5]
    await engine.dispose()


# ---- flush -----------------------------------------------------------------------------------


async def test_flush_writes_now_and_follows_rollback(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    count = text("SELECT count(*) FROM outbox.pending")
    async with sessionmaker() as session:
        add(session, 1)
        await events.flush(session)
        assert (await session.execute(count)).scalar() == 1
        await session.rollback()
        add(session, 2)
        savepoint = await session.begin_nested()
        add(session, 3)
        await events.flush(session)
        await savepoint.rollback()
        add(session, 4)
        await session.commit()
    assert await stored(engine) == [2, 4]


async def test_flush_inside_a_connection_savepoint_keeps_what_was_before(
    engine: AsyncEngine,
) -> None:
    async with engine.connect() as connection:
        add(connection, 1)
        savepoint = await connection.begin_nested()
        add(connection, 2)
        await events.flush(connection)
        await savepoint.rollback()
        await connection.commit()
    assert await stored(engine) == [1]


async def test_write_buffered_returns_the_count(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        assert await session.run_sync(write_buffered) == 0
        add(session, 1)
        enqueue(
            session,
            PendingEvent(str(uuid4()), None, "dlq.x", b"", b'{"data":{"n":2}}', None),
            schema="outbox",
        )
        assert await session.run_sync(write_buffered) == 2
        await session.commit()
    assert await stored(engine) == [1, 2]


# ---- refused ---------------------------------------------------------------------------------


async def test_autocommit_is_refused(database_url: str, engine: AsyncEngine) -> None:
    own = create_async_engine(database_url, isolation_level="AUTOCOMMIT")
    async with AsyncSession(own) as session:
        with pytest.raises(InvalidSession, match="AUTOCOMMIT"):
            add(session, 1)
    await own.dispose()
    option = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(option) as session:
        with pytest.raises(InvalidSession, match="AUTOCOMMIT"):
            add(session, 1)
    async with option.connect() as connection:
        with pytest.raises(InvalidSession, match="AUTOCOMMIT"):
            add(connection, 1)
    async with AsyncSession(engine) as session:
        _ = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(InvalidSession, match="AUTOCOMMIT"):
            add(session, 1)
    async with AsyncSession(engine) as session:
        add(session, 1)
        _ = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(InvalidSession, match="AUTOCOMMIT"):
            await session.commit()
        await session.rollback()
    assert await stored(engine) == []


async def test_closed_and_foreign_sessions_are_refused(engine: AsyncEngine) -> None:
    session = AsyncSession(engine, close_resets_only=False)
    await session.close()
    with pytest.raises(InvalidSession):
        add(session, 1)
    manual = AsyncSession(engine, autobegin=False)
    with pytest.raises(InvalidSession, match="autobegin"):
        add(manual, 1)
    async with manual.begin():
        add(manual, 1)
    await manual.close()
    with pytest.raises(InvalidSession, match="not started"):
        add(engine.connect(), 2)
    async with engine.connect() as connection:
        pass
    with pytest.raises(InvalidSession):
        add(connection, 2)
    for other in (None, engine, engine.sync_engine, object(), AsyncSession, "session"):
        with pytest.raises(InvalidSession):
            add(other, 2)
    assert await stored(engine) == [1]


async def test_other_databases_and_binds_are_refused(
    engine: AsyncEngine, sync_engine: Engine
) -> None:
    sqlite = create_engine("sqlite://")
    with Session(sqlite) as session, pytest.raises(InvalidSession, match="sqlite"):
        add(session, 1)
    sqlite.dispose()
    with Session() as session, pytest.raises(InvalidSession, match="bind_arguments"):
        add(session, 1)
    with Session(binds={Thing: sync_engine}) as session:
        with pytest.raises(InvalidSession, match="bind_arguments"):
            add(session, 1)
        named = Outbox("tests", bind_arguments={"mapper": Thing})
        named.add(session, SUBJECT, {"n": 7})
        session.commit()
    psycopg = create_async_engine(
        engine.url.set(drivername="postgresql+psycopg_async"),
    )
    async with AsyncSession(psycopg) as other:
        with pytest.raises(InvalidSession, match="asyncpg"):
            add(other, 1)
    await psycopg.dispose()
    assert await stored(engine) == [7]


async def test_commit_on_two_engines_needs_two_phase(
    engine: AsyncEngine, sync_engine: Engine, database_url: str
) -> None:
    second = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with Session(sync_engine, binds={Thing: second}) as session:
        session.add(Thing(id=1))
        add(session, 1)
        with pytest.raises(InvalidSession, match="twophase"):
            session.commit()
        session.rollback()
    second.dispose()
    assert await stored(engine) == []
    assert await things(engine) == []


async def test_invalid_events_leave_the_transaction_usable(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    async with sessionmaker() as session:
        session.add(Thing(id=1))
        add(session, 1)
        with pytest.raises(InvalidEvent):
            events.add(session, "evt.*", {})
        with pytest.raises(InvalidEvent):
            events.add(session, SUBJECT, {"x": float("nan")})
        add(session, 2)
        await session.commit()
    assert await stored(engine) == [1, 2]


# ---- ids -------------------------------------------------------------------------------------


async def test_repeat_in_one_transaction(
    sessionmaker: async_sessionmaker[AsyncSession], engine: AsyncEngine
) -> None:
    event_id = uuid4()
    async with sessionmaker() as session:
        assert add(session, 1, event_id=event_id) == str(event_id)
        add(session, 1, event_id=str(event_id).upper())
        with pytest.raises(InvalidEvent, match="other content"):
            add(session, 2, event_id=event_id)
        await events.flush(session)
        add(session, 1, event_id=event_id)
        async with session.begin_nested():
            add(session, 1, event_id=event_id)
        await session.commit()
        add(session, 2, event_id=event_id)
        await session.rollback()
        savepoint = await session.begin_nested()
        add(session, 3, event_id=event_id)
        await savepoint.rollback()
        add(session, 4, event_id=event_id)
        await session.commit()
    assert await stored(engine) == [1, 4]


async def test_repeat_on_a_connection(engine: AsyncEngine) -> None:
    event_id = uuid4()
    async with engine.begin() as connection:
        add(connection, 1, event_id=event_id)
        add(connection, 1, event_id=event_id)
        with pytest.raises(InvalidEvent, match="other content"):
            add(connection, 2, event_id=event_id)
    assert await stored(engine) == [1]


# ---- durability, privileges, wake-up ---------------------------------------------------------


async def test_transaction_raises_synchronous_commit_for_itself(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SET synchronous_commit = off"))
        await connection.commit()
        add(connection, 1)
        await events.flush(connection)
        show = text("SHOW synchronous_commit")
        assert (await connection.execute(show)).scalar() == "on"
        await connection.commit()
        assert (await connection.execute(show)).scalar() == "off"
        await connection.rollback()
        await connection.execute(text("SET synchronous_commit = remote_write"))
        add(connection, 2)
        await events.flush(connection)
        assert (await connection.execute(show)).scalar() == "remote_write"
        await connection.rollback()


async def test_insert_privilege_alone_is_enough(engine: AsyncEngine) -> None:
    role = f"writer_{uuid4().hex[:8]}"
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {role}"))
        await connection.execute(text(f"GRANT USAGE ON SCHEMA outbox TO {role}"))
        await connection.execute(text(f"GRANT INSERT ON outbox.pending TO {role}"))
    try:
        async with engine.begin() as connection:
            await connection.execute(text("SET LOCAL synchronous_commit = off"))
            await connection.execute(text(f"SET LOCAL ROLE {role}"))
            add(connection, 1)
        assert await stored(engine) == [1]
    finally:
        async with engine.begin() as connection:
            await connection.execute(text(f"DROP OWNED BY {role}"))
            await connection.execute(text(f"DROP ROLE {role}"))


async def test_commit_notifies_once_and_flush_does_not(
    engine: AsyncEngine, sessionmaker: async_sessionmaker[AsyncSession]
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with engine.connect() as listening:
        raw: Any = (await listening.get_raw_connection()).driver_connection
        await raw.add_listener(
            wake.channel("outbox"), lambda *found: heard.put_nowait(str(found[2]))
        )
        local: list[int] = []
        unsubscribe = wake.subscribe(lambda: local.append(1))
        async with sessionmaker() as session:
            add(session, 1)
            await events.flush(session)
            held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
            assert (await session.execute(held)).scalar() == 0
            await session.commit()
            assert local == [1]
            add(session, 2)
            await session.commit()
        unsubscribe()
        assert await asyncio.wait_for(heard.get(), 10) == "outbox_wake"
        assert local == [1, 1]
        async with engine.begin() as connection:
            add(connection, 3)
        await asyncio.wait_for(heard.get(), 10)
        assert heard.empty()
        await raw.reset()


async def test_settings_choose_the_schema(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE SCHEMA other"))
        await connection.execute(
            text("CREATE TABLE other.pending (LIKE outbox.pending INCLUDING ALL)")
        )
        Outbox("tests", settings=Settings.defaults(schema_name="other")).add(
            connection, SUBJECT, {"n": 1}
        )
        add(connection, 2)
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT count(*) FROM other.pending"))
        assert rows.scalar() == 1
    assert await stored(engine) == [2]
