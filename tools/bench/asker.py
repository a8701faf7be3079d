"""Clients that subscribe many codes, with snapshot, again and again; a program of its own.

Speaks JSON lines: the job comes on standard input, then the words ``connect`` and ``go``; events go to standard output.
It ends when its standard input does. Measured is the time from handing a subscribe to the socket until its ack has
been read, and until its snapshot has.
"""

import asyncio
import gc
import json
import ssl
import sys
import time
from typing import Any

import uvloop

_PAUSE_S = 0.25  # of one connection: a subscribe and an unsubscribe, and a server allows ten requests a second
_GAP_S = 0.05  # between two subscribes, however many ask at a time
_BUFFER_BYTES = 1 << 22
_TIMEOUT_S = 30.0
_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
_MARK = b'"pt":'


class Failed(Exception):
    """The run cannot go on; the text says why."""


class Asker:
    """One connection.

    Attributes:
        rows: that it has read, those of snapshots included.
        rested_s: when it may ask again, by the loop's clock.
    """

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._number = number
        self._reader = reader
        self._writer = writer
        self.rows = 0
        self.rested_s = 0.0

    @classmethod
    async def connect(cls, number: int, job: dict[str, Any], tls: ssl.SSLContext | None) -> "Asker":
        """Open a connection and shake hands."""
        reader, writer = await asyncio.open_connection("127.0.0.1", job["port"], ssl=tls, limit=_BUFFER_BYTES)
        writer.write(
            f"GET {job['path']} HTTP/1.1\r\nHost: 127.0.0.1:{job['port']}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {_KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            status_line = head.split(b"\r\n")[0].decode("latin-1")
            raise Failed(f"the server refused asker {number}: {status_line}")
        return cls(number, reader, writer)

    async def ask(self, codes: list[str]) -> tuple[float, float, int]:
        """Subscribe and unsubscribe; return seconds to the ack, seconds to the snapshot, and its size in bytes."""
        began = time.perf_counter()
        self._say({"action": "subscribe", "codes": codes})
        await self._next(b"ack")
        acked = time.perf_counter()
        snapshot = await self._next(b"snapshot")
        ended = time.perf_counter()
        self._say({"action": "unsubscribe", "codes": ["*"]})
        await self._next(b"ack")
        if (rows := snapshot.count(b'"seq":')) != len(codes):
            raise Failed(f"a snapshot of {len(codes):,} codes has {rows:,} rows")
        return acked - began, ended - began, len(snapshot)

    async def _next(self, kind: bytes) -> bytes:
        """Return the next message of a kind; ticks and heartbeats may come before it."""
        wanted, error = b'{"type":"%b"' % kind, b'{"type":"error"'
        while True:
            message = await self._message()
            self.rows += message.count(_MARK)
            if message.startswith(wanted):
                return message
            if message.startswith(error):
                raise Failed(f"asker {self._number} is told {message[:200].decode(errors='replace')}")

    async def _message(self) -> bytes:
        """Return the next text message; pings are answered meanwhile. A server fragments nothing."""
        read = self._reader.readexactly
        while True:
            first, size = await read(2)
            if size >= 126:
                size = int.from_bytes(await read(2 if size == 126 else 8))
            body = await read(size)
            if first == 0x81:
                return body
            if first == 0x89:
                self._writer.write(b"\x8a" + bytes([0x80 | size]) + b"\0\0\0\0" + body)
            elif first == 0x88:
                raise Failed(f"the server closed asker {self._number}: {body[2:].decode(errors='replace')}")

    def _say(self, request: dict[str, Any]) -> None:
        text = json.dumps(request, separators=(",", ":")).encode()
        size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2)
        self._writer.write(b"\x81" + size + b"\0\0\0\0" + text)


def window(codes: list[str], asking: int, turn: int) -> list[str]:
    """Return the codes to ask for in this turn: neighbours follow each other, so that nobody has them already."""
    begin = turn * asking % len(codes)
    return [codes[(begin + i) % len(codes)] for i in range(asking)]


async def ask_for(askers: list[Asker], job: dict[str, Any], at_once: int, seconds: float) -> dict[str, Any]:
    """Let the askers take turns, so many at a time; return their times in milliseconds.

    As many subscribes are due in every second: those who ask together rest together.
    """
    loop = asyncio.get_running_loop()
    resting: asyncio.Queue[Asker] = asyncio.Queue()
    for asker in askers:
        resting.put_nowait(asker)
    end_s = loop.time() + seconds
    acks: list[float] = []
    snapshots: list[float] = []
    sizes: list[int] = []
    turn = 0

    async def take_turns() -> None:
        nonlocal turn
        next_s = loop.time()
        while (next_s := max(next_s, loop.time())) < end_s:
            await asyncio.sleep(next_s - loop.time())
            next_s += _GAP_S * at_once
            asker = await resting.get()
            await asyncio.sleep(max(0.0, asker.rested_s - loop.time()))
            codes = window(job["codes"], job["asking"], turn)
            turn += 1
            async with asyncio.timeout(_TIMEOUT_S):
                ack_s, snapshot_s, size = await asker.ask(codes)
            acks.append(round(ack_s * 1000, 3))
            snapshots.append(round(snapshot_s * 1000, 3))
            sizes.append(size)
            asker.rested_s = loop.time() + _PAUSE_S
            resting.put_nowait(asker)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(take_turns())
    return {"at_once": at_once, "acks": acks, "snapshots": snapshots, "bytes": sum(sizes)}


def say(event: str, **facts: Any) -> None:
    """Tell the parent."""
    print(json.dumps({"event": event, **facts}), flush=True)


async def work(job: dict[str, Any], words: asyncio.StreamReader) -> None:
    """Do one job: ``port``, ``path``, ``is_tls``, ``clients``, ``codes``, ``asking``, ``at_once``, ``seconds``."""
    tls = None
    if job["is_tls"]:
        tls = ssl.create_default_context()
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE  # it was made for this run
    if not await words.readline():
        return
    async with asyncio.timeout(_TIMEOUT_S):
        askers = [await Asker.connect(number, job, tls) for number in range(job["clients"])]
    say("connected")
    if not await words.readline():
        return
    for at_once in job["at_once"]:
        say("asked", **await ask_for(askers, job, at_once, job["seconds"] / len(job["at_once"])))
    say("done", rows=sum(asker.rows for asker in askers))
    await words.readline()


async def until_abandoned(job: dict[str, Any]) -> None:
    """Do the job, as long as the parent listens."""
    loop = asyncio.get_running_loop()
    words = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
    say("ready")
    working = asyncio.ensure_future(work(job, words))
    while not working.done() and not words.at_eof():
        await asyncio.wait([working], timeout=0.2)
    if working.done():
        working.result()
    working.cancel()


def main() -> int:
    """Do one job."""
    with open(0, "rb", buffering=0, closefd=False) as unbuffered:  # what comes after the job is the loop's
        job = json.loads(unbuffered.readline())
    gc.disable()  # a pause would look like the server's
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(until_abandoned(job))
    except KeyboardInterrupt:
        return 0
    except BaseExceptionGroup as group:
        say("failed", why=f"an asker: {str(group.exceptions[0]) or 'no answer in time'}")
        return 1
    except (Failed, OSError, EOFError) as e:
        say("failed", why=f"an asker: {str(e) or 'no answer in time'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
