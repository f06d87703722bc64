"""The connection to NATS: opened with a deadline, watched, and rebuilt when nats-py gives up.

nats-py closes for good after most `-ERR` lines of the server, whatever the reconnect options say,
and its read loop can die while `is_connected` stays True. Both end in a new connection here.
"""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext
from typing_extensions import override

from outbox.backoff import Backoff
from outbox.errors import BrokerUnavailable, ConfigurationError
from outbox.jetstream import provisioning
from outbox.jetstream.api import ApiError
from outbox.jetstream.credentials import Credentials
from outbox.settings import Settings

__all__ = ["ApiError", "JetStreamClient"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = timedelta(seconds=10)
REQUEST_TIMEOUT = timedelta(seconds=5)
DENIED_SUBJECTS_MAX = 100

_ATTEMPT_SECONDS = 3
_RECONNECT_WAIT_SECONDS = 0.5
_CLOSE_SECONDS = 2.0
_REBUILD = Backoff(first=timedelta(seconds=0.1), longest=timedelta(seconds=2))
_REFUSED = "authorization"
_DENIED = re.compile(r'(?:publish|subscription) to "([^"]+)"', re.IGNORECASE)
_OUTAGE = 503
_NOT_ENABLED = frozenset({10039, 10076})  # 503 as well, but no waiting mends them


class JetStreamClient:
    """A connection to NATS with JetStream, shared by relays and listeners of one event loop.

    Connects on `async with`, or by `connect(servers)` until `close()`. Reconnects for ever; nothing
    published while disconnected is kept back and sent later.
    """

    def __init__(
        self,
        servers: str | Sequence[str] | None = None,
        *,
        tls: SSLContext | str | Path | bool | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        nkeys_seed: str | Path | None = None,
        credentials: str | Path | None = None,
        name: str = "outbox",
        inbox_prefix: str = "_INBOX",
        connect_timeout: timedelta = CONNECT_TIMEOUT,
    ) -> None:
        self._servers = _listed(servers)
        self._credentials = Credentials(
            tls=tls,
            tls_cert=tls_cert,
            tls_key=tls_key,
            user=user,
            password=password,
            token=token,
            nkeys_seed=nkeys_seed,
            credentials=credentials,
        )
        self._name = name
        self._inbox_prefix = inbox_prefix
        self._connect_timeout = connect_timeout
        self._nats: NatsClient | None = None
        self._js: JetStreamContext | None = None
        self._closing = False
        self._up = asyncio.Event()
        self._rebuilding: asyncio.Task[None] | None = None
        self._callbacks: list[Callable[[], None]] = []
        self.generation = 0  # grows with every connect and disconnect, of any nats-py client
        self.last_error: str | None = None
        self.denied_subjects: set[str] = set()

    @override
    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "not connected"
        return f"<JetStreamClient {', '.join(self.addresses) or 'no servers'}: {state}>"

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        name: str | None = None,
        connect_timeout: timedelta = CONNECT_TIMEOUT,
    ) -> Self:
        """Return a client of the servers and secrets in `settings`; it is not connected yet."""
        password, token = settings.nats_password, settings.nats_token
        return cls(
            settings.nats_url,
            tls=settings.nats_tls_ca,
            tls_cert=settings.nats_tls_cert,
            tls_key=settings.nats_tls_key,
            user=settings.nats_user,
            password=password.get_secret_value() if password else None,
            token=token.get_secret_value() if token else None,
            nkeys_seed=settings.nats_nkeys_seed,
            credentials=settings.nats_credentials,
            name=name or settings.source_service or "outbox",
            connect_timeout=connect_timeout,
        )

    @property
    def addresses(self) -> list[str]:
        """The servers as host:port, without user names and secrets."""
        return [_address(server) for server in self._servers]

    @property
    def client(self) -> NatsClient:
        """The nats-py client of this moment; a rebuild replaces it.

        Raises:
            BrokerUnavailable: never connected, or closed.
        """
        if self._nats is None:
            raise BrokerUnavailable("the client is not connected")
        return self._nats

    @property
    def js(self) -> JetStreamContext:
        """nats-py's JetStream context of this moment; a rebuild replaces it.

        Raises:
            BrokerUnavailable: never connected, or closed.
        """
        if self._js is None:
            self._js = self.client.jetstream()
        return self._js

    @property
    def server_version(self) -> tuple[int, int, int]:
        """Version of the server that it is connected to."""
        found = self.client.connected_server_version
        return found.major, found.minor, found.patch

    @property
    def is_connected(self) -> bool:
        """True while the connection is open and something reads from it."""
        current = self._nats
        return current is not None and current.is_connected and not _deaf(current)

    @property
    def max_payload(self) -> int:
        """Bytes of headers and body that the server takes in one message."""
        return self.client.max_payload

    async def connect(self, servers: str | Sequence[str] | None = None) -> None:
        """Connect; return at once when connected already.

        Raises:
            BrokerUnavailable: no server answered within the connect timeout, or refused us.
            ConfigurationError: no servers are given, or a secret's file cannot be used.
        """
        if servers is not None:
            self._servers = _listed(servers)
        if not self._servers:
            raise ConfigurationError("no NATS servers are given; set OUTBOX_NATS_URL, for example")
        self._closing = False
        if self._nats is None:
            await self._open()

    async def close(self) -> None:
        """Close the connection and end the rebuilding; harmless when closed already."""
        self._closing = True
        self._up.clear()
        task, self._rebuilding = self._rebuilding, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        current, self._nats, self._js = self._nats, None, None
        if current is not None:
            await _close(current)
        self._changed()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def ready(self, timeout: timedelta) -> bool:  # noqa: ASYNC109 - the answer is False
        """Wait until connected; return False when `timeout` passed first."""
        self.check()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout.total_seconds()):
                while not self.is_connected:
                    self._up.clear()
                    await self._up.wait()
        return self.is_connected

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` at every connect, disconnect and rebuild; return what ends that."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def check(self) -> None:
        """Replace the connection when nobody reads from it any more, though it looks open."""
        current = self._nats
        if current is not None and current.is_connected and _deaf(current):
            log.warning("the connection to NATS is deaf; it is replaced")
            self._replace(current)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - nats-py sets the deadline
    ) -> bytes:
        """Return the answer's body.

        Raises:
            BrokerUnavailable: disconnected, nobody answers on `subject`, or no answer in time.
        """
        self.check()
        if not self.is_connected:  # nats-py would leak an entry for each request that it refuses
            raise BrokerUnavailable(f"not connected to {', '.join(self.addresses)}")
        try:
            answer = await self.client.request(subject, payload, timeout=timeout.total_seconds())
        except nats.errors.NoRespondersError as error:
            raise BrokerUnavailable(f"nobody answers on {subject}") from error
        except TimeoutError as error:
            self.check()
            raise BrokerUnavailable(f"no answer on {subject} within {timeout}") from error
        except (nats.errors.Error, OSError) as error:
            raise BrokerUnavailable(self._credentials.masked(_text(error))) from error
        return answer.data

    async def api(self, suffix: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer of `$JS.API.{suffix}`, with every field that the server sent.

        Raises:
            ApiError: JetStream refused; `err_code` says why.
            BrokerUnavailable: no answer, or JetStream has no leader or no room now.
        """
        body = b"" if payload is None else json.dumps(payload).encode()
        raw = await self.request(f"$JS.API.{suffix}", body)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise BrokerUnavailable(f"$JS.API.{suffix} was answered by a stranger") from error
        if not isinstance(answer, dict):
            raise BrokerUnavailable(f"$JS.API.{suffix} was answered by a stranger")
        problem = answer.get("error")
        if problem:
            code, reason = int(problem.get("code", 0)), int(problem.get("err_code", 0))
            failure = ApiError(code, reason, str(problem.get("description", "")))
            if code == _OUTAGE and reason not in _NOT_ENABLED:
                raise BrokerUnavailable(str(failure)) from failure
            raise failure
        return answer

    async def ensure_stream(
        self, name: str, subjects: Sequence[str], **config: Any
    ) -> provisioning.StreamFacts:
        """Create the stream as recommended when it is missing; an existing one stays as it is.

        `config` overrides fields of the recommended configuration; durations are timedeltas or
        seconds. How an existing stream differs is in the result's `drift`, and is logged.

        Raises:
            ConfigurationError: the existing stream does not take `subjects`.
        """
        return await provisioning.ensure_stream(self, name, subjects, **config)

    async def delete_stream(self, name: str) -> bool:
        """Delete the stream with all its messages; return False when there was none."""
        return await provisioning.delete_stream(self, name)

    async def get_stream_info(self, name: str) -> dict[str, Any]:
        """Return configuration and state of the stream, as the server tells them.

        Raises:
            ApiError: there is no such stream (`err_code` 10059).
        """
        return await self.api(f"STREAM.INFO.{name}")

    async def _open(self) -> None:
        """Make a new nats-py client and connect it."""
        fresh = NatsClient()
        options = self._credentials.options()
        try:
            async with asyncio.timeout(self._connect_timeout.total_seconds()):
                # -1 also makes this first connect try for ever, hence the deadline around it.
                await fresh.connect(
                    list(self._servers),
                    name=self._name,
                    inbox_prefix=self._inbox_prefix,
                    connect_timeout=_ATTEMPT_SECONDS,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=_RECONNECT_WAIT_SECONDS,  # type: ignore[arg-type]
                    ping_interval=20,
                    max_outstanding_pings=2,
                    # Nothing is buffered while disconnected: a publish that the caller saw fail
                    # must not be sent later.
                    pending_size=0,
                    error_cb=self._failed,
                    disconnected_cb=self._watching(fresh, self._disconnected),
                    reconnected_cb=self._watching(fresh, self._connected),
                    closed_cb=self._watching(fresh, self._closed),
                    **options,
                )
        except (TimeoutError, nats.errors.Error, OSError, ValueError) as error:
            await _close(fresh)
            reason = self.last_error or self._credentials.masked(_text(error))
            where = ", ".join(self.addresses)
            raise BrokerUnavailable(f"cannot connect to NATS at {where}: {reason}") from None
        except BaseException:
            await _close(fresh)
            raise
        if self._closing:
            await _close(fresh)
            return
        self._nats, self._js = fresh, None
        await self._connected()

    def _watching(
        self, owner: NatsClient, then: Callable[[], Awaitable[None]]
    ) -> Callable[[], Awaitable[None]]:
        """Return a callback that is silent once `owner` was replaced."""

        async def callback() -> None:
            if self._nats is owner and not self._closing:
                await then()

        return callback

    async def _connected(self) -> None:
        self.generation += 1
        self.denied_subjects.clear()  # permissions may be others now
        self.last_error = None
        self._up.set()
        log.info("connected to NATS", extra={"generation": self.generation})
        self._changed()

    async def _disconnected(self) -> None:
        self.generation += 1  # what belongs to the lost connection is told from now on
        if self._nats is not None:
            _drop_unsent(self._nats)
        self._up.clear()
        log.warning("disconnected from NATS", extra={"reason": self.last_error})
        self._changed()

    async def _closed(self) -> None:
        if self._nats is not None:
            log.warning("NATS closed the connection", extra={"reason": self.last_error})
            self._replace(self._nats)

    async def _failed(self, error: Exception) -> None:
        """Note an error of nats-py; one raised here would kill its read loop."""
        text = self._credentials.masked(_text(error))
        if not (isinstance(error, OSError) and _REFUSED in (self.last_error or "").lower()):
            self.last_error = text  # a reset after a refusal says less than the refusal
        for subject in _DENIED.findall(text):
            if len(self.denied_subjects) < DENIED_SUBJECTS_MAX:
                self.denied_subjects.add(subject)
        log.debug("an error on the connection to NATS", extra={"reason": text})

    def _changed(self) -> None:
        for callback in list(self._callbacks):
            try:
                callback()
            except Exception:
                log.exception("a callback for connection changes failed")

    def _replace(self, old: NatsClient) -> None:
        """Begin to rebuild in the background, unless that is going on or somebody else did it."""
        going_on = self._rebuilding is not None and not self._rebuilding.done()
        if self._closing or going_on or self._nats is not old:
            return
        self._up.clear()
        self._rebuilding = asyncio.create_task(self._rebuild(old), name="outbox-nats-rebuild")

    async def _rebuild(self, old: NatsClient) -> None:
        self._changed()
        attempt = 0
        await _close(old)
        while not self._closing:
            try:
                await self._open()
            except (BrokerUnavailable, ConfigurationError) as error:
                attempt += 1
                level = logging.WARNING if attempt == 1 else logging.DEBUG
                log.log(level, "NATS cannot be reached yet", extra={"reason": str(error)})
                await asyncio.sleep(_REBUILD.delay(attempt).total_seconds())
            else:
                return


def _deaf(client: NatsClient) -> bool:
    """Return whether the read loop of a client is gone (nats.py issues 624, 675)."""
    task = client._reading_task  # noqa: SLF001 - nothing public tells
    return task is None or task.done()


def _drop_unsent(client: NatsClient) -> None:
    """Forget frames that were handed over and not written: nats-py would send them to the next."""
    client._pending.clear()  # noqa: SLF001 - nothing public does it
    client._pending_data_size = 0  # noqa: SLF001


async def _close(client: NatsClient) -> None:
    """Close without drain, which can hang for its whole timeout; never raises."""
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError, RuntimeError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await client.close()


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _listed(servers: str | Sequence[str] | None) -> tuple[str, ...]:
    given = servers.split(",") if isinstance(servers, str) else servers or ()
    return tuple(server.strip() for server in given if server.strip())


def _address(server: str) -> str:
    return urlsplit(server if "//" in server else f"//{server}").netloc.rpartition("@")[2]
