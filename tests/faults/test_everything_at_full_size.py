"""Two hundred clients of all kinds, two workers, five thousand ticks a second, and one fault after the other.

Every client ends with the newest rows, and every row on the way there was one that was published, in its order, once.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.support.door import Door, door_to
from tests.support.fleet import Fleet, Sailor, fleet_of
from tests.support.market import Market, PlainMarket
from tests.support.processes import worker_pid
from tests.support.proving_client import Sight
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.long, pytest.mark.timeout(300)]

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = [f"C{n:03}" for n in range(1000)]
CODES_EACH = 8
CLIENTS = 200
TICKS_PER_S = 5000
# However long a busy machine takes to restart something, the rows of that time are kept.
QUICK = {
    "heartbeat_ms": 500,
    "probe_interval_s": 0.1,
    "probe_timeout_s": 0.5,
    "ring_code_bytes": 1_000_000,
    "replay_bytes": 10_000_000,
}
PATIENCE_S = 60
LEAVES = {"leaves_after": 80}  # every two seconds or so
VIEW = {"fields": ["last", "volume"]}
KINDS: list[dict[str, Any]] = [
    {},
    {"format": "rows", **VIEW},
    {"is_msgpack": True},
    {"is_msgpack": True, "format": "rows"},
    {"fields": ["open", "high"]},  # seven of ten ticks show it nothing new
    {"max_rate": 1},
    {"max_rate": 2, "is_msgpack": True, "format": "rows", **VIEW},
    LEAVES,
    {"format": "rows", **VIEW, **LEAVES},
    {"is_msgpack": True, **LEAVES},
]


def fleet(server: QuotepushServer) -> contextlib.AbstractAsyncContextManager[Fleet]:
    dice = random.Random(7)
    sailors = [Sailor(dice.sample(CODES, CODES_EACH), KINDS[n % len(KINDS)]) for n in range(CLIENTS)]
    return fleet_of(server.ws_url, sailors)


def is_unthrottled(sight: Sight) -> bool:
    """Whether each tick is a row for this client."""
    return "max_rate" not in sight.options and "open" not in sight.options.get("fields", [])


class Scene:
    """A market, a server that reaches its Redis through a door, and clients of all kinds.

    Attributes:
        merged_by_main: rows that main has merged, in all its lives: it was behind, or one of its workers.
    """

    def __init__(self, server: QuotepushServer, redis: RedisServer, door: Door, market: Market, fleet: Fleet) -> None:
        self.server = server
        self.redis = redis
        self.door = door
        self.market = market
        self.fleet = fleet
        self.merged_by_main = 0.0

    async def rows_flow(self) -> None:
        """Wait until everybody is subscribed and has rows that were not there yet."""
        before = await self.fleet.received()

        async def do_they() -> bool:
            return all(now > then + 5 for now, then in zip(await self.fleet.received(), before, strict=True))

        await wait_until(do_they, PATIENCE_S)

    async def market_goes_on(self, seconds: float) -> None:
        """Wait until so much more is published as in so long."""
        enough = self.market.published + round(TICKS_PER_S * seconds)
        await wait_until(lambda: self.market.published >= enough, PATIENCE_S)

    async def everybody_has_come_back(self) -> None:
        """Each client is on another connection than its first, and was replayed to if it wants every row."""
        sights = await self.fleet.newest()
        assert all(sight.lives > 1 for sight in sights)
        assert all(sight.resumed["replay"] for sight in sights if is_unthrottled(sight))

    async def everybody_is_in(self, epoch: str) -> None:
        async def are_they() -> bool:
            return {place[0] for sight in await self.fleet.newest() for place in sight.places.values()} == {epoch}

        await wait_until(are_they, PATIENCE_S)

    # Faults

    async def kill_redis(self) -> None:
        self.redis.kill()
        await asyncio.to_thread(self.redis.start)

    async def pause_redis(self) -> None:
        self.redis.pause()
        await asyncio.sleep(5)  # the fault itself
        self.redis.resume()

    async def kill_subscribers(self) -> None:
        async with self.redis.client() as redis:
            for _ in range(3):
                await wait_until(lambda: redis.client_kill_filter(_type="pubsub"), PATIENCE_S)
                await self.rows_flow()

    async def cut_the_link(self) -> None:
        self.door.shut()
        await self.market_goes_on(3)
        self.door.open()
        await self.rows_flow()

    async def kill_a_worker(self, worker: str = "0") -> None:
        restarts = await self.server.metric("worker_restarts", worker=worker)
        os.kill(worker_pid(self.server, worker), signal.SIGKILL)

        async def is_replaced() -> bool:
            is_noticed = await self.server.metric("worker_restarts", worker=worker) == restarts + 1
            return is_noticed and await self.server.metric("workers_ready") == 2

        await wait_until(is_replaced, PATIENCE_S)

    async def kill_main(self) -> None:
        await self.note_merged()
        await self.server.kill()
        await self.server.start()

    # How it ends

    async def note_merged(self) -> None:
        self.merged_by_main += await self.server.merged_by_main()

    async def everybody_has_the_newest_rows(self) -> list[Sight]:
        """The market stands still; return all that the clients have seen."""
        lacks: list[str] = []

        async def have_they() -> bool:
            lacks[:] = [lack for sight in await self.fleet.newest() for lack in self.market.lacks(sight)]
            return not lacks

        try:
            await wait_until(have_they, PATIENCE_S)
        except AssertionError as e:
            raise AssertionError(f"{e}\n" + "\n".join(lacks[:20])) from None
        await self.fleet.agree_with_the_server()
        for line in self.server.log().splitlines():
            assert "Traceback" not in line and "ERROR" not in line, line
        return await self.fleet.sights()


@contextlib.asynccontextmanager
async def scene_of(
    start_server: StartServer, redis: RedisServer, market: Market
) -> AsyncIterator[tuple[Scene, list[Sight]]]:
    """Everybody is served; behind it the list has what the clients have seen in the end."""
    seen: list[Sight] = []
    async with door_to(redis) as door:
        server = await start_server(**QUICK, feed_redis=door.url)
        publishing = asyncio.create_task(market.run())
        try:
            await wait_until(lambda: market.published)
            async with fleet(server) as crew:
                scene = Scene(server, redis, door, market, crew)
                await scene.rows_flow()
                await scene.market_goes_on(2)
                yield scene, seen
                await scene.rows_flow()
                await scene.market_goes_on(2)
                market.stop()
                await asyncio.wait_for(publishing, PATIENCE_S)
                seen += await scene.everybody_has_the_newest_rows()
        finally:
            publishing.cancel()
            await asyncio.wait([publishing])
            if not publishing.cancelled():
                publishing.result()
        merged = sum(map(market.judge, seen))
        unthrottled = [sight for sight in seen if is_unthrottled(sight)]
        await scene.note_merged()
        print(
            f"\n{len(seen)} clients, {sum(s.lives for s in seen):,} connections; {market.published:,} ticks, "
            f"{market.published / market.took_s:,.0f} a second; {sum(s.received for s in seen):,} rows, "
            f"{merged:,} merged ({scene.merged_by_main:,.0f} by main for all), {sum(s.merged for s in unthrottled):,} "
            f"for the {len(unthrottled)} clients that want every row"
        )
        # Else only who was told to be slow may have missed a row.
        if not scene.merged_by_main:
            assert [s.merged for s in unthrottled if s.merged and "conflating" not in s.states] == []
        await server.stop()  # while the door is there


@pytest.fixture
def lasting_redis(redis_server: RedisServer) -> RedisServer:
    """A Redis that keeps everything it has taken."""
    redis_server.stop()
    redis_server.aof = True
    redis_server.options = ("--auto-aof-rewrite-percentage", "0")
    redis_server.start()
    return redis_server


@pytest.fixture
async def scene(start_server: StartServer, lasting_redis: RedisServer) -> AsyncIterator[Scene]:
    """Whatever happens in it, nothing is lost."""
    market = Market(lasting_redis.url, CODES, TICKS_PER_S)
    async with scene_of(start_server, lasting_redis, market) as (scene, seen):
        yield scene
        assert await scene.server.metric("log_gap_rows") == 0
    for sight in seen:
        market.judge_whole(sight, was_behind=scene.merged_by_main > 0)


async def test_redis_is_killed_and_has_kept_everything(scene: Scene) -> None:
    await scene.kill_redis()


async def test_redis_sleeps_for_five_seconds(scene: Scene) -> None:
    await scene.pause_redis()


async def test_the_links_that_ticks_come_on_are_killed(scene: Scene) -> None:
    await scene.kill_subscribers()


async def test_the_link_is_cut_while_ticks_are_published(scene: Scene) -> None:
    await scene.cut_the_link()
    assert await scene.server.metric("log_catch_ups") > 0


async def test_workers_are_killed(scene: Scene) -> None:
    for worker in ("0", "1"):
        await scene.kill_a_worker(worker)
        await scene.rows_flow()
    await scene.everybody_has_come_back()


async def test_main_is_killed_and_started_again(scene: Scene) -> None:
    await scene.kill_main()
    await scene.rows_flow()
    await scene.everybody_has_come_back()


async def everything(scene: Scene) -> None:
    """Each fault, and in the end some of them while others last."""
    await scene.kill_redis()
    await scene.pause_redis()
    await scene.kill_subscribers()
    await scene.cut_the_link()
    await scene.kill_a_worker("0")
    await scene.kill_main()
    await scene.rows_flow()
    scene.door.shut()
    await scene.kill_a_worker("1")
    await scene.kill_redis()
    scene.door.open()
    scene.redis.pause()
    await scene.kill_a_worker("0")
    scene.redis.resume()
    await scene.kill_main()


async def test_everything_in_a_row(scene: Scene) -> None:
    await everything(scene)


async def test_everything_in_a_row_behind_plain_publish(start_server: StartServer, redis_server: RedisServer) -> None:
    market = PlainMarket(redis_server.url, CODES, TICKS_PER_S, ends_whole=True)
    async with scene_of(start_server, redis_server, market) as (scene, _):
        await everything(scene)


async def test_nobody_freezes_behind_a_redis_that_goes_back_again_and_again(
    start_server: StartServer, lasting_redis: RedisServer
) -> None:
    market = Market(lasting_redis.url, CODES, TICKS_PER_S, ends_whole=True)
    epochs: list[str] = []
    async with scene_of(start_server, lasting_redis, market) as (scene, seen):
        kept = lasting_redis.file_bytes
        for is_server_there in (True, False, True):
            await scene.market_goes_on(2)
            epochs.append(market.epoch)
            if not is_server_there:
                await scene.server.kill()
            await asyncio.to_thread(lasting_redis.go_back, kept)
            if not is_server_there:
                await scene.server.start()
            await wait_until(lambda: market.epoch != epochs[-1], PATIENCE_S)
            await scene.everybody_is_in(market.epoch)
            await scene.rows_flow()
    assert len({*epochs, market.epoch}) == 4
    for sight in seen:
        assert all(sight.restarts[code] >= 3 for code in sight.places)
