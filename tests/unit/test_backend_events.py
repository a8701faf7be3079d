"""Events come in order, and what may be missing between two of them is said."""

import asyncio

import orjson
import pytest
from redis.asyncio import Redis

from quotepush import Backend, BlockingBackend, backend_events
from quotepush.errors import BackendUnavailable
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


async def test_events_come_as_they_are_published_and_nonsense_does_not(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend, redis_server.client() as redis, backend.events() as events:
        for said in (b"nonsense", b"[1]", orjson.dumps({"event": "open", "fd": "n1.0.1"}), b'{"event":"close"}'):
            await redis.publish("qp:events", said)
        assert await anext(events) == {"event": "open", "fd": "n1.0.1"}
        assert await anext(events) == {"event": "close"}


async def test_a_lost_link_is_made_anew_and_told_as_a_gap(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend, backend.events() as events:
        redis_server.kill()
        waiting = asyncio.create_task(anext(events))
        await asyncio.to_thread(redis_server.start)
        gap = await waiting
        assert gap["event"] == "gap" and gap["reason"] and gap["time"] > 0
        async with redis_server.client() as redis:
            await redis.publish("qp:events", b'{"event":"open"}')
        assert await anext(events) == {"event": "open"}


async def test_a_wait_that_is_given_up_loses_no_event(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend, redis_server.client() as redis, backend.events() as events:
        for n in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(events)
            await redis.publish("qp:events", orjson.dumps({"n": n}))
            assert await anext(events) == {"n": n}


async def test_a_slow_reader_gets_all_of_it(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend, redis_server.client() as redis, backend.events() as events:
        async with redis.pipeline(transaction=False) as pipeline:
            for n in range(2_500):
                pipeline.publish("qp:events", orjson.dumps({"n": n}))
            await pipeline.execute()
        assert [(await anext(events))["n"] for _ in range(2_500)] == list(range(2_500))


async def test_a_redis_that_is_not_there_is_said_when_it_begins(redis_server: RedisServer) -> None:
    redis_server.kill()
    async with Backend(redis_server.url, timeout_s=0.2) as backend:
        with pytest.raises(BackendUnavailable, match="cannot hear events"):
            await backend.events().__aenter__()


async def test_who_iterates_comes_to_the_end_when_it_is_closed(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend:
        events = backend.events()
        waiting = asyncio.create_task(anext(events, None))
        async with redis_server.client() as redis:
            await wait_until(lambda: _is_heard(redis))
        await backend.aclose()
        assert await waiting is None


async def test_who_iterates_is_told_of_a_bug_and_does_not_wait_for_ever(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise LookupError("a bug")

    monkeypatch.setattr(backend_events, "hear", fail)
    async with Backend(redis_server.url) as backend:
        with pytest.raises(LookupError):
            async with asyncio.timeout(10):
                await anext(backend.events())


async def test_the_blocking_twin_hears_and_ends_too(redis_server: RedisServer) -> None:
    def hear() -> list[dict[str, object]]:
        with BlockingBackend(redis_server.url) as backend, backend.events() as events:
            with pytest.raises(TimeoutError):
                events.next(timeout_s=0.05)
            loop.call_soon_threadsafe(begun.set)
            return [event for event, _ in zip(events, range(2), strict=False)]

    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    hearing = asyncio.create_task(asyncio.to_thread(hear))
    await begun.wait()
    async with redis_server.client() as redis:
        for n in range(3):
            await redis.publish("qp:events", orjson.dumps({"n": n}))
    assert await hearing == [{"n": 0}, {"n": 1}]


async def _is_heard(redis: Redis) -> bool:
    ((_, hearers),) = await redis.pubsub_numsub("qp:events")
    return bool(hearers)
