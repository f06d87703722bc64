"""Observers that wait, raise and kill: a test names the step at which something happens."""

import asyncio
import os
import signal

from typing_extensions import override

from outbox.telemetry import Moment, Observer, Step


class Watch(Observer):
    """Remembers every moment; a test waits for one instead of sleeping."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self._changed = asyncio.Event()

    @override
    def on_step(self, moment: Moment) -> None:
        self.moments.append(moment)
        self._changed.set()

    def of(self, step: Step) -> list[Moment]:
        """Return the moments of one step so far."""
        return [moment for moment in self.moments if moment.step is step]

    def count(self, step: Step) -> int:
        """Return the number of events, not of moments, that one step has concerned so far."""
        return sum(moment.count for moment in self.of(step))

    async def until(self, step: Step, count: int = 1, within: float = 10.0) -> list[Moment]:
        """Return once `step` was told `count` times; fail when that takes `within` seconds."""
        try:
            async with asyncio.timeout(within):
                while len(self.of(step)) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            seen = [str(moment.step) for moment in self.moments[-20:]]
            raise AssertionError(
                f"{step} came {len(self.of(step))} of {count} times in {within} s; last: {seen}"
            ) from None
        return self.of(step)

    async def until_events(self, step: Step, count: int, within: float = 10.0) -> None:
        """Return once `step` has concerned `count` events; fail when that takes `within` s."""
        try:
            async with asyncio.timeout(within):
                while self.count(step) < count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{step}: {self.count(step)} of {count} events") from None


class KillAt(Observer):
    """Ends its own process with SIGKILL at the nth time of a step. For child processes only."""

    def __init__(self, step: Step, nth: int = 1) -> None:
        self._step = step
        self._left = nth

    @override
    def on_step(self, moment: Moment) -> None:
        if moment.step is self._step:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class RaiseAt(Watch):
    """Fails a step with `error`, the first `times` times; remembers every moment too."""

    def __init__(self, step: Step, error: BaseException, times: int = 1) -> None:
        super().__init__()
        self._step = step
        self._error = error
        self._times = times

    @override
    def on_step(self, moment: Moment) -> None:
        super().on_step(moment)
        if moment.step is self._step and self._times > 0:
            self._times -= 1
            raise self._error
