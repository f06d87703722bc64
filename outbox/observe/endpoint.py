"""A small HTTP server for probes and scrapes: GET only, bounded in size, time and number."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Self

from outbox.errors import ConfigurationError

logger = logging.getLogger(__name__)

HEAD_BYTES_MAX = 8192
SECONDS_MAX = 5.0  # for a request, and for its answer
CONNECTIONS_MAX = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers."""

    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """What a route may look at."""

    path: str
    headers: Mapping[str, str]  # names in lower case


Route = Callable[[Request], Awaitable[Answer]]


class Endpoint:
    """Answers `routes` on a port while its block runs; `port` then is the one that was taken.

    Raises:
        ConfigurationError: the port is taken, or the address is not this host's.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self.host = host
        self.port = port
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(
                self._connected, self.host, self.port, limit=HEAD_BYTES_MAX
            )
        except OSError as error:
            where = f"{self.host}:{self.port}"
            raise ConfigurationError(f"metrics port {where} cannot be opened: {error}") from error
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this in a task of its own
        self._open.add(task)
        try:
            if len(self._open) <= CONNECTIONS_MAX:
                async with asyncio.timeout(SECONDS_MAX):
                    writer.write(_encoded(await self._answer(reader)))
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError) as error:  # a TimeoutError is an OSError
            logger.debug("a request was dropped", extra={"error_type": type(error).__name__})
        finally:
            self._open.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                async with asyncio.timeout(SECONDS_MAX):
                    await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 - "GET / HTTP/1.1"
            return _plain(HTTPStatus.BAD_REQUEST)
        if words[0] != "GET":
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED)
        path = words[1].partition("?")[0]
        route = self._routes.get(path)
        if route is None:
            return _plain(HTTPStatus.NOT_FOUND)
        pairs = (line.partition(":") for line in lines if ":" in line)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        try:
            return await route(Request(path, headers))
        except Exception:  # a defect of ours; the process goes on
            logger.exception("a request failed", extra={"path": path})
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)


def _plain(status: HTTPStatus) -> Answer:
    return Answer(status, f"{status.value} {status.phrase}\n".encode(), "text/plain")


def _encoded(answer: Answer) -> bytes:
    status = answer.status
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\n"
        f"Content-Length: {len(answer.body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + answer.body
