"""News of who comes and goes are told in order, wait for nobody and are bounded."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from quotepush.cluster import announcer as announcer_module
from quotepush.cluster.announcer import Announcer, event_text
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client(single_connection_client=True)
    yield client
    await client.aclose()


def make(redis: Redis) -> Announcer:
    return Announcer(redis, "qp:events", clock_ms=lambda: 7, timeout_s=20.0)


def test_an_event_says_what_happened_to_whom() -> None:
    assert json.loads(event_text("close", 5, fd="n1.0.1", uid="a", by="client", reason="closed")) == {
        "event": "close", "fd": "n1.0.1", "uid": "a", "by": "client", "reason": "closed", "time": 5,
    }  # fmt: skip
    assert json.loads(event_text("open", 5, fd="n1.0.1")) == {"event": "open", "fd": "n1.0.1", "uid": None, "time": 5}
    assert json.loads(event_text("user_online", 5, uid="a")) == {"event": "user_online", "uid": "a", "time": 5}


async def test_events_are_told_in_order(redis_server: RedisServer, redis: Redis) -> None:
    announcer = make(redis)
    async with redis_server.client() as other, other.pubsub() as hearer:
        await hearer.subscribe("qp:events")
        await hearer.get_message(timeout=5)
        task = asyncio.create_task(announcer.run())
        announcer.happened(event_text("open", n, fd=f"n1.0.{n}") for n in range(500))
        announcer.listed("u:a", True)
        announcer.listed("g:a", True)
        announcer.closed({"n1.0.1": "a", "n1.0.2": None})
        announcer.listed("u:a", False)
        heard = []

        async def has_all() -> bool:
            while message := await hearer.get_message(ignore_subscribe_messages=True, timeout=0.1):
                heard.append(json.loads(message["data"]))
            return len(heard) == 504

        await wait_until(has_all)
        assert [event["time"] for event in heard[:500]] == list(range(500))
        assert [event["event"] for event in heard[500:]] == ["user_online", "close", "close", "user_offline"]
        assert heard[501] == {
            "event": "close", "fd": "n1.0.1", "uid": "a", "by": "server", "reason": "died", "time": 7,
        }  # fmt: skip
        await wait_until(lambda: announcer.told == 504)  # counted behind the answer of Redis
        assert announcer.dropped == 0
        task.cancel()
        await asyncio.wait([task])


async def test_what_redis_does_not_take_is_dropped_and_counted(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer_module, "_MAX_WAITING", 10)
    announcer = make(redis)
    announcer.happened(b"%d" % n for n in range(15))
    assert announcer.dropped == 5
    redis_server.kill()
    task = asyncio.create_task(announcer.run())
    await wait_until(lambda: announcer.dropped == 15)
    redis_server.start()
    announcer.happened([b"16"])
    await wait_until(lambda: announcer.told + announcer.dropped == 16)
    announcer.happened([b"17"])
    await wait_until(lambda: announcer.told)
    task.cancel()
    await asyncio.wait([task])
