"""Whether a process is alive, and whether it can do its work, with the reasons."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outbox.lifecycle import Worker
from outbox.observe.sampling import Sample


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of `/readyz`."""

    ready: bool
    reasons: list[str]  # why it is not
    workers: dict[str, dict[str, Any]]  # by name, as they say of themselves


def readiness(workers: Sequence[Worker], sample: Sample) -> Readiness:
    """Ready is who can work: database, broker and schema are in reach, and what is sent is acked.

    A relay that stands by is ready. Progress counts: a broker that takes connections and acks
    nothing makes its relay unready after ten seconds.
    """
    reasons = [] if sample.database_problem is None else [sample.database_problem]
    states: dict[str, dict[str, Any]] = {}
    for worker in workers:
        health = worker.health()
        problem = health.problem if health.running else "not running"
        states[worker.name] = {"problem": problem} | asdict(health)
        if problem is not None:
            reasons.append(f"{worker.name}: {problem}")
    return Readiness(not reasons, reasons, states)


def ended(workers: Sequence[Worker]) -> list[str]:
    """Return the workers whose work is over, for `/healthz`; an answer shows that the loop turns.

    One that waits for its first connection is no reason to start the process again.
    """
    return [worker.name for worker in workers if worker.ended]
