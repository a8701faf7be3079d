#!/usr/bin/env python3
"""What one client that watches 1,000 codes costs on the wire, by view and format: the table of docs/performance.md.

    python tools/bench/wire.py [SECONDS]

A simulated market of 600 ticks/s, through a publisher, a private Redis and a server; one client of each kind. Counted
are whole WebSocket frames from the end of the snapshot on, heartbeats included, and the snapshot by itself; not
counted are TCP and IP, another 52 bytes per packet.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis
from websockets.asyncio.client import connect

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.children import running_server
from bench.measure import quotepush
from quotepush.feed import FeedOptions, Simulation, run_feed
from quotepush.private_redis import private_redis

CODES, TICKS_PER_S, SECONDS = 1000, 600.0, 20.0
VIEW = ("last", "change_pct", "volume")


@dataclass
class Kind:
    """How a client wants its rows, and what came of it."""

    what: str
    options: dict[str, Any]
    subprotocol: str = "quotes.v1.json"
    rows: int = 0
    messages: int = 0
    size: int = 0
    snapshot_size: int = 0


def kinds() -> list[Kind]:
    """The kinds of the table."""
    view, compact = {"fields": list(VIEW)}, {"fields": list(VIEW), "format": "rows"}
    return [
        Kind("objects, all fields", {}),
        Kind("objects, three fields", view),
        Kind("rows, all fields", {"format": "rows"}),
        Kind("rows, three fields", compact),
        Kind("msgpack, objects, all fields", {}, "quotes.v1.msgpack"),
        Kind("msgpack, objects, three fields", view, "quotes.v1.msgpack"),
        Kind("msgpack, rows, three fields", compact, "quotes.v1.msgpack"),
    ]


def framed(message: str | bytes) -> int:
    """Return the bytes of the frame that a server sends a message in."""
    size = len(message.encode() if isinstance(message, str) else message)
    return size + (2 if size < 126 else 4 if size < 1 << 16 else 10)


@asynccontextmanager
async def feed(redis_url: str) -> AsyncIterator[None]:
    """Publish until the end."""
    stop = asyncio.Event()
    source = Simulation(codes=CODES, rate_per_s=TICKS_PER_S, seed=1, is_steady=True)
    running = asyncio.create_task(run_feed(FeedOptions(redis_url=redis_url, source=source), stop=stop))
    try:
        yield
    finally:
        stop.set()
        await running


async def watch(url: str, kind: Kind, codes: list[str], seconds: float) -> None:
    """Be one client."""
    codec: Any = msgspec.msgpack if kind.subprotocol.endswith("msgpack") else msgspec.json
    async with connect(url, subprotocols=[kind.subprotocol], max_size=None, compression=None) as client:
        request = {"action": "subscribe", "codes": codes, **kind.options}
        await client.send(codec.encode(request), text=codec is msgspec.json)
        loop = asyncio.get_running_loop()
        until_s = float("inf")
        while loop.time() < until_s:
            said = await client.recv()
            message = codec.decode(said)
            if message["type"] == "snapshot":
                kind.snapshot_size += framed(said)
                until_s = loop.time() + seconds
            elif until_s < float("inf"):
                kind.messages += 1
                kind.size += framed(said)
                kind.rows += len(message["data"]) if message["type"] == "tick" else 0


async def main(seconds: float) -> None:
    """Measure every kind at once: they share the server, and with it the ticks."""
    found = kinds()
    async with private_redis() as redis, feed(redis.url):
        command = [word.replace("{redis}", redis.url) for word in quotepush(1, []).command]
        async with running_server("quotepush", command, {}, None) as server:
            codes: list[str] = []
            async with Redis.from_url(redis.url, decode_responses=True) as client:
                while len(codes) < CODES:
                    await asyncio.sleep(0.1)
                    codes = sorted(code for code in await client.hkeys("qp:seq") if code != "#")
            url = f"ws://127.0.0.1:{server.port}/ws"
            async with asyncio.TaskGroup() as group:
                for kind in found:
                    group.create_task(watch(url, kind, codes, seconds))
    print("| a client's rows | snapshot, KB | rows/s | messages/s | bytes per row | KB/s |\n|---|---|---|---|---|---|")
    for kind in found:
        print(
            f"| {kind.what} | {kind.snapshot_size / 1000:.0f} | {kind.rows / seconds:.0f} | "
            f"{kind.messages / seconds:.0f} | {kind.size / max(1, kind.rows):.0f} | {kind.size / seconds / 1000:.1f} |"
        )


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS))
