"""Real servers for every test: the ones that the environment names, else embedded ones."""

import logging
import os
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from tests.servers import databases, jetstream

if TYPE_CHECKING:
    from outbox.jetstream.client import JetStreamClient

DATABASE_URL = os.environ.get("OUTBOX_DATABASE_URL")
NATS_URL = os.environ.get("OUTBOX_NATS_URL")
STREAM = "EVENTS"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what only Linux can do elsewhere; the summary counts it."""
    elsewhere = (
        [] if sys.platform == "linux" else [i for i in items if i.get_closest_marker("linux")]
    )
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure: a test that did not run has shown nothing."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped; a skipped test fails"
    return report


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OUTBOX_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_logs_elsewhere() -> Iterator[None]:
    """Take away what a command in this process has set: its handler writes to a closed capture."""
    root, alembic = logging.getLogger(), logging.getLogger("alembic")
    handlers, levels = list(root.handlers), (root.level, alembic.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    alembic.setLevel(levels[1])


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """SQLAlchemy URL of a server where databases may be made; one per worker process."""
    if DATABASE_URL:
        yield DATABASE_URL
        return
    with EmbeddedPostgres(options={"fsync": "off", "max_connections": "200"}) as server:
        yield server.url


@pytest.fixture(scope="session")
def _template(postgres_server: str) -> Iterator[str]:
    with databases.database(postgres_server) as url:
        databases.migrate(url)
        yield databases.database_name(url)


@pytest.fixture
def database_url(postgres_server: str, _template: str) -> Iterator[str]:
    """URL of a database of the test's own, with the schema `outbox` migrated."""
    with databases.database(postgres_server, template=_template) as url:
        yield url


@pytest.fixture
def empty_database_url(postgres_server: str) -> Iterator[str]:
    """URL of a database of the test's own, with nothing in it."""
    with databases.database(postgres_server) as url:
        yield url


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """Engine on the test's own migrated database."""
    made = create_async_engine(database_url)
    yield made
    await made.dispose()


@pytest.fixture
def sessionmaker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions on the test's own migrated database."""
    return async_sessionmaker(engine, expire_on_commit=False)


@pytest.fixture(scope="session")
def nats_server() -> Iterator[str]:
    """URL of a nats-server with JetStream; one per worker process.

    Its streams are deleted between tests: with OUTBOX_NATS_URL, name a server that holds nothing
    else, and run without `-n`.
    """
    if NATS_URL:
        yield NATS_URL
        return
    with EmbeddedNats() as server:
        yield server.url


@pytest.fixture
async def js_client(nats_server: str) -> "AsyncIterator[JetStreamClient]":
    """A connected client of the worker's nats-server."""
    from outbox.jetstream.client import JetStreamClient  # noqa: PLC0415 - few tests need it

    async with JetStreamClient(nats_server) as client:
        yield client


@pytest.fixture
def stream(nats_server: str) -> str:
    """Name of a fresh stream for `evt.>`, `cmd.>` and `dlq.>`; all older streams are gone."""
    jetstream.delete_streams(nats_server)
    jetstream.create_stream(nats_server, STREAM)
    return STREAM


@pytest.fixture
def private_postgres() -> Iterator[EmbeddedPostgres]:
    """A durable PostgreSQL that the test may kill; its database `postgres` is empty."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def private_nats() -> Iterator[EmbeddedNats]:
    """A nats-server that the test may kill; it has no stream."""
    with EmbeddedNats() as server:
        yield server
