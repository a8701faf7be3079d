"""What Redis says about connections is what is true, whatever happens in between."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from quotepush.cluster import registry, sets
from quotepush.cluster.nodes import cut_connection, purge_life, purge_node
from quotepush.cluster.registry import RegistryMirror, registry_client
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

START_US = 1_721_872_800_000_000
LIFE = f"0.{START_US}"


def fd_of(number: int, *, node: str = "n1", worker: int = 0) -> str:
    return f"{node}.{worker}.{START_US + number}"


class Worker:
    """A mirror at work and the sessions that it follows."""

    def __init__(self, mirror: RegistryMirror, client: Redis, node: str, worker: int) -> None:
        self.mirror = mirror
        self.client = client
        self.node = node
        self.worker = worker
        self.sessions: dict[str, dict[str, None]] = {}
        self.client_ids: list[int] = []
        self.task: asyncio.Task[None] | None = None

    def fd(self, number: int) -> str:
        return fd_of(number, node=self.node, worker=self.worker)

    def subscribe(self, number: int, *codes: str) -> None:
        fd = self.fd(number)
        if fd not in self.sessions:
            self.sessions[fd] = {}
            self.mirror.open(fd, self.sessions[fd].keys())
        self.sessions[fd].update(dict.fromkeys(codes))
        self.mirror.touch(fd)

    def unsubscribe(self, number: int, *codes: str) -> None:
        for code in codes:
            self.sessions[self.fd(number)].pop(code, None)
        self.mirror.touch(self.fd(number))

    def close(self, number: int) -> None:
        del self.sessions[self.fd(number)]
        self.mirror.close(self.fd(number))

    async def in_step(self) -> None:
        await wait_until(lambda: self.mirror.healthy and not self.mirror.pending, 30, "the mirror is in step")

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            self.task = None


@asynccontextmanager
async def working(
    server: RedisServer, *, node: str = "n1", worker: int = 0, life: str = "", protocol: int = 3, **options: Any
) -> AsyncIterator[Worker]:
    client = registry_client(server.url, protocol=protocol)
    client_ids: list[int] = []
    mirror = RegistryMirror(
        client,
        prefix="qp:",
        node=node,
        life=life or f"{worker}.{START_US}",
        **{"interval_s": 0.01, "check_interval_s": 0.1, "on_client_id": client_ids.append, **options},
    )
    it = Worker(mirror, client, node, worker)
    it.client_ids = client_ids
    it.task = asyncio.create_task(mirror.run())
    try:
        yield it
        assert not it.task or not it.task.done(), "the mirror's task ended by itself"
    finally:
        await it.stop()
        await client.aclose()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client(encoding_errors="replace")  # a test writes what is no UTF-8
    yield client
    await client.aclose()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKOFF_MOST_S", 0.1)


async def sets_in(redis: Redis) -> dict[str, set[str]]:
    keys = [key async for key in redis.scan_iter("qp:*", count=1000)]
    pipeline = redis.pipeline(transaction=False)
    for key in keys:
        pipeline.smembers(key)
    return {key: set(members) for key, members in zip(keys, await pipeline.execute(), strict=True)}


def sets_for(*workers: Worker, life: str = LIFE) -> dict[str, set[str]]:
    """What the sets have to be, given the sessions of all workers."""
    expected: dict[str, set[str]] = {}
    for it in workers:
        name = f"{it.worker}.{START_US}" if life == LIFE else life
        expected.setdefault(f"qp:node:{it.node}", set()).add(name)
        for fd, codes in it.sessions.items():
            expected.setdefault(f"qp:node:{it.node}:{name}", set()).add(fd)
            for code in codes:
                expected.setdefault("qp:codes", set()).add(code)
                expected.setdefault(f"qp:code:{code}", set()).add(fd)
                expected.setdefault(f"qp:fd:{fd}", set()).add(code)
    return expected


async def become_true(redis: Redis, *workers: Worker) -> None:
    """Wait until Redis says exactly what is true, and every key of it expires some day.

    The set of all codes gets its end behind its members, and a set of a code that was removed with the next round.
    """

    async def agrees() -> bool:
        return await sets_in(redis) == sets_for(*workers)

    try:
        await wait_until(agrees, 30, "the sets in Redis equal the truth")
    except AssertionError:
        assert await sets_in(redis) == sets_for(*workers)  # for its report
        raise
    keys = list(sets_for(*workers))

    async def all_expire() -> bool:
        return all(ttl > 0 for ttl in await ttls_of(redis, keys))

    await wait_until(all_expire, what="each key has an end")


async def ttls_of(redis: Redis, keys: Sequence[str]) -> list[int]:
    pipeline = redis.pipeline(transaction=False)
    for key in keys:
        pipeline.ttl(key)
    ttls: list[int] = await pipeline.execute()
    return ttls


# ---------------------------------------------------------------------- following


async def test_a_subscription_appears_in_all_three_sets(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        it.subscribe(1, "600519.SH", "AAPL")
        await it.in_step()
        assert await sets_in(redis) == {
            "qp:codes": {"600519.SH", "AAPL"},
            "qp:code:600519.SH": {fd_of(1)},
            "qp:code:AAPL": {fd_of(1)},
            f"qp:fd:{fd_of(1)}": {"600519.SH", "AAPL"},
            "qp:node:n1": {LIFE},
            f"qp:node:n1:{LIFE}": {fd_of(1)},
        }


async def test_only_differences_are_written(redis_server: RedisServer, redis: Redis):
    async with working(redis_server, check_interval_s=3600) as it:
        it.subscribe(1, *(f"C{n}" for n in range(100)))
        await it.in_step()
        before = (await redis.info("commandstats"))["cmdstat_sadd"]["calls"]
        it.subscribe(1, "ONE.MORE")
        await it.in_step()
        assert (await redis.info("commandstats"))["cmdstat_sadd"]["calls"] == before + 3  # fd, code, codes
        await become_true(redis, it)


async def test_a_connection_without_codes_is_known_too(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        it.subscribe(1)
        await it.in_step()
        assert await sets_in(redis) == {"qp:node:n1": {LIFE}, f"qp:node:n1:{LIFE}": {fd_of(1)}}


async def test_a_code_leaves_codes_with_its_last_fd(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        it.subscribe(1, "AAPL", "MSFT")
        it.subscribe(2, "AAPL")
        await it.in_step()
        it.unsubscribe(1, "AAPL", "MSFT")
        await it.in_step()
        assert await redis.smembers("qp:codes") == {"AAPL"}
        it.close(2)
        await it.in_step()
        assert await sets_in(redis) == {"qp:node:n1": {LIFE}, f"qp:node:n1:{LIFE}": {fd_of(1)}}


async def test_another_nodes_fd_keeps_the_code(redis_server: RedisServer, redis: Redis):
    async with working(redis_server, node="n1") as one, working(redis_server, node="n2") as two:
        one.subscribe(1, "AAPL")
        two.subscribe(1, "AAPL")
        await one.in_step()
        await two.in_step()
        one.close(1)
        await one.in_step()
        assert await redis.smembers("qp:codes") == {"AAPL"}
        assert await redis.smembers("qp:code:AAPL") == {two.fd(1)}


async def test_a_connection_that_closes_before_it_is_written_leaves_nothing(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        await it.in_step()
        it.subscribe(1, "AAPL")
        it.close(1)
        await it.in_step()
        assert await sets_in(redis) == {"qp:node:n1": {LIFE}}


async def test_more_members_than_a_slice_holds_are_written(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        it.subscribe(0, *(f"C{n}" for n in range(5_000)))
        for number in range(1, 2_200):
            it.subscribe(number, "AAPL", f"C{number}")
        await it.in_step()  # which is asked more cheaply than all the sets
        await become_true(redis, it)
        for number in range(2_200):
            it.close(number)
        await it.in_step()
        await become_true(redis, it)
        assert it.mirror.repairs == 0


async def test_pending_and_lag_tell_what_is_not_written_yet(redis_server: RedisServer):
    client = registry_client(redis_server.url)
    mirror = RegistryMirror(client, prefix="qp:", node="n1", life=LIFE)
    assert (mirror.pending, mirror.lag_ms, mirror.healthy) == (0, 0, False)
    mirror.open(fd_of(1), {"AAPL": None}.keys())
    mirror.open(fd_of(2), {"AAPL": None}.keys())
    assert mirror.pending == 2
    assert mirror.lag_ms >= 1
    task = asyncio.create_task(mirror.run())
    await wait_until(lambda: mirror.healthy)
    assert (mirror.pending, mirror.lag_ms) == (0, 0)
    task.cancel()
    await asyncio.wait([task])
    await client.aclose()


async def test_one_session_with_broken_codes_does_not_stop_the_others(
    redis_server: RedisServer, redis: Redis, caplog: pytest.LogCaptureFixture
):
    class Broken(dict[str, None]):
        def __iter__(self) -> Iterator[str]:
            raise RuntimeError("this session is broken")

    async with working(redis_server) as it:
        it.mirror.open(fd_of(1), Broken())
        it.mirror.open(fd_of(2), [None])  # type: ignore[list-item]
        it.mirror.open(fd_of(3), ["\ud800"])
        it.subscribe(4, "AAPL")
        await it.in_step()
        assert await redis.smembers("qp:codes") == {"AAPL"}
        assert await redis.scard(f"qp:node:n1:{LIFE}") == 4
        for number in (1, 2, 3):
            it.mirror.close(fd_of(number))
        await become_true(redis, it)
    assert "this session is broken" in caplog.text


async def test_finish_removes_everything_of_this_life_only(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it, working(redis_server, worker=1) as other:
        it.subscribe(1, "AAPL", "MSFT")
        other.subscribe(1, "AAPL")
        await it.in_step()
        await other.in_step()
        await redis.delete(f"qp:node:n1:{LIFE}")  # even when its own sets no longer lead to all of it
        await it.stop()
        assert await it.mirror.finish() is True
        await become_true(redis, other)


async def test_finish_gives_up_when_redis_is_away(redis_server: RedisServer):
    async with working(redis_server) as it:
        await it.in_step()
        await it.stop()
        redis_server.kill()
        assert await it.mirror.finish() is False


async def test_a_cancelled_mirror_ends_whatever_it_is_doing(redis_server: RedisServer):
    for delay_s in (0, 0, 0.001, 0.002, 0.005, 0.01, 0.02):
        async with working(redis_server, interval_s=0.001, check_interval_s=0.001) as it:
            for number in range(2_000):
                it.subscribe(number, "AAPL", f"C{number % 50}")
            await asyncio.sleep(delay_s)
            assert it.task is not None
            it.task.cancel()
            await asyncio.wait([it.task], timeout=5)
            assert it.task.cancelled()
            it.task = None


async def test_a_cancellation_that_the_client_swallows_still_ends_a_purge():
    class Swallowing:
        def pipeline(self, transaction: bool) -> "Swallowing":
            return self

        def execute_command(self, *command: Any) -> None:
            pass

        async def execute(self) -> list[Any]:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                pass
            return [(0, [])]

    task = asyncio.create_task(purge_life(Swallowing(), "qp:", "n1", LIFE))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


# ---------------------------------------------------------------------- Redis in trouble


async def test_a_flushed_redis_is_filled_again(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        for number in range(50):
            it.subscribe(number, "AAPL", f"C{number}")
        await it.in_step()
        await redis.flushall()
        await become_true(redis, it)
        assert it.mirror.repairs >= 50


@pytest.mark.parametrize(
    "damage",
    [
        ("DEL", "qp:codes"),
        ("DEL", "qp:code:AAPL"),
        ("DEL", f"qp:fd:{fd_of(1)}"),
        ("DEL", "qp:node:n1"),
        ("DEL", f"qp:node:n1:{LIFE}"),
        ("SREM", "qp:code:AAPL", fd_of(1)),
        ("SREM", "qp:codes", "C1"),
        ("SREM", f"qp:fd:{fd_of(1)}", "AAPL"),
        ("SREM", f"qp:node:n1:{LIFE}", fd_of(1)),
        ("SADD", "qp:code:AAPL", fd_of(2)),  # ours, but closed
        ("SADD", "qp:code:AAPL", fd_of(3)),  # ours and open, but not subscribed
        ("SADD", f"qp:fd:{fd_of(1)}", "TSLA"),
        ("SADD", f"qp:fd:{fd_of(1)}", b"\xff\xfe"),
        ("SADD", f"qp:node:n1:{LIFE}", fd_of(2)),
        ("SADD", "qp:codes", "NOBODY"),
    ],
    ids=lambda damage: "-".join(str(word) for word in damage[:2]),
)
async def test_a_difference_is_repaired(redis_server: RedisServer, redis: Redis, damage: tuple[Any, ...]):
    async with working(redis_server) as it:
        for number in (1, 2, 3, 4):
            it.subscribe(number, f"C{number}")
        it.subscribe(1, "AAPL")
        it.subscribe(4, "AAPL")
        it.close(2)
        await it.in_step()
        await redis.execute_command(*damage)
        await become_true(redis, it)


async def test_the_set_of_a_popular_code_is_compared_page_by_page(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        for number in range(3_000):
            it.subscribe(number, "AAPL")
        await it.in_step()
        await redis.srem("qp:code:AAPL", fd_of(1_234))
        await redis.sadd("qp:code:AAPL", fd_of(-1), "n2.0.5", f"n1.0.{START_US + 9_999}")  # of other lives
        await wait_until(lambda: redis.sismember("qp:code:AAPL", fd_of(1_234)))
        await it.in_step()
        assert await redis.smismember("qp:code:AAPL", [fd_of(-1), "n2.0.5", f"n1.0.{START_US + 9_999}"]) == [1, 1, 1]


async def test_keys_live_as_long_as_they_are_renewed(redis_server: RedisServer, redis: Redis):
    async with working(redis_server, ttl_s=600) as it:
        it.subscribe(1, "AAPL")
        it.subscribe(2)
        await it.in_step()
        keys = list(await sets_in(redis))

        async def pass_most_of_it() -> None:
            for key in keys:
                await redis.expire(key, 300)

        async def are_renewed() -> bool:
            return all(ttl > 500 for ttl in await ttls_of(redis, keys))

        for _ in range(3):
            await pass_most_of_it()
            await wait_until(are_renewed, what="all keys are renewed")
        assert await sets_in(redis) == sets_for(it)
        assert it.mirror.repairs == 0
        await it.stop()
        assert await redis.dbsize() == len(keys)
        assert all(0 < ttl <= 600 for ttl in await ttls_of(redis, keys)), "nobody renews them, and all expire"


async def no_keys(redis: Redis) -> bool:
    return await redis.dbsize() == 0


@pytest.mark.parametrize("aof", [False, True], ids=["empty", "with_its_old_contents"])
async def test_a_redis_killed_and_restarted_is_right_again(tmp_path: Path, aof: bool, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger=registry.__name__)
    server = RedisServer(tmp_path / "redis", aof=aof)
    server.start()
    try:
        async with working(server) as it:
            for number in range(100):
                it.subscribe(number, "AAPL", f"C{number}")
            await it.in_step()
            server.kill()
            for number in range(50):
                it.close(number)
            it.subscribe(100, "AAPL")
            it.subscribe(60, "TSLA")
            it.unsubscribe(61, "AAPL")
            await wait_until(lambda: not it.mirror.healthy, what="the mirror notices")
            assert it.mirror.pending >= 53
            assert it.mirror.lag_ms > 0
            await asyncio.to_thread(server.start)
            await it.in_step()
            async with server.client() as redis:
                await become_true(redis, it)
            assert len(it.client_ids) >= 2
    finally:
        server.stop()
    said = [record.levelname for record in caplog.records if "Redis" in record.message]
    assert said == ["WARNING", "INFO"], caplog.text


async def test_a_paused_redis_takes_late_commands_of_the_old_connection_no_more(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sets, "SLICE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(registry, "SLICE_TIMEOUT_S", 0.3)
    async with working(redis_server) as it:
        await it.in_step()
        redis_server.pause()
        for number in range(3_000):
            it.subscribe(number, "AAPL", f"C{number}")
        await wait_until(lambda: not it.mirror.healthy, what="the mirror notices")
        for number in range(3_000):
            it.close(number)
        redis_server.resume()
        await it.in_step()
        assert await sets_in(redis) == {"qp:node:n1": {LIFE}}


async def test_a_killed_connection_is_replaced_and_its_id_told(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        it.subscribe(1, "AAPL")
        await it.in_step()
        for _ in range(3):
            before = list(it.client_ids)
            assert await redis.client_kill_filter(_id=str(before[-1])) == 1
            it.subscribe(2, f"C{len(before)}")
            await wait_until(lambda before=before: len(it.client_ids) > len(before), what="a new id")
            await become_true(redis, it)
        names = [client["name"] for client in await redis.client_list()]
        assert names.count(f"quotepush:n1:{LIFE}") == 1


async def test_what_the_last_connection_still_had_under_way_is_stopped(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it, redis_server.client(single_connection_client=True) as last:
        await it.in_step()
        ids = [await last.client_id(), await redis.client_id()]  # one of that name, and one of a stranger
        await last.client_setname(f"quotepush:n1:{LIFE}")
        for old_id, is_left in zip(ids, (False, True), strict=True):
            now = it.client_ids[-1]
            (place,) = it.mirror._client_ids
            it.mirror._client_ids[place] = old_id
            await redis.client_kill_filter(_id=str(now))
            await wait_until(lambda now=now: it.client_ids[-1] != now, what="a new connection")
            assert bool(await redis.client_list(client_id=[str(old_id)])) is is_left


async def test_a_flush_never_goes_on_over_another_connection(
    redis_server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
):
    """Else a store that came back empty would get the codes of fds that its life does not lead to."""
    execute_slice = sets._execute_slice
    keys_after: list[int] = []

    # With RESP2 redis-py notices the loss before it sends, and would connect again without a word.
    async with working(redis_server, check_interval_s=3600, protocol=2) as it:
        await it.in_step()

        async def lose_all_before_the_fds(client: Redis, commands: Any) -> list[Any]:
            if keys_after or commands[0][1] != f"qp:fd:{fd_of(1)}".encode():
                return await execute_slice(client, commands)
            await redis.flushall()
            await redis.client_kill_filter(_id=str(it.client_ids[-1]))
            await asyncio.sleep(0.05)
            try:
                return await execute_slice(client, commands)
            finally:
                keys_after.append(await redis.dbsize())

        monkeypatch.setattr(sets, "_execute_slice", lose_all_before_the_fds)
        it.subscribe(1, "AAPL")
        await become_true(redis, it)
        assert keys_after == [0]


async def test_the_id_is_told_before_anything_is_written(redis_server: RedisServer, redis: Redis):
    client = registry_client(redis_server.url)

    def refuse(client_id: int) -> None:
        raise RedisConnectionError("main is not there")

    mirror = RegistryMirror(client, prefix="qp:", node="n1", life=LIFE, interval_s=0.01, on_client_id=refuse)
    mirror.open(fd_of(1), ["AAPL"])
    task = asyncio.create_task(mirror.run())
    await asyncio.sleep(0.3)
    assert await no_keys(redis)
    assert not mirror.healthy
    task.cancel()
    await asyncio.wait([task])
    await client.aclose()


async def oom(redis: Redis, on: bool) -> None:
    await redis.config_set("maxmemory", "1" if on else "0")


async def read_only(redis: Redis, on: bool) -> None:
    if on:
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    else:
        await redis.execute_command("REPLICAOF", "NO", "ONE")


async def needs_password(redis: Redis, on: bool) -> None:
    await redis.config_set("requirepass", "secret" if on else "")
    if on:
        await redis.client_kill_filter(skipme=True)


async def wrong_type(redis: Redis, on: bool) -> None:
    await redis.delete("qp:code:TSLA")
    if on:
        await redis.set("qp:code:TSLA", "a string")


@pytest.mark.parametrize("trouble", [oom, read_only, needs_password, wrong_type], ids=lambda trouble: trouble.__name__)
async def test_a_refusing_redis_loses_no_change(
    redis_server: RedisServer,
    caplog: pytest.LogCaptureFixture,
    trouble: Callable[[Redis, bool], Awaitable[None]],
):
    caplog.set_level(logging.INFO, logger=registry.__name__)
    async with redis_server.client(single_connection_client=True) as redis, working(redis_server) as it:
        it.subscribe(1, "AAPL")
        it.subscribe(2, "MSFT")
        await it.in_step()
        await trouble(redis, True)
        it.subscribe(3, "TSLA")
        it.unsubscribe(2, "MSFT")
        it.close(1)
        await wait_until(lambda: not it.mirror.healthy, what="the mirror is refused")
        await asyncio.sleep(0.3)  # a few attempts
        await trouble(redis, False)
        await become_true(redis, it)
        await it.in_step()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"], caplog.text


async def test_a_redis_that_is_away_at_the_start_is_waited_for(redis_server: RedisServer, redis: Redis):
    redis_server.kill()
    async with working(redis_server) as it:
        it.subscribe(1, "AAPL")
        await asyncio.sleep(0.2)
        await asyncio.to_thread(redis_server.start)
        await become_true(redis, it)


async def test_no_command_names_keys_of_two_slots(tmp_path: Path):
    server = RedisServer(tmp_path / "redis", options=("--cluster-enabled", "yes"))
    server.start()
    try:
        async with server.client() as redis:
            await redis.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")

            await wait_until(lambda: redis_state_ok(redis), what="the cluster is up")
            async with working(server) as it, working(server, node="n2") as dead:
                for number in range(100):
                    it.subscribe(number, "AAPL", f"C{number}")
                    dead.subscribe(number, f"C{number}")
                await it.in_step()
                for number in range(50):
                    it.close(number)
                await become_true(redis, it, dead)
                await dead.stop()
                assert await purge_node(redis, "qp:", "n2") == 100
                await become_true(redis, it)
    finally:
        server.stop()


async def redis_state_ok(redis: Redis) -> bool:
    state = await redis.execute_command("CLUSTER", "INFO")
    return "ok" in (state.get("cluster_state", "") if isinstance(state, dict) else str(state))


# ---------------------------------------------------------------------- dead lives


async def test_purge_removes_exactly_one_life(redis_server: RedisServer, redis: Redis):
    async with (
        working(redis_server) as dead,
        working(redis_server, worker=1) as sibling,
        working(redis_server, node="n2") as elsewhere,
    ):
        for number in range(20):
            dead.subscribe(number, "AAPL", f"D{number}")
            sibling.subscribe(number, "AAPL", f"S{number}")
            elsewhere.subscribe(number, "AAPL", f"E{number}")
        await become_true(redis, dead, sibling, elsewhere)
        await dead.stop()
        assert await purge_life(redis, "qp:", "n1", LIFE) == 20
        assert await sets_in(redis) == sets_for(sibling, elsewhere)
        assert await purge_life(redis, "qp:", "n1", LIFE) == 0
        assert await sets_in(redis) == sets_for(sibling, elsewhere)


async def test_a_new_life_of_the_same_worker_survives_the_purge_of_the_old(redis_server: RedisServer, redis: Redis):
    new_life = f"0.{START_US + 1_000}"
    async with working(redis_server) as old, working(redis_server, life=new_life) as new:
        old.subscribe(1, "AAPL", "MSFT")
        new.subscribe(1_001, "AAPL")
        await old.in_step()
        await new.in_step()
        await old.stop()
        assert await purge_life(redis, "qp:", "n1", LIFE) == 1
        assert await sets_in(redis) == sets_for(new, life=new_life)


async def test_purge_node_keeps_the_lives_it_is_told_to(redis_server: RedisServer, redis: Redis):
    async with (
        working(redis_server) as dead,
        working(redis_server, worker=1) as alive,
        working(redis_server, node="n2") as elsewhere,
    ):
        for it in (dead, alive, elsewhere):
            it.subscribe(1, "AAPL", f"{it.node}-{it.worker}")
        await become_true(redis, dead, alive, elsewhere)
        await dead.stop()
        assert await purge_node(redis, "qp:", "n1", keep={f"1.{START_US}"}) == 1
        await become_true(redis, alive, elsewhere)
        await alive.stop()
        assert await purge_node(redis, "qp:", "n1") == 1
        await become_true(redis, elsewhere)


class Tripwire:
    """Lets so many commands pass, then Redis is gone for whoever asks through it.

    ``meddle`` is called before each command and may do what another node could do at that moment.
    """

    def __init__(
        self, redis: Redis, commands: int, meddle: Callable[[tuple[Any, ...]], Awaitable[None]] | None = None
    ) -> None:
        self._redis = redis
        self.connection_pool = Tripwire.Pool()
        self._left = commands
        self._meddle = meddle
        self.tripped = False

    def pipeline(self, transaction: bool) -> "Tripwire.Pipeline":
        return Tripwire.Pipeline(self)

    class Pool:
        """Stands between the mirror and the true one, whose connections are not the mirror's to look at."""

        def __init__(self) -> None:
            self.connection_kwargs: dict[str, Any] = {}

        async def disconnect(self, inuse_connections: bool) -> None: ...

    class Pipeline:
        def __init__(self, wire: "Tripwire") -> None:
            self._wire = wire
            self._commands: list[tuple[Any, ...]] = []

        def execute_command(self, *command: Any) -> None:
            self._commands.append(command)

        async def execute(self) -> list[Any]:
            replies = []
            for command in self._commands:
                if not self._wire._left:
                    self._wire.tripped = True
                    raise RedisConnectionError("cut off")
                self._wire._left -= 1
                if self._wire._meddle is not None:
                    await self._wire._meddle(command)
                replies.append(await self._wire._redis.execute_command(*command))
            return replies


