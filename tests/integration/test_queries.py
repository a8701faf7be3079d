"""Rows and codes for one question, from a real server."""

import asyncio
from typing import Any

import aiohttp

from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until


async def get(server: QuotepushServer, path: str) -> Any:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.get(server.url + path) as response:
        assert response.status == 200
        return await response.json()


async def test_rows_codes_and_movers(quotepush_server: QuotepushServer, redis_server: RedisServer) -> None:
    server = quotepush_server
    async with redis_server.client() as redis:
        await publish(redis, "AAPL", name="Apple", last=199.0, prev_close=200.0, bids=[[198.9, 100]])
        await publish(redis, "600519.SH", name="贵州茅台", last=1688.0, prev_close=1675.5)

        async def quotes() -> Any:
            found = (await get(server, "/quotes?codes=sh600519,AAPL,GOOG&fields=last,bids"))["quotes"]
            return found if found[0]["seq"] else None

        rows = await wait_until(quotes)
        assert [(row["code"], row["seq"], row.get("last")) for row in rows] == [
            ("600519.SH", 1, 1688.0), ("AAPL", 1, 199.0), ("GOOG", 0, None),
        ]  # fmt: skip
        assert rows[1]["bids"] == [[198.9, 100]]

        async def found() -> Any:
            return await get(server, "/codes?q=%E8%8C%85")

        (entry,) = await wait_until(found, 30)
        assert (entry["code"], entry["change_pct"]) == ("600519.SH", 0.75)
        movers = await get(server, "/codes?movers=10")
        assert [entry["code"] for entry in movers["up"] + movers["down"]] == ["600519.SH", "AAPL"]
        assert await asyncio.gather(*(get(server, "/codes?q=aap&limit=1") for _ in range(20)))
        # To look is not to watch.
        assert await server.metric("codes_watched") == 0
