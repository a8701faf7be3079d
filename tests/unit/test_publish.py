"""Ticks reach real subscribers of a real Redis, and Redis going away costs what was said and no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from redis.asyncio.client import PubSub

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.feed import publish
from quotepush.feed.publish import PlainPublisher, shown_address
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@asynccontextmanager
async def publisher_of(
    url: str, channel: str = "quote.{code}", *, waits: bool = True, warnings: list[str] | None = None
) -> AsyncIterator[PlainPublisher]:
    publisher = PlainPublisher(url, channel, waits=waits, warn=([] if warnings is None else warnings).append)
    try:
        await publisher.connect()
        yield publisher
    finally:
        await publisher.aclose()


@asynccontextmanager
async def subscribed(server: RedisServer, pattern: str = "*") -> AsyncIterator[PubSub]:
    client = server.client()
    pubsub = client.pubsub()
    try:
        await pubsub.psubscribe(pattern)
        confirmation = await pubsub.get_message(timeout=5)
        assert confirmation and confirmation["type"] == "psubscribe"
        yield pubsub
    finally:
        await pubsub.aclose()
        await client.aclose()


async def messages(pubsub: PubSub, count: int) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    while len(found) < count:
        message = await pubsub.get_message(timeout=5)
        assert message is not None, f"only {len(found)} messages"
        found.append((message["channel"], orjson.loads(message["data"])))
    return found


async def test_each_tick_is_one_message_on_the_channel_of_its_code_in_order(redis_server: RedisServer):
    async with subscribed(redis_server) as pubsub, publisher_of(redis_server.url) as publisher:
        await publisher.publish([("600519.SH", {"last": 1688.2, "name": "贵州茅台"}), ("AAPL", {"last": 1})])
        await publisher.publish([("AAPL", {"last": 2, "ask": None})])

        assert await messages(pubsub, 3) == [
            ("quote.600519.SH", {"last": 1688.2, "name": "贵州茅台"}),
            ("quote.AAPL", {"last": 1}),
            ("quote.AAPL", {"last": 2, "ask": None}),
        ]
        assert publisher.sent == 3


async def test_template_without_a_place_for_the_code_puts_the_code_into_the_tick(redis_server: RedisServer):
    async with subscribed(redis_server) as pubsub, publisher_of(redis_server.url, "all") as publisher:
        await publisher.publish([("AAPL", {"last": 1})])

        assert await messages(pubsub, 1) == [("all", {"code": "AAPL", "last": 1})]


async def test_batch_without_an_answer_is_sent_again_when_redis_is_back(redis_server: RedisServer):
    warnings: list[str] = []
    async with publisher_of(redis_server.url, warnings=warnings) as publisher:
        await publisher.publish([("A", {"last": 1})])
        # Paused and killed: the batch lies in the socket, and nobody ever reads it.
        redis_server.pause()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 2}), ("A", {"last": 3})]))
        await asyncio.sleep(0)
        redis_server.kill()
        await wait_until(lambda: publisher.outages == 1)
        assert not waiting.done() and publisher.sent == 1
        await asyncio.to_thread(redis_server.start)

        await waiting

        assert publisher.sent == 3 and publisher.dropped == 0
    assert len(warnings) == 2
    assert "went away" in warnings[0] and "is back" in warnings[1]


async def test_live_ticks_of_an_outage_are_dropped_and_counted(redis_server: RedisServer):
    warnings: list[str] = []
    async with publisher_of(redis_server.url, waits=False, warnings=warnings) as publisher:
        await publisher.publish([("A", {"last": 1})])
        redis_server.kill()
        for last in range(3):
            await publisher.publish([("A", {"last": last})])
        assert (publisher.sent, publisher.dropped, publisher.outages) == (1, 3, 1)

        await asyncio.to_thread(redis_server.start)
        await wait_until(lambda: len(warnings) == 2)
        await publisher.publish([("A", {"last": 9})])

        assert (publisher.sent, publisher.dropped) == (2, 3)
    assert warnings[1].endswith("is back; 3 ticks dropped so far")


async def test_redis_that_does_not_answer_counts_as_gone_until_it_does(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publish, "_TIMEOUT_S", 0.2)
    warnings: list[str] = []
    async with publisher_of(redis_server.url, warnings=warnings) as publisher:
        redis_server.pause()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await wait_until(lambda: publisher.outages)
        redis_server.resume()

        await waiting

        assert publisher.sent == 1
    assert "no answer within 0.2 s" in warnings[0]
    assert "is back" in warnings[1]


async def test_cancelled_publish_still_counts_the_batch_that_was_on_its_way(redis_server: RedisServer):
    async with publisher_of(redis_server.url) as publisher:
        redis_server.pause()
        publishing = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.sleep(0)
        redis_server.resume()

        with pytest.raises(asyncio.CancelledError):
            await publishing

        assert publisher.sent == 1


async def test_waiting_for_redis_can_be_cancelled_and_closed(redis_server: RedisServer):
    async with publisher_of(redis_server.url) as publisher:
        redis_server.kill()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await wait_until(lambda: publisher.outages == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_redis_that_is_not_there_is_an_operators_error_without_the_password(redis_server: RedisServer):
    redis_server.kill()
    url = f"redis://me:hunter2@127.0.0.1:{redis_server.port}/0"

    with pytest.raises(RedisUnavailable) as caught:
        async with publisher_of(url):
            pass

    assert f"127.0.0.1:{redis_server.port}" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_wrong_password_and_missing_permission_are_operators_errors(redis_server: RedisServer):
    client = redis_server.client()
    await client.execute_command("ACL", "SETUSER", "mute", "on", ">hunter2", "+ping", "+client", "+hello")
    await client.aclose()
    where = f"127.0.0.1:{redis_server.port}"

    with pytest.raises(RedisUnavailable):
        async with publisher_of(f"redis://mute:wrong@{where}"):
            pass
    with pytest.raises(RedisUnavailable, match=r"(?i)permission"):
        async with publisher_of(f"redis://mute:hunter2@{where}") as publisher:
            await publisher.publish([("A", {"last": 1})])


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://:hunt/er2@127.0.0.1:1", "127.0.0.1:6379", ""])
async def test_address_that_is_none_is_a_wrong_setting_and_not_repeated(url: str):
    with pytest.raises(SettingsError) as caught:
        PlainPublisher(url, "quote.{code}", waits=True, warn=pytest.fail)

    assert "hunt" not in str(caught.value)


def test_address_is_shown_without_user_password_and_options(tmp_path: Path):
    assert shown_address("redis://me:secret@example.org:7000/3?password=secret") == "example.org:7000"
    assert shown_address("rediss://:secret@example.org") == "example.org:6379"
    assert shown_address(f"unix://:secret@{tmp_path}/s?db=1") == f"unix:{tmp_path}/s"
