"""pytest fixtures with real servers: `pytest_plugins = ["outbox.testing.fixtures"]`.

OUTBOX_DATABASE_URL and OUTBOX_NATS_URL name the servers; without them embedded ones are started
once for each worker process (extra `embedded`). Every test gets a database of its own, migrated,
and a stream of its own for `evt.>`, `cmd.>` and `dlq.>`: on a server that is named, all other
streams with these subjects have to be elsewhere. Needs pytest and pytest-asyncio.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from outbox.errors import ConfigurationError
from outbox.jetstream.client import JetStreamClient
from outbox.postgres.schema import upgrade
from outbox.settings import Settings

Server = TypeVar("Server", EmbeddedPostgres, EmbeddedNats)


def _in_thread(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `work` in a loop and a thread of its own: a test's loop may be running here."""
    failed: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _execute(url: str, sql: str) -> None:
    async def work() -> None:
        engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text(sql))
        await engine.dispose()

    _in_thread(work)


@contextmanager
def _database(server_url: str, template: str = "template1") -> Iterator[str]:
    """Make a database beside the one of `server_url`; drop it afterwards."""
    name = f"outbox_test_{uuid4().hex}"
    _execute(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        _execute(server_url, f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def _started(server: Server, variable: str) -> Iterator[Server]:
    """Run `server`; fail and say what to install when it cannot be had."""
    with ExitStack() as stack:
        try:
            stack.enter_context(server)
        except ConfigurationError as error:
            pytest.fail(f"{error}; or set {variable} to a server for tests", pytrace=False)
        yield server


@pytest.fixture(scope="session")
def outbox_postgres() -> Iterator[str]:
    """SQLAlchemy URL of a server on which databases may be made."""
    url = os.environ.get("OUTBOX_DATABASE_URL")
    if url:
        parsed = make_url(url)
        if parsed.drivername in {"postgres", "postgresql"}:
            parsed = parsed.set(drivername="postgresql+asyncpg")
        yield parsed.render_as_string(hide_password=False)
        return
    options = {"fsync": "off", "max_connections": "200"}
    with _started(EmbeddedPostgres(options=options), "OUTBOX_DATABASE_URL") as server:
        yield server.url


@pytest.fixture(scope="session")
def outbox_template(outbox_postgres: str) -> Iterator[str]:
    """Name of a migrated database, from which those of the tests are made."""

    async def migrate() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        await upgrade(engine)
        await engine.dispose()

    with _database(outbox_postgres) as url:
        _in_thread(migrate)
        yield make_url(url).database or ""


@pytest.fixture(scope="session")
def outbox_nats() -> Iterator[str]:
    """URL of a nats-server with JetStream."""
    url = os.environ.get("OUTBOX_NATS_URL")
    if url:
        yield url
        return
    with _started(EmbeddedNats(), "OUTBOX_NATS_URL") as server:
        yield server.url


@pytest.fixture
def outbox_database_url(outbox_postgres: str, outbox_template: str) -> Iterator[str]:
    """URL of a database of the test's own, with the schema `outbox`."""
    with _database(outbox_postgres, outbox_template) as url:
        yield url


@pytest_asyncio.fixture
async def outbox_engine(outbox_database_url: str) -> AsyncIterator[AsyncEngine]:
    """Engine on the test's own database."""
    engine = create_async_engine(outbox_database_url)
    yield engine
    await engine.dispose()


@pytest.fixture
def outbox_sessionmaker(outbox_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions on the test's own database."""
    return async_sessionmaker(outbox_engine, expire_on_commit=False)


@pytest_asyncio.fixture
async def outbox_js_client(outbox_nats: str) -> AsyncIterator[JetStreamClient]:
    """A connected client."""
    async with JetStreamClient(outbox_nats) as client:
        yield client


@pytest_asyncio.fixture
async def outbox_stream(outbox_js_client: JetStreamClient) -> AsyncIterator[str]:
    """Name of a stream of the test's own; deleted afterwards."""
    name = f"TEST_{uuid4().hex}"
    await outbox_js_client.ensure_stream(name, ["evt.>", "cmd.>", "dlq.>"])
    yield name
    await outbox_js_client.delete_stream(name)


@pytest.fixture
def outbox_settings(outbox_stream: str) -> Settings:
    """Settings for relays and listeners on the test's own stream."""
    return Settings.defaults(stream=outbox_stream)
