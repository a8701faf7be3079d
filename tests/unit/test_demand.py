"""What is wanted is told once to whoever hears it, and is right in the end, whatever happens to nodes and to Redis."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.cluster import demand, registry
from quotepush.cluster.commands import ClusterKeys, NodeRecord, encode
from quotepush.cluster.demand import DemandTeller
from quotepush.cluster.nodes import purge_node
from quotepush.cluster.registry import RegistryMirror, registry_client
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

KEYS = ClusterKeys("qp:")
DEMANDED = "qp:demanded:{qp:codes}"
START_US = 1_721_872_800_000_000


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKOFF_MOST_S", 0.1)
    monkeypatch.setattr(demand, "_AGAIN_S", 0.05)
    monkeypatch.setattr(demand, "_PAGE_REST_S", 0.001)


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


class Node:
    """One node with one worker: its mirror, its teller, and who watches what."""

    def __init__(self, name: str, redis: Redis, mirror: RegistryMirror, teller: DemandTeller) -> None:
        self.name = name
        self.redis = redis
        self.mirror = mirror
        self.teller = teller
        self.watched: dict[int, set[str]] = {}
        self.fds: dict[int, str] = {}
        self.opened = 0
        self.tasks: list[asyncio.Task[None]] = []

    async def live(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        await self.redis.hset(KEYS.nodes, self.name, encode(NodeRecord(now_ms, now_ms)))
        self.tasks = [asyncio.create_task(self.mirror.run()), asyncio.create_task(self.teller.run())]

    def watch(self, number: int, *codes: str) -> None:
        """Let a connection watch exactly these codes; the first time it opens, with none it closes."""
        if number not in self.watched:
            if not codes:
                return
            self.opened += 1
            fd = self.fds[number] = f"{self.name}.0.{START_US + self.opened}"
            self.watched[number] = set()
            self.mirror.open(fd, self.watched[number])
        self.watched[number].clear()
        self.watched[number].update(codes)
        self.mirror.touch(self.fds[number])
        if not codes:
            self.mirror.close(self.fds[number])
            del self.watched[number]

    async def die(self) -> None:
        """Be gone as after a SIGKILL: what it has in Redis stays there."""
        assert not any(task.done() for task in self.tasks), "a task ended by itself"
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)
        self.tasks = []


@asynccontextmanager
async def a_node(
    server: RedisServer, name: str, *, debounce_s: float = 0.1, compare_s: float = 60.0, is_deaf: bool = False
) -> AsyncIterator[Node]:
    """Run a node.

    Args:
        is_deaf: its teller hears nothing of its mirror, as if each change came at the moment of a crash.
    """
    async with AsyncExitStack() as stack:
        # As main has it: with a socket timeout redis-py can swallow a cancellation in Python 3.11 (bpo-37658).
        redis = await stack.enter_async_context(server.client(decode_responses=False, socket_timeout=None))
        client = registry_client(server.url)
        stack.push_async_callback(client.aclose)
        teller = DemandTeller(
            redis, KEYS, name, debounce_s=debounce_s, ttl_s=600, timeout_s=20.0, compare_s=compare_s
        )  # fmt: skip
        mirror = RegistryMirror(
            client, prefix="qp:", node=name, life=f"0.{START_US}", interval_s=0.005, check_interval_s=0.05,
            told=None if is_deaf else teller.wanted,
        )  # fmt: skip
        node = Node(name, redis, mirror, teller)
        await node.live()
        try:
            yield node
        finally:
            await node.die()


class Hearer:
    """Anybody in any language: it only hears the channel."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bool]] = []
        self.times: list[int] = []

    @property
    def wanted(self) -> set[str]:
        return {code for code, is_wanted in dict(self.heard).items() if is_wanted}

    def about(self, code: str) -> list[bool]:
        return [is_wanted for other, is_wanted in self.heard if other == code]


@asynccontextmanager
async def a_hearer(server: RedisServer) -> AsyncIterator[Hearer]:
    hearer = Hearer()
    async with server.client() as redis, redis.pubsub() as pubsub:
        await pubsub.subscribe("qp:demand")
        await pubsub.get_message(timeout=5)

        async def hear() -> None:
            async for message in pubsub.listen():
                said = json.loads(message["data"])
                assert said.keys() == {"code", "demand", "time"}
                hearer.heard.append((said["code"], said["demand"]))
                hearer.times.append(said["time"])

        task = asyncio.create_task(hear())
        try:
            yield hearer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def somebody_else_watches(redis: Redis, code: str | bytes) -> None:
    name = code if isinstance(code, bytes) else code.encode()
    await redis.sadd(b"qp:code:" + name, "other.0.1")
    await redis.sadd("qp:codes", name)


async def end_of_it(redis: Redis, hearer: Hearer) -> None:
    """Wait until the set, what was told and what was heard are the same."""
    states: list[Any] = []

    async def is_equal() -> bool:
        states[:] = [await redis.smembers("qp:codes"), set(await redis.hkeys(DEMANDED)), hearer.wanted]
        return bool(states[0] == states[1] == states[2])

    try:
        await wait_until(is_equal)
    except AssertionError:
        raise AssertionError(f"set, told, heard: {states}") from None


