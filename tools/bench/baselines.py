"""Two plain servers to compare with: the same subscribe message, the same ticks; a program of its own.

``aiohttp`` is what one writes first: a loop over Redis messages that awaits ``send_str`` for every subscriber.
``websockets`` hands each message to ``websockets.broadcast``, which waits for nobody. Both run on uvloop, as one
process, without heartbeat, merging, snapshot, sequence or registry.
"""

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError

_ACK = '{"type":"ack","action":"subscribe"}'
_audience: "defaultdict[str, set[Any]]" = defaultdict(set)


async def ticks(redis_url: str) -> AsyncIterator[tuple[str, str]]:
    """Yield every tick as its code and the message to send, for ever."""
    while True:
        try:
            async with Redis.from_url(redis_url, decode_responses=True) as redis, redis.pubsub() as pubsub:
                await pubsub.psubscribe("quote.*")
                async for message in pubsub.listen():
                    if message["type"] == "pmessage":
                        code = message["channel"].removeprefix("quote.")
                        yield code, '{"type":"tick","data":[' + message["data"] + "]}"
        except (RedisError, OSError):  # Redis cuts off a subscriber that lags
            await asyncio.sleep(0.1)


def subscribe(peer: Any, text: str) -> list[str]:
    """Add a peer to the audience of the codes in its message; return them."""
    codes: list[str] = json.loads(text)["codes"]
    for code in codes:
        _audience[code].add(peer)
    return codes


def forget(peer: Any, codes: Iterable[str]) -> None:
    """A peer is gone."""
    for code in codes:
        _audience[code].discard(peer)


async def serve_aiohttp(redis_url: str) -> None:
    """Run the naive aiohttp server."""
    from aiohttp import web

    async def handle(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        codes: list[str] = []
        try:
            async for message in ws:
                codes += subscribe(ws, message.data)
                await ws.send_str(_ACK)
        finally:
            forget(ws, codes)
        return ws

    app = web.Application()
    app.router.add_get("/ws", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(f"aiohttp ready http://127.0.0.1:{runner.addresses[0][1]}/", flush=True)
    async for code, text in ticks(redis_url):
        for ws in list(_audience[code]):
            try:
                await ws.send_str(text)
            except ConnectionError:
                pass  # gone: its handler forgets it


async def serve_websockets(redis_url: str) -> None:
    """Run the server of ``websockets.broadcast``."""
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    async def handle(connection: ServerConnection) -> None:
        codes: list[str] = []
        try:
            async for text in connection:
                codes += subscribe(connection, str(text))
                await connection.send(_ACK)
        finally:
            forget(connection, codes)

    async with serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None, backlog=4096) as server:
        print(f"websockets ready http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/", flush=True)
        async for code, text in ticks(redis_url):
            broadcast(_audience[code], text)


BASELINES = {"aiohttp": serve_aiohttp, "websockets": serve_websockets}


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(BASELINES[sys.argv[1]](sys.argv[2]))
