"""The scene of a run: servers, proxies, and the processes that are started again when they die."""

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import upgrade
from outbox.embedded import EmbeddedNats, EmbeddedPostgres
from tests.chaos import process, witness
from tests.chaos.listeners import SUBJECTS
from tests.chaos.shared import (
    CANARY,
    MESSAGE_BYTES_MAX,
    SHOP,
    STREAM,
    WAREHOUSE,
    Journal,
    Orders,
)
from tests.chaos.stream import consumers
from tests.servers import jetstream
from tests.servers.proxy import Proxy

T = TypeVar("T")
MAINS = {
    "app": "tests.chaos.app:main",
    "relay": "tests.chaos.relay:main",
    "listener": "tests.chaos.listeners:main",
}
PRELOADED = ["tests.chaos.process", *(each.split(":")[0] for each in MAINS.values())]
ROLES = tuple(MAINS)
RESTART_SECONDS = 0.1
STOP_SECONDS = 25.0  # L4
LEFT = """
SELECT (SELECT count(*) FROM outbox.pending) + (SELECT count(*) FROM outbox.waiting),
       (SELECT count(*) FROM outbox.held),
       (SELECT count(*) FROM outbox.dead_letter WHERE state = 'requeued' AND side = 'listener')
"""


@dataclass(slots=True)
class Child:
    """A process of the run, and what it is started with."""

    orders: Orders
    process: ForkServerProcess
    wanted: bool = True  # is started again when it ends

    @property
    def role(self) -> str:
        """What it is."""
        return self.orders.role

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; return whether there was somebody to take it."""
        if self.process.pid is None or not self.process.is_alive():
            return False
        os.kill(self.process.pid, number)
        return True


@dataclass(slots=True)
class Stage:
    """Everything that a run consists of; faults act on it."""

    seed: int
    folder: Path
    postgres: EmbeddedPostgres
    nats: EmbeddedNats
    random: random.Random
    journal: Journal
    mutant: str = ""
    rate: float = 6.0
    proxies: dict[str, Proxy] = field(default_factory=dict)  # "app-postgres", …
    children: list[Child] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # faults that have fired
    restarts: int = 0
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="servers")
    )

    async def blocking(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run something that waits for a server on the thread that has started it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def url(self, database: str) -> str:
        """Return the URL of one of the databases, past the proxies."""
        return self.postgres.database_url(database)

    @asynccontextmanager
    async def engine(self, database: str) -> AsyncIterator[AsyncEngine]:
        """Lend an engine past the proxies."""
        engine = create_async_engine(
            self.url(database),
            poolclass=NullPool,
            connect_args={"timeout": 5, "command_timeout": 30},
        )
        try:
            yield engine
        finally:
            await engine.dispose()

    async def execute(self, database: str, sql: str) -> list[Any]:
        """Run statements, each in a transaction of its own; return the rows of the last."""
        rows: list[Any] = []
        async with self.engine(database) as engine:
            for each in witness.statements(sql):
                async with engine.begin() as connection:
                    found = await connection.exec_driver_sql(each)
                    rows = list(found) if found.returns_rows else []
        return rows

    # ---- processes ----------------------------------------------------------------------------

    def start(self, role: str, index: int, *, listener: str = "") -> None:
        """Start a process for the first time."""
        orders = Orders(
            role,
            index,
            self.seed,
            self.folder,
            self._urls(role),
            listener=listener,
            mutant=self.mutant,
            rate=self.rate,
        )
        self.children.append(Child(orders, self._launched(orders)))

    def _launched(self, orders: Orders) -> ForkServerProcess:
        context = multiprocessing.get_context("forkserver")
        child = context.Process(target=process.run, args=(MAINS[orders.role], orders))
        child.start()
        return child

    def _urls(self, role: str) -> dict[str, str]:
        where = f"postgres:{CANARY}@127.0.0.1:{self.proxies[f'{role}-postgres'].port}"
        urls = {name: f"postgresql+asyncpg://{where}/{name}" for name in ("shop", "warehouse")}
        if role != "app":
            urls["nats"] = f"nats://127.0.0.1:{self.proxies[f'{role}-nats'].port}"
        return urls

    async def tend(self) -> None:
        """Start again what has ended, for as long as it is wanted."""
        while True:
            for child in self.children:
                if child.wanted and not child.process.is_alive():
                    child.process.join()
                    self.restarts += 1
                    child.process = self._launched(child.orders)
            await asyncio.sleep(RESTART_SECONDS)

    def of(self, role: str) -> list[Child]:
        """Return the processes of a role that live at the moment."""
        return [each for each in self.children if each.role == role and each.process.is_alive()]

    async def end(self, role: str) -> None:
        """Ask the processes of a role to stop, and wait for them.

        Raises:
            AssertionError: one did not stop in time, or not in peace.
        """
        children = [each for each in self.children if each.role == role]
        begun = time.monotonic()
        for child in children:
            child.wanted = False
            child.signal(signal.SIGTERM)
        for child in children:
            left = STOP_SECONDS - (time.monotonic() - begun)
            await asyncio.to_thread(child.process.join, max(left, 0.1))
            code = child.process.exitcode
            if code is None:
                child.signal(signal.SIGQUIT)  # its log says what it waits for
                await asyncio.sleep(1)
            assert code is not None, f"L4: {role} {child.orders.index} did not stop in time"
            assert code in {0, 1, -signal.SIGKILL}, f"L4: {role} ended with {code}"

    async def noted(self, what: str, seconds: float) -> bool:
        """Wait for a line in the journal; return whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(line["what"] == what for line in self.journal.news()):
                return True
            await asyncio.sleep(0.05)
        return False

    # ---- the end ------------------------------------------------------------------------------

    def heal(self) -> None:
        """End every fault."""
        for proxy in self.proxies.values():
            proxy.disarm()
            proxy.open()
        for child in self.children:
            child.signal(signal.SIGCONT)
            child.signal(signal.SIGUSR1)

    async def left(self) -> str:
        """Return what is not drained yet; nothing when all is."""
        for database in ("shop", "warehouse"):
            (row,) = await self.execute(database, LEFT)
            if any(row):
                return f"{database}: {row[0]} to publish, {row[1]} held, {row[2]} requeued"
        found = await consumers(self.nats.url, STREAM, list(SUBJECTS))
        for name, info in found.items():
            if "error" in info or info["num_pending"] or info["num_ack_pending"]:
                unread, unacked = info.get("num_pending"), info.get("num_ack_pending")
                return f"{name}: {unread} unread, {unacked} unacked"
        return ""


