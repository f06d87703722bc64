"""Failpoints are the observer's steps: at one of them a process kills, fails or hangs itself."""

import asyncio
import os
import signal
import time

from typing_extensions import override

from outbox.telemetry import Moment, Observer, Step
from tests.chaos.shared import LEASE_SECONDS, Failpoint, Journal

RELAY_STEPS = (Step.READ, Step.SENT, Step.CONFIRMED, Step.SETTLING, Step.SETTLED, Step.HELD)
LISTENER_STEPS = (
    *(Step.RECEIVED, Step.RECORDED, Step.HANDLED, Step.FLUSHED, Step.COMMITTED, Step.ACKED),
    Step.RETRIED,
)
ACTIONS = ("kill", "raise", "cancel", "hang")
COUNTED = (Step.REPAIRED, Step.LANE_TAKEN, Step.LANE_LOST, Step.OUTAGE_BEGAN)


class Failure(Exception):  # noqa: N818 - what a failpoint raises, as a bug would
    """A failpoint's own."""


class Failing(Observer):
    """Does what its failpoint says, once, after it has noted so."""

    def __init__(self, role: str, failpoint: Failpoint | None, journal: Journal) -> None:
        self._role = role
        self._journal = journal
        self.arm(failpoint)

    def arm(self, failpoint: Failpoint | None) -> None:
        """Do what `failpoint` says from now on."""
        self._failpoint = failpoint
        self._left = failpoint.nth if failpoint else 0

    @override
    def on_step(self, moment: Moment) -> None:
        if moment.step in COUNTED:
            self._journal.note(f"step:{moment.step}", source=moment.source, count=moment.count)
        point = self._failpoint
        if point is None or moment.step != point.step:
            return
        self._left -= 1
        if self._left:
            return
        self._failpoint = None
        self._journal.note(f"{self._role}_{point.action}_at_step", step=str(moment.step))
        match point.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise Failure(f"at {moment.step}")
            case "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            case _:
                time.sleep(1.5 * LEASE_SECONDS)  # as a SIGSTOP would, at this very step
