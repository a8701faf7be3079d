"""The library for backends: what it asks of Redis and of nodes, and what a caller is told when they are silent."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from quotepush import Backend, BlockingBackend
from quotepush.backend import Job
from quotepush.cluster.commands import Reply
from quotepush.errors import BackendUnavailable, CallRefused, NotOnline
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in
from tests.support.waiting import wait_until


async def test_a_message_goes_only_to_nodes_that_hold_a_recipient(redis_server: RedisServer) -> None:
    async with stand_in(redis_server, "n1") as n1, stand_in(redis_server, "n2") as n2, Backend(redis_server.url) as b:
        await n1.connect(1, user="ann", groups=["vip"])
        await n2.connect(1, user="bob")
        first, second = n1.fd(1), n2.fd(1)

        sent = await b.send_to_user("ann", {"x": 1}, exclude=[second])
        assert (sent.delivered, sent.nodes, sent.missing, sent.kept) == (1, {"n1": 1}, (), 0)
        (command,) = n1.heard
        assert (command.op, command.to.users, command.data, command.exclude) == ("send", ["ann"], {"x": 1}, [second])
        await b.send_to_group("vip", "hello")
        await b.send_to_conn(first, b"\x00\xff")
        assert n1.heard[-1].encoding == "base64" and n1.heard[-1].data == "AP8="
        assert not n2.heard

        assert (await b.send_to_users(["ann", "bob", "eve"], 1)).nodes == {"n1": 1, "n2": 1}
        assert (n1.heard[-1].to.users, n2.heard[-1].to.users) == (["ann"], ["bob"])
        assert (await b.send_to_conns([first, second, "n3.0.1"], 1)).missing == ("n3",)
        assert (await b.send_to_all(None)).nodes == {"n1": 1, "n2": 1}
        for nobody in (b.send_to_user("eve", 1), b.send_to_group("none", 1), b.send_to_conns([], 1)):
            assert (await nobody).nodes == {}


async def test_a_node_that_is_silent_is_missing_when_the_time_is_over(redis_server: RedisServer) -> None:
    both = stand_in(redis_server, "n1"), stand_in(redis_server, "n2")
    async with both[0] as n1, both[1] as n2, Backend(redis_server.url, timeout_s=2) as b:
        await n1.connect(1, groups=["g"])
        await n2.connect(1, groups=["g"])
        n2.answer = lambda command: None
        sent = await b.send_to_group("g", 1)
        assert (sent.nodes, sent.missing) == ({"n1": 1}, ("n2",))
        with pytest.raises(BackendUnavailable, match="n2 has not answered"):
            await b.close_conn(n2.fd(1))
        await n2.renew(age_ms=20_000)
        assert not await b.close_conn(n2.fd(1)), "its node is not alive"
        with pytest.raises(NotOnline):
            await b.bind_user(n2.fd(1), "ann")
        assert (await b.send_to_group("g", 1)).nodes == {"n1": 1}


async def test_what_nobody_could_carry_out_is_refused_before_it_is_sent(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, Backend(redis_server.url) as b:
        fd = await node.connect(1, user="ann")
        for call in (
            b.send_to_user("", 1), b.send_to_user("a\nb", 1), b.send_to_group("x" * 129, 1), b.send_to_conn("x", 1),
            b.send_to_user("ann", {1, 2}), b.send_to_user("ann", {"x": 1}, raw=True),
            b.send_to_user("ann", 1, delivery="soon"), b.close_conn(fd, code=1006),
            b.kick_user("ann", reason="x" * 124),
            b.set_session(fd, {"x": object()}), b.join_group(fd, ""), b.user_count(""),
        ):  # fmt: skip
            with pytest.raises(CallRefused) as refused:
                await call
            assert refused.value.error == "bad_request"
        with pytest.raises(CallRefused) as refused:
            await b.send_to_user("ann", "x" * (1 << 20))
        assert refused.value.error == "too_large"
        with pytest.raises(CallRefused) as refused:
            b.code_conns("no such")
        assert refused.value.error == "bad_code"
        with pytest.raises(TypeError, match="exlude"):
            await b.send_to_user("ann", 1, exlude=[fd])  # type: ignore[call-arg]
        assert not node.heard


async def test_every_call_that_sends_can_do_so_later(redis_server: RedisServer) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    async with Backend(redis_server.url, jobs_max=8) as b:
        made = [
            await b.send_to_conn("n1.0.1", 1, at=at), await b.send_to_conns(["n1.0.1", "n1.0.2"], b"\x00", at=at),
            await b.send_to_user("ann", "x", at=at, raw=True),
            await b.send_to_users(["ann"], 1, at=at, delivery="kept"),
            await b.send_to_group("vip", 1, every=60, exclude=["n1.0.1"]),
            await b.send_to_all({"x": 1}, at=timedelta(minutes=5), every=timedelta(days=1), count=3),
        ]  # fmt: skip
        assert all(type(job) is Job for job in made)
        assert [job.to for job in made] == [
            {"conns": ["n1.0.1"]}, {"conns": ["n1.0.1", "n1.0.2"]}, {"users": ["ann"]}, {"users": ["ann"]},
            {"group": "vip"}, {"all": True},
        ]  # fmt: skip
        assert made[0].at == int(at.timestamp() * 1000)
        assert (made[1].data, made[1].encoding, made[2].raw, made[3].delivery) == ("AA==", "base64", True, "kept")
        assert (made[4].every, made[4].exclude, made[5].every, made[5].left) == (60, ("n1.0.1",), 86_400, 3)

        def look() -> None:
            with BlockingBackend(redis_server.url) as twin:
                assert sorted(job.id for job in twin.jobs()) == sorted(job.id for job in made)
                assert twin.cancel_job(made[0].id) and not twin.cancel_job(made[0].id)
                assert twin.send_to_all("later", at=at).to == {"all": True}

        await asyncio.to_thread(look)
        assert len(await b.jobs()) == 6

        await b.send_to_all(1, every=1)
        await b.send_to_all(1, every=1)
        with pytest.raises(CallRefused) as refused:
            await b.send_to_all(1, every=1)
        assert refused.value.error == "job_limit"
        for call in (
            b.send_to_user("", 1, at=at), b.send_to_user("a", {"x": 1}, at=at, raw=True),
            b.send_to_user("a", 1, at=datetime(2026, 7, 25)), b.send_to_user("a", 1, every=0.5),
        ):  # fmt: skip
            with pytest.raises(CallRefused) as refused:
                await call
            assert refused.value.error == "bad_request"
        redis_server.kill()
        for asked in (b.send_to_all(1, at=at), b.cancel_job(made[1].id), b.jobs().all()):
            with pytest.raises(BackendUnavailable):
                await asked


async def test_what_a_node_refuses_is_raised_with_its_word(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, Backend(redis_server.url) as b:
        fd = await node.connect(1)
        node.answer = lambda command: Reply(command.id, "n1", error="wrong_key", message="that is not its conn_key")
        with pytest.raises(CallRefused, match=r"not its conn_key \(node n1\)") as refused:
            await b.bind_user(fd, "ann", conn_key="x")
        assert refused.value.error == "wrong_key"
        node.answer = lambda command: Reply(command.id, "n1")
        with pytest.raises(NotOnline):
            await b.get_session(fd)


async def test_a_thousand_calls_at_once_get_each_its_own_answer(redis_server: RedisServer) -> None:
    async with (
        stand_in(redis_server) as node,
        Backend(redis_server.url, timeout_s=30) as b,
        redis_server.client() as redis,
    ):
        await node.connect(1, user="ann")
        node.answer = lambda command: Reply(command.id, "n1", command.data)
        sent = await asyncio.gather(*(b.send_to_user("ann", n) for n in range(1000)))
        assert [one.delivered for one in sent] == list(range(1000))
        replies = await redis.pubsub_channels("qp:reply:*")
        assert len(replies) == 1
        assert int((await redis.info("clients"))["connected_clients"]) < 10


async def test_a_call_that_is_cancelled_harms_no_other(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, Backend(redis_server.url, timeout_s=30) as b:
        await node.connect(1, user="ann")
        node.answer = lambda command: None if command.data == "silent" else node.served(command)
        calls = [asyncio.create_task(b.send_to_user("ann", "silent")) for _ in range(20)]
        await wait_until(lambda: len(node.heard) == 20)
        others = [asyncio.create_task(b.send_to_user("ann", 1)) for _ in range(20)]
        for call in calls:
            call.cancel()
        await asyncio.sleep(0)
        others += [asyncio.create_task(b.send_to_user("ann", 1)) for _ in range(20)]
        others[5].cancel()
        done = await asyncio.gather(*others, return_exceptions=True)
        assert [one.delivered for one in done if not isinstance(one, BaseException)] == [1] * 39


async def test_a_redis_that_dies_is_told_at_once_and_found_again(redis_server: RedisServer) -> None:
    async with Backend(redis_server.url, timeout_s=5) as b:
        async with stand_in(redis_server) as node:
            await node.connect(1, user="ann")
            assert (await b.send_to_user("ann", 1)).delivered == 1
            node.answer = lambda command: None
            waiting = asyncio.create_task(b.send_to_user("ann", 2))
            await wait_until(lambda: len(node.heard) == 2)
            redis_server.kill()
            with pytest.raises(BackendUnavailable, match="may have been carried out"):
                await waiting
        for call in (b.send_to_user("ann", 1), b.send_to_all(1), b.conn_count(), b.is_online("n1.0.1000"), b.connect()):
            with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1"):
                await call
        redis_server.start()
        async with stand_in(redis_server) as node:
            await node.connect(1, user="ann")
            assert (await b.send_to_user("ann", 3)).delivered == 1


async def test_a_redis_that_hangs_is_told_within_the_time(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, Backend(redis_server.url, timeout_s=1) as b:
        await node.connect(1, user="ann")

        async def is_there() -> bool:
            try:
                return (await b.send_to_user("ann", 2)).delivered == 1
            except BackendUnavailable:
                return False

        await wait_until(is_there)
        redis_server.pause()
        for _ in range(2):
            calls = await asyncio.gather(*(b.send_to_user("ann", n) for n in range(50)), return_exceptions=True)
            assert {type(one) for one in calls} == {BackendUnavailable}
        async with Backend(redis_server.url, timeout_s=1) as new:
            with pytest.raises(BackendUnavailable):
                await new.send_to_all(1)
        redis_server.resume()
        await wait_until(is_there)


async def test_a_closed_backend_lets_nobody_wait(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node:
        await node.connect(1, user="ann")
        node.answer = lambda command: None
        b = Backend(redis_server.url, timeout_s=30)
        call = asyncio.create_task(b.send_to_user("ann", 1))
        await wait_until(lambda: node.heard)
        await b.aclose()
        await b.aclose()
        with pytest.raises(BackendUnavailable):
            await call
