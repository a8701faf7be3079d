"""A Redis Cluster: everything of the feed stands behind one hash tag, the registry is spread over the slots."""

from collections.abc import AsyncIterator, Awaitable, Callable, Set
from pathlib import Path

import pytest
from redis.asyncio import Redis

import quotepush
from quotepush.errors import RedisUnavailable
from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

StartServer = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    """A cluster of one node."""
    server = RedisServer(tmp_path / "redis", options=("--cluster-enabled", "yes"))
    server.start()
    async with server.client() as redis:
        await redis.execute_command("CLUSTER", "ADDSLOTS", *range(16384))

        async def is_up() -> bool:
            return "cluster_state:ok" in str(await redis.execute_command("CLUSTER", "INFO"))

        await wait_until(is_up)
    yield server
    server.stop()


async def told_as_wanted(redis: Redis, key: str, codes: Set[str]) -> bool:
    return set(await redis.hkeys(key)) == codes


async def test_with_a_hash_tag_in_the_prefix_everything_works(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(redis_prefix="{qp}:")
    async with quotepush.Publisher(redis_server.url, prefix="{qp}:") as feed:
        async with RecordingClient(server.ws_url) as client, redis_server.client() as redis:
            await client.subscribe("AAPL", "MSFT")
            await feed.publish([{"code": "AAPL", "last": 1}, {"code": "MSFT", "last": 2}])
            await wait_until(lambda: (client.last("AAPL"), client.last("MSFT")) == (1, 2))
            await registry_equals(redis, {client.fd: client.codes}, prefix="{qp}:")
            await wait_until(lambda: told_as_wanted(redis, "{qp}:demanded:{{qp}:codes}", client.codes))
        await server.stop()
        await feed.publish([{"code": "AAPL", "last": 3}])
        await server.start()
        async with RecordingClient(server.ws_url) as client:
            await client.subscribe("AAPL")
            assert client.last("AAPL") == 3
        assert (await server.admin("/readyz"))[0] == 200


async def test_without_one_publishers_and_operators_are_told(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    with pytest.raises(RedisUnavailable, match=r"needs a hash tag.*\{qp\}:"):
        async with quotepush.Publisher(redis_server.url) as feed:
            await feed.publish([{"code": "AAPL", "last": 1}])
    server = await start_server()
    await wait_until(lambda: "needs a hash tag" in server.log())
    async with RecordingClient(server.ws_url) as client, redis_server.client() as redis:
        await client.subscribe("AAPL")
        await redis.publish("quote.AAPL", '{"last":2}')
        await wait_until(lambda: client.last("AAPL") == 2)
        await wait_until(lambda: told_as_wanted(redis, "qp:demanded:{qp:codes}", {"AAPL"}))