async def test_a_purge_interrupted_after_each_command_can_be_run_again(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as dead, working(redis_server, node="n2") as alive:
        alive.subscribe(1, "AAPL", "ONLY.N2")
        for number in range(3):
            dead.subscribe(number, "AAPL", "ONLY.N1", f"C{number}")
        await become_true(redis, dead, alive)
        await dead.stop()
        before = await sets_in(redis)
        commands = 0
        while True:
            wire = Tripwire(redis, commands)
            try:
                await purge_life(wire, "qp:", "n1", LIFE)  # type: ignore[arg-type]
            except RedisConnectionError:
                assert wire.tripped
            await purge_life(redis, "qp:", "n1", LIFE)
            assert await sets_in(redis) == sets_for(alive), f"cut off after {commands} commands"
            if not wire.tripped:
                break
            commands += 1
            for key, members in before.items():
                await redis.sadd(key, *members)
        assert commands > 20


async def test_a_mirror_cut_off_after_each_command_leaves_nothing_that_a_purge_does_not_find(
    redis_server: RedisServer, redis: Redis
):
    """First some connections are written, then they change and close; the worker dies at every point of both."""
    commands = 0
    while True:
        sessions = {fd_of(number): {"AAPL": None, f"C{number}": None, "COMMON": None} for number in range(3)}
        wire = Tripwire(redis, commands)
        mirror = RegistryMirror(wire, prefix="qp:", node="n1", life=LIFE)  # type: ignore[arg-type]
        try:
            await sets.execute(wire, mirror._find_me())  # type: ignore[arg-type]
            for fd, codes in sessions.items():
                mirror.open(fd, codes.keys())
            await mirror._flush()
            mirror.close(fd_of(0))
            del sessions[fd_of(1)]["COMMON"]
            sessions[fd_of(1)]["TSLA"] = None
            del sessions[fd_of(2)]["AAPL"]
            for fd in (fd_of(1), fd_of(2)):
                mirror.touch(fd)
            await mirror._flush()
        except RedisConnectionError:
            assert wire.tripped
        await purge_life(redis, "qp:", "n1", LIFE)
        assert await sets_in(redis) == {}, f"cut off after {commands} commands"
        if not wire.tripped:
            break
        commands += 1
    assert commands > 30


@pytest.mark.parametrize("leaves_again", [False, True])
async def test_two_nodes_racing_over_a_code_end_with_the_truth(redis: Redis, leaves_again: bool):
    """The last fd of n1 goes while one of n2 comes, between n1's look and its deed, and perhaps goes again."""
    theirs, ours = fd_of(1, node="n2"), fd_of(1)
    await redis.sadd("qp:codes", "AAPL")
    await redis.sadd("qp:code:AAPL", ours)
    await redis.sadd(f"qp:fd:{ours}", "AAPL")
    await redis.sadd(f"qp:node:n1:{LIFE}", ours)

    done: set[str] = set()

    async def meddle(command: tuple[Any, ...]) -> None:
        if command[1] != "qp:codes" or command[0] in done:
            return
        done.add(command[0])
        if command[0] == "SREM":
            await redis.sadd("qp:code:AAPL", theirs)
            await redis.sadd("qp:codes", "AAPL")
        elif command[0] == "SADD" and leaves_again:
            await redis.srem("qp:code:AAPL", theirs)
            await redis.srem("qp:codes", "AAPL")

    await purge_life(Tripwire(redis, 1_000, meddle), "qp:", "n1", LIFE)  # type: ignore[arg-type]
    expected = {} if leaves_again else {"qp:codes": {"AAPL"}, "qp:code:AAPL": {theirs}}
    assert await sets_in(redis) == expected


async def test_a_dead_workers_connection_is_cut_before_its_life_is_purged(redis_server: RedisServer, redis: Redis):
    async with working(redis_server) as it:
        await it.in_step()
        mine = await redis.client_id()
        assert not await cut_connection(redis, "n1", LIFE, mine), "an id of somebody else is left alone"
        assert await cut_connection(redis, "n1", LIFE, it.client_ids[-1])
        assert not await cut_connection(redis, "n1", LIFE, 999_999)


# ---------------------------------------------------------------------- all at once


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_two_nodes_do_the_sets_equal_the_truth(redis_server: RedisServer, redis: Redis, seed: int):
    """Random sessions on two nodes that share codes, while connections are cut and keys deleted."""
    chance = random.Random(seed)
    codes = [f"C{n}" for n in range(12)]
    async with (
        working(redis_server, node="n1", interval_s=0.001) as one,
        working(redis_server, node="n2", interval_s=0.001) as two,
    ):
        numbers = {one: 0, two: 0}
        for _ in range(1_500):
            it = chance.choice((one, two))
            numbers[it] += 1
            live = [int(fd.rpartition(".")[2]) - START_US for fd in it.sessions]
            step = chance.random()
            if step < 0.35 or not live:
                it.subscribe(numbers[it], *chance.sample(codes, chance.randrange(4)))
            elif step < 0.55:
                it.subscribe(chance.choice(live), *chance.sample(codes, 2))
            elif step < 0.75:
                it.unsubscribe(chance.choice(live), *chance.sample(codes, 6))
            elif step < 0.98:
                it.close(chance.choice(live))
            elif step < 0.985 and it.client_ids:
                await redis.client_kill_filter(_id=str(it.client_ids[-1]))
            elif step < 0.99 and seed % 2:
                await redis.delete(chance.choice(["qp:codes", f"qp:code:{chance.choice(codes)}", "qp:node:n1"]))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.choice((0, 0, 0.001, 0.003)))
        await become_true(redis, one, two)
        if not seed % 2:
            assert one.mirror.repairs == two.mirror.repairs == 0, "nothing was damaged, so nothing was wrong"
        for it in (one, two):
            for fd in list(it.sessions):
                it.close(int(fd.rpartition(".")[2]) - START_US)
        await become_true(redis, one, two)
