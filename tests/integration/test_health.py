"""The private listener of a running server."""

from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until


async def test_a_running_server_is_alive_and_ready(quotepush_server: QuotepushServer) -> None:
    assert await quotepush_server.admin("/healthz") == (200, {"status": "alive"})
    status, facts = await quotepush_server.admin("/readyz")
    assert status == 200
    assert facts["ready"] is True
    assert facts["workers"] == 2


async def test_a_server_without_its_redis_is_alive_but_not_ready(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    redis_server.kill()

    async def is_red() -> bool:
        status, facts = await quotepush_server.admin("/readyz")
        return status == 503 and facts["reasons"] == ["the feed link is down"] and facts["feed"] == "down"

    await wait_until(is_red)
    assert (await quotepush_server.admin("/healthz"))[0] == 200
    redis_server.start()

    async def is_green() -> bool:
        return (await quotepush_server.admin("/readyz"))[0] == 200

    await wait_until(is_green)


async def test_metrics_count_ticks_and_what_was_refused(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    async with redis_server.client() as redis:
        await redis.publish("quote.AAPL", '{"last":1.5}')
        await redis.publish("quote.AAPL", '{"last":-1}')
        await redis.publish("quote.AAPL", "[]")
        await wait_until(lambda: quotepush_server.metric("ticks_accepted"))

        async def has_refused() -> bool:
            return await quotepush_server.metric("ticks_refused") == 2

        await wait_until(has_refused)
    assert await quotepush_server.metric("ticks_refused", reason="negative") == 1
    assert await quotepush_server.metric("workers_ready") == 2
