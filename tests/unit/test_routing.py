"""Commands reach the nodes that hold recipients, and the link on which answers come is whole or made anew."""

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from quotepush.cluster import hearing
from quotepush.cluster.commands import Command, To, decode_kept
from quotepush.cluster.line import Line
from quotepush.cluster.routing import Routing
from quotepush.errors import BackendUnavailable
from quotepush.store.clients import Store
from tests.support.door import door_to
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in
from tests.support.waiting import wait_until


def client(url: str) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None)


async def test_a_link_of_answers_that_only_looks_alive_is_made_anew(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "_PROBE_S", 60.0)  # it is noticed by what asks
    command = Command(op="send", to=To(users=["ann"]), data=1)
    async with stand_in(redis_server) as node, door_to(redis_server) as door:
        await node.connect(1, user="ann")
        async with client(redis_server.url) as direct:
            line = Line(direct, "here", 5)
            routing = Routing(line, Store(door.url).links(), "qp:", timeout_s=1)

            async def is_answered() -> bool:
                try:
                    return (await routing.send(command)).delivered == 1
                except BackendUnavailable:
                    return False

            await wait_until(is_answered)
            links = door.passed
            door.stall()
            assert (await routing.send(command)).missing == ("n1",)

            async def is_anew() -> bool:
                return not await is_answered() and door.passed > links

            await wait_until(is_anew, 30)
            door.flow()
            await wait_until(is_answered, 30)
            await routing.aclose()
            await line.aclose()


async def test_no_more_of_a_group_is_read_than_it_takes(redis_server: RedisServer) -> None:
    command = Command(op="send", to=To(group="g"), data=1)
    async with (
        stand_in(redis_server, "n1") as n1,
        stand_in(redis_server, "n2") as n2,
        client(redis_server.url) as redis,
    ):
        line = Line(redis, "here", 5)
        routing = Routing(line, Store(redis_server.url).links(), "qp:", timeout_s=5)
        await n2.renew(age_ms=60_000)
        await redis.sadd("qp:group:g", *(n2.fd(n) for n in range(5_000)))
        await redis.sadd("qp:group:g", n1.fd(1))
        await redis.config_resetstat()
        assert (await routing.send(command)).nodes.keys() == {"n1"}, "the only node that is alive is asked unread"
        assert "cmdstat_sscan" not in await redis.info("commandstats")

        await n2.renew()
        assert (await routing.send(command)).nodes.keys() == {"n1", "n2"}
        await n2.connect(1)
        await redis.srem("qp:group:g", n1.fd(1))
        assert (await routing.send(command)).nodes.keys() == {"n2"}
        await routing.aclose()
        await line.aclose()


async def test_what_is_kept_waits_in_the_inbox_of_a_node_or_in_the_list_of_a_user(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, client(redis_server.url) as redis:
        await node.connect(1, user="ann")
        await redis.sadd("qp:user:old", "gone.0.1")
        line = Line(redis, "here", 5)
        routing = Routing(line, Store(redis_server.url).links(), "qp:", timeout_s=1, kept_max=2, kept_ttl_s=60)
        for n in range(3):
            sent = await routing.send(Command(op="send", to=To(users=["ann", "old", "eve"]), data=n), kept=True)
        assert sent.kept == 3, "nobody answers from an inbox here"
        assert [command.op for command in node.heard] == ["poke"] * 3
        assert await redis.xlen("qp:inbox:n1") == await redis.xlen("qp:inbox:gone") == 3
        ((_, fields),) = await redis.xrange("qp:inbox:n1", count=1)
        assert b'"users":["ann"]' in fields[b"c"] and b'"keep":true' in fields[b"c"]
        kept = [decode_kept(entry) for entry in await redis.lrange("qp:kept:eve", 0, -1)]
        assert [(entry.data, entry.until - entry.at) for entry in kept if entry] == [(1, 60_000), (2, 60_000)]
        assert 0 < await redis.ttl("qp:kept:eve") <= 60
        assert not await redis.exists("qp:kept:ann")
        await routing.aclose()
        await line.aclose()
