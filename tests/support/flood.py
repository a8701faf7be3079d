"""A publisher without mercy: ticks that were made before, as fast as Redis takes them."""

import asyncio
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tests.support.redis_server import RedisServer

__all__ = ["Flood", "flood"]

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Flood:
    """What a flood was.

    Attributes:
        ticks: that were published.
        replies: what Redis answered, e.g. ``b":1\\r\\n"`` for each tick that it gave to one subscriber.
        took_s: until the last answer.
        feed_clients: ids of the subscribers that Redis had meanwhile.
        peak_bytes: the most that Redis held back for one of them.
    """

    ticks: int
    replies: bytes
    took_s: float
    feed_clients: set[str]
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.ticks:,} ticks in {self.took_s:.2f} s, {self.ticks / self.took_s:,.0f} a second; "
            f"Redis held back {self.peak_bytes / 2**20:.1f} MiB at most"
        )


async def flood(redis: RedisServer, ticks: Iterable[tuple[str, bytes]]) -> Flood:
    """Publish ticks (code and payload) in one pipeline; meanwhile watch what Redis holds back for its subscribers."""
    commands = [b"*3\r\n$7\r\nPUBLISH\r\n" + _bulk(b"quote." + code.encode()) + _bulk(tick) for code, tick in ticks]
    writing = asyncio.create_task(asyncio.to_thread(_write, redis.port, b"".join(commands), len(commands)))
    clients: set[str] = set()
    peak_bytes = 0
    async with redis.client() as looking:
        while True:
            is_last = writing.done()
            for client in await looking.client_list():
                if client["psub"] != "0":
                    clients.add(client["id"])
                    peak_bytes = max(peak_bytes, int(client["omem"]))
            if is_last:
                break
            await asyncio.sleep(0.01)
    replies, took_s = await writing
    return Flood(len(commands), replies, took_s, clients, peak_bytes)


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def _write(port: int, commands: bytes, count: int) -> tuple[bytes, float]:
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as s:
        begin = time.monotonic()
        s.sendall(commands)  # Redis keeps its answers meanwhile: a few bytes each
        replies = bytearray()
        while replies.count(b"\n") < count:
            replies += s.recv(1 << 20)
        return bytes(replies), time.monotonic() - begin
