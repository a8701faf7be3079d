"""What the registry says, without what belongs to the dead, and page by page."""

import pytest
import redis.asyncio

from quotepush.cluster.census import Census
from quotepush.cluster.line import Line
from quotepush.errors import BackendUnavailable, CallRefused
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in


async def test_what_belongs_to_a_node_that_is_not_alive_is_not_there(redis_server: RedisServer) -> None:
    async with stand_in(redis_server, "n1") as n1, stand_in(redis_server, "n2") as n2, redis_server.client() as raw:
        both = [await node.connect(1, user="ann", groups=["g"], codes=["A"]) for node in (n1, n2)]
        async with redis.asyncio.Redis.from_url(redis_server.url) as client:
            census = Census(Line(client, "here", 10), "qp:")
            assert sorted(await census.user_conns("ann")) == sorted(await census.code_conns("A")) == both
            assert await census.user_count("ann") == await census.group_count("g") == 2
            assert [await census.is_online(fd) for fd in both] == [True, True]
            await n2.renew(age_ms=11_000)
            assert await census.user_conns("ann") == await census.group_conns("g") == both[:1]
            assert await census.user_count("ann") == await census.code_audience("A") == 1
            assert [await census.is_online(fd) for fd in both] == [True, False]
            assert await census.conn_counts() == {"n1": 1}
            assert [session["conn"] for session in await census.sessions()] == both[:1]
            await raw.hset("qp:nodes", "n3", "nonsense")
            assert (await census.nodes()).keys() == {"n1"}


async def test_a_connection_is_there_only_in_a_life_that_can_have_given_it_out(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, redis.asyncio.Redis.from_url(redis_server.url) as client:
        census = Census(Line(client, "here", 10), "qp:")
        fd = await node.connect(1)
        await client.sadd("qp:node:n1", "0.5000", "1.1000", "0.1000:members", "x")
        assert await census.is_online(fd)
        for other in ("n1.1.1001", "n1.0.1002", "n1.0.999", "n2.0.1001", "n1.0", "x", "", "n1.0.1001 "):
            assert not await census.is_online(other), other


async def test_all_sessions_come_page_by_page_over_all_lives(redis_server: RedisServer) -> None:
    async with stand_in(redis_server, "n1") as n1, stand_in(redis_server, "n2") as n2:
        fds = set()
        for node in (n1, n2):
            for life in ("0.1000", "1.500"):
                node.life = life
                for n in range(3):
                    fds.add(await node.connect(n + (1000 if life == "1.500" else 0), user="u" if n else ""))
        async with redis.asyncio.Redis.from_url(redis_server.url) as client:
            census = Census(Line(client, "here", 10), "qp:")
            found, cursor, pages = [], "", 0
            while not pages or cursor:
                page = await census.sessions().page(cursor, 3)
                found += [session["conn"] for session in page.items]
                cursor, pages = page.cursor, pages + 1
            assert set(found) == fds and len(found) == len(fds) and pages >= 4
            await n1.renew(age_ms=20_000)  # the life that the cursor names is gone: the next one follows
            page = await census.sessions().page("n1/0.1000/0", 100)
            assert {session["conn"] for session in page.items} == {fd for fd in fds if fd.startswith("n2")}
            for cursor in ("x", "n1/0/0", "-1", "n1/0.1/x"):
                for listing in (census.sessions(), census.users()):
                    with pytest.raises(CallRefused):
                        await listing.page(cursor)


async def test_names_of_all_kinds_are_told_apart(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, redis.asyncio.Redis.from_url(redis_server.url) as client:
        await node.connect(1, user="g:x*", groups=["u:y"], codes=["A"])
        census = Census(Line(client, "here", 10), "qp:")
        assert (await census.users(), await census.groups(), await census.codes()) == (["g:x*"], ["u:y"], ["A"])


async def test_a_key_of_another_kind_is_trouble_and_no_bug(redis_server: RedisServer) -> None:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        await client.set("qp:user:ann", "x")
        with pytest.raises(BackendUnavailable, match="WRONGTYPE"):
            await Census(Line(client, "here", 10), "qp:").user_count("ann")
