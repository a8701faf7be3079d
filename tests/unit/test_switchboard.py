"""Main's side of the cluster."""

import asyncio
import contextlib
from typing import Any

import pytest
from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError

from quotepush.cluster.commands import ClusterKeys, Command, To, encode
from quotepush.node import bus
from quotepush.node import switchboard as switchboard_module
from quotepush.node.switchboard import Switchboard
from quotepush.settings import Settings
from quotepush.store.clients import Links
from tests.support.redis_server import RedisServer


def switchboard_of(redis: Redis, **settings: Any) -> Switchboard:
    return Switchboard(
        Settings(node="n1", events=True, **settings), redis, Links(ConnectionPool()),
        on_up=lambda: None, on_lost=lambda fault: None, on_removed=lambda: None,
    )  # fmt: skip


async def test_a_node_that_cannot_tell_its_last_events_leaves_nevertheless(redis_server: RedisServer) -> None:
    async with redis_server.client() as admin:
        await admin.execute_command("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
        async with redis_server.client(username="mute", password="secret") as redis:
            switchboard = switchboard_of(redis)
            await switchboard.join()
            assert set(await admin.hgetall("qp:nodes")) == {"n1"}
            switchboard.heard(0, bus.Happened([b"{}"]))
            with contextlib.suppress(RedisError):
                await switchboard.leave()
        assert await admin.hgetall("qp:nodes") == {}


async def test_leaving_ends_where_redis_does_not_answer(redis_server: RedisServer) -> None:
    async with redis_server.client(socket_timeout=None) as redis:
        switchboard = switchboard_of(redis, redis_timeout_s=2)  # Redis has it to answer while we join
        await switchboard.join()
        switchboard.heard(0, bus.Happened([b"{}"]))
        redis_server.pause()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):  # as main does it
                    await switchboard.leave()
        finally:
            redis_server.resume()


async def test_what_came_into_the_inbox_while_the_node_stopped_waits_for_its_users(redis_server: RedisServer) -> None:
    keys = ClusterKeys("qp:")
    async with redis_server.client(decode_responses=False) as redis:
        switchboard = switchboard_of(redis)
        await switchboard.join()
        await redis.xadd(keys.inbox("n1"), {"c": encode(Command(op="send", id="m", to=To(users=["ann"]), data=1))})
        await switchboard.leave()
        assert await redis.llen(keys.kept("ann")) == 1
        assert not await redis.xlen(keys.inbox("n1"))
        assert await redis.hgetall(keys.nodes) == {}


@pytest.mark.parametrize(("late_s", "may_fire"), [(60, False), (0, True)])
async def test_after_a_start_jobs_wait_for_every_worker_but_not_for_ever(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, late_s: float, may_fire: bool
) -> None:
    monkeypatch.setattr(switchboard_module, "_LATE_WORKER_S", late_s)
    async with redis_server.client() as redis:
        switchboard = switchboard_of(redis, workers=2)
        end: Any = None  # nothing is sent to it
        await switchboard.join()
        assert not switchboard._may_fire()
        switchboard.ready(0, end)
        assert switchboard._may_fire() is may_fire
        switchboard.ready(1, end)
        assert switchboard._may_fire()
        switchboard.gone(1)  # later on one is enough
        assert switchboard._may_fire()
        switchboard.gone(0)
        assert not switchboard._may_fire()
        await switchboard.leave()
