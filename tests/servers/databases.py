"""Databases made from a migrated template, by pytest-postgresql's janitor."""

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool


def in_thread(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine to its end in a loop and thread of its own, beside pytest-asyncio's loop."""
    failed: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def database(server_url: str, *, template: str | None = None) -> Iterator[str]:
    """Make a database with a fresh name beside the one of `server_url`; drop it afterwards."""
    url = make_url(server_url)
    name = f"outbox_test_{uuid.uuid4().hex}"
    janitor = DatabaseJanitor(
        user=url.username or "postgres",
        password=url.password,
        host=url.host or str(url.query.get("host", "127.0.0.1")),
        port=url.port or 5432,
        dbname=name,
        template_dbname=template,
        maintenance_dbname=url.database or "postgres",
    )
    with janitor:
        yield url.set(database=name).render_as_string(hide_password=False)


def migrate(url: str) -> None:
    """Bring the database's outbox schema to the newest version."""
    from outbox.postgres.schema import upgrade  # noqa: PLC0415 - the servers start without it

    async def work() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        try:
            await upgrade(engine)
        finally:
            await engine.dispose()

    in_thread(work)


def database_name(url: str) -> str:
    """Return the name of the database that `url` points at."""
    return make_url(url).database or ""
