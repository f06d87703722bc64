"""A TCP proxy that cuts, stalls, loses traffic, or cuts at a moment of the protocol."""

import asyncio
import contextlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

CHUNK = 65_536
TAIL = 32  # bytes; a pattern may be cut in two by the chunks


class Side(StrEnum):
    """Who has sent the bytes."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(slots=True)
class Trap:
    """Cuts one connection at the first bytes that hold `pattern`; then it is used up.

    Before: they are not passed on. After: they are; of a request also no answer comes back.
    """

    side: Side
    pattern: bytes
    after: bool
    fired: bool = False


BEFORE_COMMIT = (Side.CLIENT, b"COMMIT", False)
AFTER_COMMIT = (Side.CLIENT, b"COMMIT", True)
BEFORE_PUB_ACK = (Side.SERVER, b'"seq":', False)
AFTER_PUB_ACK = (Side.SERVER, b'"seq":', True)
BEFORE_ACK = (Side.CLIENT, b"PUB $JS.ACK.", False)
AFTER_ACK = (Side.CLIENT, b"PUB $JS.ACK.", True)


class Proxy:
    """Listens on a loopback port and passes everything on to another."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.loses = False  # everything is read and thrown away
        self._traps: list[Trap] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.open()
        self.cut()
        while self._pairs:
            await asyncio.wait({pair.ended for pair in self._pairs})
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Reset every connection."""
        for pair in list(self._pairs):
            pair.abort()

    def stall(self) -> None:
        """Pass nothing on until `open`; nothing is lost."""
        self._flows.clear()

    def lose(self) -> None:
        """Read and throw away what is sent until `open`, which resets the connections."""
        self.loses = True

    def open(self) -> None:
        """Pass everything on again."""
        if self.loses:
            self.loses = False
            self.cut()
        self._flows.set()

    def trap(self, side: Side, pattern: bytes, after: bool) -> Trap:
        """Cut the next connection that comes to that moment; the trap says when it has."""
        trap = Trap(side, pattern, after)
        self._traps.append(trap)
        return trap

    def disarm(self) -> None:
        """Forget the traps that have not fired."""
        self._traps.clear()

    async def passing(self) -> None:
        """Wait while the traffic is stalled."""
        await self._flows.wait()

    def caught(self, side: Side, tail: bytes, chunk: bytes) -> Trap | None:
        """Return the trap that `chunk`, which comes after `tail`, sets off."""
        seen = tail + chunk
        for trap in self._traps:
            begin = max(0, len(tail) - len(trap.pattern) + 1)
            if trap.side is side and seen.find(trap.pattern, begin) >= 0:
                self._traps.remove(trap)
                trap.fired = True
                return trap
        return None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(self, (reader, writer), upstream)
        self._pairs.add(pair)
        try:
            await pair.run()
        finally:
            self._pairs.discard(pair)


class _Pair:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._answered = True  # False: what the server sends is thrown away, then it is cut
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Pass both ways on until either ends."""
        pumps = {
            asyncio.create_task(self._pump(Side.CLIENT, self._client[0], self._server[1])),
            asyncio.create_task(self._pump(Side.SERVER, self._server[0], self._client[1])),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.abort()
            self.ended.set_result(None)

    def abort(self) -> None:
        """Reset both ends."""
        for writer in (self._client[1], self._server[1]):
            writer.transport.abort()

    async def _pump(
        self, side: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        tail = b""
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await self._proxy.passing()
                if self._proxy.loses:
                    continue
                if not self._answered and side is Side.SERVER:
                    return
                trap = self._proxy.caught(side, tail, chunk)
                if trap is not None and not trap.after:
                    return
                writer.write(chunk)
                await writer.drain()
                if trap is not None:
                    if side is Side.SERVER:
                        return
                    self._answered = False
                tail = (tail + chunk)[-TAIL:]
