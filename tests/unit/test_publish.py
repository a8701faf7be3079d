"""Ticks reach real subscribers of a real Redis, and Redis going away costs what was said and no more."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import orjson
import pytest
from redis.asyncio.client import PubSub

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.feed import publish
from quotepush.feed.publish import LoggedPublisher, PlainPublisher, TickPublisher
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
async def logged_of(
    url: str, *, waits: bool = True, warnings: list[str] | None = None, give_up_s: float | None = None
) -> AsyncIterator[LoggedPublisher]:
    warn = ([] if warnings is None else warnings).append
    publisher = LoggedPublisher(url, "qp:", waits=waits, warn=warn, give_up_s=give_up_s)
    try:
        await publisher.connect()
        yield publisher
    finally:
        await publisher.aclose()


both = pytest.mark.parametrize("opened", [logged_of, publisher_of], ids=["logged", "plain"])
Opened = Callable[..., AbstractAsyncContextManager[TickPublisher]]


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
        ticks = [("600519.SH", {"last": 1688.2, "name": "贵州茅台"}), ("AAPL", {"last": 1})]
        assert await publisher.publish(ticks) == [1, 1]  # subscribers
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
        assert publisher.channel_of("AAPL") == "all"


async def test_logged_ticks_are_one_batch_with_their_numbers(redis_server: RedisServer):
    async with subscribed(redis_server) as pubsub, logged_of(redis_server.url) as publisher:
        assert await publisher.publish([("A", {"last": 1}), ("B", {"last": 1}), ("A", {"code": "a", "ask": 2})]) == [
            1,
            1,
            2,
        ]

        ((channel, batch),) = await messages(pubsub, 1)
        assert channel == "qp:feed"
        assert isinstance(batch, dict)
        assert batch["ticks"] == [[1, "A", {"last": 1}], [1, "B", {"last": 1}], [2, "A", {"ask": 2}]]
        assert publisher.sent == 3


async def test_tick_that_cannot_be_logged_does_not_harm_the_others(redis_server: RedisServer):
    warnings: list[str] = []
    async with logged_of(redis_server.url, warnings=warnings) as publisher:
        assert await publisher.publish([("A", {"last": 1}), ("B", {"@": 1}), ("A", {"last": 2})]) == [1, 2]
        assert publisher.sent == 2
    assert warnings == ["a tick of B is refused: tick 1: '@' cannot be the name of a field"]


async def test_logged_batch_without_an_answer_is_published_when_redis_is_back(redis_server: RedisServer):
    warnings: list[str] = []
    async with logged_of(redis_server.url, warnings=warnings) as publisher:
        await publisher.publish([("A", {"last": 1})])
        redis_server.pause()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 2}), ("A", {"last": 3})]))
        await asyncio.sleep(0)
        redis_server.kill()
        await wait_until(lambda: publisher.outages == 1)
        assert not waiting.done() and publisher.sent == 1
        await asyncio.to_thread(redis_server.start)

        assert await waiting == [1, 2]

        assert (publisher.sent, publisher.dropped) == (3, 0)
    assert len(warnings) == 2
    assert "went away" in warnings[0] and warnings[0].endswith("waiting for it")
    assert warnings[1].endswith("is back")


async def test_logged_live_ticks_of_an_outage_are_dropped_but_for_the_batch_under_way(redis_server: RedisServer):
    warnings: list[str] = []
    async with logged_of(redis_server.url, waits=False, warnings=warnings) as publisher:
        await publisher.publish([("A", {"last": 0})])
        redis_server.kill()
        for last in range(1, 4):
            assert await publisher.publish([("A", {"last": last})]) == []
        assert (publisher.sent, publisher.dropped, publisher.outages) == (1, 2, 1)

        await asyncio.to_thread(redis_server.start)
        await wait_until(lambda: len(warnings) == 2)
        assert await publisher.publish([("A", {"last": 9})]) == [2]

        assert (publisher.sent, publisher.dropped) == (3, 2)
        async with redis_server.client() as client:
            assert await client.hget("qp:row:A", "last") == "9"
    assert warnings[0].endswith("dropping ticks until it is back")
    assert warnings[1].endswith("is back; 2 ticks dropped so far")


async def test_what_redis_refuses_for_good_ends_a_publisher_that_drops_too(redis_server: RedisServer):
    async with logged_of(redis_server.url, waits=False) as publisher, redis_server.client() as client:
        await publisher.publish([("A", {"last": 1})])
        await client.config_set("requirepass", "hunter2")
        await client.client_kill_filter(_type="normal", skipme=True)

        async def is_refused() -> bool:
            try:
                await publisher.publish([("A", {"last": 3})])
            except RedisUnavailable:
                return True
            return False

        await wait_until(is_refused)


async def test_logged_publisher_gives_up_when_it_was_told_to(redis_server: RedisServer):
    async with logged_of(redis_server.url, give_up_s=3) as publisher:
        redis_server.kill()
        with pytest.raises(RedisUnavailable):
            await publisher.publish([("A", {"last": 1})])


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
    warnings: list[str] = []
    async with publisher_of(redis_server.url, warnings=warnings) as publisher:
        monkeypatch.setattr(publish, "_TIMEOUT_S", 0.2)  # only now: on a busy machine connecting takes longer
        redis_server.pause()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await wait_until(lambda: publisher.outages)
        redis_server.resume()

        await waiting

        assert publisher.sent == 1
    assert "no answer within 0.2 s" in warnings[0]
    assert "is back" in warnings[1]


@both
async def test_cancelled_publish_still_counts_the_batch_that_was_on_its_way(
    opened: Opened, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publish, "_LAST_EXCHANGE_S", 30.0)  # however late Redis is on a busy machine
    async with opened(redis_server.url) as publisher:
        redis_server.pause()
        publishing = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.sleep(0)
        redis_server.resume()

        with pytest.raises(asyncio.CancelledError):
            await publishing

        assert publisher.sent == 1


@both
async def test_waiting_for_redis_can_be_cancelled_and_closed(opened: Opened, redis_server: RedisServer):
    async with opened(redis_server.url) as publisher:
        redis_server.kill()
        waiting = asyncio.create_task(publisher.publish([("A", {"last": 1})]))
        await wait_until(lambda: publisher.outages == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@both
async def test_closing_gives_up_what_still_waits(opened: Opened, redis_server: RedisServer):
    async with opened(redis_server.url, waits=False) as publisher:
        redis_server.kill()
        await publisher.publish([("A", {"last": 1})])
    assert asyncio.all_tasks() == {asyncio.current_task()}


@both
async def test_redis_that_is_not_there_is_an_operators_error_without_the_password(
    opened: Opened, redis_server: RedisServer
):
    redis_server.kill()
    url = f"redis://me:hunter2@127.0.0.1:{redis_server.port}/0"

    with pytest.raises(RedisUnavailable) as caught:
        async with opened(url):
            pass

    assert f"127.0.0.1:{redis_server.port}" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@both
async def test_wrong_password_and_missing_permission_are_operators_errors(opened: Opened, redis_server: RedisServer):
    client = redis_server.client()
    await client.execute_command("ACL", "SETUSER", "mute", "on", ">hunter2", "+ping", "+client", "+hello")
    await client.aclose()
    where = f"127.0.0.1:{redis_server.port}"

    with pytest.raises(RedisUnavailable):
        async with opened(f"redis://mute:wrong@{where}"):
            pass
    with pytest.raises(RedisUnavailable, match=r"(?i)permission"):
        async with opened(f"redis://mute:hunter2@{where}") as publisher:
            await publisher.publish([("A", {"last": 1})])


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://:hunt/er2@127.0.0.1:1", "127.0.0.1:6379", ""])
async def test_address_that_is_none_is_a_wrong_setting_and_not_repeated(url: str):
    with pytest.raises(SettingsError) as caught:
        PlainPublisher(url, "quote.{code}", waits=True, warn=pytest.fail)
    with pytest.raises(SettingsError) as of_the_other:
        LoggedPublisher(url, "qp:", waits=True, warn=pytest.fail)

    assert "hunt" not in str(caught.value)
    assert str(of_the_other.value) == str(caught.value)
