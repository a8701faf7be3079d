"""How old prices are, as clients, load balancers and operators are told; with real servers and a real Redis."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.ingest import log as log_module
from quotepush.ingest.keys import FeedKeys
from quotepush.ingest.log import LogFollower
from quotepush.publisher import Publisher
from quotepush.quote.board import Board, TradingDays
from quotepush.quote.ring import Ring
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

StartServer = Callable[..., Awaitable[QuotepushServer]]

# As true as an age has to be.
PRECISION_MS = 50


def now_ms() -> float:
    return time.time_ns() / 1e6


def told(client: RecordingClient) -> list[tuple[str, list[str]]]:
    """The status messages about codes, so far."""
    return [(m["state"], m["codes"]) for m in client.control if m["type"] == "status" and m["scope"] == "codes"]


def feed_of(client: RecordingClient) -> str:
    assert client.heartbeat is not None
    return str(client.heartbeat["feed"])


@contextlib.asynccontextmanager
async def again_and_again(tick: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    """Publish by calling ``tick``; at the end Redis has answered to the last one."""
    is_over = asyncio.Event()

    async def go_on() -> None:
        while not is_over.is_set():
            await tick()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(go_on())
    try:
        yield
    finally:
        is_over.set()
        await task


@contextlib.asynccontextmanager
async def steadily(redis: Redis, code: str, **fields: Any) -> AsyncIterator[None]:
    """Publish the same tick again and again."""
    async with again_and_again(lambda: publish(redis, code, **fields)):
        yield


# Codes


async def test_exactly_the_watchers_of_a_code_are_told_that_it_is_stale_and_that_it_is_fresh(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(code_stale_s=3, probe_timeout_s=30)
    async with redis_server.client() as redis, contextlib.AsyncExitStack() as stack:
        for code in ("QUIET", "MUTE", "BUSY"):
            await publish(redis, code, last=1)
        await wait_until(lambda: server.metric("ticks_accepted"))

        async def client(*codes: str) -> RecordingClient:
            return await stack.enter_async_context(RecordingClient(server.ws_url, codes))

        await stack.enter_async_context(steadily(redis, "BUSY", last=2))
        of_one = [await client("QUIET") for _ in range(16)]  # all on one worker once in 32,768 times
        of_three = await client("BUSY", "MUTE", "QUIET", "NEVER")
        others = [await client("BUSY"), await client("NEVER"), await client()]
        for watcher in of_one:
            await wait_until(lambda watcher=watcher: told(watcher) == [("stale", ["QUIET"])])
        # Perhaps in two messages: a sweep may come between the two.
        await wait_until(lambda: {code for _, codes in told(of_three) for code in codes} == {"MUTE", "QUIET"})
        assert {client.worker for client in of_one} == {"0", "1"}

        async def are_counted() -> bool:
            return await server.metric("codes_stale") == 2

        await wait_until(are_counted)

        late = await client("BUSY", "QUIET")
        await late.ping()
        assert [m["type"] for m in late.control] == ["hello", "ack", "snapshot", "status", "pong"]
        assert told(late) == [("stale", ["QUIET"])]

        await stack.enter_async_context(steadily(redis, "QUIET", last=1))  # shows nothing new: no row
        for watcher in (*of_one, late):
            await wait_until(lambda watcher=watcher: told(watcher)[1:] == [("fresh", ["QUIET"])])
        await wait_until(lambda: told(of_three)[-1] == ("fresh", ["QUIET"]))
        assert [watcher.received for watcher in of_one] == [0] * len(of_one)
        assert [told(other) for other in others] == [[], [], []]


async def test_ticks_of_the_log_make_codes_fresh_and_what_is_read_late_does_not(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    async with Publisher(redis_server.url) as publisher:
        asked_ms = now_ms()
        await publisher.publish([{"code": "A", "last": 1}, {"code": "B", "last": 1}])
        done_ms = now_ms()
        # What is waited for is the age itself.
        await wait_until(lambda: now_ms() - done_ms > 1_500)
        server = await start_server(workers=1, code_stale_s=1.5, feed_stale_s=1.5, heartbeat_ms=100)

        async def is_in_step() -> bool:
            return (await server.admin("/readyz"))[1]["log"] == "in step"

        await wait_until(is_in_step)
        before_ms = now_ms()
        status, facts = await server.admin("/readyz")
        after_ms = now_ms()
        assert (status, facts["feed"], facts["log"]) == (200, "stale", "in step")
        assert before_ms - done_ms - PRECISION_MS <= facts["feed_age_ms"] <= after_ms - asked_ms + PRECISION_MS

        async with RecordingClient(server.ws_url, ["A", "B"]) as client:
            assert sorted(client.rows) == ["A", "B"]
            await wait_until(lambda: told(client))
            assert told(client) == [("stale", ["A", "B"])]
            await wait_until(lambda: client.heartbeat and feed_of(client) == "stale")
            beat = client.heartbeat
            assert beat is not None
            assert asked_ms - PRECISION_MS <= beat["time"] - beat["feed_age_ms"] <= done_ms + PRECISION_MS

            asked_ms = now_ms()
            async with again_and_again(lambda: publisher.publish([{"code": "B", "last": 1}])):
                await wait_until(lambda: told(client)[1:] == [("fresh", ["B"])])
                await wait_until(lambda: feed_of(client) == "ok")
                beat = client.heartbeat
                assert asked_ms - PRECISION_MS <= beat["time"] - beat["feed_age_ms"]
                assert 0 <= await server.metric("feed_age_seconds") * 1000 <= now_ms() - asked_ms + PRECISION_MS


@pytest.mark.parametrize("ahead_ms", [0, 3_600_000, -3_600_000])
async def test_the_arrival_of_what_is_read_from_the_log_is_told_by_our_own_clock(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, ahead_ms: int
) -> None:
    monkeypatch.setattr(log_module, "_now_ms", lambda: round(now_ms()) + ahead_ms)
    board = Board(epoch="e", days=TradingDays({}))
    async with Redis.from_url(redis_server.url) as redis, Publisher(redis_server.url) as publisher:
        follower = LogFollower(
            redis, FeedKeys("qp:"), board, Ring(max_bytes=1 << 20, max_code_bytes=1 << 16, max_age_ms=60_000),
            on_filled=lambda code: None, publish=lambda quote: None, on_batch=lambda: None, timeout_s=5,
        )  # fmt: skip
        assert follower.state == "none"
        asked_ms = now_ms()
        await publisher.publish([{"code": "A", "last": 1}])
        done_ms = now_ms()
        await wait_until(lambda: now_ms() - done_ms > 300)

        async def begin() -> float:
            """Return how long the log took to be read: when in that Redis looked at its clock nobody knows."""
            began_ms = now_ms()
            await follower.begin()
            return now_ms() - began_ms

        def is_right(arrived_ms: int) -> bool:
            precision_ms = PRECISION_MS + took_ms
            return asked_ms - precision_ms <= arrived_ms - ahead_ms <= done_ms + precision_ms

        took_ms = await begin()  # reads the row
        assert follower.state == "in step"
        assert is_right(board.quotes["A"].arrived_ms)
        assert asked_ms - PRECISION_MS <= board.quotes["A"].ts <= done_ms + PRECISION_MS  # Redis's clock, as everywhere

        follower.note_cut()
        assert follower.state == "behind"
        asked_ms = now_ms()
        await publisher.publish([{"code": "A", "last": 2}])
        done_ms = now_ms()
        await wait_until(lambda: now_ms() - done_ms > 300)
        follower.lose_step()
        took_ms = await begin()  # reads the batch
        assert board.quotes["A"].seq == 2
        assert is_right(board.quotes["A"].arrived_ms)
        assert is_right(board.newest_ms)


# The feed


async def test_heartbeats_say_how_the_feed_is(start_server: StartServer, redis_server: RedisServer) -> None:
    server = await start_server(feed_stale_s=1, heartbeat_ms=100, probe_interval_s=0.1, probe_timeout_s=2)
    async with (
        redis_server.client() as redis,
        RecordingClient(server.ws_url, ["A"]) as client,
        RecordingClient(server.ws_url) as other,
    ):
        clients = (client, other)

        async def everybody_says(state: str) -> None:
            async def is_said() -> bool:
                said = [feed_of(c) if c.heartbeat else "" for c in clients]
                return {*said, (await server.admin("/readyz"))[1]["feed"]} == {state}

            await wait_until(is_said, 20, state)

        await everybody_says("stale")
        assert all("feed_age_ms" not in (c.heartbeat or {}) for c in clients)
        published = 0

        async def tick() -> None:
            nonlocal published
            await publish(redis, "A", last=1)
            published += 1

        async def are_taken() -> bool:
            return await server.metric("ticks_accepted") == published

        async with again_and_again(tick):
            await everybody_says("ok")
        await wait_until(are_taken)
        last_ms = now_ms()
        await everybody_says("stale")
        for c in clients:
            assert c.heartbeat is not None
            assert c.heartbeat["feed_age_ms"] >= 1_000
            assert c.heartbeat["time"] - c.heartbeat["feed_age_ms"] <= last_ms + PRECISION_MS
        async with steadily(redis, "A", last=1):
            await everybody_says("ok")
            redis_server.pause()
            try:
                await everybody_says("down")
                status, facts = await server.admin("/readyz")
                assert (status, facts["reasons"]) == (503, ["the feed link is down"])
                assert await server.metric("feed_up") == 0
            finally:
                redis_server.resume()
            await everybody_says("ok")

        async def is_ready() -> bool:
            return (await server.admin("/readyz"))[0] == 200

        await wait_until(is_ready)
        assert client.is_open and other.is_open


# The log, as /readyz tells


async def test_readiness_says_how_the_log_is(start_server: StartServer, redis_server: RedisServer) -> None:
    server = await start_server(workers=1, probe_interval_s=0.1, probe_timeout_s=0.5)

    async def log_is(state: str) -> None:
        async def is_so() -> bool:
            return (await server.admin("/readyz"))[1]["log"] == state

        await wait_until(is_so, 20, state)

    await log_is("none")
    async with Publisher(redis_server.url) as publisher, redis_server.client() as redis:
        await publisher.publish([{"code": "A", "last": 1}])
        await log_is("in step")
        redis_server.pause()
        try:
            await log_is("behind")
        finally:
            redis_server.resume()
        await log_is("in step")

        # Something else stands where the log was.
        await redis.set("qp:log", "x")
        await redis.client_kill_filter(_type="pubsub")
        await log_is("unreadable")
        status, facts = await server.admin("/readyz")
        assert (status, facts["reasons"]) == (503, ["the publishers' log cannot be read"])
        await redis.delete("qp:log")
        await log_is("in step")
        assert (await server.admin("/readyz"))[0] == 200


async def test_a_log_that_this_redis_user_may_not_read_does_not_make_the_server_unready(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    async with redis_server.client() as redis:
        await redis.execute_command(
            "ACL", "SETUSER", "feed", "on", ">secret", "allchannels", "+ping", "+psubscribe", "+subscribe", "+client"
        )
        url = redis_server.url.replace("//", "//feed:secret@")
        server = await start_server(workers=1, feed_redis=url, registry_redis=redis_server.url)
        async with RecordingClient(server.ws_url, ["A"]) as client:
            await publish(redis, "A", last=1)
            await wait_until(lambda: client.last("A") == 1)
        status, facts = await server.admin("/readyz")
        assert (status, facts["log"], facts["reasons"]) == (200, "unreadable", [])
        assert server.log().count("the publishers' log cannot be read") == 1
