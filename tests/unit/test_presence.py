"""Each node holds its name by a lease, and knows when it does not."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from quotepush.cluster.commands import ClusterKeys, NodeRecord, decode_node, encode
from quotepush.cluster.presence import Presence, change_record, read_records, records, redis_us
from quotepush.errors import NodeTaken
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

KEYS = ClusterKeys("qp:")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


class Node:
    """A presence whose clock a test moves, and what it has told."""

    def __init__(self, redis: Redis, owner: str, node: str = "n1", *, lease_ms: int = 600_000, place: str = "") -> None:
        self.now_s = 100.0
        self.lost: list[NodeTaken] = []
        self.removed = 0
        self.running: set[int] = set()
        record = NodeRecord(0, 0, "0.3", 2, lease=lease_ms, owner=owner, place=place, pid=7, born="b")
        self.presence = Presence(
            redis, KEYS, node, record,
            is_running=lambda found: found.pid in self.running, ttl_s=60, timeout_s=20.0,
            on_lost=self.lost.append, on_removed=self.note_removed, clock_s=lambda: self.now_s,
        )  # fmt: skip

    def note_removed(self) -> None:
        self.removed += 1


async def text_of(redis: Redis, node: str = "n1") -> bytes:
    return (await read_records(redis, KEYS))[1].get(node, b"")


async def age(redis: Redis, by_ms: int, node: str = "n1") -> None:
    """Let a record be older than it is."""
    found = decode_node(await text_of(redis, node))
    assert found is not None
    older = msgspec.structs.replace(found, renewed=found.renewed - by_ms, started=found.started - by_ms)
    await redis.hset(KEYS.nodes, node, encode(older))


async def test_a_node_is_there_until_it_leaves(redis: Redis) -> None:
    one, two = Node(redis, "a").presence, Node(redis, "b", "n2").presence
    await one.take()
    await two.take()
    live = await records(redis, KEYS)
    assert set(live) == {"n1", "n2"}
    assert (live["n1"].version, live["n1"].workers, live["n1"].owner) == ("0.3", 2, "a")
    assert live["n1"].started == live["n1"].renewed
    assert 0 < await redis.ttl(KEYS.nodes) <= 60
    assert one.is_held
    await one.leave()
    assert not one.is_held
    assert set(await records(redis, KEYS)) == {"n2"}


async def test_a_renewed_record_says_when_it_was_renewed_and_when_the_node_began(redis: Redis) -> None:
    node = Node(redis, "a")
    await node.presence.take()
    first = (await records(redis, KEYS))["n1"]

    async def is_newer() -> bool:
        assert await node.presence.renew()
        return (await records(redis, KEYS))["n1"].renewed > first.renewed

    await wait_until(is_newer)
    assert (await records(redis, KEYS))["n1"].started == first.started
    assert node.removed == 0


async def test_the_second_of_two_that_live_is_refused_as_soon_as_the_first_renews(redis: Redis) -> None:
    first, second = Node(redis, "a"), Node(redis, "b")
    await first.presence.take()
    taking = asyncio.create_task(second.presence.take())
    with pytest.raises(NodeTaken, match="pid 7, somewhere"):
        while True:
            await first.presence.renew()
            await asyncio.wait([taking], timeout=0.05)
            if taking.done():
                taking.result()
    assert (await records(redis, KEYS))["n1"].owner == "a"


async def test_whoever_comes_waits_for_the_lease_of_one_that_is_silent(redis: Redis) -> None:
    first, second = Node(redis, "a"), Node(redis, "b")
    await first.presence.take()
    taking = asyncio.create_task(second.presence.take())
    await asyncio.wait([taking], timeout=0.6)
    assert not taking.done()
    await age(redis, 600_000)
    await wait_until(taking.done)
    assert (await records(redis, KEYS))["n1"].owner == "b"


async def test_a_former_holder_that_surely_is_dead_is_not_waited_for(redis: Redis) -> None:
    first, second = Node(redis, "a", place="here/1"), Node(redis, "b", place="here/1")
    await first.presence.take()
    await second.presence.take()
    assert (await records(redis, KEYS))["n1"].owner == "b"
    for place, running in (("there/1", set()), ("here/1", {7})):
        third = Node(redis, "c", place=place)
        third.running = running
        taking = asyncio.create_task(third.presence.take())
        await asyncio.wait([taking], timeout=0.6)
        assert not taking.done(), place
        taking.cancel()
        await asyncio.wait([taking])


async def test_of_two_that_come_at_once_one_has_the_name(redis: Redis) -> None:
    nodes = [Node(redis, str(n)) for n in range(5)]
    taking = [asyncio.create_task(node.presence.take()) for node in nodes]
    await wait_until(lambda: any(task.done() for task in taking))

    async def are_others_refused() -> bool:
        for node, task in zip(nodes, taking, strict=True):
            if task.done() and task.exception() is None:
                await node.presence.renew()
        return all(task.done() for task in taking)

    await wait_until(are_others_refused)
    assert sorted(type(task.exception()).__name__ for task in taking) == ["NodeTaken"] * 4 + ["NoneType"]


async def test_one_whose_name_another_has_taken_says_so_once(redis: Redis) -> None:
    first, second = Node(redis, "a"), Node(redis, "b")
    await first.presence.take()
    await age(redis, 600_000)
    await second.presence.take()
    assert not await first.presence.renew()
    assert (len(first.lost), first.presence.is_lost, first.presence.is_held) == (1, True, False)
    await first.presence.leave()
    assert (await records(redis, KEYS))["n1"].owner == "b"


async def test_a_redis_that_has_gone_back_to_an_earlier_life_does_not_end_the_present_one(redis: Redis) -> None:
    earlier, node = Node(redis, "a"), Node(redis, "b")
    await earlier.presence.take()
    await age(redis, 1)
    old = await text_of(redis)
    await age(redis, 600_000)
    await node.presence.take()
    await redis.hset(KEYS.nodes, "n1", old)
    assert await node.presence.renew()
    assert (await records(redis, KEYS))["n1"].owner == "b"
    assert (node.lost, node.removed) == ([], 1)


async def test_an_emptied_redis_has_the_record_again(redis: Redis) -> None:
    node = Node(redis, "a")
    await node.presence.take()
    await redis.flushall()
    assert await node.presence.renew()
    assert (await records(redis, KEYS))["n1"].owner == "a"
    assert node.removed == 1


async def test_one_that_is_being_cleared_up_after_waits_until_that_is_done_and_writes_all_again(redis: Redis) -> None:
    node = Node(redis, "a")
    await node.presence.take()
    before = await text_of(redis)
    now_ms = await redis_us(redis) // 1000
    record = decode_node(before)
    assert record is not None
    fields = {f: getattr(record, f) for f in record.__struct_fields__}
    claimed = encode(NodeRecord(**{**fields, "cleaner": "z", "until": now_ms + 9_000}))
    assert await change_record(redis, KEYS, "n1", before, claimed)
    assert not await node.presence.renew()
    assert (await records(redis, KEYS), node.removed) == ({}, 0)
    done = encode(NodeRecord(**{**fields, "is_cleaned": True}))
    assert await change_record(redis, KEYS, "n1", claimed, done)
    assert await node.presence.renew()
    assert (set(await records(redis, KEYS)), node.removed) == ({"n1"}, 1)


async def test_one_that_could_not_renew_for_its_lease_knows_that_it_may_be_taken_for_dead(redis: Redis) -> None:
    node = Node(redis, "a", lease_ms=10_000)
    await node.presence.take()
    node.now_s += 8
    assert node.presence.is_held
    node.now_s += 2
    assert not node.presence.is_held
    assert await node.presence.renew()
    assert node.presence.is_held


async def test_a_record_that_is_none_is_replaced_and_counts_as_nobodys(redis: Redis) -> None:
    await redis.hset(KEYS.nodes, mapping={"n1": "?", "strange": "{}"})
    node = Node(redis, "a")
    await node.presence.take()
    assert set(await records(redis, KEYS)) == {"n1"}


async def test_a_redis_that_came_back_has_the_record_again(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node(redis, "a", lease_ms=1_000)
    await node.presence.take()
    task = asyncio.create_task(node.presence.run())
    redis_server.kill()
    await wait_until(lambda: caplog.records)
    redis_server.start()

    async def is_there() -> bool:
        try:
            return "n1" in await records(redis, KEYS)
        except OSError:
            return False

    await wait_until(is_there)
    await wait_until(lambda: node.removed)  # said behind a further answer of Redis
    task.cancel()
    await asyncio.wait([task])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]  # away; its record was lost


async def test_a_clock_of_redis_that_has_gone_back_lets_nobody_wait_for_longer_than_a_lease(redis: Redis) -> None:
    looks: list[str] = []
    first = Node(redis, "a", lease_ms=10_000)
    second = Node(SlowRedis(redis, looks.append), "b", lease_ms=10_000)  # type: ignore[arg-type]
    await first.presence.take()
    await age(redis, -600_000)
    taking = asyncio.create_task(second.presence.take())
    await wait_until(lambda: len(looks) >= 3)
    assert not taking.done()
    second.now_s += 10
    await wait_until(taking.done)
    assert decode_node(await text_of(redis)).owner == "b"  # type: ignore[union-attr]


async def test_a_claim_from_before_the_clock_of_redis_went_back_keeps_nobody_out(redis: Redis) -> None:
    node, other = Node(redis, "a"), Node(redis, "b")
    await node.presence.take()
    record = decode_node(await text_of(redis))
    assert record is not None
    claimed = encode(msgspec.structs.replace(record, cleaner="z", until=record.renewed + 600_000))
    await redis.hset(KEYS.nodes, "n1", claimed)
    assert await node.presence.renew()
    await redis.hset(KEYS.nodes, "n1", claimed)
    async with asyncio.timeout(5):
        await other.presence.take()


class SlowRedis:
    """A client that answers late: ``late`` is called when it reads a record, or with what changes one."""

    def __init__(self, redis: Redis, late: Callable[[str], None]) -> None:
        self._redis = redis
        self._late = late

    async def hget(self, *words: str) -> Any:
        found = await self._redis.hget(*words)
        self._late("hget")
        return found

    async def eval(self, *words: Any) -> Any:
        changed = await self._redis.eval(*words)
        self._late("eval")
        return changed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)


async def test_the_lease_begins_when_the_time_was_asked_for_however_late_the_answers_come(redis: Redis) -> None:
    def late(what: str) -> None:
        node.now_s += 4

    node = Node(SlowRedis(redis, late), "a", lease_ms=10_000)  # type: ignore[arg-type]
    await node.presence.take()
    assert node.presence.is_held
    node.now_s += 1.5
    assert not node.presence.is_held


async def test_whoever_is_back_and_hears_no_answer_writes_all_again_nevertheless(redis: Redis) -> None:
    def late(what: str) -> None:
        if what in refused:
            raise ConnectionError("the answer was lost")

    refused: list[str] = []
    node = Node(SlowRedis(redis, late), "a")  # type: ignore[arg-type]
    await node.presence.take()
    await redis.flushall()
    refused.append("eval")
    assert not await node.presence.renew()
    assert set(await records(redis, KEYS)) == {"n1"}, "it was done"
    refused.clear()
    assert await node.presence.renew()
    assert await node.presence.renew()
    assert node.removed == 1


async def test_whoever_did_not_hear_that_it_has_renewed_leaves_nevertheless(redis: Redis) -> None:
    def late(what: str) -> None:
        if what in refused:
            raise ConnectionError("the answer was lost")

    refused: list[str] = []
    node = Node(SlowRedis(redis, late), "a")  # type: ignore[arg-type]
    await node.presence.take()
    before = await text_of(redis)
    refused.append("eval")

    async def is_renewed() -> bool:  # once a millisecond has passed
        assert not await node.presence.renew() or before == await text_of(redis)
        return before != await text_of(redis)

    await wait_until(is_renewed)
    refused.clear()
    await node.presence.leave()
    assert await redis.hgetall(KEYS.nodes) == {}
