"""Two servers on one Redis: what anybody wants on either is told once, and right again after a crash."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from quotepush import Backend
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

Start = Callable[..., Awaitable[QuotepushServer]]


@asynccontextmanager
async def told(redis_server: RedisServer) -> AsyncIterator[list[tuple[str, bool]]]:
    """What the channel says, as it says it."""
    heard: list[tuple[str, bool]] = []
    async with redis_server.client() as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe("qp:demand")
        await pubsub.get_message(timeout=5)

        async def hear() -> None:
            async for message in pubsub.listen():
                said = json.loads(message["data"])
                heard.append((said["code"], said["demand"]))

        task = asyncio.create_task(hear())
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def two_servers(start_server: Start) -> tuple[QuotepushServer, QuotepushServer]:
    """Nodes n1 and n2 with two workers and one."""
    # The lease is longer than a node stands still on a busy machine.
    options = {"demand_debounce_s": 0.3, "registry_interval_s": 0.02, "lease_s": 4}
    first, second = await asyncio.gather(
        start_server(node="n1", **options), start_server(node="n2", workers=1, **options)
    )
    return first, second


async def test_the_first_and_the_last_subscriber_of_both_nodes_are_told_once(
    start_server: Start, redis_server: RedisServer
) -> None:
    n1, n2 = await two_servers(start_server)
    async with told(redis_server) as heard, Backend(redis_server.url) as backend, backend.demand() as demand:
        assert await anext(demand) == ((), ())
        here = [await RecordingClient(n1.ws_url, ["AAPL"]).open() for _ in range(4)]
        await wait_until(lambda: heard)
        there = await RecordingClient(n2.ws_url, ["AAPL", "MSFT"]).open()
        await wait_until(lambda: len(heard) == 2)
        for client in here:
            await client.close()
        last = await RecordingClient(n1.ws_url, ["END"]).open()
        await wait_until(lambda: ("END", True) in heard)
        await last.close()
        await wait_until(lambda: ("END", False) in heard)
        assert heard == [("AAPL", True), ("MSFT", True), ("END", True), ("END", False)]
        await there.unsubscribe("AAPL")
        await wait_until(lambda: ("AAPL", False) in heard)
        await there.close()
        await wait_until(lambda: ("MSFT", False) in heard)
        assert len(heard) == 6
        await wait_until(lambda: not demand.codes())

        async def nothing_is_pending() -> bool:
            return not any([await node.metric("demand_pending") for node in (n1, n2)])

        await wait_until(nothing_is_pending)

        async def all_are_counted() -> bool:
            return await n1.metric("demand_told") + await n2.metric("demand_told") == 6

        await wait_until(all_are_counted)
        assert len(heard) == 6


async def test_what_a_killed_node_had_wanted_is_told_when_another_one_has_cleared_it(
    start_server: Start, redis_server: RedisServer
) -> None:
    n1, n2 = await two_servers(start_server)
    async with told(redis_server) as heard:
        clients = [
            await RecordingClient(n1.ws_url, ["AAPL", "MSFT"]).open(),
            await RecordingClient(n2.ws_url, ["MSFT"]).open(),
        ]
        await wait_until(lambda: dict(heard) == {"AAPL": True, "MSFT": True})
        await n1.kill()
        await wait_until(lambda: ("AAPL", False) in heard, 30)
        assert dict(heard) == {"AAPL": False, "MSFT": True}
        assert ("MSFT", False) not in heard
        for client in clients:
            await client.close()


async def test_an_emptied_redis_is_told_anew_and_who_follows_notices_nothing(
    start_server: Start, redis_server: RedisServer
) -> None:
    n1, n2 = await two_servers(start_server)
    async with (
        RecordingClient(n1.ws_url, ["AAPL"]),
        RecordingClient(n2.ws_url, ["MSFT"]),
        Backend(redis_server.url) as backend,
        backend.demand() as demand,
    ):
        await wait_until(lambda: demand.codes() == {"AAPL", "MSFT"})
        async with told(redis_server) as heard, redis_server.client() as redis:
            await redis.flushall()
            await wait_until(lambda: dict(heard) == {"AAPL": True, "MSFT": True}, 30)
            assert demand.codes() == {"AAPL", "MSFT"}