async def test_the_first_is_told_at_once_and_the_last_after_the_debounce(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a") as a:
        a.watch(1, "AAPL", "600519.SH")
        await wait_until(lambda: hearer.wanted == {"AAPL", "600519.SH"})
        assert abs(hearer.times[0] - time.time() * 1000) < 60_000
        a.watch(2, "AAPL")
        a.watch(1, "600519.SH")
        a.watch(2)
        await wait_until(lambda: hearer.wanted == {"600519.SH"})
        assert sorted(hearer.heard) == [("600519.SH", True), ("AAPL", False), ("AAPL", True)]
        assert hearer.times[-1] - hearer.times[0] >= 100
        # Redis tells others before it answers.
        await wait_until(lambda: a.teller.told >= 3 and not a.teller.pending)
        assert a.teller.told == 3
        assert 0 < await redis.ttl(DEMANDED) <= 600
        await end_of_it(redis, hearer)


async def test_who_comes_back_within_the_debounce_is_not_told_as_gone(redis_server: RedisServer) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a", debounce_s=2.5) as a:
        a.watch(1, "AAPL")
        await wait_until(lambda: hearer.about("AAPL"))
        a.watch(1)
        await wait_until(lambda: a.teller.pending)
        a.watch(2, "AAPL")
        await wait_until(lambda: not a.teller.pending)
        a.watch(3, "END")
        await wait_until(lambda: hearer.about("END"))
        a.watch(3)
        await wait_until(lambda: hearer.about("END") == [True, False])
        assert set(hearer.about("AAPL")) == {True}


async def test_the_last_leaves_one_node_while_another_comes_to_the_other(redis_server: RedisServer) -> None:
    async with (
        a_hearer(redis_server) as hearer,
        a_node(redis_server, "a", debounce_s=0.3) as a,
        a_node(redis_server, "b", debounce_s=0.3) as b,
    ):
        a.watch(1, "AAPL")
        await wait_until(lambda: hearer.about("AAPL"))
        b.watch(1, "AAPL", "MSFT")
        await wait_until(lambda: hearer.about("MSFT"))
        assert hearer.about("AAPL") == [True]
        a.watch(1)
        a.watch(2, "END")
        await wait_until(lambda: hearer.about("END"))
        a.watch(2)
        await wait_until(lambda: hearer.about("END") == [True, False])
        assert hearer.about("AAPL") == [True]
        b.watch(1)
        await wait_until(lambda: not hearer.wanted)
        assert (hearer.about("AAPL"), hearer.about("MSFT")) == ([True, False], [True, False])


async def test_news_of_two_workers_may_come_in_the_wrong_order(redis_server: RedisServer, redis: Redis) -> None:
    async with a_hearer(redis_server) as hearer:
        async with a_node(redis_server, "a", debounce_s=60) as a:
            await somebody_else_watches(redis, "AAPL")
            a.teller.came(["AAPL"])
            a.teller.left(["AAPL"])  # it was before
            await wait_until(lambda: hearer.heard == [("AAPL", True)])
        async with a_node(redis_server, "a") as a:
            await redis.srem("qp:codes", "AAPL")
            a.teller.left(["AAPL"])
            a.teller.came(["AAPL"])  # it was before
            await wait_until(lambda: hearer.heard[1:] == [("AAPL", False)])


async def test_a_timer_of_one_node_does_not_cut_the_debounce_of_another_short(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a", debounce_s=0.3) as a:
        now_ms = time.time_ns() // 1_000_000
        await redis.hset(DEMANDED, "AAPL", now_ms + 250)  # the other node's first, shortly before our time has come
        a.teller.left(["AAPL"])
        await wait_until(lambda: hearer.heard)
        assert hearer.heard == [("AAPL", False)]
        assert hearer.times[0] >= now_ms + 550


async def test_a_clock_of_redis_that_went_back_holds_nothing_up(redis_server: RedisServer, redis: Redis) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a") as a:
        await redis.hset(DEMANDED, "AAPL", time.time_ns() // 1_000_000 + 86_400_000)
        a.teller.left(["AAPL"])
        await wait_until(lambda: hearer.heard == [("AAPL", False)])


async def test_what_a_dead_node_did_not_tell_another_one_tells(redis_server: RedisServer, redis: Redis) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "b", compare_s=0.05) as b:
        async with a_node(redis_server, "a", is_deaf=True) as a:
            a.watch(1, *(f"C{n}" for n in range(1_200)))
            b.watch(1, "AAPL", "C7")
            await wait_until(lambda: not a.mirror.pending and hearer.about("AAPL"))
            await a.die()
            await redis.hdel(KEYS.nodes, "a")
        await wait_until(lambda: len(hearer.wanted) == 1_201)
        await purge_node(redis, "qp:", "a")
        await wait_until(lambda: hearer.wanted == {"AAPL", "C7"})
        await end_of_it(redis, hearer)


async def test_a_purge_tells_what_it_takes_away(redis_server: RedisServer, redis: Redis) -> None:
    class Findings:
        def __init__(self, teller: DemandTeller) -> None:
            self.wanted = teller.wanted

        def listed(self, tag: str, is_listed: bool) -> None: ...

        def closed(self, users: Any) -> None: ...

    async with a_hearer(redis_server) as hearer, a_node(redis_server, "b") as b:
        async with a_node(redis_server, "a") as a:
            a.watch(1, "AAPL", "MSFT")
            b.watch(1, "MSFT")
            await wait_until(lambda: hearer.wanted == {"AAPL", "MSFT"})
            await a.die()
        await purge_node(redis, "qp:", "a", told=Findings(b.teller))
        await wait_until(lambda: hearer.wanted == {"MSFT"})


async def test_only_the_node_whose_name_is_least_compares(redis_server: RedisServer, redis: Redis) -> None:
    async with (
        a_hearer(redis_server) as hearer,
        a_node(redis_server, "a", compare_s=0.02) as a,
        a_node(redis_server, "b", compare_s=0.02) as b,
    ):
        for n in range(20):
            await somebody_else_watches(redis, f"C{n}")
        await wait_until(lambda: len(hearer.wanted) == 20)
        await wait_until(lambda: a.teller.told + b.teller.told >= 20)  # Redis tells others before it answers
        assert (a.teller.told, b.teller.told) == (20, 0)


async def test_what_is_no_code_is_not_told(redis_server: RedisServer, redis: Redis) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a", compare_s=0.02) as a:
        for nonsense in (b"\xff\xfe", b'"}', "sh600519", "", "x" * 40):
            await somebody_else_watches(redis, nonsense)
        a.watch(1, "AAPL")
        a.watch(2, "MSFT")
        await wait_until(lambda: hearer.wanted == {"AAPL", "MSFT"})
        a.watch(1)
        await wait_until(lambda: hearer.wanted == {"MSFT"})
        assert {code for code, _ in hearer.heard} == {"AAPL", "MSFT"}


async def test_an_emptied_redis_is_told_anew(redis_server: RedisServer, redis: Redis) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a") as a:
        a.watch(1, "AAPL", "MSFT")
        await wait_until(lambda: len(hearer.heard) == 2)
        await redis.flushall()
        await wait_until(lambda: len(hearer.heard) == 4)
        a.watch(1, "MSFT")
        await wait_until(lambda: hearer.wanted == {"MSFT"})
        await end_of_it(redis, hearer)


async def test_redis_away_for_a_while_is_made_up_for(redis_server: RedisServer) -> None:
    async with a_node(redis_server, "a") as a:
        async with a_hearer(redis_server) as hearer:
            a.watch(1, "AAPL")
            await wait_until(lambda: hearer.wanted == {"AAPL"})
        redis_server.kill()
        a.teller.came(["AAPL"])
        a.watch(1, "MSFT")
        await wait_until(lambda: not a.mirror.healthy)
        await asyncio.to_thread(redis_server.start)
        async with a_hearer(redis_server) as hearer, redis_server.client() as redis:
            await wait_until(lambda: not a.mirror.pending and not a.teller.pending)
            assert set(await redis.hkeys(DEMANDED)) == await redis.smembers("qp:codes") == {"MSFT"}
            a.watch(1)
            await wait_until(lambda: hearer.about("MSFT")[-1:] == [False])


async def test_a_redis_that_forbids_it_is_told_once_and_tried_again(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_hearer(redis_server) as hearer, a_node(redis_server, "a", compare_s=0.02) as a:
        await redis.execute_command("ACL", "SETUSER", "default", "-eval")
        a.watch(1, "AAPL")
        await wait_until(lambda: a.teller.pending and "demand is not told" in caplog.text)
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert caplog.text.count("demand is not told") == 1
        await redis.execute_command("ACL", "SETUSER", "default", "+eval")
        await wait_until(lambda: hearer.wanted == {"AAPL"})
        assert await redis.smembers("qp:codes") == {"AAPL"}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_set_and_messages_agree_in_the_end(
    redis_server: RedisServer, redis: Redis, seed: int
) -> None:
    chance = random.Random(seed)
    codes = [f"C{n}" for n in range(12)]
    async with AsyncExitStack() as stack:
        hearer = await stack.enter_async_context(a_hearer(redis_server))
        nodes = [
            await stack.enter_async_context(
                a_node(redis_server, name, debounce_s=0.02, compare_s=0.05, is_deaf=name == "c")
            )
            for name in "abc"
        ]
        for _ in range(150):
            node = chance.choice(nodes)
            node.watch(chance.randrange(4), *chance.sample(codes, chance.randrange(4)))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.03)
        await wait_until(lambda: not any(node.mirror.pending for node in nodes))
        wanted = {code for node in nodes for watched in node.watched.values() for code in watched}
        await end_of_it(redis, hearer)
        assert hearer.wanted == wanted
