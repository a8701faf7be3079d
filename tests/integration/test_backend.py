"""Every call of the library for backends on a server with two workers, and what it makes of a Redis that goes away."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quotepush import Backend, BlockingBackend
from quotepush.errors import BackendUnavailable, CallRefused, NotOnline
from quotepush.quote.tick import BadTick
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

Start = Callable[..., Awaitable[QuotepushServer]]


def fd(client: RecordingClient) -> str:
    name: str = client.hello["conn"]
    return name


def heard(client: RecordingClient) -> list[Any]:
    client.check()
    return [message["data"] for message in client.control if message["type"] == "message"]


@asynccontextmanager
async def six_clients(
    server: QuotepushServer, redis_server: RedisServer
) -> AsyncIterator[tuple[Backend, list[RecordingClient]]]:
    """A backend, and six clients of whom all watch A; that both workers have some is as good as sure."""
    async with (
        connected_clients(server.ws_url, 6, lambda n: ["A"]) as clients,
        Backend(redis_server.url, timeout_s=30) as backend,
    ):

        async def are_registered() -> bool:
            return await backend.code_count("A") == 6

        await wait_until(are_registered)
        yield backend, clients


async def test_each_call_does_what_it_says(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server(events=True)
    async with six_clients(server, redis_server) as (backend, clients), backend.events() as events:
        ann, ann2, bob, *others = clients
        all_fds = sorted(map(fd, clients))

        # users
        await backend.bind_user(fd(ann), "ann")
        await backend.bind_user(fd(ann2), "ann")
        await backend.bind_user(fd(bob), "bob/b b")
        assert (await backend.send_to_user("ann", {"n": 1})).nodes == {"test": 2}
        assert (await backend.send_to_users(["ann", "bob/b b", "eve"], "two")).delivered == 3
        assert (await backend.send_to_user("eve", 0)).delivered == 0
        sent = await backend.send_to_conns([fd(bob), "test.0.5", "gone.0.1"], b"\x00\xff")
        assert (sent.delivered, sent.missing) == (1, ("gone",))
        assert (await backend.send_to_conn(fd(others[0]), [3])).delivered == 1
        assert (await backend.send_to_all(None, exclude=[fd(ann)])).delivered == 5
        await wait_until(lambda: [len(heard(client)) for client in clients] == [2, 3, 3, 2, 1, 1])
        assert heard(ann) == [{"n": 1}, "two"]
        assert heard(bob)[1] == "AP8="

        # who is there
        async def ann_is_registered() -> bool:
            return await backend.user_count("ann") == 2 and await backend.conn_user(fd(bob)) == "bob/b b"

        await wait_until(ann_is_registered)
        assert sorted(await backend.user_conns("ann")) == sorted([fd(ann), fd(ann2)])
        assert sorted(await backend.users()) == ["ann", "bob/b b"]
        assert await backend.is_user_online("ann") and not await backend.is_user_online("eve")
        assert await backend.conn_user(fd(others[0])) is None
        assert await backend.is_online(fd(others[0])) and not await backend.is_online("test.0.5")
        assert await backend.conn_count() == 6
        assert await backend.codes() == ["A"] and await backend.conn_codes(fd(ann)) == ["A"]
        assert sorted(await backend.code_conns("a")) == all_fds
        assert sorted([session["conn"] async for session in backend.sessions()]) == all_fds
        stats = await backend.stats()
        assert (stats.conns, stats.codes, stats.nodes["test"].workers) == ({"test": 6}, 1, 2)

        # groups
        for client in (ann, bob):
            await backend.join_group(fd(client), "vip")
            await backend.join_group(fd(client), "vip")
        with pytest.raises(NotOnline):
            await backend.join_group("test.0.5", "vip")
        assert (await backend.send_to_group("vip", "g", exclude=[fd(bob)])).delivered == 1

        async def group_is_registered() -> bool:
            return await backend.group_count("vip") == 2

        await wait_until(group_is_registered)
        assert await backend.groups() == ["vip"]
        assert {s["user"] for s in await backend.group_sessions("vip")} == {"ann", "bob/b b"}
        await backend.leave_group(fd(ann), "vip")
        assert (await backend.dissolve_group("vip")).count == 1
        assert (await backend.send_to_group("vip", "nobody")).delivered == 0

        # session data
        assert await backend.set_session(fd(ann), {"a": 1, "b": 2}) == {"a": 1, "b": 2}
        assert await backend.update_session(fd(ann), {"b": None, "c": [3]}) == {"a": 1, "c": [3]}
        assert await backend.get_session(fd(ann)) == {"a": 1, "c": [3]}
        assert await backend.get_session(fd(others[0])) == {}
        with pytest.raises(CallRefused) as refused:
            await backend.set_session(fd(ann), {"a": "x" * 9000})
        assert refused.value.error == "too_large"
        with pytest.raises(NotOnline):
            await backend.get_session("test.0.5")

        # what they may have
        await backend.entitle_conn(fd(ann), {"codes": ["*.SH"], "max_codes": 1})
        assert (await ann.request("subscribe", codes=["AAPL"]))["rejected"][0]["error"] == "not_entitled"
        assert (await backend.entitle_user("ann", {})).count == 2
        assert (await ann.request("subscribe", codes=["AAPL"]))["rejected"] == []
        with pytest.raises(CallRefused):
            await backend.entitle_conn(fd(ann), {"codes": "AAPL"})
        with pytest.raises(NotOnline):
            await backend.entitle_conn("test.0.5", {})

        # goodbye
        await backend.unbind_user(fd(bob))
        assert await backend.close_conn(fd(bob), reason="bye")
        assert not await backend.close_conn(fd(bob))
        assert (await backend.kick_user("ann")).count == 2
        assert (await backend.close_conns([fd(others[0]), fd(ann)])).count == 1
        await wait_until(lambda: all(client.close_code == 4403 for client in (ann, ann2, bob, others[0])))

        async def two_are_left() -> bool:
            return await backend.conn_count() == 2

        await wait_until(two_are_left)
        assert not await backend.is_online(fd(ann))

        # events
        seen: list[tuple[str, Any]] = []
        async with asyncio.timeout(20):
            while ("user_offline", "ann") not in seen:
                event = await anext(events)
                seen.append((event["event"], event.get("uid")))
        assert ("user_online", "ann") in seen


async def test_messages_that_are_kept_come_when_their_user_is_back(
    start_server: Start, redis_server: RedisServer
) -> None:
    server = await start_server()
    async with six_clients(server, redis_server) as (backend, (first, second, *_)):
        sent = await backend.send_to_user("ann", "while away", delivery="kept")
        assert (sent.delivered, sent.kept) == (0, 1)
        await backend.bind_user(fd(first), "ann")
        await wait_until(lambda: heard(first) == ["while away"])
        sent = await backend.send_to_users(["ann", "bob"], "now", delivery="kept")
        assert (sent.delivered, sent.kept) == (1, 1)
        await backend.bind_user(fd(second), "bob")
        await wait_until(lambda: heard(second) == ["now"])
        assert heard(first) == ["while away", "now"]


async def test_conn_key_is_asked_for_where_the_server_wants_it(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server(require_conn_key=True)
    async with six_clients(server, redis_server) as (backend, (first, *_)):
        for key, word in (("", "key_needed"), ("wrong", "wrong_key")):
            with pytest.raises(CallRefused) as refused:
                await backend.bind_user(fd(first), "ann", conn_key=key)
            assert refused.value.error == word
        await backend.bind_user(fd(first), "ann", conn_key=first.hello["conn_key"])
        assert (await backend.send_to_user("ann", 1)).delivered == 1


async def test_a_thousand_messages_at_once_arrive_each_once(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server()
    async with six_clients(server, redis_server) as (backend, clients):
        users = [f"user {n}" for n in range(len(clients))]
        await asyncio.gather(*(backend.bind_user(fd(one), user) for one, user in zip(clients, users, strict=True)))
        calls = [(user, n) for n in range(167) for user in users]
        sent = await asyncio.gather(*(backend.send_to_user(user, n) for user, n in calls))
        assert [one.delivered for one in sent] == [1] * len(calls)
        await wait_until(lambda: all(len(heard(client)) == 167 for client in clients))
        assert all(sorted(heard(client)) == list(range(167)) for client in clients)


async def test_calls_go_on_when_redis_is_back(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server()
    async with six_clients(server, redis_server) as (backend, (first, *_)):
        await backend.bind_user(fd(first), "ann")
        outcomes: list[str] = []

        async def call() -> None:
            while True:
                try:
                    await backend.send_to_user("ann", 1)
                    outcomes.append("done")
                except BackendUnavailable:
                    outcomes.append("away")
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(call()) for _ in range(10)]
            await wait_until(lambda: len(outcomes) > 20)
            redis_server.kill()
            await wait_until(lambda: outcomes[-10:] == ["away"] * 10)
            await asyncio.to_thread(redis_server.start)

            async def is_delivered() -> bool:
                try:
                    return (await backend.send_to_user("ann", 2)).delivered == 1
                except BackendUnavailable:
                    return False

            await wait_until(is_delivered, 30)
            for task in calls:
                task.cancel()


async def test_ticks_are_published_as_a_whole(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server()
    async with six_clients(server, redis_server) as (backend, (first, *_)):
        assert await backend.publish([{"code": "a", "last": 1}, {"code": "A", "last": 2}]) == [1, 2]
        with pytest.raises(BadTick):
            await backend.publish([{"code": "A", "last": 3}, {"code": "A", "last": "x"}])
        await wait_until(lambda: first.last("A") == 2)


async def test_the_blocking_twin_serves_any_number_of_threads(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server()
    async with six_clients(server, redis_server) as (_, (first, second, *_)):
        backend = BlockingBackend(redis_server.url, timeout_s=30)
        counts: list[int] = []

        def send_some() -> None:
            for n in range(20):
                counts.append(backend.send_to_user("ann", n).delivered)

        def call() -> None:
            backend.bind_user(fd(first), "ann")
            threads = [threading.Thread(target=send_some) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(backend.sessions().all()) == 6
            assert list(backend.codes()) == ["A"]
            assert backend.is_online(fd(second))
            with pytest.raises(NotOnline):
                backend.get_session("test.0.5")

        try:
            await asyncio.to_thread(call)
        finally:
            await asyncio.to_thread(backend.close)
        assert counts == [1] * 160
        await wait_until(lambda: len(heard(first)) == 160)
        assert "quotepush backend" not in {thread.name for thread in threading.enumerate()}
