"""One run: begin, disturb, heal, drain, check, and say what was seen."""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nats.errors
from sqlalchemy.exc import SQLAlchemyError

from outbox.errors import OutboxError
from tests.chaos import checker
from tests.chaos.acks import Acks
from tests.chaos.checker import Checker, Report
from tests.chaos.listeners import SUBJECTS
from tests.chaos.nemesis import EXCLUSIVE, FAULTS, NOTED
from tests.chaos.shared import STREAM
from tests.chaos.stage import Stage, built
from tests.chaos.stream import read

QUIET_SHARE = 0.25
WARM_UP_SECONDS = 1.5
LATE_SECONDS = 30.0  # beyond the plan's, for kinds that have not fired


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run consists of."""

    seconds: float
    seed: int
    faults: Sequence[str] = tuple(FAULTS)
    mutant: str = ""
    rate: float = 5.0
    drain_seconds: float = 60.0  # without any progress


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen."""

    plan: Plan
    faults: Counter[str]
    report: Report
    drained_seconds: float
    restarts: int
    never_fired: list[str]

    @property
    def violations(self) -> int:
        """How many there were."""
        return sum(len(each) for each in self.report.found.values())


async def run(plan: Plan, folder: Path) -> Outcome:
    """Do the whole run in an empty folder."""
    async with built(folder, seed=plan.seed, mutant=plan.mutant, rate=plan.rate) as stage:
        for index in range(2):
            stage.start("app", index)
            stage.start("relay", index)
            for number, listener in enumerate(("plain", "ordered", "batch")):
                stage.start("listener", 3 * index + number, listener=listener)
        acks = Acks(stage)
        tending = asyncio.create_task(stage.tend())
        watching = asyncio.create_task(acks.watch())
        try:
            await _disturb(stage, plan)
            stage.heal()
            await stage.end("app")
            drained = await _drain(stage, plan.drain_seconds)
        finally:
            acks.ended = True
            tending.cancel()
            await asyncio.wait({tending, watching})
        watching.result()  # had it failed, nobody would have looked since
        for role in ("listener", "relay"):
            await stage.end(role)
        await acks.look()
        return await _checked(stage, plan, drained, acks)


async def _disturb(stage: Stage, plan: Plan) -> None:
    """Let up to three faults at a time happen, with quiet times; each kind comes soon."""
    await asyncio.sleep(WARM_UP_SECONDS)
    end = time.monotonic() + plan.seconds
    lines: dict[int, list[str]] = defaultdict(list)
    for each in plan.faults:
        lines[0 if each in EXCLUSIVE else 1 + each.endswith("_at_step")].append(each)
    async with asyncio.TaskGroup() as tasks:
        for kinds in lines.values():
            if kinds:
                tasks.create_task(_one_after_another(stage, kinds, end))
    left = end - time.monotonic()
    if left > 0:
        await asyncio.sleep(left)


async def _one_after_another(stage: Stage, kinds: list[str], end: float) -> None:
    queue: list[str] = []
    latest = end + LATE_SECONDS
    while (now := time.monotonic()) < latest:
        missing = [kind for kind in kinds if not stage.counts[kind]]
        if now >= end and not missing:
            return
        if not queue:
            queue = stage.random.sample(kinds, len(kinds)) if now < end else missing
        kind = queue.pop()
        stage.counts[kind] += await _done(stage, kind)
        quiet = stage.random.uniform(0.8, 1.8) if kind in EXCLUSIVE else 0.2
        if stage.random.random() < QUIET_SHARE and stage.counts.total() > len(FAULTS):
            quiet = stage.random.uniform(1.0, 4.0)
        await asyncio.sleep(quiet)


async def _done(stage: Stage, kind: str) -> bool:
    """Do a fault; one that meets a server which another fault has taken away did not fire."""
    try:
        return await FAULTS[kind](stage)
    except (OSError, RuntimeError, SQLAlchemyError, OutboxError) as error:
        stage.journal.note("fault_failed", kind=kind, error=f"{type(error).__name__}: {error}")
        return False


async def _drain(stage: Stage, most: float) -> float:
    """Wait until nothing is left; end when nothing has moved for `most` seconds."""
    begun = moved = time.monotonic()
    left = ""
    while time.monotonic() - moved < most:
        with contextlib.suppress(OSError, SQLAlchemyError, nats.errors.Error):
            found = await stage.left()
            if not found:
                return time.monotonic() - begun
            if found != left:
                left, moved = found, time.monotonic()
                stage.journal.note("left", left=left)
        await asyncio.sleep(0.5)
    stage.journal.note("not_drained", left=left)
    return time.monotonic() - begun


async def _checked(stage: Stage, plan: Plan, drained: float, acks: Acks) -> Outcome:
    journal = list(stage.journal.lines())
    found = Checker(
        await checker.load(stage.url("shop"), listens=False),
        await checker.load(stage.url("warehouse"), listens=True),
        await read(stage.nats.url, STREAM),
        SUBJECTS,
        journal,
        acks,
    )
    report = found.check()
    for line in journal:
        if line["what"] == "not_drained":
            report.add("L1 not drained", line["left"])
    for name in checker.leaks(stage.folder):
        report.add("S17 a payload or password in a log", name)
    faults = stage.counts + Counter(line["what"] for line in journal if line["what"] in NOTED)
    never = [each for each in (*plan.faults, *NOTED) if not faults[each]]
    return Outcome(plan, faults, report, drained, stage.restarts, never)


def shown(outcome: Outcome) -> list[str]:
    """Return what a person wants to know of a run."""
    plan, report = outcome.plan, outcome.report
    lines = [f"seed {plan.seed}, {plan.seconds:.0f} s of faults", "faults:"]
    lines += [f"  {name:<24}{number:>5}" for name, number in sorted(outcome.faults.items())]
    lines += [f"{name}: {number:,}" for name, number in report.figures.items()]
    lines += [f"processes started again: {outcome.restarts}"]
    lines += [f"drained in {outcome.drained_seconds:.1f} s"]
    if outcome.never_fired:
        lines += [f"INVALID, these never fired: {', '.join(outcome.never_fired)}"]
    lines += [*report.lines(), f"violations: {outcome.violations}"]
    return lines
