"""What a dead node has left is removed by one other node, once."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
import orjson
import pytest
from redis.asyncio import Redis

from quotepush.cluster import cleaner as cleaner_module
from quotepush.cluster.cleaner import Cleaner
from quotepush.cluster.commands import ClusterKeys, Command, NodeRecord, To, decode_kept, decode_node, encode
from quotepush.cluster.presence import Presence, read_records, redis_us
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import StandInNode
from tests.support.waiting import wait_until

KEYS = ClusterKeys("qp:")
LEASE_S = 10.0


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


class Told:
    """Hears what a purge finds."""

    def __init__(self) -> None:
        self.closes: dict[str, str | None] = {}
        self.changes: list[tuple[str, bool]] = []
        self.codes: dict[str, bool] = {}

    def wanted(self, code: str, is_wanted: bool) -> None:
        self.codes[code] = is_wanted

    def listed(self, tag: str, is_listed: bool) -> None:
        self.changes.append((tag, is_listed))

    def closed(self, users: Mapping[str, str | None]) -> None:
        assert not self.closes.keys() & users.keys(), "told twice"
        self.closes |= users


class Survivor:
    """A node that looks after others; the test moves its clock."""

    def __init__(self, redis: Redis, owner: str = "s", told: Told | None = None, timeout_s: float = 20.0) -> None:
        self.now_s = 50.0
        self.told = told or Told()
        self.cleaner = Cleaner(
            redis, KEYS, f"node-{owner}", owner, look_s=0.01, kept_max=10, kept_ttl_s=3600, ttl_s=3600,
            timeout_s=timeout_s, told=self.told, clock_s=lambda: self.now_s,
        )  # fmt: skip

    async def watch(self, seconds: float = LEASE_S) -> None:
        """Look now and then, for so long; not at the end of it."""
        for _ in range(4):
            await self.cleaner.look()
            self.now_s += seconds / 4

    async def look_for_long(self) -> None:
        await self.watch()
        await self.cleaner.look()


async def dead_node(redis: Redis, name: str = "gone", conns: int = 3, age_ms: int = 60_000) -> StandInNode:
    node = StandInNode(redis, name)
    for n in range(conns):
        await node.connect(n, user=f"u{n}", groups=["g"], codes=["AAPL", f"C{n}"])
    await redis.sadd(f"qp:node:{name}", f"{node.life}:members")
    await redis.sadd(f"qp:node:{name}:{node.life}:members", *node.conns)
    for fd in node.conns:
        await redis.sadd(f"qp:member:{fd}", f"u:u{int(fd.rpartition('.')[2]) - 1000}", "g:g")
    await node.renew(age_ms=age_ms)
    return node


async def left_of(redis: Redis, name: str = "gone") -> list[str]:
    keys = [key.decode() if isinstance(key, bytes) else key for key in await redis.keys("qp:*")]
    return sorted(key for key in keys if key not in ("qp:nodes",) and not key.startswith("qp:kept"))


async def record_of(redis: Redis, name: str = "gone") -> NodeRecord:
    record = decode_node((await read_records(redis, KEYS))[1][name])
    assert record is not None
    return record


async def test_everything_of_a_dead_node_goes_and_is_told(redis: Redis) -> None:
    node = await dead_node(redis)
    survivor = Survivor(redis)
    await survivor.look_for_long()
    assert await left_of(redis) == []
    assert survivor.told.closes == {node.fd(n): f"u{n}" for n in range(3)}
    assert sorted(survivor.told.changes) == [("g:g", False), ("u:u0", False), ("u:u1", False), ("u:u2", False)]
    assert survivor.told.codes and not any(survivor.told.codes.values())
    assert (survivor.cleaner.cleared, survivor.cleaner.removed) == (1, 3)
    assert (await record_of(redis)).is_cleaned


async def test_what_others_have_stays(redis: Redis) -> None:
    await dead_node(redis)
    alive = StandInNode(redis, "alive")
    fd = await alive.connect(1, user="u1", codes=["AAPL"])
    await alive.renew()
    await Survivor(redis).look_for_long()
    assert await redis.smembers("qp:code:AAPL") == {fd}
    assert await redis.smembers("qp:user:u1") == {fd}
    assert await redis.smembers("qp:codes") == {"AAPL"}
    assert await redis.smembers("qp:members") == {"u:u1"}


async def test_nobody_is_dead_by_a_clock_alone(redis: Redis) -> None:
    node = await dead_node(redis)
    survivor = Survivor(redis)
    await survivor.watch(LEASE_S - 0.1)
    await survivor.cleaner.look()
    await node.renew(age_ms=59_000)  # the clock of Redis has jumped, and it still renews
    await survivor.watch(LEASE_S - 0.1)
    await survivor.cleaner.look()
    assert await redis.scard("qp:code:AAPL") == 3


async def test_the_time_in_which_redis_was_away_counts_for_nobody(redis: Redis) -> None:
    """Nobody could renew; whoever sees it first when it is back must not take the others for dead."""
    node = await dead_node(redis)
    survivor = Survivor(redis)
    await survivor.watch(LEASE_S - 1)
    survivor.now_s += 60
    await survivor.watch(LEASE_S - 1)
    await survivor.cleaner.look()
    assert await redis.scard("qp:code:AAPL") == 3
    survivor.now_s += 1
    await survivor.cleaner.look()
    assert survivor.told.closes.keys() == node.conns


async def test_nobody_is_dead_whose_lease_holds(redis: Redis) -> None:
    await dead_node(redis, age_ms=0)
    await Survivor(redis).look_for_long()
    assert await redis.scard("qp:code:AAPL") == 3


async def test_of_many_that_look_at_once_one_clears_up(redis_server: RedisServer) -> None:
    told = Told()
    clients = [redis_server.client() for _ in range(4)]
    node = await dead_node(clients[0], conns=200)
    survivors = [Survivor(client, str(n), told) for n, client in enumerate(clients)]
    for survivor in survivors:
        await survivor.watch()
    await asyncio.gather(*(survivor.cleaner.look() for survivor in survivors))
    assert await left_of(clients[0]) == []
    assert told.closes.keys() == node.conns  # and none was told twice
    assert sum(survivor.cleaner.cleared for survivor in survivors) == 1
    for client in clients:
        await client.aclose()


async def test_a_clearing_that_was_broken_off_is_finished_by_another_one_after_its_claim(redis: Redis) -> None:
    await dead_node(redis)
    now_ms = await redis_us(redis) // 1000
    record = await record_of(redis)
    claimed = msgspec.structs.replace(record, cleaner="dead too", until=now_ms + 9_000)
    await redis.hset(KEYS.nodes, "gone", encode(claimed))
    survivor = Survivor(redis)
    await survivor.look_for_long()
    assert await redis.scard("qp:code:AAPL") == 3
    await redis.hset(KEYS.nodes, "gone", encode(msgspec.structs.replace(claimed, until=now_ms - 1)))
    await survivor.look_for_long()
    assert await left_of(redis) == []


async def test_a_life_that_began_after_the_claim_is_not_touched(redis: Redis) -> None:
    """The node is back under its name while its dead life is removed."""
    node = await dead_node(redis)
    survivor = Survivor(redis)
    original = survivor.cleaner._remove

    async def return_first(name: str, lives: list[str]) -> int:
        back = Presence(
            redis, KEYS, "gone", NodeRecord(0, 0, owner="new"), is_running=lambda found: False, ttl_s=60,
            timeout_s=20.0, on_lost=lambda fault: None, on_removed=lambda: None,
        )  # fmt: skip
        record = await record_of(redis)
        await redis.hset(KEYS.nodes, "gone", encode(msgspec.structs.replace(record, until=0)))
        await back.take()
        node.life = "0.2000"
        fd = "gone.0.2001"
        await redis.sadd("qp:node:gone", node.life)
        await redis.sadd("qp:node:gone:0.2000", fd)
        await redis.sadd("qp:code:AAPL", fd)
        await redis.sadd(f"qp:fd:{fd}", "AAPL")
        return await original(name, lives)

    survivor.cleaner._remove = return_first  # type: ignore[method-assign]
    await survivor.look_for_long()
    assert await redis.smembers("qp:code:AAPL") == {"gone.0.2001"}
    assert await redis.smembers("qp:node:gone") == {"0.2000"}
    assert (await record_of(redis)).owner == "new"
    assert survivor.cleaner.cleared == 0


async def test_what_a_part_of_a_dead_node_writes_later_goes_too(redis: Redis) -> None:
    node = await dead_node(redis)
    survivor = Survivor(redis)
    await survivor.look_for_long()
    await node.connect(7, codes=["AAPL"])
    await survivor.look_for_long()
    assert await left_of(redis) == []
    assert survivor.cleaner.cleared == 2


async def test_messages_in_its_inbox_wait_for_their_users(redis_server: RedisServer) -> None:
    async with redis_server.client(decode_responses=False) as redis:
        now_ms = await redis_us(redis) // 1000
        commands: list[Any] = [
            Command(op="send", id="m1", to=To(users=["u1", "away"]), data="for users", until=now_ms + 60_000),
            Command(op="send", to=To(all=True), data="for all who were there"),
            Command(op="send", id="m2", to=To(users=["u1"]), data="too old", until=now_ms - 1),
        ]
        for command in commands:
            await redis.xadd(KEYS.inbox("gone"), {"c": encode(command)})
        await redis.xadd(KEYS.inbox("gone"), {"c": b"?"})
        await redis.hset(KEYS.nodes, "gone", encode(NodeRecord(now_ms - 60_000, 1)))
        alive = StandInNode(redis, "alive")
        await alive.connect(1, user="u1")
        heard: list[Any] = []
        async with redis.pubsub() as pubsub:
            await pubsub.subscribe(KEYS.to_node("alive"))
            await Survivor(redis).look_for_long()

            async def is_told() -> bool:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1)
                if message is not None:
                    heard.append(orjson.loads(message["data"]))
                return bool(heard)

            await wait_until(is_told)
        assert heard[0] == {"op": "collect", "user": "u1"}
        for user in ("u1", "away"):
            (kept,) = [decode_kept(text) for text in await redis.lrange(KEYS.kept(user), 0, -1)]
            assert kept is not None
            assert (kept.id, kept.data) == ("m1", "for users")
        assert await redis.xlen(KEYS.inbox("gone")) == 0


async def test_whoever_may_be_taken_for_dead_itself_clears_up_after_nobody(redis: Redis) -> None:
    await dead_node(redis)
    looks = 0

    def may_work() -> bool:
        nonlocal looks
        looks += 1
        return False

    cleaner = Cleaner(
        redis, KEYS, "n", "s", look_s=0.001, kept_max=10, kept_ttl_s=60, ttl_s=60, timeout_s=20.0, may_work=may_work,
        clock_s=lambda: looks * LEASE_S,
    )  # fmt: skip
    task = asyncio.create_task(cleaner.run())
    await wait_until(lambda: looks > 20)
    task.cancel()
    await asyncio.wait([task])
    assert await redis.scard("qp:code:AAPL") == 3


async def test_a_redis_that_is_away_is_told_once_and_looked_at_again(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    survivor = Survivor(redis)
    redis_server.kill()
    task = asyncio.create_task(survivor.cleaner.run())
    await wait_until(lambda: caplog.records)
    redis_server.start()
    node = await dead_node(redis)

    async def has_seen_it_for_long() -> bool:
        # Only behind a look: between two of them no long time may pass.
        if "gone" in survivor.cleaner._seen and survivor.cleaner._answered_s == survivor.now_s:
            survivor.now_s += LEASE_S / 10
        return bool(survivor.told.closes)

    await wait_until(has_seen_it_for_long)
    assert survivor.told.closes.keys() == node.conns
    task.cancel()
    await asyncio.wait([task])
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_a_redis_that_goes_while_it_clears_up_ends_nothing_and_it_is_done_later(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await dead_node(redis)
    survivor = Survivor(redis)
    await survivor.watch()
    with monkeypatch.context() as patch:

        async def fail(*_: Any, **__: Any) -> int:
            raise ConnectionError("Redis is gone")

        patch.setattr(cleaner_module, "purge_life", fail)
        with pytest.raises(ConnectionError):
            await survivor.cleaner.look()
    record = await record_of(redis)
    await redis.hset(KEYS.nodes, "gone", encode(msgspec.structs.replace(record, until=1)))
    await survivor.look_for_long()
    assert await left_of(redis) == []


async def test_a_record_of_a_dead_node_goes_when_nothing_of_it_can_be_left(redis: Redis) -> None:
    await dead_node(redis, age_ms=3_000_000)
    await dead_node(redis, "older", age_ms=3_700_000)
    survivor = Survivor(redis)
    for _ in range(3):
        await survivor.look_for_long()
    assert (await record_of(redis)).is_cleaned
    assert set((await read_records(redis, KEYS))[1]) == {"gone"}
    assert survivor.cleaner.cleared == 2


async def test_a_clock_of_redis_that_has_gone_back_keeps_no_dead_node_alive(redis: Redis) -> None:
    await dead_node(redis, age_ms=-600_000)
    await Survivor(redis).look_for_long()
    assert await left_of(redis) == []


async def test_a_claim_from_before_the_clock_of_redis_went_back_ends_too(redis: Redis) -> None:
    await dead_node(redis)
    now_ms = await redis_us(redis) // 1000
    claimed = msgspec.structs.replace(await record_of(redis), cleaner="dead too", until=now_ms + 600_000)
    await redis.hset(KEYS.nodes, "gone", encode(claimed))
    await Survivor(redis).look_for_long()
    assert await left_of(redis) == []
