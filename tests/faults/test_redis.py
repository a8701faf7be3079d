"""Redis dies, sleeps, cuts links, is full, forgets: nobody is disconnected, and in the end everything is true again."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.support.ports import own_port
from tests.support.processes import worker_pid
from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.steady_feed import SteadyFeed, steady_feed
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

pytestmark = pytest.mark.fault

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = [f"C{n:02}" for n in range(20)]
CLIENTS = 50
# Until whatever was lost is there again, on a busy machine.
PATIENCE_S = 30
QUICK = {"heartbeat_ms": 200, "probe_interval_s": 0.1, "probe_timeout_s": 0.5, "registry_check_s": 0.3}


def codes_of(n: int) -> list[str]:
    return [CODES[(n + step) % len(CODES)] for step in (0, 1, 7)]


class Scene:
    """A server under load: clients that watch, a feed that publishes."""

    def __init__(self, server: QuotepushServer, redis: RedisServer, clients: list[RecordingClient], feed: SteadyFeed):
        self.server = server
        self.redis = redis
        self.clients = clients
        self.feed = feed

    async def ticks_flow(self) -> None:
        """Wait until everybody has a tick that was not there yet."""
        before = [client.received for client in self.clients]
        await wait_until(lambda: all(c.received > n for c, n in zip(self.clients, before, strict=True)), PATIENCE_S)

    async def everybody_hears_that_the_feed_is(self, state: str) -> None:
        await wait_until(lambda: all(c.heartbeat and c.heartbeat["feed"] == state for c in self.clients), PATIENCE_S)

    async def everybody_has_the_newest(self) -> None:
        """Stop the feed; what was lost with a link is published once more, for it has no log to come from."""
        while True:
            links = await self.server.metric("feed_links")
            newest = await self.feed.finish()

            def have_they(newest: dict[str, float] = newest) -> bool:
                return all(client.last(code) == newest[code] for client in self.clients for code in client.codes)

            async def have_they_or_was_it_lost(links: float = links) -> bool:
                return have_they() or await _has_made_links(self.server, links + 1)

            await wait_until(have_they_or_was_it_lost, PATIENCE_S)
            if have_they():
                return

    async def ends_well(self) -> None:
        """Nobody was lost, everybody has the newest price of every code, the registry is complete, the log is clean."""
        await self.everybody_has_the_newest()
        assert all(client.lives == 1 and client.is_open for client in self.clients)
        async with self.redis.client() as redis:
            await registry_equals(redis, {client.fd: client.codes for client in self.clients})

        async def is_ready() -> bool:
            status, facts = await self.server.admin("/readyz")
            return bool(status == 200 and facts["connections"] == len(self.clients))

        await wait_until(is_ready, PATIENCE_S)
        assert "Traceback" not in self.server.log()
        assert "ERROR" not in self.server.log()


@contextlib.asynccontextmanager
async def under_load(server: QuotepushServer, redis: RedisServer) -> AsyncIterator[Scene]:
    async with (
        connected_clients(server.ws_url, CLIENTS, codes_of) as clients,
        steady_feed(redis.url, CODES, 500) as feed,
    ):
        scene = Scene(server, redis, clients, feed)
        await scene.ticks_flow()
        async with redis.client() as registry:
            await registry_equals(registry, {client.fd: client.codes for client in clients})
        yield scene


@pytest.fixture
async def scene(start_server: StartServer, redis_server: RedisServer) -> AsyncIterator[Scene]:
    async with under_load(await start_server(**QUICK), redis_server) as scene:
        yield scene


async def test_redis_dies_and_comes_back_empty(scene: Scene) -> None:
    scene.redis.kill()
    await scene.everybody_hears_that_the_feed_is("down")
    for client in scene.clients[:5]:
        await client.request("snapshot", codes=["C00"])
    scene.redis.start()
    await scene.everybody_hears_that_the_feed_is("ok")
    await scene.ticks_flow()
    await scene.ends_well()


@pytest.mark.long
async def test_redis_dies_again_and_again(scene: Scene) -> None:
    for _ in range(4):
        links = await scene.server.metric("feed_links")
        await asyncio.to_thread(scene.redis.restart)
        await wait_until(lambda links=links: _has_made_links(scene.server, links + 1), PATIENCE_S)
        await scene.ticks_flow()
    await scene.ends_well()


async def test_clients_come_change_and_go_while_redis_is_away(scene: Scene) -> None:
    scene.redis.kill()
    await scene.everybody_hears_that_the_feed_is("down")
    for client in scene.clients[:10]:
        await client.subscribe("NEW", "C19")
        await client.unsubscribe(*codes_of(0))
    for client in scene.clients[10:15]:
        await client.close()
    for client in scene.clients[15:20]:
        client.abort()
    del scene.clients[10:20]
    async with connected_clients(scene.server.ws_url, 10, lambda n: ["C05"]) as late:
        await wait_until(lambda: _counts(scene.server, CLIENTS))
        scene.clients += late
        scene.redis.start()
        await scene.everybody_hears_that_the_feed_is("ok")
        scene.feed.codes.append("NEW")
        await scene.ends_well()


async def _counts(server: QuotepushServer, connections: int) -> bool:
    return bool((await server.admin("/readyz"))[1]["connections"] == connections)


async def _has_made_links(server: QuotepushServer, links: float) -> bool:
    return await server.metric("feed_links") >= links


@pytest.mark.long
async def test_redis_sleeps_for_some_seconds(scene: Scene) -> None:
    scene.redis.pause()
    await scene.everybody_hears_that_the_feed_is("down")
    for client in scene.clients[:5]:
        await client.ping()
    await asyncio.sleep(2)  # longer than the probe's patience, several times
    scene.redis.resume()
    await scene.everybody_hears_that_the_feed_is("ok")
    await scene.ticks_flow()
    await scene.ends_well()


async def test_the_links_that_ticks_come_on_are_cut_again_and_again(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        for _ in range(10):
            links = await scene.server.metric("feed_links")
            assert await redis.client_kill_filter(_type="pubsub") >= 1
            # Before that, rows may flow that were under way when the link was cut.
            await wait_until(lambda links=links: _has_made_links(scene.server, links + 1), PATIENCE_S)
            await scene.ticks_flow()
    await scene.ends_well()


async def test_every_link_to_redis_is_cut(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        for _ in range(3):
            links = await scene.server.metric("feed_links")
            await redis.client_kill_filter(_type="normal", skipme=True)
            await redis.client_kill_filter(_type="pubsub")
            await wait_until(lambda links=links: _has_made_links(scene.server, links + 1), PATIENCE_S)
            await scene.ticks_flow()
    await scene.ends_well()


async def test_redis_forgets_everything(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        for _ in range(3):
            await redis.flushall()
            await registry_equals(redis, {client.fd: client.codes for client in scene.clients})
    await scene.ends_well()


async def test_somebody_meddles_with_the_registry(scene: Scene) -> None:
    async with scene.redis.client() as redis:
        fd = scene.clients[0].fd
        # At once: what is put right in between would leave fds of codes that nobody here has, and nobody looks there.
        meddling = redis.pipeline(transaction=True)
        meddling.delete("qp:codes", f"qp:fd:{scene.clients[1].fd}", "qp:node:test")
        meddling.srem("qp:code:C07", *(client.fd for client in scene.clients))
        meddling.sadd(f"qp:fd:{fd}", "NOBODY")
        meddling.sadd("qp:code:NOBODY", fd)
        meddling.sadd("qp:codes", "NOBODY")
        await meddling.execute()
        stranger = fd.rpartition(".")[0] + ".1"
        await redis.sadd("qp:code:C00", stranger)
        await redis.srem("qp:code:C00", stranger)  # no life's of ours: not for us to clear
        await registry_equals(redis, {client.fd: client.codes for client in scene.clients})
    await scene.ends_well()


@pytest.mark.parametrize("trouble", ["full", "read-only", "too few replicas"])
async def test_a_registry_that_takes_no_writes_does_not_stop_the_pushing(trouble: str, scene: Scene) -> None:
    async with scene.redis.client() as redis:
        match trouble:
            case "full":
                await redis.config_set("maxmemory-policy", "noeviction")
                await redis.config_set("maxmemory", "1")
            case "read-only":
                await redis.replicaof("127.0.0.1", own_port())  # nobody's
            case _:
                await redis.config_set("min-replicas-to-write", "3")
        for client in scene.clients[:10]:
            await client.unsubscribe("*")
            await client.subscribe("C11", "C12")
        for client in scene.clients[10:15]:
            await client.close()
        del scene.clients[10:15]
        await scene.ticks_flow()

        async def lags() -> bool:
            return await scene.server.metric("registry_pending") > 0

        await wait_until(lags)
        await scene.ticks_flow()
        match trouble:
            case "full":
                await redis.config_set("maxmemory", "0")
            case "read-only":
                await redis.replicaof("no", "one")
            case _:
                await redis.config_set("min-replicas-to-write", "0")
    await scene.ends_well()


async def test_a_worker_dies_while_redis_is_away(scene: Scene) -> None:
    scene.redis.kill()
    await scene.everybody_hears_that_the_feed_is("down")
    os.kill(worker_pid(scene.server, "0"), signal.SIGKILL)
    lost = [client for client in scene.clients if client.worker == "0"]
    await wait_until(lambda: all(client.has_ended for client in lost))
    scene.clients[:] = [client for client in scene.clients if client.worker != "0"]
    await wait_until(lambda: scene.server.metric("worker_restarts"))
    scene.redis.start()
    await scene.everybody_hears_that_the_feed_is("ok")
    await scene.ends_well()


async def test_a_worker_that_dies_while_redis_sleeps_is_replaced_before_redis_wakes(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    # Nothing that waits for an answer of Redis gives up before the test does.
    async with under_load(await start_server(**QUICK, redis_timeout_s=60), redis_server) as scene:
        scene.redis.pause()
        os.kill(worker_pid(scene.server, "0"), signal.SIGKILL)
        lost = [client for client in scene.clients if client.worker == "0"]
        await wait_until(lambda: all(client.has_ended for client in lost))
        scene.clients[:] = [client for client in scene.clients if client.worker != "0"]

        async def is_replaced() -> bool:
            restarts = await scene.server.metric("worker_restarts")  # before that it counts as ready, dead or not
            return restarts == 1 and await scene.server.metric("workers_ready") == 2

        await wait_until(is_replaced, PATIENCE_S)
        # Not before: what is published while the link is found dead has no log to come from.
        await scene.everybody_hears_that_the_feed_is("down")
        scene.redis.resume()
        await scene.everybody_hears_that_the_feed_is("ok")
        await scene.ends_well()


@pytest.mark.long
async def test_redis_remembers_a_worker_that_died_while_it_was_away(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    redis_server.stop()
    redis_server.aof = True
    redis_server.start()
    async with under_load(await start_server(**QUICK), redis_server) as scene:
        scene.redis.kill()
        await scene.everybody_hears_that_the_feed_is("down")
        os.kill(worker_pid(scene.server, "1"), signal.SIGKILL)
        lost = [client for client in scene.clients if client.worker == "1"]
        await wait_until(lambda: all(client.has_ended for client in lost))
        scene.clients[:] = [client for client in scene.clients if client.worker != "1"]
        await asyncio.to_thread(scene.redis.start)
        await scene.everybody_hears_that_the_feed_is("ok")
        await scene.ends_well()


async def test_redis_cuts_off_a_subscriber_that_was_too_slow(scene: Scene) -> None:
    """Main stands still for a while, as on a machine that swaps: Redis loses patience, but nobody else does."""
    links = await scene.server.metric("feed_links")
    async with scene.redis.client() as redis:
        await redis.config_set("client-output-buffer-limit", "pubsub 100kb 100kb 1")
        workers = set(scene.server.worker_pids())
        os.kill(scene.server.pid, signal.SIGSTOP)
        try:
            while any(client["psub"] != "0" for client in await redis.client_list()):
                bulk = redis.pipeline(transaction=False)
                for _ in range(200):
                    bulk.publish("quote.OTHER", '{"last":1,"text":"' + "x" * 7000 + '"}')
                await bulk.execute()
        finally:
            os.kill(scene.server.pid, signal.SIGCONT)
        # Heartbeats said "ok" all the time, and the first ticks are those that waited in the cut link.
        await wait_until(lambda: _has_made_links(scene.server, links + 1), PATIENCE_S)
        await scene.everybody_hears_that_the_feed_is("ok")
        await scene.ticks_flow()
        assert set(scene.server.worker_pids()) == workers
    await scene.ends_well()
