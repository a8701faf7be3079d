"""Whatever is killed, paused or cut: every client can prove from its own stream what it has missed, which is nothing
as long as Redis keeps its log.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.exceptions import RedisError

from tests.support.market import Market
from tests.support.processes import worker_pid
from tests.support.proving_client import ProvingClient
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.fault

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = [f"C{n:02}" for n in range(30)]
# However long a busy machine takes to restart something, the rows of that time are kept.
QUICK = {
    "heartbeat_ms": 200,
    "probe_interval_s": 0.1,
    "probe_timeout_s": 0.5,
    "ring_code_bytes": 1_000_000,
    "replay_bytes": 10_000_000,
}
VIEW = ["last", "volume"]


class Scene:
    """A market, a server, and clients of several kinds."""

    def __init__(self, server: QuotepushServer, redis: RedisServer, market: Market) -> None:
        url = server.ws_url
        self.server = server
        self.redis = redis
        self.market = market
        self.clients = [
            ProvingClient(url, CODES),
            ProvingClient(url, CODES[:7]),
            ProvingClient(url, CODES, fields=VIEW, format="rows"),
            ProvingClient(url, CODES, is_msgpack=True),
            ProvingClient(url, CODES, is_msgpack=True, format="rows"),
            ProvingClient(url, CODES, leaves_after=150),
            ProvingClient(url, CODES, fields=VIEW, format="rows", leaves_after=150),
        ]

    async def rows_flow(self) -> None:
        """Wait until everybody has rows that were not there yet."""
        before = [client.received for client in self.clients]

        def do_they() -> bool:
            for client in self.clients:
                client.check()
            return all(c.received > n + 100 for c, n in zip(self.clients, before, strict=True))

        await wait_until(do_they, 30)

    async def kill_a_worker(self, worker: str) -> None:
        """Kill it; return when another one accepts connections in its place."""
        restarts = await self.server.metric("worker_restarts", worker=worker)
        os.kill(worker_pid(self.server, worker), signal.SIGKILL)

        async def is_replaced() -> bool:
            is_noticed = await self.server.metric("worker_restarts", worker=worker) == restarts + 1
            return is_noticed and await self.server.metric("workers_ready") == 2

        await wait_until(is_replaced, 30)

    async def everybody_has_everything(self) -> None:
        """The market stands still: what each client sees is what was published, and every row was what it had to be."""
        market = self.market
        for client in self.clients:
            await wait_until(lambda c=client: market.lacks(c.sight(is_whole=False)) == [], 20, "the newest rows")
            market.judge(client.sight())
        for line in self.server.log().splitlines():
            assert "Traceback" not in line and "ERROR" not in line, line

    async def nothing_was_lost(self) -> None:
        """No client was told of a loss, and none began anew: each chain leads from its first row to its last."""
        assert await self.server.metric("log_gap_rows") == 0
        for client in self.clients:
            self.market.judge_whole(client.sight())
        if not await self.server.merged_by_main():
            assert [client.merged for client in self.clients] == [0] * len(self.clients)


@contextlib.asynccontextmanager
async def a_market(server: QuotepushServer, redis: RedisServer, log_batches: int = 10_000) -> AsyncIterator[Scene]:
    scene = Scene(server, redis, market := Market(redis.url, CODES, log_batches=log_batches))
    publishing = asyncio.create_task(market.run())
    try:
        await wait_until(lambda: market.newest)
        async with contextlib.AsyncExitStack() as stack:
            for client in scene.clients:
                await stack.enter_async_context(client)
            await scene.rows_flow()
            yield scene
            market.stop()
            await asyncio.wait_for(publishing, 30)
            await scene.everybody_has_everything()
    finally:
        publishing.cancel()
        await asyncio.wait([publishing])


@pytest.fixture
async def scene(start_server: StartServer, redis_server: RedisServer) -> AsyncIterator[Scene]:
    """On a Redis that keeps everything it has taken."""
    redis_server.stop()
    redis_server.aof = True
    redis_server.start()
    async with a_market(await start_server(**QUICK), redis_server) as scene:
        yield scene
    await scene.nothing_was_lost()


@pytest.mark.long
async def test_links_to_redis_are_cut_again_and_again(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        for kind in ("pubsub", "normal", "pubsub", "normal", "pubsub"):
            await redis.client_kill_filter(_type=kind, skipme=True)
            await scene.rows_flow()
    assert await scene.server.metric("log_catch_ups") > 0


@pytest.mark.long
async def test_redis_sleeps_for_some_seconds(scene: Scene) -> None:
    scene.redis.pause()
    await asyncio.sleep(3)
    scene.redis.resume()
    await scene.rows_flow()


@pytest.mark.long
async def test_redis_is_killed_and_has_kept_everything(scene: Scene) -> None:
    for _ in range(3):
        scene.redis.kill()
        await asyncio.to_thread(scene.redis.start)
        await scene.rows_flow()


@pytest.mark.long
async def test_workers_are_killed(scene: Scene) -> None:
    for worker in ("0", "1", "0"):
        await scene.kill_a_worker(worker)
        await scene.rows_flow()
    assert any(client.resumed["replay"] for client in scene.clients[:5])


async def test_main_is_killed_and_started_again(scene: Scene) -> None:
    await scene.server.kill()
    await scene.server.start()
    await scene.rows_flow()
    assert all(client.resumed["replay"] for client in scene.clients)


@pytest.mark.long
async def test_the_server_is_restarted(scene: Scene) -> None:
    for _ in range(2):
        assert await scene.server.stop() == 0
        await scene.server.start()
        await scene.rows_flow()
    assert all(client.resumed["replay"] for client in scene.clients)


@pytest.mark.long
async def test_the_server_is_restarted_while_redis_is_killed(scene: Scene) -> None:
    scene.redis.kill()
    await scene.server.stop()
    await asyncio.to_thread(scene.redis.start)
    await scene.server.start()
    await scene.rows_flow()


@pytest.mark.long
async def test_everything_at_once_and_again(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        os.kill(worker_pid(scene.server, "1"), signal.SIGKILL)
        await redis.client_kill_filter(_type="pubsub")
    scene.redis.pause()
    await asyncio.sleep(1)
    scene.redis.kill()
    await asyncio.to_thread(scene.redis.start)
    os.kill(scene.server.pid, signal.SIGSTOP)
    before = scene.market.published
    await wait_until(lambda: scene.market.published > before + 500)
    os.kill(scene.server.pid, signal.SIGCONT)
    await scene.rows_flow()


# What Redis itself has lost


@pytest.mark.long
async def test_redis_comes_back_empty(start_server: StartServer, redis_server: RedisServer) -> None:
    async with a_market(await start_server(**QUICK), redis_server) as scene:
        for _ in range(2):
            epoch = scene.market.epoch
            await asyncio.to_thread(redis_server.restart)
            await wait_until(lambda e=epoch: scene.market.epoch != e, 30)
            await wait_until(lambda: all(_epochs(c) == {scene.market.epoch} for c in scene.clients), 30)
            await scene.rows_flow()
    for client in scene.clients:
        assert all(client.restarts[code] >= 2 for code in client.seen)


def _epochs(client: ProvingClient) -> set[str]:
    client.check()
    return {epoch for epoch, _ in client.places.values()}


@pytest.mark.long
async def test_a_log_that_is_too_short_is_announced_to_everybody(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    async with a_market(await start_server(**QUICK), redis_server) as scene, redis_server.client() as redis:
        while await scene.server.metric("log_gap_rows") < 20:
            await redis.client_kill_filter(_type="pubsub")
            before = scene.market.published
            while scene.market.published < before + 100:
                with contextlib.suppress(RedisError):
                    await redis.xtrim("qp:log", maxlen=0, approximate=False)
                await asyncio.sleep(0.001)
        await scene.rows_flow()
    for client in scene.clients:
        assert client.gaps.total() or client.resumed["snapshot"]
    # Whoever never was away was told of every loss by the server itself.
    assert all(client.gaps.total() for client in scene.clients[:5])
