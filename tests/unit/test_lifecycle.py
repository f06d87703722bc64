"""One life: run, start and stop, and the block, however the work or the caller ends."""

# ruff: noqa: PT012 - a block that raises is the subject here
# ruff: noqa: ASYNC110 - the point is to look before anything else runs

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from typing_extensions import override

from outbox.errors import ConfigurationError
from outbox.lifecycle import Worker

BROKEN = ConfigurationError("the stream is missing")


class Fake(Worker):
    """Works until stopped; fails, lingers or returns when told."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.begun = asyncio.Event()
        self.fail = asyncio.Event()
        self.lingering = False
        self.ends: list[str] = []

    @override
    async def _live(self) -> None:
        self.begun.set()
        try:
            failing = asyncio.create_task(self.fail.wait())
            stopped = asyncio.create_task(self.stopping.wait())
            try:
                await asyncio.wait({failing, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                failing.cancel()
                stopped.cancel()
            if self.fail.is_set():
                raise BROKEN
            if self.lingering:
                await asyncio.Event().wait()
            self.ends.append("soft")
        except asyncio.CancelledError:
            self.ends.append("hard")
            raise


async def within(awaited: Awaitable[None], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        await awaited


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> object:
    yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


# ---- run ---------------------------------------------------------------------------------------


async def test_run_returns_when_stopped_by_somebody_else() -> None:
    worker = Fake()
    running = asyncio.create_task(worker.run())
    await worker.begun.wait()
    await worker.stop()
    await within(running)
    assert worker.ends == ["soft"]
    assert not worker.running


async def test_run_returns_when_somebody_else_stops_it_hard() -> None:
    """The caller of `run` was not cancelled, so it does not see a cancellation."""
    worker = Fake()
    running = asyncio.create_task(worker.run())
    await worker.begun.wait()
    await worker.stop(grace=0)
    await within(running)
    assert worker.ends == ["hard"]


async def test_run_raises_what_ended_it_and_stop_does_not_raise_it_again() -> None:
    worker = Fake()
    worker.fail.set()
    with pytest.raises(ConfigurationError, match="the stream is missing"):
        await worker.run()
    await worker.stop()


async def test_cancelling_run_cancels_the_work_and_waits_for_its_end() -> None:
    worker = Fake()
    running = asyncio.create_task(worker.run())
    await worker.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert worker.ends == ["hard"]
    assert not worker.running


async def test_a_failure_while_run_is_cancelled_does_not_swallow_the_cancellation() -> None:
    class Sour(Fake):
        @override
        async def _live(self) -> None:
            try:
                await super()._live()
            except asyncio.CancelledError:
                raise BROKEN from None

    worker = Sour()
    running = asyncio.create_task(worker.run())
    await worker.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_runs_again_after_a_stop_and_after_a_failure() -> None:
    worker = Fake()
    worker.fail.set()
    with pytest.raises(ConfigurationError):
        await worker.run()
    worker.fail.clear()
    for _ in range(2):
        await worker.start()
        await worker.stop()
    assert worker.ends in (["hard", "hard"], ["soft", "soft"])


# ---- start and stop ----------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [Worker.start, Worker.run, Worker.__aenter__])
async def test_a_second_start_is_refused_and_leaves_the_first_alone(
    begin: Callable[[Worker], Awaitable[object]],
) -> None:
    worker = Fake()
    await worker.start()
    with pytest.raises(RuntimeError, match="fake is running already"):
        await begin(worker)
    assert worker.running
    await worker.stop()


async def test_stop_without_start_and_twice_is_harmless() -> None:
    worker = Fake()
    await worker.stop()
    await worker.start()
    await worker.stop()
    await worker.stop()


@pytest.mark.parametrize("grace", [0.05, timedelta(milliseconds=50), 0, timedelta(0), -1])
async def test_work_that_outlives_the_grace_is_cancelled(grace: timedelta | float) -> None:
    worker = Fake()
    worker.lingering = True
    await worker.start()
    await worker.begun.wait()
    await within(worker.stop(grace=grace))
    assert worker.ends == ["hard"]


async def test_the_default_grace_is_the_workers() -> None:
    worker = Fake()
    worker.lingering = True
    worker.grace = timedelta(milliseconds=20)
    await worker.start()
    await worker.begun.wait()
    await within(worker.stop(), 2)
    assert worker.ends == ["hard"]


async def test_stop_raises_an_earlier_failure_once_and_it_was_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Fake()
    worker.fail.set()
    with caplog.at_level(logging.ERROR):
        await worker.start()
        while worker.running:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert "fake has failed for good" in caplog.text
    with pytest.raises(ConfigurationError):
        await worker.stop()
    await worker.stop()


async def test_cancelling_stop_cancels_the_work_at_once() -> None:
    worker = Fake()
    worker.lingering = True
    await worker.start()
    await worker.begun.wait()
    stopping = asyncio.create_task(worker.stop(grace=60))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(stopping)
    assert worker.ends == ["hard"]


async def test_two_stops_at_once_both_wait_for_the_end() -> None:
    worker = Fake()
    await worker.start()
    await worker.begun.wait()
    await asyncio.gather(worker.stop(), worker.stop())
    assert worker.ends == ["soft"]
    assert not worker.running


# ---- the block ---------------------------------------------------------------------------------


async def test_the_block_ends_softly() -> None:
    async with Fake() as worker:
        await worker.begun.wait()
    assert worker.ends == ["soft"]


async def test_a_fatal_error_cancels_the_block_and_is_raised() -> None:
    reached = False
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ConfigurationError, match="the stream is missing"):
        async with Fake() as worker:
            worker.fail.set()
            await asyncio.Event().wait()
            reached = True
    assert not reached
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # no cancellation is left over


async def test_a_block_that_swallows_the_cancellation_still_raises_the_failure() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ConfigurationError):
        async with Fake() as worker:
            worker.fail.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
    assert task.cancelling() == 0


async def test_an_error_of_the_block_while_it_is_cancelled_is_the_context() -> None:
    with pytest.raises(ConfigurationError) as raised:
        async with Fake() as worker:
            worker.fail.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("the block's own")
    assert isinstance(raised.value.__context__, ValueError)


async def test_an_error_of_the_block_passes_and_stops_the_work() -> None:
    with pytest.raises(ValueError, match="the block's own"):
        async with Fake() as worker:
            await worker.begun.wait()
            raise ValueError("the block's own")
    assert worker.ends == ["soft"]


async def test_cancelling_the_block_stops_the_work_and_stays_a_cancellation() -> None:
    worker = Fake()

    async def block() -> None:
        async with worker:
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await worker.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.ends == ["soft"]


async def test_a_timeout_around_the_block_stays_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), Fake():
            await asyncio.Event().wait()


async def test_failure_and_cancellation_together_are_a_cancellation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever cancelled waits for that; the failure is in the log."""
    worker = Fake()

    async def block() -> None:
        async with worker:
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await worker.begun.wait()
    worker.fail.set()
    while worker.running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "failed in a cancelled block" in caplog.text


