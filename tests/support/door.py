"""A way to a server that can be cut, can stall, can trickle, and can lose answers."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, Protocol

from tests.support.waiting import wait_until

__all__ = ["Door", "door_to"]

_RESET = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is thrown away, and the peer gets RST
_REFUSAL = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class _HasPort(Protocol):
    @property
    def port(self) -> int: ...


class Door:
    """A TCP proxy in front of a Redis or a quotepush server.

    Attributes:
        url: its own.
        swallows: how many more answers are lost: the request goes through, then the link is cut before its answer.
        piece_bytes: answers go through in pieces of at most so many bytes, a millisecond apart; 0: at once.
        refuses_upgrades: as a proxy does that knows HTTP and no WebSocket.
        passing: the connections that are open.
        passed: how many there have been.
    """

    def __init__(self, server: _HasPort) -> None:
        self._server = server
        self._is_shut = False
        self._requests_flow = asyncio.Event()
        self._answers_flow = asyncio.Event()
        self.flow()
        self._writers: set[asyncio.StreamWriter] = set()
        self.swallows = 0
        self.piece_bytes = 0
        self.refuses_upgrades = False
        self.url = ""
        self.passing: set[asyncio.Task[Any]] = set()
        self.passed = 0

    def shut(self) -> None:
        """Cut every connection, and each new one, until :meth:`open`."""
        self._is_shut = True
        self.cut()

    def open(self) -> None:
        self._is_shut = False

    def cut(self, *, reset: bool = False) -> None:
        """Cut every connection that is open; with ``reset`` the client sees a reset and not the end of the stream."""
        for writer in self._writers:
            if reset and not writer.transport.is_closing():  # it may have ended in this very turn
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def stall(self, way: str = "both") -> None:
        """Hold what is on its way, without a word to either side, until :meth:`flow`.

        Args:
            way: ``requests``, ``answers`` or ``both``.
        """
        if way != "answers":
            self._requests_flow.clear()
        if way != "requests":
            self._answers_flow.clear()

    def flow(self) -> None:
        self._requests_flow.set()
        self._answers_flow.set()

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing = asyncio.current_task()
        assert passing is not None
        self.passing.add(passing)
        self._writers.add(writer)
        try:
            if self._is_shut:
                return
            self.passed += 1
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            try:
                await self._pass_on_until_cut(reader, writer, to_reader, to_writer)
            finally:
                to_writer.transport.abort()
        except OSError:  # the server is away
            pass
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self.passing.discard(passing)

    async def _pass_on_until_cut(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        to_reader: asyncio.StreamReader,
        to_writer: asyncio.StreamWriter,
    ) -> None:
        async def requests() -> None:
            while data := await reader.read(65_536):
                await self._requests_flow.wait()
                if self.refuses_upgrades and b"\r\nupgrade: websocket" in data.lower():
                    writer.write(_REFUSAL)
                    await writer.drain()
                    return
                to_writer.write(data)
                await to_writer.drain()

        async def answers() -> None:
            while data := await to_reader.read(65_536):
                if self.swallows:
                    self.swallows -= 1
                    return
                while data:
                    await self._answers_flow.wait()
                    piece = data[: self.piece_bytes or len(data)]
                    data = data[len(piece) :]
                    writer.write(piece)
                    await writer.drain()
                    if data:
                        await asyncio.sleep(0.001)

        ways = [asyncio.create_task(requests()), asyncio.create_task(answers())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)


@contextlib.asynccontextmanager
async def door_to(server: _HasPort, url: str = "redis://127.0.0.1:{port}/0") -> AsyncIterator[Door]:
    door = Door(server)
    listening = await asyncio.start_server(door.pass_on, "127.0.0.1", 0)
    door.url = url.format(port=listening.sockets[0].getsockname()[1])
    try:
        yield door
    finally:
        listening.close()
        door.flow()
        door.shut()
        await wait_until(lambda: not door.passing)
        await asyncio.sleep(0)  # the transports close
