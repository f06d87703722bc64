"""The demo's own processes. None outlives the demo, whatever ends that."""

import asyncio
import os
import sys
from collections.abc import Mapping

from outbox.embedded import bound
from outbox.errors import OutboxError

STOP_SECONDS = 15.0


class Child:
    """A Python module in a process of its own."""

    def __init__(self, module: str, *arguments: str, settings: Mapping[str, str]) -> None:
        self.module = module
        self.lines = 0  # that it has printed
        self._arguments = arguments
        kept = {k: v for k, v in os.environ.items() if not k.startswith("OUTBOX_")}
        self._environment = {**kept, **settings}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run it; on Linux it dies with this process."""
        command = [sys.executable, "-m", self.module, *self._arguments]
        self._process = await asyncio.create_subprocess_exec(
            *bound(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches the demo, which stops it in order
        )
        self._reading = asyncio.create_task(self._read(self._process))

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return None if self._process is None else self._process.returncode

    def check(self) -> None:
        """Return if it runs, or has ended well.

        Raises:
            OutboxError: it has failed.
        """
        if self.code:
            raise OutboxError(f"{self.module} ended with exit code {self.code}")

    async def kill(self) -> None:
        """End it with SIGKILL."""
        await self._end(soft=False)

    async def stop(self) -> None:
        """End it with SIGTERM, and with SIGKILL if that takes long."""
        await self._end(soft=True)

    async def _end(self, *, soft: bool) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate() if soft else process.kill()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if self._reading is not None:
            await self._reading

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        async for _ in process.stdout:
            self.lines += 1
