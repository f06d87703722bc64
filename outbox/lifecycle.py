"""One life for relay and listener: run, start and stop, or a block that they run beside."""

import asyncio
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a worker says about itself, without asking anybody."""

    running: bool
    connected: bool  # to the broker

    @property
    def ok(self) -> bool:
        """True while it runs and nothing keeps it from its work."""
        return self.running and self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong, in a few words; None when all is well."""
        return self._hindrance() or (None if self.connected else "not connected to the broker")

    def _hindrance(self) -> str | None:
        """Return what else keeps it from its work."""
        return None


class Worker(ABC):
    """Something that runs until it is stopped softly, cancelled, or fails for good.

    A soft stop lets what is in flight end. After its grace period comes cancellation, and SIGKILL
    is the third way; all three leave the same state behind, at worst an event sent twice.
    """

    grace: timedelta = timedelta(seconds=10)

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopping = asyncio.Event()  # read between batches; every sleep is cut short by it
        self.ended = False  # whether it ran, and its work is over
        self._task: asyncio.Task[None] | None = None
        self._block: asyncio.Task[object] | None = None
        self._failure: BaseException | None = None
        self._cancelled_before = 0
        self._awaited = False  # `run` waits for the end, and raises what ended it

    @abstractmethod
    async def _live(self) -> None:
        """Work until `stopping` is set; raise only what no retry can mend."""

    def health(self) -> Health:
        """Return how it does, without asking anybody."""
        return Health(running=self.running, connected=True)

    @property
    def running(self) -> bool:
        """True from `start` until the end, whatever the end was."""
        return self._task is not None and not self._task.done()

    async def run(self) -> None:
        """Work until stopped; raise the error that ended the work for good.

        Cancelling the caller is a hard stop: it returns once the work has been cancelled too.

        Raises:
            ConfigurationError: at the start, when settings, schema or broker do not fit.
            RuntimeError: it runs already.
        """
        await self.start()
        task = self._task
        assert task is not None  # noqa: S101 - start has just set it
        self._awaited = True
        try:
            await _ended_or_cancelled(task)
        finally:
            self._awaited = False
            self._forget(task)
        _raise_failure(task)

    async def start(self) -> None:
        """Begin to work beside the caller; errors are raised by `run`, `stop` or the block.

        Raises:
            RuntimeError: it runs already.
        """
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self.stopping.clear()
        self.ended = False
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
        try:
            await _ended_or_cancelled(task, max(seconds, 0))
            task.cancel()  # does nothing when it has ended
            await _ended_or_cancelled(task)
        finally:
            self._forget(task)
        _raise_failure(task)

    async def __aenter__(self) -> Self:
        await self.start()
        self._block = asyncio.current_task()
        self._cancelled_before = 0 if self._block is None else self._block.cancelling()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        failure, self._failure = self._failure, None
        if failure is None or block is None:
            await self.stop()
            return
        self._task = None
        if block.uncancel() > self._cancelled_before:
            # Somebody else has cancelled the block as well, and waits for it to end so.
            logger.error("%s failed in a cancelled block", self.name, exc_info=failure)
            return
        raise failure

    def _forget(self, task: asyncio.Task[None]) -> None:
        if self._task is task:  # not when it was started again meanwhile
            self._task = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Cancel the block when the work failed while the block still runs."""
        self.ended = True
        if task.cancelled() or (failure := task.exception()) is None:
            return
        if self._block is not None:
            self._failure = failure
            self._block.cancel()
        elif not self._awaited and not self.stopping.is_set():
            # After a bare `start` nobody may look for a long time; `stop` raises it then.
            logger.error("%s has failed for good", self.name, exc_info=failure)

    async def pause(self, delay: timedelta | float) -> bool:
        """Sleep for `delay`, cut short by a stop; return True when stopping."""
        seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return False
        return True


async def _ended_or_cancelled(task: asyncio.Task[None], seconds: float | None = None) -> None:
    """Return once `task` has ended or `seconds` are over; cancelled, take the task along."""
    if seconds == 0:
        return
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise


def _raise_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
