"""What Redis says about users, groups and session data is what is true, whatever happens in between."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from quotepush.cluster import registry, sets
from quotepush.cluster.nodes import purge_life, purge_node
from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.cluster.sessions import SessionMirror
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until
from tests.unit.test_registry import LIFE, START_US, Tripwire, fd_of


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKOFF_MOST_S", 0.1)


class Worker:
    """Both mirrors of a worker at work, and the sessions that they follow."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.codes: dict[str, dict[str, None]] = {}
        self.tags: dict[str, dict[str, None]] = {}
        self.data: dict[str, Any] = {}
        self.came: list[str] = []
        self.told: list[tuple[str, bool]] = []
        self.base: RegistryMirror
        self.mirror: SessionMirror

    def fd(self, number: int) -> str:
        return fd_of(number, node=self.node)

    def describe(self, fd: str) -> bytes | None:
        return orjson.dumps({"tags": list(self.tags[fd]), "data": self.data[fd]}) if fd in self.tags else None

    def open(self, number: int, *tags: str, data: Any = None) -> None:
        fd = self.fd(number)
        self.codes[fd] = {}
        self.tags[fd] = dict.fromkeys(tags)
        self.data[fd] = data
        self.base.open(fd, self.codes[fd].keys())
        self.mirror.open(fd, self.tags[fd].keys())

    def change(self, number: int, *tags: str, data: Any = None) -> None:
        fd = self.fd(number)
        self.tags[fd].clear()
        self.tags[fd].update(dict.fromkeys(tags))
        self.data[fd] = data
        self.mirror.touch(fd)

    def close(self, number: int) -> None:
        fd = self.fd(number)
        del self.codes[fd], self.tags[fd], self.data[fd]
        self.base.close(fd)
        self.mirror.close(fd)


def make(it: Worker, base: Any, client: Any, **options: Any) -> None:
    common: dict[str, Any] = {
        "prefix": "qp:",
        "node": it.node,
        "life": LIFE,
        "interval_s": 0.005,
        "check_interval_s": 0.05,
    }
    it.base = RegistryMirror(base, **common)
    it.mirror = SessionMirror(
        client,
        describe=it.describe,
        on_users=it.came.extend,
        told=lambda *news: it.told.append(news),
        **common,
        **options,
    )


@asynccontextmanager
async def working(server: RedisServer, node: str = "n1", **options: Any) -> AsyncIterator[Worker]:
    it = Worker(node)
    base, client = registry_client(server.url), registry_client(server.url)
    make(it, base, client, **options)
    tasks = [asyncio.create_task(mirror.run()) for mirror in (it.base, it.mirror)]
    try:
        yield it
        assert not any(task.done() for task in tasks), "a mirror's task ended by itself"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await base.aclose()
        await client.aclose()


async def test_connections_that_get_their_users_in_any_order_are_right_and_stale_ones_are_found(
    redis_server: RedisServer, redis: Redis
) -> None:
    async with working(redis_server) as it:
        for number in (5, 1, 9, 3):
            it.open(number, f"u:{number}")
        await wait_until(lambda: redis.scard("qp:user:3"))
        await redis.sadd("qp:user:3", it.fd(5))  # stale, and of a newer one than that which came last

        async def is_gone() -> bool:
            return it.fd(5) not in await redis.smembers("qp:user:3")

        await wait_until(is_gone)
        await wait_until(lambda: it.mirror.repairs)  # counted behind the answer of Redis
        assert it.mirror.repairs == 1


async def contents(redis: Redis) -> dict[str, Any]:
    keys = [key async for key in redis.scan_iter("qp:*", count=1000)]
    found: dict[str, Any] = {}
    for key in keys:
        value = await redis.get(key) if key.startswith("qp:conn:") else await redis.smembers(key)
        if value:  # it may have gone meanwhile
            found[key] = value
    return found


def truth(workers: Sequence[Worker]) -> dict[str, Any]:
    expected: dict[str, Any] = {}
    for it in workers:
        node = f"qp:node:{it.node}"
        expected.setdefault(node, set()).update({LIFE, f"{LIFE}:members"})
        for fd, tags in it.tags.items():
            expected.setdefault(f"{node}:{LIFE}", set()).add(fd)
            expected.setdefault(f"{node}:{LIFE}:members", set()).add(fd)
            expected[f"qp:conn:{fd}"] = (it.describe(fd) or b"").decode()
            for tag in tags:
                kind = "user" if tag[0] == "u" else "group"
                expected.setdefault("qp:members", set()).add(tag)
                expected.setdefault(f"qp:{kind}:{tag[2:]}", set()).add(fd)
                expected.setdefault(f"qp:member:{fd}", set()).add(tag)
    return expected


async def become_true(redis: Redis, *workers: Worker) -> None:
    async def agrees() -> bool:
        return await contents(redis) == truth(workers)

    try:
        await wait_until(agrees)
    except AssertionError:
        assert await contents(redis) == truth(workers)
        raise
    keys = list(truth(workers))

    async def all_expire() -> bool:  # a set of tags gets its end behind its members, or with the next round
        return all([await redis.ttl(key) > 0 for key in keys])

    await wait_until(all_expire)