async def test_of_two_workers_in_one_block_the_failed_one_is_raised_the_other_stopped() -> None:
    for inner_fails in (True, False):
        outer, inner = Fake(), Fake()
        with pytest.raises(ConfigurationError):
            async with outer, inner:
                await outer.begun.wait()
                await inner.begun.wait()
                (inner if inner_fails else outer).fail.set()
                await asyncio.Event().wait()
        assert (outer if inner_fails else inner).ends == ["soft"]


async def test_two_workers_that_fail_at_once_raise_one_error() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ConfigurationError):
        async with Fake() as outer, Fake() as inner:
            outer.fail.set()
            inner.fail.set()
            await asyncio.Event().wait()
    assert task.cancelling() == 0


async def test_a_failure_at_the_very_end_of_the_block_is_raised() -> None:
    with pytest.raises(ConfigurationError):
        async with Fake() as worker:
            await worker.begun.wait()
            worker.fail.set()


async def test_a_block_left_by_another_task_raises_the_failure_there() -> None:
    """As test fixtures do, whose two halves run in different tasks."""
    worker = Fake()
    await asyncio.create_task(worker.__aenter__())
    worker.fail.set()
    while worker.running:
        await asyncio.sleep(0)
    with pytest.raises(ConfigurationError):
        await worker.__aexit__(None, None, None)


# ---- pause -------------------------------------------------------------------------------------


async def test_pause_is_cut_short_by_a_stop() -> None:
    worker = Fake()
    assert not await worker.pause(0.001)
    worker.stopping.set()
    async with asyncio.timeout(1):
        assert await worker.pause(timedelta(hours=1))
