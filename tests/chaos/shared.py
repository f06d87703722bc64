"""What the processes of a chaos run share: their orders, their journal, their tables."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

CANARY = "canary-7f3a9c51"  # in every payload and password; must show up nowhere else
STREAM = "GLAM_EVENTS"
LEASE_SECONDS = 2.0
MESSAGE_BYTES_MAX = 20_000  # of the stream; larger events are refused for good

SHOP = """
CREATE TABLE counters (key text PRIMARY KEY, n bigint NOT NULL);
CREATE TABLE ledger (event_id uuid PRIMARY KEY, subject text NOT NULL, key text, key_seq bigint,
                     digest text NOT NULL, kind text NOT NULL)
"""
WAREHOUSE = """
CREATE TABLE ledger (event_id uuid PRIMARY KEY, subject text NOT NULL, key text, key_seq bigint,
                     digest text NOT NULL, kind text NOT NULL);
CREATE TABLE effects (id bigint GENERATED ALWAYS AS IDENTITY, listener text NOT NULL,
                      event_id uuid NOT NULL, key text, key_seq bigint, digest text NOT NULL,
                      mark text, failed boolean NOT NULL DEFAULT false);
CREATE TABLE amnesty (event_id uuid PRIMARY KEY)
"""


@dataclass(frozen=True, slots=True)
class Failpoint:
    """What a process does to itself at the nth time of a step."""

    step: str
    action: str  # kill, raise, cancel, hang
    nth: int = 1

    def save(self, path: Path) -> None:
        """Write it where its process looks."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Failpoint":
        """Read what `save` has written."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True, slots=True)
class Orders:
    """What one process of the run is to do."""

    role: str
    index: int
    seed: int
    folder: Path
    urls: Mapping[str, str]  # databases by name, and "nats"
    listener: str = ""
    failpoint: Failpoint | None = None
    mutant: str = ""
    rate: float = 6.0  # transactions per second and task
    tasks: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def told(self) -> Path:
        """The file with a failpoint for this process."""
        return self.folder / f"failpoint-{self.role}-{self.index}"


class Journal:
    """A file that all processes append to; a line is written whole, also before a SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"
        self._read = 0
        self._file = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def note(self, what: str, **facts: Any) -> None:
        """Append a line."""
        at = round(time.time(), 3)
        line = json.dumps({"what": what, "pid": os.getpid(), "at": at, **facts}, default=str)
        os.write(self._file, line.encode() + b"\n")

    def news(self) -> Iterator[dict[str, Any]]:
        """Return the lines that this reader has not seen yet."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Return what was noted so far."""
        for line in self._path.read_bytes().splitlines():
            yield json.loads(line)


def digest(data: Mapping[str, Any]) -> str:
    """Return what an event's data must still be when it is handled."""
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
