"""Large sets are compared too, and a round of it takes no longer in a large cluster than in a small one."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.cluster.sessions import SessionMirror
from tests.support.redis_server import RedisServer
from tests.unit.test_registry import LIFE, START_US, fd_of

MANY = 50_000
MOST_A_ROUND = 30_000


class Counting:
    """A client that counts the members of sets that are read or asked for through it.

    Attributes:
        members: since they were last set to 0.
        scans: the sets that were read and each with the cursor from which, in this order.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.members = 0
        self.scans: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    def pipeline(self, transaction: bool) -> "Counting.Pipeline":
        return Counting.Pipeline(self, self._redis.pipeline(transaction=transaction))

    class Pipeline:
        def __init__(self, counting: "Counting", pipeline: Any) -> None:
            self._counting = counting
            self._pipeline = pipeline
            self._commands: list[tuple[Any, ...]] = []

        def execute_command(self, *command: Any) -> None:
            self._commands.append(command)
            self._pipeline.execute_command(*command)

        async def execute(self) -> list[Any]:
            replies: list[Any] = await self._pipeline.execute()
            for command, reply in zip(self._commands, replies, strict=True):
                read = {"SSCAN": lambda r: len(r[1]), "SMEMBERS": len, "SMISMEMBER": len}.get(command[0])
                if read is not None:
                    self._counting.members += read(reply)
                if command[0] == "SSCAN" and isinstance(command[1], bytes):
                    self._counting.scans.append((command[1].decode(), command[2]))
            return replies


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


@pytest.fixture
async def counting(redis_server: RedisServer) -> AsyncIterator[Counting]:
    client = registry_client(redis_server.url)
    yield Counting(client)
    await client.aclose()


async def at_work(counting: Counting, sessions: dict[str, Any], kind: type = RegistryMirror, **options: Any) -> Any:
    """A mirror that has written these sessions and goes on only when it is told to."""
    mirror = kind(counting, prefix="qp:", node="n1", life=LIFE, **options)
    await mirror._begin()
    for fd, codes in sessions.items():
        mirror.open(fd, codes)
    await mirror._flush()
    return mirror


async def add_others(redis: Redis, key: str, count: int) -> None:
    for start in range(0, count, 10_000):
        await redis.sadd(key, *(fd_of(n, node="n2") for n in range(start, min(start + 10_000, count))))


async def rounds_until(
    mirror: RegistryMirror, counting: Counting, redis: Redis, key: str, fds: Sequence[str], *, are_in: bool
) -> int:
    """How many rounds of comparing it takes until all of these fds are in a set, or none is."""
    for number in range(1, 31):
        counting.members = 0
        await mirror._check()
        assert counting.members <= MOST_A_ROUND
        await mirror._flush()
        if await redis.smismember(key, list(fds)) == [int(are_in)] * len(fds):
            return number
    raise AssertionError(f"{key} is not repaired after {number} rounds")


async def test_a_round_reads_no_more_than_its_measure_however_large_the_sets_are(redis: Redis, counting: Counting):
    codes = [f"C{n}" for n in range(20)]
    mirror = await at_work(counting, {fd_of(n): codes for n in range(20)})
    for code in codes:
        await add_others(redis, f"qp:code:{code}", 5_000)
    for _ in range(3):
        counting.members = 0
        await mirror._check()
        assert counting.members <= MOST_A_ROUND
    assert mirror.repairs == 0


@pytest.mark.parametrize("is_ours_many", [False, True])
async def test_what_is_missing_in_a_large_set_is_found_in_the_next_rounds(
    redis: Redis, counting: Counting, is_ours_many: bool
):
    ours = [fd_of(n) for n in range(45_000 if is_ours_many else 40)]
    mirror = await at_work(counting, {fd: ["AAPL"] for fd in ours})
    await add_others(redis, "qp:code:AAPL", MANY)
    await mirror._check()
    missing = [ours[0], ours[17], ours[-1]]
    await redis.srem("qp:code:AAPL", *missing)
    # Our own are asked for, as many as a round allows, and the next round goes on behind them.
    assert await rounds_until(mirror, counting, redis, "qp:code:AAPL", missing, are_in=True) <= (
        6 if is_ours_many else 2
    )
    assert await redis.scard("qp:code:AAPL") == MANY + len(ours)


