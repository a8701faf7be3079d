"""A client of Server-Sent Events by the letter of the standard, that proves from its own stream what it has missed.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import orjson

from tests.support.waiting import wait_until

__all__ = ["EventClient", "EventReader", "connected"]


class EventReader:
    """Reads a stream, in whatever pieces it comes, and checks it.

    Attributes:
        messages: every event's, in order.
        last_id: as the browser would send it.
        retry_ms: what the server has asked for.
        rows: newest row of each code, over all connections.
        seen: per code the seqs of all its tick rows, in order.
        snapshots: rows that came in snapshots: code and seq.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.last_id = ""
        self.retry_ms: int | None = None
        self.rows: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, list[int]] = {}
        self.snapshots: list[tuple[str, int]] = []
        self._rest = b""
        self._id = ""

    def connect(self) -> None:
        """A new connection begins; an event that was cut off is forgotten."""
        self._rest = b""
        self._id = self.last_id

    def feed(self, data: bytes) -> None:
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            self._dispatch(block)

    def _dispatch(self, block: bytes) -> None:
        kind, said = "", b""
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            match name:
                case b"event":
                    kind = value.decode()
                case b"data":
                    said += value
                case b"id":
                    self._id = value.decode()
                case b"retry":
                    self.retry_ms = int(value)
                case _:
                    raise AssertionError(f"no field: {line!r}")
        self.last_id = self._id
        if not said:  # a block without data is no event
            return
        message: dict[str, Any] = orjson.loads(said)
        assert message["type"] == kind
        self.messages.append(message)
        if kind in ("snapshot", "tick"):
            for row in message["data"]:
                self._take(kind, row)

    def _take(self, kind: str, row: dict[str, Any]) -> None:
        code, seq = row["code"], row["seq"]
        before = self.rows.get(code)
        if kind == "snapshot":
            self.snapshots.append((code, seq))
        else:
            assert before is not None, f"a tick of {code} before its snapshot"
            assert seq > before["seq"], f"{code}: row {seq} again, behind {before['seq']}"
            assert row.get("prev", before["seq"]) == before["seq"], f"{row} behind {before['seq']}"
            self.seen.setdefault(code, []).append(seq)
        self.rows[code] = row

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    def last(self, code: str) -> Any:
        return self.rows.get(code, {}).get("last")


class EventClient(EventReader):
    """A connection to ``/stream``, made again at will.

    Args:
        query: of the address, besides the codes.
        rows: what it has already.
    """

    def __init__(
        self,
        port: int,
        *codes: str,
        query: str = "",
        path: str = "/stream",
        rows: dict[str, dict[str, Any]] | None = None,
        **headers: str,
    ) -> None:
        super().__init__()
        self.rows |= rows or {}
        self._port = port
        self._target = f"{path}?codes={','.join(map(quote, codes))}{query}"
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter
        self.status = 0
        self.headers: dict[str, str] = {}
        self.has_ended = False
        self.may_read = asyncio.Event()
        self.may_read.set()

    @property
    def fd(self) -> str:
        fd: str = self.of("hello")[-1]["conn"]
        return fd

    async def open(self, *, limit: int = 1 << 16) -> None:
        """Connect, from where the last connection ended."""
        await self.cut()
        super().connect()
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=limit)
        headers = {"Host": f"127.0.0.1:{self._port}", **self._headers}
        if self.last_id:
            headers["Last-Event-ID"] = self.last_id
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._writer.write(f"GET {self._target} HTTP/1.1\r\n{head}\r\n".encode())
        answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode()
        status, *lines = answer.split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines if line}
        self.has_ended = False
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.feed(data)
                await self.may_read.wait()
        except ConnectionError:
            pass
        self.has_ended = True

    async def cut(self) -> None:
        """End the connection at once."""
        self.may_read.set()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.result()
            self._reading = None
            self._writer.transport.abort()

    async def until(self, code: str, last: Any, timeout_s: float = 20) -> None:
        """Wait for a price, or one above it."""

        def has_it() -> bool:
            assert self._reading is not None
            if self._reading.done() and not self._reading.cancelled():
                self._reading.result()
            return bool((self.last(code) or 0) >= last)

        await wait_until(has_it, timeout_s, f"{code} at {last}")

    async def until_said(self, kind: str, **facts: Any) -> dict[str, Any]:
        """Wait for a message with these facts."""

        def found() -> dict[str, Any] | None:
            return next((m for m in self.of(kind) if facts.items() <= m.items()), None)

        message: dict[str, Any] = await wait_until(found, 30, f"{kind} {facts}")
        return message


@asynccontextmanager
async def connected(port: int, *codes: str, **rest: Any) -> AsyncIterator[EventClient]:
    """A client that has got its ack."""
    client = EventClient(port, *codes, **rest)
    await client.open()
    try:
        await client.until_said("ack")
        yield client
    finally:
        await client.cut()
