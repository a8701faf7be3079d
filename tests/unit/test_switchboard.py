"""Main's side of the cluster."""

import contextlib

from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from quotepush.node import bus
from quotepush.node.switchboard import Switchboard
from quotepush.settings import Settings
from tests.support.redis_server import RedisServer


async def test_a_node_that_cannot_tell_its_last_events_leaves_nevertheless(redis_server: RedisServer) -> None:
    async with redis_server.client() as admin:
        await admin.execute_command("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
        async with redis_server.client(username="mute", password="secret") as redis:
            switchboard = Switchboard(
                Settings(node="n1", events=True), redis, ConnectionPool(),
                on_up=lambda: None, on_lost=lambda fault: None, on_removed=lambda: None,
            )  # fmt: skip
            await switchboard.join()
            assert set(await admin.hgetall("qp:nodes")) == {"n1"}
            switchboard.heard(0, bus.Happened([b"{}"]))
            with contextlib.suppress(RedisError):
                await switchboard.leave()
        assert await admin.hgetall("qp:nodes") == {}
