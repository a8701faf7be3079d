"""The programs of docs/feeds.md, as they stand there, against a real server."""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from tests.support.examples import ROOT, Block, blocks_of, running
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

Start = Callable[..., Awaitable[QuotepushServer]]

FEEDS = ROOT / "docs" / "feeds.md"
PROGRAMS = [block for block in blocks_of(FEEDS) if block.language == "python"]
VENDORS = [block for block in PROGRAMS if "class Vendor" in block.text]
(PLACES,) = [block for block in PROGRAMS if "class Places" in block.text]


def test_every_program_is_run() -> None:
    assert len(VENDORS) == 2 and len(PROGRAMS) == 3


def here(block: Block, redis_server: RedisServer) -> str:
    assert "redis://127.0.0.1:6379/0" in block.text
    return block.text.replace("redis://127.0.0.1:6379/0", redis_server.url)


async def until(output: asyncio.StreamReader, wanted: str) -> None:
    """Read what a program prints up to this line."""
    async with asyncio.timeout(30):
        while (line := (await output.readline()).decode()).strip() != wanted:
            assert line, f"it ended before it printed {wanted!r}"


async def are_wanted(redis: Redis, count: int) -> None:
    """Wait until so many codes are: a program that begins then is told of all of them together."""

    async def are_listed() -> bool:
        return await redis.scard("qp:codes") == count

    await wait_until(are_listed)


@pytest.mark.parametrize("example", VENDORS, ids=str)
async def test_a_vendor_is_asked_for_what_is_wanted_and_no_longer(
    example: Block, start_server: Start, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, demand_debounce_s=0.3)
    async with RecordingClient(server.ws_url, ["AAPL", "600519"]) as client, redis_server.client() as redis:
        await are_wanted(redis, 2)
        async with running(sys.executable, "-u", "-c", here(example, redis_server)) as output:
            await until(output, "subscribe 600519.SH AAPL")
            await wait_until(lambda: client.last("AAPL") and client.last("600519.SH"))
            await client.subscribe("MSFT")
            await until(output, "subscribe MSFT")
            await wait_until(lambda: client.last("MSFT"))
            await client.unsubscribe("AAPL")
            await until(output, "unsubscribe AAPL")
            seq, seen = await redis.hget("qp:seq", "AAPL"), client.received
            await wait_until(lambda: client.received > seen + 4)
            assert int(await redis.hget("qp:seq", "AAPL")) <= int(seq) + 1  # one may have been on its way


async def test_codes_wait_for_a_place_of_the_vendor(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server(workers=1, demand_debounce_s=0.2)
    async with RecordingClient(server.ws_url, ["A", "B", "C", "D"]) as client, redis_server.client() as redis:
        await are_wanted(redis, 4)
        async with running(sys.executable, "-u", "-c", here(PLACES, redis_server)) as output:
            await until(output, "subscribe A B unsubscribe waiting C D")
            await client.unsubscribe("D")
            await until(output, "subscribe unsubscribe waiting C")
            await client.unsubscribe("A")
            await until(output, "subscribe C unsubscribe A waiting")
