"""A node dies, sleeps, loses its name or its Redis: the registry equals the live connections in the end."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.backend import Backend
from quotepush.cluster.commands import ClusterKeys, Command, Kept, encode
from quotepush.cluster.kept import keep
from quotepush.cluster.presence import records, redis_us
from quotepush.errors import BackendUnavailable
from tests.support.jumping_clock import JumpingClock
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.several_nodes import SeveralNodes, heard_by, several_nodes
from tests.support.steady_feed import publish, steady_feed
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

pytestmark = pytest.mark.fault

QUICK = {
    "heartbeat_ms": 200,
    "registry_check_s": 0.5,
    "probe_interval_s": 0.1,
    "probe_timeout_s": 0.5,
    "redis_timeout_s": 2,
    "lease_s": 4,  # longer than a node stands still on a busy machine
}


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def nodes(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[SeveralNodes]:
    async with several_nodes(tmp_path, redis_server.url, events="true", **QUICK) as found:
        yield found


@asynccontextmanager
async def events_of(redis: Redis) -> AsyncIterator[list[dict[str, Any]]]:
    """What is told on the channel of events."""
    heard: list[dict[str, Any]] = []
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe("qp:events")
        assert (await pubsub.get_message(timeout=10))["type"] == "subscribe"

        async def hear() -> None:
            async for message in pubsub.listen():
                heard.append(json.loads(message["data"]))

        task = asyncio.create_task(hear())
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.wait([task])


def feed_of(client: RecordingClient) -> str:
    """What its newest heartbeat says of the feed."""
    return str((client.heartbeat or {}).get("feed"))


async def is_cleared(redis: Redis, node: str) -> bool:
    return not await redis.exists(f"qp:node:{node}")


async def test_a_dead_nodes_state_is_cleared_once_and_its_return_is_like_a_new_one(
    redis_server: RedisServer, nodes: SeveralNodes, redis: Redis
) -> None:
    clients = await nodes.crowd()
    await nodes.registry_is_right(redis)
    async with Backend(redis_server.url, timeout_s=5) as backend, events_of(redis) as events:
        await nodes.nodes["n3"].kill()
        await wait_until(lambda: is_cleared(redis, "n3"), 30)
        await nodes.registry_is_right(redis)
        await nodes.sends_are_right(backend, 1)
        dead = {client.fd for client in clients["n3"]}
        await wait_until(lambda: sum(event["event"] == "close" for event in events) >= len(dead))
        gone = {f"u-n3-{n}" for n in range(3)}
        await wait_until(lambda: sum(event["event"] == "user_offline" for event in events) >= len(gone))
        closes = Counter(event["fd"] for event in events if event["event"] == "close")
        assert closes == dict.fromkeys(dead, 1)
        assert {event["uid"] for event in events if event["event"] == "user_offline"} == gone
        cleared = [await nodes.nodes[name].metric("nodes_cleared") for name in ("n1", "n2")]
        assert sorted(cleared) == [0, 1]
        await nodes.nodes["n3"].start()
        for n in range(3):
            await nodes.connect("n3", f"u-n3-{n}", codes=["AAPL"])
        await nodes.registry_is_right(redis)
        await nodes.sends_are_right(backend, 2)
    assert await nodes.nodes["n1"].metric("nodes_cleared") + await nodes.nodes["n2"].metric("nodes_cleared") == 1


@pytest.mark.long
@pytest.mark.parametrize("only_main", [True, False], ids=["main", "all of it"])
async def test_a_node_that_sleeps_for_longer_than_its_lease_is_back_with_all_its_connections(
    redis_server: RedisServer, nodes: SeveralNodes, redis: Redis, only_main: bool
) -> None:
    clients = await nodes.crowd()
    await nodes.registry_is_right(redis)
    async with (
        Backend(redis_server.url, timeout_s=2) as hasty,  # so long it waits for the one that sleeps
        Backend(redis_server.url, timeout_s=5) as backend,
    ):
        nodes.pause("n3", only_main=only_main)
        sent = await hasty.send_to_user("u-n3-0", "while it slept", delivery="kept")
        assert (sent.delivered, sent.kept) == (0, 1)

        async def is_taken_for_dead() -> bool:
            return sum([await nodes.nodes[name].metric("nodes_cleared") for name in ("n1", "n2")]) >= 1

        await wait_until(is_taken_for_dead, 30)
        assert await backend.group_count("all") == 12
        moved = await nodes.connect("n1", "u-n3-0")  # the user has come to another node meanwhile
        await wait_until(lambda: heard_by(moved) == ["while it slept"], 15)
        nodes.resume("n3", only_main=only_main)
        await nodes.registry_is_right(redis, 30)
        for client in clients["n3"]:
            await client.ping()
            assert heard_by(client) == []  # it was his, and he has it
        assert heard_by(moved) == ["while it slept"]
        await nodes.sends_are_right(backend, 1)


@pytest.mark.parametrize("returns", [True, False], ids=["it comes back", "another clears up after it"])
async def test_messages_that_a_node_had_in_hand_when_it_was_killed_arrive(
    redis_server: RedisServer, redis: Redis, tmp_path: Path, returns: bool
) -> None:
    keys = ClusterKeys("qp:")
    async with several_nodes(tmp_path, redis_server.url, ["n1", "n2"], workers=1, **QUICK) as nodes:
        await nodes.connect("n1", "ann")
        await nodes.registry_is_right(redis)
        server = nodes.nodes["n1"]
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)  # so that nothing is delivered
        now_ms = await redis_us(redis) // 1000
        await keep(redis, keys, "ann", [Kept(now_ms, now_ms + 60_000, n, id=f"m{n}") for n in range(5)], 100)
        await redis.publish(keys.to_node("n1"), encode(Command(op="collect", user="ann")))
        await wait_until(lambda: redis.exists(keys.taken("n1")))

        async def are_out_of_the_list() -> bool:
            return not await redis.exists(keys.kept("ann"))

        await wait_until(are_out_of_the_list)
        for pid in (server.pid, worker):
            os.kill(pid, signal.SIGKILL)
        await server.kill()
        await redis.rpush(keys.kept("ann"), encode(Kept(now_ms, now_ms + 60_000, 5, id="m5")))
        if returns:
            await server.start()
        client = await nodes.connect("n1" if returns else "n2", "ann")
        await wait_until(lambda: len(heard_by(client)) == 6, 30)
        heard = heard_by(client)
        # At the other node she has what waits there at once; what the dead one had comes when its lease has ended.
        assert heard == [*range(6)] or (not returns and heard == [5, *range(5)])

        async def is_nothing_left() -> bool:
            return not await redis.exists(keys.taken("n1"), keys.kept("ann"))

        await wait_until(is_nothing_left)


@pytest.mark.long
async def test_a_node_that_sleeps_and_wakes_around_its_lease_again_and_again(
    redis_server: RedisServer, nodes: SeveralNodes, redis: Redis
) -> None:
    """So that it comes back before, while and after others clear up after it."""
    await nodes.crowd()
    await nodes.registry_is_right(redis)
    async with Backend(redis_server.url, timeout_s=5) as backend:
        for sleep_s in (3.8, 4.4, 5.0, 5.6, 6.2):
            nodes.pause("n3", only_main=sleep_s < 5.0)
            await asyncio.sleep(sleep_s)  # the very length is what is tried
            nodes.resume("n3")
        await nodes.registry_is_right(redis, 30)
        await nodes.sends_are_right(backend, 1)


@pytest.mark.long
async def test_whoever_has_lost_its_name_while_it_slept_ends_and_touches_nothing_of_the_new_one(
    redis_server: RedisServer, nodes: SeveralNodes, redis: Redis
) -> None:
    clients = await nodes.crowd(3)
    await nodes.registry_is_right(redis)
    sleeper = nodes.nodes["n3"]
    nodes.pause("n3", only_main=True)
    heir = nodes.nodes["n3"] = nodes.make("n3", "heir")
    await heir.start()
    fresh = [await nodes.connect("n3", f"new-{n}", ["all"], ["AAPL", "NEW"]) for n in range(3)]
    nodes.nodes["n3"] = sleeper
    nodes.resume("n3", only_main=True)
    nodes.nodes["n3"] = heir
    assert await sleeper.wait() == 1
    (line,) = [line for line in sleeper.log().splitlines() if "is taken" in line]
    assert f"pid {heir.pid}" in line
    for client in clients["n3"]:
        await wait_until(lambda client=client: client.has_ended)
        assert client.close_code == 1012
    await nodes.registry_is_right(redis, 40)
    assert all(not client.has_ended for client in fresh)
    async with Backend(redis_server.url, timeout_s=5) as backend:
        await nodes.sends_are_right(backend, 1)


@pytest.mark.long
async def test_a_redis_that_was_emptied_is_filled_again(
    redis_server: RedisServer, nodes: SeveralNodes, redis: Redis
) -> None:
    await nodes.crowd()
    await nodes.registry_is_right(redis)
    async with Backend(redis_server.url, timeout_s=5) as backend:
        await redis.flushall()
        await nodes.registry_is_right(redis, 30)

        async def are_all_there() -> bool:
            return len(await records(redis, ClusterKeys("qp:"))) == 3

        await wait_until(are_all_there, 15)
        await nodes.sends_are_right(backend, 1)
    assert [await server.metric("nodes_cleared") for server in nodes.nodes.values()] == [0, 0, 0]


@pytest.mark.long
async def test_feed_and_registry_are_lost_each_on_its_own(redis_server: RedisServer, tmp_path: Path) -> None:
    registry = RedisServer(tmp_path / "registry")
    registry.start()
    try:
        async with (
            several_nodes(tmp_path, redis_server.url, registry_redis=registry.url, **QUICK) as nodes,
            registry.client() as redis,
            Backend(registry.url, feed_url=redis_server.url, timeout_s=5) as backend,
        ):
            clients = [client for some in (await nodes.crowd(4)).values() for client in some]
            await nodes.registry_is_right(redis)
            async with steady_feed(redis_server.url, ["AAPL"], 100):
                registry.kill()
                with pytest.raises(BackendUnavailable):
                    await backend.send_to_all("nobody hears it")
                late = await nodes.connect("n2", "late", codes=["AAPL"])
                count = [client.received for client in clients]
                await wait_until(
                    lambda: all(c.received > n + 20 for c, n in zip(clients, count, strict=True)), 20,
                    "ticks go on without the registry",
                )  # fmt: skip
                registry.start()  # empty
                await nodes.registry_is_right(redis, 30)

                async def commands_are_heard() -> bool:
                    return all([await server.metric("commands_up") == 1 for server in nodes.nodes.values()])

                await wait_until(commands_are_heard, 20)
                redis_server.kill()
                await wait_until(lambda: all(feed_of(client) == "down" for client in clients), 20)
                await nodes.sends_are_right(backend, 1)
                await late.close()
                await nodes.registry_is_right(redis)
                redis_server.start()
                await wait_until(lambda: all(feed_of(client) == "ok" for client in clients), 20)
            async with redis_server.client() as feed_redis:

                async def has_reached_all() -> bool:
                    return await publish(feed_redis, "AAPL", last=4711.0) == len(nodes.nodes)

                await wait_until(has_reached_all)
            await wait_until(lambda: all(client.last("AAPL") == 4711.0 for client in clients), 20)
    finally:
        registry.kill()


@pytest.mark.long
async def test_a_clock_that_jumps_kills_nobody_and_loses_nothing(
    redis_server: RedisServer, redis: Redis, tmp_path: Path
) -> None:
    clock = JumpingClock(tmp_path / "clock")
    async with several_nodes(tmp_path, redis_server.url, ["n1", "n2"], **QUICK) as nodes:
        await nodes.start("n3", environment=clock.environment)
        clients = await nodes.crowd(3)
        await nodes.registry_is_right(redis)
        async with Backend(redis_server.url, timeout_s=5) as backend:
            assert (await backend.send_to_user("away", "kept", delivery="kept")).kept == 1
            for number, offset_s in enumerate((7 * 86_400, -7 * 86_400, 0)):
                clock.jump_to(offset_s)
                assert await nodes.nodes["n3"].metric("lease_held") == 1
                assert "n3" in await records(redis, ClusterKeys("qp:"))
                await nodes.sends_are_right(backend, number)
                # A worker that begins now has fds of its own all the same.
                known = {client.fd for client in nodes.clients}
                assert (await nodes.connect("n3", f"after-{number}")).fd not in known
                await nodes.registry_is_right(redis)
            clock.jump_to(7 * 86_400)
            back = await nodes.connect("n3", "away")
            await wait_until(lambda: heard_by(back) == ["kept"], 15)
        for some in clients.values():
            for client in some:
                assert not client.has_ended
        assert [await server.metric("nodes_cleared") for server in nodes.nodes.values()] == [0, 0, 0]


async def test_a_start_that_cannot_clear_what_its_earlier_life_left_leaves_the_record_that_leads_to_it(
    redis_server: RedisServer, redis: Redis, tmp_path: Path
) -> None:
    await redis.sadd("qp:node:n1", "0.5")
    await redis.set("qp:node:n1:0.5", "no set")  # Redis refuses to read it
    server = QuotepushServer(tmp_path, redis_server.url, node="n1", lease_s=2)
    server.spawn()
    assert await server.wait() == 1
    assert "WRONGTYPE" in server.log()
    assert set(await redis.hgetall("qp:nodes")) == {"n1"}
