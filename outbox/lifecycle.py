"""One life for relay and listener: run, start and stop, or a block that they run beside."""

import asyncio
from abc import ABC, abstractmethod
from datetime import timedelta
from types import TracebackType
from typing import Self


class Worker(ABC):
    """Something that runs until it is stopped softly, cancelled, or fails for good.

    A soft stop lets what is in flight end. After its grace period comes cancellation, and SIGKILL
    is the third way; all three leave the same state behind, at worst an event sent twice.
    """

    grace: timedelta = timedelta(seconds=10)

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopping = asyncio.Event()  # read between batches; every sleep is cut short by it
        self._task: asyncio.Task[None] | None = None
        self._block: asyncio.Task[object] | None = None
        self._failure: BaseException | None = None

    @abstractmethod
    async def _live(self) -> None:
        """Work until `stopping` is set; raise only what no retry can mend."""

    @property
    def running(self) -> bool:
        """True from `start` until the end, whatever the end was."""
        return self._task is not None and not self._task.done()

    async def run(self) -> None:
        """Work until stopped; raise the error that ended the work for good.

        Cancelling the caller is a hard stop.

        Raises:
            ConfigurationError: at the start, when settings, schema or broker do not fit.
        """
        await self.start()
        assert self._task is not None  # noqa: S101 - start has just set it
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._task.done():
                await self.stop(grace=timedelta(0))
            raise

    async def start(self) -> None:
        """Begin to work beside the caller; errors are raised by `run`, `stop` or the block.

        Raises:
            RuntimeError: it runs already.
        """
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self.stopping.clear()
        self._failure = None
        self._task = asyncio.create_task(self._live(), name=self.name)
        self._task.add_done_callback(self._ended)

    async def stop(self, *, grace: timedelta | float | None = None) -> None:
        """Stop softly, and by cancellation after `grace` (seconds or timedelta; default 10 s).

        Raises:
            OutboxError: the work had failed for good before.
        """
        task = self._task
        if task is None:
            return
        self.stopping.set()
        wait = self.grace if grace is None else grace
        seconds = wait.total_seconds() if isinstance(wait, timedelta) else wait
        if seconds > 0:
            await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def __aenter__(self) -> Self:
        await self.start()
        self._block = asyncio.current_task()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        if self._failure is not None and block is not None:
            if kind is not None and issubclass(kind, asyncio.CancelledError):
                block.uncancel()
            self._task = None
            raise self._failure
        await self.stop()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Cancel the block when the work failed while the block still runs."""
        if task.cancelled() or task.exception() is None:
            return
        if self._block is not None:
            self._failure = task.exception()
            self._block.cancel()

    async def pause(self, delay: timedelta | float) -> bool:
        """Sleep for `delay`, cut short by a stop; return True when stopping."""
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return False
        return True
