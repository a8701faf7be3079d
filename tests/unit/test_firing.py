"""Who sends what is due: exactly one of the nodes that live, whatever happens to them, to Redis and to clocks."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from quotepush.cluster import firing
from quotepush.cluster.commands import Command, To
from quotepush.cluster.firing import IN_WORK, Firing
from quotepush.cluster.line import Line
from quotepush.cluster.routing import Sent
from quotepush.cluster.schedule import LEASE_S, Job, Schedule, times_of
from quotepush.errors import BackendUnavailable, CallRefused
from tests.support.jobs import pass_time
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("caplog")


class Node:
    """One that only sends what is due.

    Attributes:
        sent: the names of the messages that it has sent.
        open: whether it takes part.
        hold: while it is not set, nothing that was begun is sent.
        fail: raised instead of sending.
    """

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        self.schedule = schedule
        self.sent: list[str] = []
        self.begun = 0
        self.most = 0
        self.is_open = True
        self.hold = asyncio.Event()
        self.hold.set()
        self.fail: Callable[[Command], Exception | None] = lambda command: None
        self.firing = Firing(
            schedule, self._send, is_open=lambda: self.is_open, **{"quiet_s": 0.0, "look_s": 0.05, **options}
        )
        self._task: asyncio.Task[None] | None = None

    async def _send(self, command: Command, is_kept: bool, name: str) -> Sent:
        self.begun += 1
        self.most = max(self.most, self.begun - len(self.sent))
        await self.hold.wait()
        if (error := self.fail(command)) is not None:
            self.begun -= 1
            raise error
        self.sent.append(name)
        return Sent(1, {})

    def start(self) -> None:
        self._task = asyncio.create_task(self.firing.run())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def die(self) -> None:
        """Do and say nothing any more, as after a SIGKILL."""

        async def nothing(*_: Any, **__: Any) -> None:
            raise BackendUnavailable("dead")

        for name in ("settle", "put_off", "drop", "claim"):
            setattr(self.schedule, name, nothing)
        self.fail = lambda command: BackendUnavailable("dead")
        self.hold.set()
        await self.stop()


class Cluster:
    def __init__(self, redis_server: RedisServer) -> None:
        self.server = redis_server
        self.redis: Redis = redis_server.client()
        self.nodes: list[Node] = []
        self._closing: list[Callable[[], Awaitable[Any]]] = [self.redis.aclose]
        self.schedule = self.new_schedule()

    def new_schedule(self) -> Schedule:
        client = self.server.client(decode_responses=False, retry=Retry(NoBackoff(), 0))
        line = Line(client, "Redis", 20.0)
        self._closing += [line.aclose, client.aclose]
        return Schedule(line.ask, "qp:")

    def node(self, **options: Any) -> Node:
        node = Node(self.new_schedule(), **options)
        self.nodes.append(node)
        node.start()
        return node

    async def add(self, data: Any = 1, **times: Any) -> Job:
        found = times_of(times)
        assert found is not None
        return await self.schedule.add(Command(op="send", to=To(all=True), data=data), found, most=10_000)

    def sent(self) -> list[str]:
        return [name for node in self.nodes for name in node.sent]

    async def has_sent(self, count: int) -> None:
        await wait_until(lambda: len(self.sent()) == count, 30, f"{count} messages are sent")

    async def left(self) -> int:
        return int(await self.redis.zcard("qp:{jobs}"))

    async def is_empty(self) -> None:
        async def nothing_is_left() -> bool:
            return not await self.left()

        await wait_until(nothing_is_left, 30)

    async def close(self) -> None:
        for node in self.nodes:
            await node.stop()
        for close in self._closing:
            await close()


@pytest.fixture
async def cluster(redis_server: RedisServer) -> AsyncIterator[Cluster]:
    made = Cluster(redis_server)
    yield made
    await made.close()


@asynccontextmanager
async def clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch, by_s: float) -> AsyncIterator[None]:
    true_ns, true_s = time.time_ns, time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: true_ns() + int(by_s * 1e9))
        patched.setattr(time, "time", lambda: true_s() + by_s)
        yield


async def test_several_nodes_send_each_job_once(cluster: Cluster) -> None:
    jobs = [await cluster.add(at=timedelta()) for _ in range(300)]
    for _ in range(4):
        cluster.node()
    await cluster.has_sent(300)
    await cluster.is_empty()
    assert Counter(cluster.sent()) == Counter(f"{job.id}.0" for job in jobs)
    assert sum(node.firing.fired for node in cluster.nodes) == 300


async def test_a_job_is_sent_at_its_time_by_whoever_lives_then(cluster: Cluster) -> None:
    first, second = cluster.node(), cluster.node()
    job = await cluster.add(every=60)
    for round_ in (1, 2, 3):
        await wait_until(lambda: first.firing.waiting == second.firing.waiting == 1)
        assert len(cluster.sent()) == round_ - 1
        await pass_time(cluster.redis, 60)
        await cluster.has_sent(round_)
        await wait_until(lambda r=round_: _has_sent(cluster, job, r))
    names = set(cluster.sent())
    assert len(names) == 3, "each time has a name of its own"


async def _has_sent(cluster: Cluster, job: Job, count: int) -> bool:
    try:
        return [found.sent for found in await cluster.schedule.jobs() if found.id == job.id] == [count]
    except BackendUnavailable:
        return False


async def test_when_a_node_dies_with_a_job_another_sends_it_after_the_lease(cluster: Cluster) -> None:
    dead = cluster.node()
    dead.hold.clear()
    job = await cluster.add(at=timedelta())
    await wait_until(lambda: dead.begun == 1)
    await dead.die()
    alive = cluster.node()
    await pass_time(cluster.redis, LEASE_S - 5)
    await wait_until(lambda: alive.firing.waiting == 1)
    assert not alive.sent
    await pass_time(cluster.redis, 5)
    await cluster.has_sent(1)
    assert alive.sent[0].startswith(job.id)
    await cluster.is_empty()


async def test_a_node_that_slept_over_its_lease_sends_nothing_of_it(cluster: Cluster) -> None:
    slept_s = 0.0
    sleeper = cluster.node(clock=lambda: time.monotonic() + slept_s)
    claim = sleeper.schedule.claim

    async def claim_and_sleep(most: int) -> Any:
        nonlocal slept_s
        claims = await claim(most)
        if claims.jobs:
            slept_s += LEASE_S  # SIGSTOP, SIGCONT
        return claims

    sleeper.schedule.claim = claim_and_sleep  # type: ignore[method-assign]
    await cluster.add(at=timedelta())
    await wait_until(lambda: slept_s > 0)
    sleeper.is_open = False
    await wait_until(lambda: sleeper.firing._open_s is None)  # it claims no more, or it would have the job again
    other = cluster.node()
    await pass_time(cluster.redis, LEASE_S)
    await cluster.has_sent(1)
    assert other.sent and not sleeper.sent


async def test_jobs_survive_that_no_node_lives(cluster: Cluster) -> None:
    job = await cluster.add(at=timedelta(minutes=5))
    other = await cluster.add(at=timedelta(minutes=5), every=60)
    await pass_time(cluster.redis, 3600)
    node = cluster.node()
    await cluster.has_sent(2)
    await wait_until(lambda: _has_sent(cluster, other, 1))
    await node.stop()
    assert {name.partition(".")[0] for name in node.sent} == {job.id, other.id}
    assert await cluster.left() == 1


async def test_a_node_that_stops_gives_back_what_it_has_not_sent(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "_GIVE_BACK_S", 20.0)
    stopping = cluster.node()
    stopping.hold.clear()
    await cluster.add(at=timedelta())
    await wait_until(lambda: stopping.begun == 1)
    await stopping.stop()
    other = cluster.node()
    await cluster.has_sent(1)
    assert other.sent


async def test_a_node_waits_for_its_clients_before_it_sends(cluster: Cluster) -> None:
    now_s = 100.0
    node = cluster.node(quiet_s=3.0, clock=lambda: now_s)
    node.is_open = False
    await cluster.add(at=timedelta())
    looks = 0
    claim = node.schedule.claim

    async def count(most: int) -> Any:
        nonlocal looks
        looks += 1
        return await claim(most)

    node.schedule.claim = count  # type: ignore[method-assign]
    now_s += 10
    node.is_open = True
    await wait_until(lambda: node.firing._open_s is not None)
    now_s += 2.9
    await asyncio.sleep(0)
    assert not looks
    now_s += 0.1
    await cluster.has_sent(1)


async def test_a_cancelled_job_is_not_sent(cluster: Cluster) -> None:
    job, other = await cluster.add(at=timedelta(minutes=1)), await cluster.add(at=timedelta(minutes=1))
    assert await cluster.schedule.cancel(job.id)
    cluster.node()
    await pass_time(cluster.redis, 60)
    await cluster.has_sent(1)
    assert cluster.sent()[0].startswith(other.id)
    await cluster.is_empty()


async def test_what_is_wanted_no_more_is_not_sent(cluster: Cluster) -> None:
    job = await cluster.add(at=timedelta())
    await cluster.redis.hset(f"qp:{{jobs}}:{job.id}", "last", job.at + 1)
    await asyncio.sleep(0.01)  # it is over then
    node = cluster.node()
    await cluster.is_empty()
    assert not node.sent and not node.firing.failed


@pytest.mark.parametrize("by_s", [-86_400.0, 86_400.0])
async def test_a_machine_whose_clock_is_wrong_sends_at_the_right_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    async with clock_that_is_wrong(monkeypatch, by_s):
        node = cluster.node()
        await cluster.add(at=timedelta(minutes=1))
        await wait_until(lambda: node.firing.waiting == 1)
        await pass_time(cluster.redis, 40)
        await cluster.add(at=timedelta(), data="now")
        await cluster.has_sent(1)
        await pass_time(cluster.redis, 20)
        await cluster.has_sent(2)


async def test_what_cannot_be_sent_now_is_tried_again(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    failing = iter([BackendUnavailable("no Redis"), TimeoutError(), RuntimeError("a bug")])
    node = cluster.node()
    node.fail = lambda command: next(failing, None)
    await cluster.add(at=timedelta())
    for failed in (1, 2, 3):
        await wait_until(lambda n=failed: node.firing.failed >= n)

        async def is_put_off() -> bool:
            soonest_s = (await cluster.schedule.claim(0)).soonest_s
            # Should that take long, it was tried again already.
            return bool(node.sent) or (soonest_s is not None and soonest_s < LEASE_S / 2)

        await wait_until(is_put_off, 30)
        await pass_time(cluster.redis, 10)
    await cluster.has_sent(1)
    await cluster.is_empty()
    assert node.firing.failed == 3
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]


async def test_what_nobody_could_send_is_dropped_with_one_line(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    bad = await cluster.add(at=timedelta())
    await cluster.redis.hset(f"qp:{{jobs}}:{bad.id}", "text", "{")
    refused = await cluster.add(at=timedelta(), every=5, data="no")
    gone = await cluster.add(at=timedelta())
    await cluster.redis.delete(f"qp:{{jobs}}:{gone.id}")
    node = cluster.node()
    node.fail = lambda command: CallRefused("bad_request", "not so") if command.data == "no" else None
    await cluster.is_empty()
    assert not node.sent and node.firing.failed == 2
    said = sorted(record.getMessage().partition(":")[0] for record in caplog.records)
    assert said == sorted(f"job {job.id} is dropped" for job in (bad, refused))


async def test_what_was_sent_is_settled_when_redis_is_back(redis_server: RedisServer, tmp_path: Any) -> None:
    server = RedisServer(tmp_path / "kept", aof=True)
    server.start()
    cluster = Cluster(server)
    try:
        node = cluster.node()
        job = await cluster.add(at=timedelta(), every=3600)
        node.hold.clear()
        await wait_until(lambda: node.begun == 1)
        server.kill()
        node.hold.set()
        await cluster.has_sent(1)
        await asyncio.to_thread(server.start)
        await wait_until(lambda: _has_sent(cluster, job, 1))
        await pass_time(cluster.redis, 3600)
        await cluster.has_sent(2)
    finally:
        await cluster.close()
        server.stop()


async def test_a_flood_of_due_jobs_is_sent_a_few_at_a_time_and_the_loop_turns(cluster: Cluster) -> None:
    for _ in range(200):
        await cluster.add(at=timedelta())
    node = cluster.node()
    node.hold.clear()
    await wait_until(lambda: node.begun == IN_WORK)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    node.hold.set()
    await cluster.has_sent(200)
    counting.cancel()
    assert node.most <= IN_WORK and turns > 200 / IN_WORK
