"""The private listener of a running server."""

from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients


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

    await wait_until(is_red, 30)
    assert (await quotepush_server.admin("/healthz"))[0] == 200
    redis_server.start()

    async def is_green() -> bool:
        return (await quotepush_server.admin("/readyz"))[0] == 200

    await wait_until(is_green, 30)


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


async def test_open_connections_are_counted_and_not_the_places_that_workers_hold_ready(
    quotepush_server: QuotepushServer,
) -> None:
    async def is_counted(connections: int) -> bool:
        return (await quotepush_server.admin("/readyz"))[1]["connections"] == connections

    async with connected_clients(quotepush_server.ws_url, 3):
        await wait_until(lambda: is_counted(3))
    await wait_until(lambda: is_counted(0))
    async with RecordingClient(quotepush_server.ws_url) as client:
        await wait_until(lambda: is_counted(1))
        await quotepush_server.stop()
        assert client.close_code in (None, 1012)
    assert "stopping: 1 connections are closed" in quotepush_server.log()