@asynccontextmanager
async def built(
    folder: Path, *, seed: int, mutant: str = "", rate: float = 6.0
) -> AsyncIterator[Stage]:
    """Lend a stage with servers, tables and proxies, without any process yet."""
    postgres = EmbeddedPostgres(options={"fsync": "off", "max_connections": "200"})
    nats = EmbeddedNats(folder / "nats")
    (folder / "nats").mkdir()
    stage = Stage(seed, folder, postgres, nats, random.Random(seed), Journal(folder), mutant, rate)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    async with AsyncExitStack() as stack:
        stack.callback(stage._threads.shutdown)
        for server in (postgres, nats):
            await stage.blocking(server.start)
            stack.push_async_callback(stage.blocking, server.close)
        await _make_tables(stage)
        limits = {"max_msg_size": MESSAGE_BYTES_MAX}
        jetstream.create_stream(nats.url, STREAM, **limits)
        for role in ROLES:
            stage.proxies[f"{role}-postgres"] = await stack.enter_async_context(
                Proxy(postgres.port)
            )
            if role != "app":
                stage.proxies[f"{role}-nats"] = await stack.enter_async_context(Proxy(nats.port))
        stack.callback(_end_all, stage)
        yield stage


async def _make_tables(stage: Stage) -> None:
    for database, tables in (("shop", SHOP), ("warehouse", WAREHOUSE)):
        await stage.blocking(stage.postgres.create_database, database)
        async with stage.engine(database) as engine:
            await upgrade(engine)
            await witness.install(engine)
        await stage.execute(database, tables)


def _end_all(stage: Stage) -> None:
    """Kill what is left when a run ends in the middle."""
    for child in stage.children:
        child.wanted = False
        if child.process.is_alive():
            child.process.kill()
        child.process.join(5)


def keep_store(stage: Stage) -> Path:
    """Copy the stopped broker's files."""
    copy = stage.folder / "nats-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(stage.nats.directory / "store", copy)
    return copy


def put_back(stage: Stage, copy: Path) -> None:
    """Replace the stopped broker's files by a copy."""
    shutil.rmtree(stage.nats.directory / "store")
    shutil.copytree(copy, stage.nats.directory / "store")
