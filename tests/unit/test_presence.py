"""Which nodes are there is told by records that are renewed."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from quotepush.cluster import presence as presence_module
from quotepush.cluster.commands import ClusterKeys, NodeRecord, encode
from quotepush.cluster.presence import SILENT_MS, Presence, live_nodes
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

KEYS = ClusterKeys("qp:")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


def make(redis: Redis, node: str = "n1") -> Presence:
    return Presence(redis, KEYS, node, version="0.3", workers=2, ttl_s=60, timeout_s=1.0)


async def test_a_node_is_there_until_it_leaves(redis: Redis) -> None:
    one, two = make(redis), make(redis, "n2")
    await one.renew()
    await two.renew()
    live = await live_nodes(redis, KEYS)
    assert set(live) == {"n1", "n2"}
    assert (live["n1"].version, live["n1"].workers) == ("0.3", 2)
    assert live["n1"].started == live["n1"].renewed
    assert 0 < await redis.ttl(KEYS.nodes) <= 60
    await one.leave()
    assert set(await live_nodes(redis, KEYS)) == {"n2"}


async def test_who_does_not_renew_counts_as_gone_and_goes_in_the_end(redis: Redis) -> None:
    seconds, _ = await redis.time()
    now_ms = int(seconds) * 1000
    await redis.hset(KEYS.nodes, "silent", encode(NodeRecord(now_ms - SILENT_MS - 1000, 1)))
    await redis.hset(KEYS.nodes, "dead", encode(NodeRecord(now_ms - 61_000, 1)))
    await redis.hset(KEYS.nodes, "strange", "?")
    await make(redis).renew()
    assert set(await live_nodes(redis, KEYS)) == {"n1"}
    assert set(await redis.hkeys(KEYS.nodes)) == {"n1", "silent"}


async def test_a_redis_that_came_back_has_the_record_again(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(presence_module, "RENEW_S", 0.02)
    task = asyncio.create_task(make(redis).run())
    await wait_until(lambda: live_nodes(redis, KEYS))
    redis_server.kill()
    await wait_until(lambda: caplog.records)
    redis_server.start()

    async def is_there() -> bool:
        try:
            return "n1" in await live_nodes(redis, KEYS)
        except OSError:
            return False

    await wait_until(is_there)
    task.cancel()
    await asyncio.wait([task])
    assert len(caplog.records) == 1
