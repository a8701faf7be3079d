"""Who hears what is wanted ends up with the truth, whatever he missed, and lets nothing go too early."""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator

import orjson
import pytest
from redis.asyncio import Redis

from quotepush import Backend, BlockingBackend, backend_demand
from quotepush.backend_demand import Demand, DemandChange, Wanted
from quotepush.errors import BackendUnavailable
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

GRACE_S = 10.0


class Cluster:
    """A model of the servers and of Redis: a set, and messages that are on their way.

    Each change of the set is told, the last subscriber's only when nobody has come back meanwhile.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.codes: set[str] = set()
        self.leaving: dict[str, int] = {}  # rounds until it is told
        self.under_way: deque[tuple[str, bool]] = deque()

    def change(self, code: str) -> None:
        if code in self.codes:
            self.codes.discard(code)
            self.leaving[code] = self.chance.randrange(1, 4)
        else:
            self.codes.add(code)
            self.leaving.pop(code, None)
            self.under_way.append((code, True))

    def turn(self) -> None:
        for code in list(self.leaving):
            self.leaving[code] -= 1
            if not self.leaving[code]:
                del self.leaving[code]
                self.under_way.append((code, False))


@pytest.mark.parametrize("seed", range(300))
def test_set_and_messages_end_equal_to_the_truth_in_whatever_order_they_come(seed: int) -> None:
    chance = random.Random(seed)
    cluster, wanted = Cluster(chance), Wanted(GRACE_S)
    names = [f"C{n}" for n in range(8)]
    told: set[str] = set()
    pages: deque[str] | None = None  # what of a reading is still to come
    now_s = 0.0
    is_lossy = chance.random() < 0.5

    def take() -> None:
        change = wanted.take()
        assert not set(change.wanted) & set(change.unwanted)
        assert not set(change.wanted) & told and told >= set(change.unwanted), "it says what was said before"
        told.update(change.wanted)
        told.difference_update(change.unwanted)

    def read_some() -> None:
        nonlocal pages
        if pages is None:
            wanted.begin_reading()
            pages = deque(names)
        page = [pages.popleft() for _ in range(min(len(pages), chance.randrange(1, 9)))]
        wanted.found(code for code in page if code in cluster.codes)
        if not pages:
            wanted.end_reading(now_s)
            pages = None

    def hear() -> None:
        if cluster.under_way:
            wanted.said(*cluster.under_way.popleft())

    read_some()
    while pages is not None:
        read_some()
    for _ in range(chance.randrange(80)):
        now_s += chance.random() * 4
        step = chance.random()
        if step < 0.4:
            cluster.change(chance.choice(names))
        elif step < 0.6:
            hear()
        elif step < 0.8:
            read_some()
        elif step < 0.9:
            take()
        elif step < 0.93 and is_lossy:  # the link is lost, and with it what was under way and the reading
            cluster.under_way.clear()
            pages = None
        cluster.turn()
    for _ in range(4):
        cluster.turn()
    while cluster.under_way:
        hear()
    while pages is not None:
        read_some()
    while is_lossy and now_s < 1_000:  # only then it takes further readings
        read_some()
        while pages is not None:
            read_some()
        now_s += 500
    take()
    assert told == wanted.codes == cluster.codes
    assert not wanted.has_changed


def test_a_code_that_only_a_reading_lacks_is_let_go_after_the_grace() -> None:
    wanted = Wanted(GRACE_S)

    def read(now_s: float, *codes: str) -> DemandChange:
        wanted.begin_reading()
        wanted.found(codes)
        wanted.end_reading(now_s)
        return wanted.take()

    assert set(read(0, "A", "B").wanted) == {"A", "B"}
    assert read(1) == ((), ())  # an emptied Redis
    assert read(2, "A") == ((), ())
    assert read(10.9, "A") == ((), ())
    assert read(11, "A") == ((), ("B",))
    wanted.said("A", False)
    assert wanted.take() == ((), ("A",))
    wanted.said("B", True)
    assert read(20) == (("B",), ())
    wanted.said("B", True)  # it has come back
    assert read(29) == read(38) == ((), ())
    assert read(39) == ((), ("B",))


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


async def say(redis: Redis, code: str, is_wanted: bool) -> None:
    await (redis.sadd if is_wanted else redis.srem)("qp:codes", code)
    await redis.publish("qp:demand", orjson.dumps({"code": code, "demand": is_wanted, "time": 1}))


async def test_first_comes_all_that_is_wanted_and_then_what_changes(redis_server: RedisServer, redis: Redis) -> None:
    codes = [f"C{n}" for n in range(3_000)]
    await redis.sadd("qp:codes", *codes, "no code", b"\xff")
    async with Backend(redis_server.url) as backend, backend.demand() as demand:
        first = await anext(demand)
        assert sorted(first.wanted) == sorted(codes) and first.unwanted == ()
        for nonsense in (b"nonsense", b"[1]", b"{}", b'{"code":"no code","demand":true}', b'{"code":"A","demand":1}'):
            await redis.publish("qp:demand", nonsense)
        await say(redis, "AAPL", True)
        assert await anext(demand) == (("AAPL",), ())
        assert "AAPL" in demand and "MSFT" not in demand
        await say(redis, "AAPL", True)  # twice is once
        await say(redis, "C0", False)
        assert await anext(demand) == ((), ("C0",))
        assert demand.codes() == {*codes, "AAPL"} - {"C0"}


async def test_nothing_wanted_is_said_too(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend:
        demand = backend.demand()  # without a context, too
        assert await anext(demand) == ((), ())


async def test_what_changes_while_nobody_asks_comes_together(redis_server: RedisServer, redis: Redis) -> None:
    async with Backend(redis_server.url) as backend, backend.demand() as demand:
        await anext(demand)
        for code in ("A", "B", "C"):
            await say(redis, code, True)
        await say(redis, "B", False)
        await wait_until(lambda: demand.codes() == {"A", "C"})
        assert await anext(demand) == (("A", "C"), ())
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(demand)
        await say(redis, "A", False)
        assert await anext(demand) == ((), ("A",))


async def test_what_a_lost_link_missed_follows(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_demand, "GRACE_S", 0.2)
    await redis.sadd("qp:codes", "A", "B")
    async with Backend(redis_server.url) as backend, backend.demand() as demand:
        assert set((await anext(demand)).wanted) == {"A", "B"}
        async with redis.pipeline() as at_once:
            at_once.client_kill_filter(_type="pubsub")
            at_once.srem("qp:codes", "A")
            at_once.sadd("qp:codes", "C")
            await at_once.execute()
        assert await anext(demand) == (("C",), ())
        assert await anext(demand) == ((), ("A",))


async def test_a_redis_that_comes_back_empty_and_fills_changes_nothing(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_demand, "GRACE_S", 0.3)
    read = Demand._read
    is_filled = asyncio.Event()

    async def read_again_when_it_is_filled(self: Demand) -> None:
        if self._wanted.missing:
            await is_filled.wait()
        await read(self)

    monkeypatch.setattr(Demand, "_read", read_again_when_it_is_filled)
    async with Backend(redis_server.url) as backend, backend.demand() as demand:
        async with redis_server.client() as redis:
            for code in ("A", "B"):
                await say(redis, code, True)
            await wait_until(lambda: demand.codes() == {"A", "B"})
        await anext(demand)
        redis_server.kill()
        await asyncio.to_thread(redis_server.start)
        async with redis_server.client() as redis:
            await wait_until(lambda: demand._wanted.missing.keys() == {"A", "B"})  # read, and so it is heard
            await say(redis, "A", True)
            is_filled.set()
            assert await anext(demand) == ((), ("B",))  # of A nothing


async def test_a_link_that_only_looks_alive_is_made_anew(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_demand, "_READ_AGAIN_S", 0.05)
    monkeypatch.setattr(backend_demand, "_PROOF_S", 0.05)

    async def hearers() -> set[str]:
        return {client["id"] for client in await redis.client_list(_type="pubsub")}

    async with Backend(redis_server.url) as backend, backend.demand() as demand:
        await anext(demand)
        before = await hearers()
        await redis.sadd("qp:codes", "A")  # and the channel is silent
        assert await anext(demand) == (("A",), ())

        async def is_new() -> bool:
            return bool((now := await hearers()) and not now & before)

        await wait_until(is_new)
        await say(redis, "B", True)
        assert await anext(demand) == (("B",), ())


async def test_a_redis_that_is_not_there_is_said_when_it_begins(redis_server: RedisServer) -> None:
    redis_server.kill()
    async with Backend(redis_server.url, timeout_s=0.2) as backend:
        with pytest.raises(BackendUnavailable, match="cannot hear what is wanted"):
            await backend.demand().__aenter__()


async def test_who_iterates_comes_to_the_end_when_it_is_closed(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url) as backend:
        demand = backend.demand()
        await anext(demand)
        waiting = asyncio.create_task(anext(demand, None))
        await asyncio.sleep(0)
        await backend.aclose()
        assert await waiting is None


async def test_it_can_be_closed_in_the_turn_in_which_the_link_is_lost(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_lost = asyncio.Event()

    async def lose(self: Demand, is_heard: asyncio.Event) -> None:
        is_heard.set()
        await is_lost.wait()
        raise ConnectionError

    monkeypatch.setattr(Demand, "_hear", lose)
    async with Backend(redis_server.url) as backend:
        demand = backend.demand()
        await anext(demand)
        is_lost.set()
        async with asyncio.timeout(10):
            await demand.aclose()


async def test_a_bug_is_said_to_whoever_waits(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Demand) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Demand, "_read", broken)
    async with Backend(redis_server.url) as backend:
        with pytest.raises(ZeroDivisionError):
            await anext(backend.demand())


async def test_the_blocking_twin_hears_and_ends_too(redis_server: RedisServer, redis: Redis) -> None:
    def hear() -> list[DemandChange]:
        with BlockingBackend(redis_server.url) as backend, backend.demand() as demand:
            first = demand.next()
            with pytest.raises(TimeoutError):
                demand.next(timeout_s=0.05)
            loop.call_soon_threadsafe(begun.set)
            heard = [first, next(iter(demand))]
            assert demand.codes() == {"A", "B"}
            demand.close()
            with pytest.raises(EOFError):
                demand.next()
            return heard

    await redis.sadd("qp:codes", "A")
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    hearing = asyncio.create_task(asyncio.to_thread(hear))
    await begun.wait()
    await say(redis, "B", True)
    assert await hearing == [(("A",), ()), (("B",), ())]
