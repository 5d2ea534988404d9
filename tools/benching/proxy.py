"""A proxy before an S3 server, which counts what passes and can make every request slower.

1. Heads are passed on byte for byte: signatures cover the Host header and others, and still hold.
2. Each connection of a client has one of its own to the server; requests on it follow one another.
3. Bodies are passed on as they come, both ways at once: a server may ask for a large body first
   (100 Continue), or refuse it before it has been sent.
4. A request is counted when its head is here, and bytes are counted before they are passed on. So
   whoever has an answer finds it counted.
5. All of it runs on a thread of its own. A request that waits keeps no other one waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 18
END_S = 1.0
"""How long after its answer the rest of a request may still come."""


@dataclass
class Exchange:
    """A request and its answer. The bytes are those of the bodies, as they were encoded."""

    method: str
    target: str
    extent: str
    """The header Range of the request."""
    at_s: float
    """When it came: seconds of the monotonic clock."""
    status: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def of_object(self) -> bool:
        """Whether it is about an object, not a bucket: its path has more than one part."""
        return "/" in self.target.partition("?")[0].strip("/")

    def __str__(self) -> str:
        size = f"{self.bytes_up} up, {self.bytes_down} down"
        return f"{self.method} {self.target} {self.extent} → {self.status}, {size}"


@dataclass(frozen=True)
class Tally:
    """How many requests there were: all, and those that get and put objects; bytes of bodies."""

    requests: int
    gets: int
    puts: int
    bytes_up: int
    bytes_down: int

    @classmethod
    def of(cls, exchanges: Iterable[Exchange]) -> Tally:
        """Count these."""
        found = list(exchanges)
        methods = [one.method for one in found if one.of_object]
        return cls(
            len(found),
            methods.count("GET"),
            methods.count("PUT"),
            sum(one.bytes_up for one in found),
            sum(one.bytes_down for one in found),
        )


class Proxy:
    """A context manager; within it, ``url`` stands for the server at ``server_url``.

    ``delay_s`` is waited for before each request that comes from then on is passed on.
    """

    def __init__(self, server_url: str) -> None:
        server = urlsplit(server_url)
        self._server = (server.hostname or "", server.port or 80)
        self._exchanges: list[Exchange] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.delay_s = 0.0
        self.url = ""

    def take(self) -> list[Exchange]:
        """What came since this was last asked. Those under way belong to it."""
        taken, self._exchanges = self._exchanges, []
        return taken

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE_BYTES)
        self.url = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        self._ready.set()
        await self._stopped.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client. What breaks on one side, ends the other."""
        client = _Side(reader, writer)
        server: _Side | None = None
        try:
            while head := await client.head():
                if server is None or server.reader.at_eof():  # it may close what is idle
                    server = await self._reconnect(server)
                if not await self._pass(head, client, server):
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side is gone, or the proxy ends
        finally:
            client.writer.close()
            if server is not None:
                server.writer.close()

    async def _reconnect(self, old: _Side | None) -> _Side:
        if old is not None:
            old.writer.close()
        return _Side(*await asyncio.open_connection(*self._server, limit=PIECE_BYTES))

    async def _pass(self, request: _Head, client: _Side, server: _Side) -> bool:
        """One exchange. False: nothing more can come on these connections."""
        method, target, _ = request.first_line.split(" ", 2)
        one = Exchange(method, target, request.headers.get("range", ""), time.monotonic())
        self._exchanges.append(one)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        server.writer.write(request.raw)

        sending = asyncio.create_task(self._send(one, request, client, server))
        try:
            stays = await self._answer(one, client, server)
            await asyncio.wait([sending], timeout=END_S)
            return stays and sending.done() and not request.closes
        finally:
            sending.cancel()
            await asyncio.wait([sending])

    async def _send(self, one: Exchange, request: _Head, client: _Side, server: _Side) -> None:
        def count(size: int) -> None:
            one.bytes_up += size

        try:
            await client.pass_body(request, server, count)
        except (OSError, asyncio.IncompleteReadError):
            server.writer.write_eof()  # or it would wait for the rest

    async def _answer(self, one: Exchange, client: _Side, server: _Side) -> bool:
        """Pass the answer on. False: the server closes the connection behind it."""

        def count(size: int) -> None:
            one.bytes_down += size

        while answer := await server.head():
            one.status = int(answer.first_line.split(" ", 2)[1])
            client.writer.write(answer.raw)
            await client.writer.drain()
            if one.status >= 200:
                break
        else:
            return False
        if one.method == "HEAD" or one.status in (204, 304):
            return not answer.closes
        if answer.framed:
            await server.pass_body(answer, client, count)
            return not answer.closes
        await server.pass_bytes(None, client, count)
        return False


class _Head:
    """The first line and the headers of a message."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.first_line, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def closes(self) -> bool:
        """Whether the connection ends behind this message."""
        said = self.headers.get("connection", "").lower()
        return said == "close" or ("HTTP/1.0" in self.first_line and said != "keep-alive")

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def framed(self) -> bool:
        """Whether it says how long its body is."""
        return self.chunked or "content-length" in self.headers


@dataclass
class _Side:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> _Head | None:
        """The next message; None at the end."""
        try:
            return _Head(await self.reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:
            return None

    async def pass_body(self, head: _Head, other: _Side, count: Callable[[int], None]) -> None:
        """Pass the body behind ``head`` on; none where nothing announces one."""
        if not head.chunked:
            await self.pass_bytes(int(head.headers.get("content-length", "0")), other, count)
            return
        size = 1
        while size:
            line = await self.reader.readuntil(b"\r\n")
            other.writer.write(line)
            size = int(line.partition(b";")[0], 16)
            if size:
                await self.pass_bytes(size, other, count)
                other.writer.write(await self.reader.readexactly(2))
        while line != b"\r\n":  # trailers
            line = await self.reader.readuntil(b"\r\n")
            other.writer.write(line)
        await other.writer.drain()

    async def pass_bytes(
        self, length: int | None, other: _Side, count: Callable[[int], None]
    ) -> None:
        """Pass so many bytes on; None: all that come."""
        left = length
        while left != 0:
            data = await self.reader.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
            if not data:
                if left is None:
                    return
                raise asyncio.IncompleteReadError(b"", left)
            if left is not None:
                left -= len(data)
            count(len(data))
            other.writer.write(data)
            await other.writer.drain()