async def test_users_groups_and_data_follow_the_sessions(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as it:
        it.open(1, "u:alice", "g:room")
        it.open(2, "u:alice")
        it.open(3, data={"only": "data"})
        await become_true(redis, it)
        assert await redis.smembers("qp:user:alice") == {it.fd(1), it.fd(2)}
        it.change(1, "u:bob", "g:room", "g:hall", data={"a": 1})
        it.change(3, data={"other": "data"})
        await become_true(redis, it)
        it.close(1)
        await become_true(redis, it)
        it.close(2)
        it.close(3)
        await become_true(redis, it)
        assert it.mirror.repairs == 0


async def test_users_who_came_and_who_went_are_told_once(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as one, working(redis_server, "n2") as two:
        one.told = two.told  # a round of comparing may find what the other one is just about to unlist
        one.open(1, "u:alice")
        await become_true(redis, one, two)
        one.open(2, "u:alice", "g:x")
        two.open(1, "u:alice")
        await become_true(redis, one, two)
        await wait_until(lambda: len(one.came) + len(two.came) == 3)  # told behind the last answer of Redis
        assert one.came == ["alice", "alice"] and two.came == ["alice"], "each time Redis knew of it"
        one.close(1)
        one.close(2)
        await become_true(redis, one, two)
        two.close(1)
        await become_true(redis, one, two)
        await wait_until(lambda: len(two.told) == 4)
        assert two.told == [("u:alice", True), ("g:x", True), ("g:x", False), ("u:alice", False)]


@pytest.mark.parametrize(
    "damage",
    [
        ("DEL", "qp:members"), ("DEL", "qp:user:alice"), ("SREM", "qp:group:room", fd_of(1)),
        ("DEL", f"qp:member:{fd_of(1)}"), ("DEL", f"qp:conn:{fd_of(1)}"), ("SET", f"qp:conn:{fd_of(1)}", "{}"),
        ("DEL", f"qp:node:n1:{LIFE}:members"), ("SADD", "qp:user:alice", fd_of(2)), ("SADD", "qp:members", "u:ghost"),
        ("SADD", "qp:members", "strange"),
    ],
    ids=lambda damage: "-".join(damage[:2]),
)  # fmt: skip
async def test_a_difference_is_repaired(redis_server: RedisServer, redis: Redis, damage: tuple[str, ...]) -> None:
    async with working(redis_server) as it:
        it.open(1, "u:alice", "g:room", data={"a": 1})
        it.open(2, data={"a": 2})
        await become_true(redis, it)
        await redis.execute_command(*damage)
        await become_true(redis, it)


async def test_a_redis_that_came_back_empty_is_filled_again(redis_server: RedisServer, redis: Redis) -> None:
    async with working(redis_server) as it:
        for number in range(50):
            it.open(number, f"u:{number % 7}", "g:all", data={"n": number})
        await become_true(redis, it)
        await redis.flushall()
        await become_true(redis, it)


async def test_a_dead_life_is_cleared_with_all_that_goes_with_it(redis_server: RedisServer, redis: Redis) -> None:
    told: list[tuple[str, bool]] = []
    closed: dict[str, str | None] = {}

    class Hearer:
        def wanted(self, code: str, is_wanted: bool) -> None: ...

        def listed(self, tag: str, is_listed: bool) -> None:
            told.append((tag, is_listed))

        def closed(self, users: Any) -> None:
            closed.update(users)

    async with working(redis_server, "n2") as alive:
        alive.open(1, "u:alice", "g:room")
        async with working(redis_server) as dead:
            dead.open(1, "u:alice", "g:room")
            dead.open(2, "u:bob", data={"a": 1})
            dead.open(3, data={"b": 1})
            await become_true(redis, dead, alive)
        alive.told.clear()
        assert await purge_node(redis, "qp:", "n1", told=Hearer()) == 3
        await become_true(redis, alive)
        await wait_until(lambda: told or alive.told)
        assert told + alive.told == [("u:bob", False)], "by whoever saw it first"
        assert closed == {fd_of(1): "alice", fd_of(2): "bob", fd_of(3): None}


async def test_a_mirror_cut_off_after_each_command_leaves_nothing_that_a_purge_does_not_find(redis: Redis) -> None:
    commands = 0
    while True:
        wire = Tripwire(redis, commands)
        it = Worker("n1")
        make(it, wire, wire)
        try:
            await sets.execute(wire, it.mirror._find_me())  # type: ignore[arg-type]
            it.open(1, "u:alice", "g:room", data={"a": 1})
            it.open(2, data={"b": 1})
            await it.mirror._flush()
            it.change(1, "u:bob")
            it.close(2)
            await it.mirror._flush()
        except RedisConnectionError:
            assert wire.tripped
        await purge_life(redis, "qp:", "n1", LIFE)
        assert await contents(redis) == {}, f"cut off after {commands} commands"
        if not wire.tripped:
            break
        commands += 1
    assert commands > 20


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_two_nodes_do_redis_says_the_truth(redis_server: RedisServer, redis: Redis, seed: int) -> None:
    chance = random.Random(seed)
    async with working(redis_server, "n1") as one, working(redis_server, "n2") as two:
        number = 0
        for _ in range(600):
            it = chance.choice((one, two))
            live = [int(fd.rpartition(".")[2]) - START_US for fd in it.tags]
            tags = [f"{chance.choice('ug')}:{chance.choice('abcd')}" for _ in range(chance.randrange(3))]
            step = chance.random()
            if step < 0.4 or not live:
                number += 1
                it.open(number, *tags, data=chance.random())
            elif step < 0.7:
                it.change(chance.choice(live), *tags, data=chance.random())
            elif step < 0.98:
                it.close(chance.choice(live))
            elif seed:
                await redis.delete(chance.choice(["qp:members", "qp:user:a", f"qp:conn:{it.fd(chance.choice(live))}"]))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.choice((0, 0, 0.001, 0.003)))
        await become_true(redis, one, two)
        if not seed:
            assert one.mirror.repairs == two.mirror.repairs == 0, "nothing was damaged, so nothing was wrong"