async def test_what_is_stale_in_a_large_set_is_found_page_by_page(redis: Redis, counting: Counting):
    mirror = await at_work(counting, {fd_of(n): ["AAPL"] for n in range(40)} | {fd_of(50): ["MSFT"]})
    await add_others(redis, "qp:code:AAPL", MANY)
    stale = [fd_of(45), fd_of(50)]  # ours but closed, and ours with other codes
    foreign = [fd_of(-1), "n2.0.5", f"n1.0.{START_US + 9_999}", "n1.0.x", "n1.1.5"]
    await redis.sadd("qp:code:AAPL", *stale, *foreign)
    assert await rounds_until(mirror, counting, redis, "qp:code:AAPL", stale, are_in=False) <= 15
    assert await redis.smismember("qp:code:AAPL", foreign) == [1] * len(foreign)
    assert await redis.scard("qp:code:AAPL") == MANY + 40 + len(foreign)
    assert mirror.repairs in (1, 2)  # on one page or on two


async def test_what_is_wrong_in_a_large_group_is_repaired_too(redis: Redis, counting: Counting):
    sessions = {fd_of(n): ["u:alice", "g:crowd"] for n in range(40)} | {fd_of(50): ["u:bob"]}
    mirror = await at_work(counting, sessions, SessionMirror, describe=lambda fd: b"{}")
    await add_others(redis, "qp:group:crowd", MANY)
    await redis.srem("qp:group:crowd", fd_of(3), fd_of(30))
    assert await rounds_until(mirror, counting, redis, "qp:group:crowd", [fd_of(3), fd_of(30)], are_in=True) <= 2
    await redis.sadd("qp:group:crowd", fd_of(50))
    assert await rounds_until(mirror, counting, redis, "qp:group:crowd", [fd_of(50)], are_in=False) <= 25
    assert await redis.scard("qp:group:crowd") == MANY + 40


async def test_who_leaves_while_a_large_set_is_compared_is_not_taken_for_missing(redis: Redis, counting: Counting):
    sessions: dict[str, list[str]] = {fd_of(n): ["AAPL"] for n in range(45_000)}
    mirror = await at_work(counting, sessions)
    await mirror._check()  # it has asked for a part of them
    for number in range(0, 45_000, 2):
        mirror.close(fd_of(number))
    for number in range(1, 45_000, 1_000):
        sessions[fd_of(number)].clear()
        mirror.touch(fd_of(number))
    await mirror._flush()
    for _ in range(5):
        await mirror._check()
    assert mirror.repairs == 0
    assert not mirror.pending


async def test_a_large_set_is_not_read_any_more_when_its_code_is_nobodys(redis: Redis, counting: Counting):
    mirror = await at_work(counting, {fd_of(1): ["AAPL"], fd_of(2): ["MSFT"]})
    await add_others(redis, "qp:code:AAPL", MANY)
    await mirror._check()
    mirror.close(fd_of(1))
    await mirror._flush()
    await add_others(redis, "qp:code:MSFT", MANY)
    counting.scans.clear()
    await mirror._check()
    assert {key for key, _ in counting.scans} == {"qp:code:MSFT"}
    assert [cursor for _, cursor in counting.scans][:2] == [0, 0], "is it large? then from its beginning"
    assert all(cursor for _, cursor in counting.scans[2:])


async def test_after_a_new_connection_a_large_set_is_compared_from_its_beginning(redis: Redis, counting: Counting):
    """A cursor is worth nothing at another Redis."""
    mirror = await at_work(counting, {fd_of(1): ["AAPL"]})
    await add_others(redis, "qp:code:AAPL", MANY)
    for begins in ([0, 0], []):
        counting.scans.clear()
        await mirror._check()
        assert [cursor for _, cursor in counting.scans if not cursor] == begins
    await mirror._begin()
    await mirror._flush()
    counting.scans.clear()
    await mirror._check()
    assert [cursor for _, cursor in counting.scans if not cursor] == [0, 0]
