"""Jobs in Redis: when each is due, who has it, what comes after it, and what goes."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.cluster.commands import Command, To
from quotepush.cluster.line import Line
from quotepush.cluster.schedule import LEASE_S, LEFT_S, MAX_JOB_BYTES, Claim, Job, Schedule, times_of
from quotepush.errors import CallRefused
from tests.support.jobs import pass_time
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

MESSAGE = Command(op="send", to=To(users=["ann"]), data={"title": "Markets open"})


class Desk:
    """A schedule, and the clock of its Redis."""

    def __init__(self, redis: Redis, schedule: Schedule) -> None:
        self.redis = redis
        self.schedule = schedule

    async def now_ms(self) -> int:
        seconds, micros = await self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def add(self, command: Command = MESSAGE, *, most: int = 100, **times: Any) -> Job:
        found = times_of(times)
        assert found is not None
        return await self.schedule.add(command, found, most=most)

    async def claim(self, most: int = 100) -> list[Claim]:
        return list((await self.schedule.claim(most)).jobs)

    async def names(self) -> list[str]:
        return sorted(str(name) for name in await self.redis.keys("*"))


@pytest.fixture
async def desk(redis_server: RedisServer) -> AsyncIterator[Desk]:
    async with redis_server.client() as redis, redis_server.client(decode_responses=False) as asked:
        line = Line(asked, "Redis", 5.0)
        yield Desk(redis, Schedule(line.ask, "qp:"))
        await line.aclose()


async def test_a_job_is_claimed_at_its_time_and_goes_when_it_was_sent(desk: Desk) -> None:
    before_ms = await desk.now_ms()
    job = await desk.add(at=timedelta(seconds=60))
    assert before_ms + 60_000 <= job.at <= await desk.now_ms() + 60_000
    assert (job.every, job.until, job.left, job.sent, job.to) == (None, None, None, 0, {"users": ["ann"]})
    claims = await desk.schedule.claim(10)
    assert not claims.jobs and claims.waiting == 1 and claims.soonest_s is not None and 50 < claims.soonest_s <= 60

    await pass_time(desk.redis, 60)
    (claim,) = await desk.claim()
    assert (claim.id, claim.command, claim.is_over) == (job.id, MESSAGE, False)
    assert claim.message == f"{job.id}.0", "the same name whoever sends it"
    assert not await desk.claim(), "it is somebody's"
    await desk.schedule.settle(claim)
    assert await desk.names() == []


async def test_who_has_claimed_a_job_and_died_loses_it_after_the_lease(desk: Desk) -> None:
    await desk.add(at=timedelta())
    (first,) = await desk.claim()
    await pass_time(desk.redis, LEASE_S - 15)
    assert not await desk.claim()
    await pass_time(desk.redis, 15)
    (second,) = await desk.claim()
    assert second.id == first.id
    # The first was only slow: its words come too late.
    await desk.schedule.put_off(first, has_failed=False)
    assert not await desk.claim()


async def test_two_who_have_sent_a_job_for_one_time_settle_it_once(desk: Desk) -> None:
    job = await desk.add(at=timedelta(), every=10)
    (first,) = await desk.claim()
    for _ in range(2):
        await desk.schedule.settle(first)
    (found,) = await desk.schedule.jobs()
    assert (found.at, found.sent) == (job.at + 10_000, 1)


async def test_a_job_comes_again_on_its_grid_and_what_was_missed_comes_once(desk: Desk) -> None:
    job = await desk.add(every=timedelta(minutes=1))
    assert job.at == job.made + 60_000
    await pass_time(desk.redis, 60)
    (claim,) = await desk.claim()
    await desk.schedule.settle(claim)
    assert not await desk.claim()
    (found,) = await desk.schedule.jobs()
    assert found.at == job.at, "a minute after the first time, which is a minute ago"

    await pass_time(desk.redis, 10 * 60 + 20)  # no node lives
    (claim,) = await desk.claim()
    await desk.schedule.settle(claim)
    assert not await desk.claim(), "once for all that was missed"
    (found,) = await desk.schedule.jobs()
    assert (found.sent, found.at) == (2, job.at - 20_000), "the grid is still that of the first time"


async def test_a_job_ends_by_count_and_by_until(desk: Desk) -> None:
    counted = await desk.add(every=10, count=2)
    assert counted.left == 2
    await pass_time(desk.redis, 10)
    for left in (1, None):
        (claim,) = await desk.claim()
        await desk.schedule.settle(claim)
        assert [job.left for job in await desk.schedule.jobs()] == ([left] if left else [])
        await pass_time(desk.redis, 10)

    now_ms = await desk.now_ms()
    await desk.add(at=now_ms, every=10, until=now_ms + 15_000)
    for is_there in (True, False):
        (claim,) = await desk.claim()
        await desk.schedule.settle(claim)
        assert bool(await desk.schedule.jobs()) is is_there
        await pass_time(desk.redis, 10)
    assert await desk.names() == []


async def test_what_comes_too_late_is_known_as_that(desk: Desk) -> None:
    now_ms = await desk.now_ms()
    await desk.add(at=now_ms, until=now_ms + 5_000)
    await pass_time(desk.redis, 6)
    (claim,) = await desk.claim()
    assert claim.is_over
    await desk.schedule.drop(claim)
    assert await desk.names() == []
    with pytest.raises(CallRefused, match="before the first time"):
        await desk.add(at=now_ms + 60_000, until=now_ms + 50_000)
    with pytest.raises(CallRefused, match="before the first time"):
        await desk.add(at=now_ms - 60_000, until=now_ms - 50_000)


async def test_a_job_that_failed_is_due_again_after_longer_and_longer_times(desk: Desk) -> None:
    await desk.add(at=timedelta())
    for wait_s in (1, 2, 4, 8, 16, 32, 60, 60):
        (claim,) = await desk.claim()
        before_ms = await desk.now_ms()
        await desk.schedule.put_off(claim, has_failed=True)
        soonest_s = (await desk.schedule.claim(0)).soonest_s
        passed_s = (await desk.now_ms() - before_ms) / 1000
        assert soonest_s is not None and wait_s - passed_s <= soonest_s <= wait_s
        await pass_time(desk.redis, wait_s)
    (claim,) = await desk.claim()
    await desk.schedule.put_off(claim, has_failed=False)
    assert [again.id for again in await desk.claim()] == [claim.id], "who only gives it back makes it due at once"


async def test_a_cancelled_job_is_gone_also_while_somebody_sends_it(desk: Desk) -> None:
    one, two = await desk.add(at=timedelta(hours=1)), await desk.add(at=timedelta(), every=5)
    (claim,) = await desk.claim()
    assert await desk.schedule.cancel(one.id) and await desk.schedule.cancel(two.id)
    for nobody in (one.id, "", "no such", "x" * 99):
        assert not await desk.schedule.cancel(nobody)
    await desk.schedule.settle(claim)
    await desk.schedule.put_off(claim, has_failed=True)
    assert await desk.names() == []


async def test_jobs_are_listed_page_by_page_each_once(desk: Desk) -> None:
    made = [(await desk.add(at=timedelta(hours=1), most=1000)).id for _ in range(250)]
    seen: list[str] = []
    cursor, pages = "", 0
    while not pages or cursor:
        page = await desk.schedule.jobs().page(cursor, 50)
        seen += [job.id for job in page.items]
        cursor, pages = page.cursor, pages + 1
    assert sorted(seen) == sorted(made) and pages > 2
    with pytest.raises(CallRefused, match="no cursor"):
        await desk.schedule.jobs().page("x")


async def test_a_job_says_all_that_was_asked_for(desk: Desk) -> None:
    until_ms = await desk.now_ms() + 86_400_000
    for to, said in (
        (To(conns=["n.0.1"]), {"conns": ["n.0.1"]}), (To(group="vip"), {"group": "vip"}), (To(all=True), {"all": True}),
    ):  # fmt: skip
        command = Command(op="send", to=to, data="AP8=", encoding="base64", raw=True, exclude=["n.0.2"], keep=True)
        job = await desk.add(command, every=1.5, until=until_ms, count=3)
        assert [listed for listed in await desk.schedule.jobs() if listed.id == job.id] == [job]
        assert (job.to, job.data, job.encoding, job.raw, job.exclude) == (said, "AP8=", "base64", True, ("n.0.2",))
        assert (job.every, job.until, job.left, job.delivery) == (1.5, until_ms, 3, "kept")


async def test_jobs_are_bounded_in_number_and_size(desk: Desk) -> None:
    jobs = [await desk.add(at=timedelta(hours=1), most=3) for _ in range(3)]
    with pytest.raises(CallRefused, match="3 messages wait") as refused:
        await desk.add(at=timedelta(hours=1), most=3)
    assert refused.value.error == "job_limit"
    await desk.schedule.cancel(jobs[0].id)
    await desk.add(at=timedelta(hours=1), most=3)
    with pytest.raises(CallRefused) as refused:
        await desk.add(Command(op="send", to=To(all=True), data="x" * MAX_JOB_BYTES), at=timedelta(1))
    assert refused.value.error == "too_large"
    for wrong in (To(users=[""]), To(users=["a"], group="g"), None):
        with pytest.raises(CallRefused):
            await desk.add(Command(op="send", to=wrong, data=1), at=timedelta(1))
    with pytest.raises(CallRefused, match="not a JSON value"):
        await desk.add(Command(op="send", to=To(all=True), data={1, 2} and object()), at=timedelta(1))


async def test_what_nobody_sends_for_a_week_after_its_time_is_gone(desk: Desk) -> None:
    job = await desk.add(at=timedelta(days=30))
    for key in await desk.names():
        left_s = await desk.redis.ttl(key)
        assert 30 * 86_400 + LEFT_S - 60 < left_s <= 30 * 86_400 + LEFT_S
    soon = await desk.add(at=timedelta(hours=1))
    assert await desk.redis.ttl("qp:{jobs}") > 30 * 86_400, "the list lives as long as its last job"
    assert await desk.redis.ttl(f"qp:{{jobs}}:{soon.id}") <= 3600 + LEFT_S
    await desk.redis.delete(f"qp:{{jobs}}:{soon.id}")
    await pass_time(desk.redis, 3600)
    (claim,) = await desk.claim()
    assert (claim.id, claim.command, claim.fault) == (soon.id, None, "")
    await desk.schedule.drop(claim)
    assert [found.id for found in await desk.schedule.jobs()] == [job.id]


async def test_what_somebody_else_has_put_there_is_claimed_as_a_fault_and_not_listed(desk: Desk) -> None:
    texts = (b"{", b'{"op":"kick","users":["ann"]}', b'{"op":"send","data":1}')
    for n, said in enumerate(texts):
        await desk.redis.zadd("qp:{jobs}", {f"j{n}": 1})
        await desk.redis.hset(f"qp:{{jobs}}:j{n}", mapping={"text": said, "next": 1})
    await desk.redis.zadd("qp:{jobs}", {"j3": 1})
    await desk.redis.hset("qp:{jobs}:j3", mapping={"text": b'{"op":"send","to":{"all":true},"data":1}', "next": "x"})
    assert await desk.schedule.jobs() == []
    claims = await desk.claim()
    assert len(claims) == 4 and all(claim.command is None and claim.fault for claim in claims)
    for claim in claims:
        await desk.schedule.drop(claim)
    assert await desk.names() == []


async def test_a_whole_life_in_redis_and_in_valkey_as_nodes_of_a_cluster(store: RedisServer) -> None:
    """In a Redis Cluster a step with keys of two slots would be refused."""
    store.stop()
    store.options = ("--cluster-enabled", "yes")
    store.start()
    async with store.client() as redis, store.client(decode_responses=False) as asked:
        await redis.execute_command("CLUSTER", "ADDSLOTS", *range(16384))

        async def is_up() -> bool:
            return "cluster_state:ok" in str(await redis.execute_command("CLUSTER", "INFO"))

        await wait_until(is_up)
        line = Line(asked, "Redis", 5.0)
        desk = Desk(redis, Schedule(line.ask, "qp:"))
        job = await desk.add(at=timedelta(), every=60, count=2)
        for turn in (0, 1):
            (claim,) = await desk.claim()
            await desk.schedule.put_off(claim, has_failed=False)
            (claim,) = await desk.claim()
            assert claim.message == f"{job.id}.{turn}"
            await desk.schedule.settle(claim)
            await pass_time(redis, 60)
        assert await desk.names() == []
        job = await desk.add(every=60)
        assert await desk.schedule.jobs() == [job] and await desk.schedule.cancel(job.id)
        await line.aclose()


async def test_claims_at_the_same_time_are_of_different_jobs(desk: Desk) -> None:
    made = {(await desk.add(at=timedelta(), most=1000)).id for _ in range(100)}
    found = await asyncio.gather(*(desk.claim(20) for _ in range(10)))
    ids = [claim.id for claims in found for claim in claims]
    assert len(ids) == 100 and set(ids) == made


def test_times_are_said_in_the_units_that_are_named() -> None:
    assert times_of({}) is times_of({"at": None, "every": None}) is None
    aware = datetime(2026, 7, 25, 9, 30, tzinfo=timezone(timedelta(hours=8)))
    for at in (aware, aware.astimezone(UTC), 1_784_943_000_000):
        times = times_of({"at": at})
        assert times is not None and (times.at_ms, times.in_ms, times.every_ms) == (1_784_943_000_000, 0, 0)
    times = times_of({"at": timedelta(minutes=5), "every": 2.5, "count": 4})
    assert times is not None and (times.at_ms, times.in_ms, times.every_ms, times.count) == (0, 300_000, 2_500, 4)
    times = times_of({"every": timedelta(days=1)})
    assert times is not None and (times.in_ms, times.every_ms) == (86_400_000, 86_400_000)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"at": 1_784_943_000}, "milliseconds"),
        ({"at": 1_784_943_000_000_000}, "milliseconds"),
        ({"at": 1_784_943_000_000.5}, "milliseconds"),
        ({"at": True}, "milliseconds"),
        ({"at": datetime(2026, 7, 25)}, "time zone"),
        ({"at": timedelta(seconds=-1)}, "from now"),
        ({"every": 0.5}, "at least 1"),
        ({"every": float("nan")}, "at least 1"),
        ({"every": True}, "at least 1"),
        ({"every": timedelta(days=5000)}, "ten years"),
        ({"until": 1_784_943_000_000}, "belong to at or every"),
        ({"count": 2}, "belong to at or every"),
        ({"at": 1_784_943_000_000, "count": 2}, "belongs to every"),
        ({"every": 5, "count": 0}, "at least 1"),
        ({"every": 5, "until": 5}, "until must be"),
    ],
)
def test_a_time_that_cannot_be_meant_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(CallRefused, match=said) as refused:
        times_of(given)
    assert refused.value.error == "bad_request"
