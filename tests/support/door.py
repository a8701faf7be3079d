"""A way to a server that can be cut, can stall, can trickle, and can lose answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from tests.support.waiting import wait_until

__all__ = ["Door", "door_to"]


class _HasPort(Protocol):
    @property
    def port(self) -> int: ...


class Door:
    """A TCP proxy in front of a Redis or a quotepush server.

    Attributes:
        url: its own.
        swallows: how many more answers are lost: the request goes through, then the link is cut before its answer.
        piece_bytes: answers go through in pieces of at most so many bytes, a millisecond apart; 0: at once.
        passing: the connections that are open.
        passed: how many there have been.
    """

    def __init__(self, server: _HasPort) -> None:
        self._server = server
        self._is_shut = False
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.swallows = 0
        self.piece_bytes = 0
        self.url = ""
        self.passing: set[asyncio.Task[Any]] = set()
        self.passed = 0

    def shut(self) -> None:
        """Cut every connection, and each new one, until :meth:`open`."""
        self._is_shut = True
        self.cut()

    def open(self) -> None:
        self._is_shut = False

    def cut(self) -> None:
        """Cut every connection that is open."""
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Hold everything on its way, without a word to either side, until :meth:`flow`."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

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
                await self._flows.wait()
                to_writer.write(data)
                await to_writer.drain()

        async def answers() -> None:
            while data := await to_reader.read(65_536):
                if self.swallows:
                    self.swallows -= 1
                    return
                while data:
                    await self._flows.wait()
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
