"""Several nodes are one cluster: everybody is reached wherever he is, and nobody else is asked."""

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from quotepush.backend import Backend
from tests.support.redis_server import RedisServer
from tests.support.several_nodes import SeveralNodes, heard_by, several_nodes
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def nodes(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[SeveralNodes]:
    # No node dies here for good: one that stands still for a moment is not to be taken for dead.
    async with several_nodes(tmp_path, redis_server.url, lease_s=20, redis_timeout_s=10) as found:
        yield found


@pytest.fixture
async def backend(redis_server: RedisServer) -> AsyncIterator[Backend]:
    async with Backend(redis_server.url, timeout_s=30) as found:
        yield found


async def hear(client: RecordingClient, *data: Any) -> None:
    await wait_until(lambda: heard_by(client) == list(data), 15, f"{client.fd} has heard {data!r}")


async def commands_of(nodes: SeveralNodes) -> dict[str, float]:
    return {name: await server.metric("commands") for name, server in nodes.nodes.items()}


async def test_everybody_is_reached_wherever_he_is_and_no_other_node_is_asked(
    nodes: SeveralNodes, redis: Redis, backend: Backend
) -> None:
    ann1 = await nodes.connect("n1", "ann", ["vip"], ["AAPL"])
    ann2 = await nodes.connect("n2", "ann", [], ["AAPL", "600519.SH"])
    bob = await nodes.connect("n3", "bob", ["vip"], ["MSFT"])
    guest = await nodes.connect("n3")
    clients = {"ann1": ann1, "ann2": ann2, "bob": bob, "guest": guest}
    await nodes.registry_is_right(redis)
    assert len({client.fd for client in clients.values()}) == 4

    async def sent(sending: Any, to: dict[str, int], asked: set[str], *recipients: str) -> None:
        before = await commands_of(nodes)
        heard = {name: heard_by(client) for name, client in clients.items()}
        outcome = await sending
        assert (outcome.delivered, outcome.nodes, outcome.missing) == (sum(to.values()), to, ())
        for name, client in clients.items():
            await client.ping()  # whatever was sent before is here
            assert len(heard_by(client)) - len(heard[name]) == (name in recipients), name
        after = await commands_of(nodes)
        assert {node for node in after if after[node] > before[node]} == asked

    await sent(backend.send_to_user("ann", 1), {"n1": 1, "n2": 1}, {"n1", "n2"}, "ann1", "ann2")
    await sent(backend.send_to_user("bob", 2), {"n3": 1}, {"n3"}, "bob")
    await sent(backend.send_to_user("nobody", 3), {}, set())
    await sent(backend.send_to_conn(guest.fd, 4), {"n3": 1}, {"n3"}, "guest")
    await sent(backend.send_to_group("vip", 5), {"n1": 1, "n3": 1}, {"n1", "n3"}, "ann1", "bob")
    await sent(
        backend.send_to_users(["ann", "bob"], 6), {"n1": 1, "n2": 1, "n3": 1}, {"n1", "n2", "n3"},
        "ann1", "ann2", "bob",
    )  # fmt: skip
    await sent(
        backend.send_to_all(7, exclude=[bob.fd]), {"n1": 1, "n2": 1, "n3": 1}, {"n1", "n2", "n3"},
        "ann1", "ann2", "guest",
    )  # fmt: skip
    assert await backend.is_user_online("ann")
    assert sorted([conn async for conn in backend.user_conns("ann")]) == sorted([ann1.fd, ann2.fd])
    assert await backend.group_count("vip") == 2
    assert await backend.conn_count() == 4
    assert await backend.is_online(guest.fd)
    assert sorted([conn async for conn in backend.code_conns("sh600519")]) == [ann2.fd]
    await ann1.close()
    await nodes.registry_is_right(redis)
    assert [conn async for conn in backend.user_conns("ann")] == [ann2.fd]
    assert not await backend.is_online(ann1.fd)


async def test_ticks_reach_the_clients_of_every_node(nodes: SeveralNodes, redis: Redis) -> None:
    clients = [await nodes.connect(name, codes=["AAPL"]) for name in nodes.nodes]
    await publish(redis, "AAPL", last=10.5)
    for client in clients:
        await wait_until(lambda client=client: client.last("AAPL") == 10.5)


async def test_a_kept_message_for_a_user_who_moves_arrives_once_at_the_first_connection(
    nodes: SeveralNodes, redis: Redis, backend: Backend
) -> None:
    first = await nodes.connect("n1", "ann")
    await nodes.registry_is_right(redis)
    assert (await backend.send_to_user("ann", "here", delivery="kept")).delivered == 1
    await hear(first, "here")
    await first.close()
    await nodes.registry_is_right(redis)
    assert (await backend.send_to_user("ann", "away", delivery="kept")).kept == 1
    second = await nodes.connect("n2", "ann")
    await hear(second, "away")
    third = await nodes.connect("n3", "ann")
    await nodes.registry_is_right(redis)
    assert (await backend.send_to_user("ann", "both", delivery="kept")).delivered == 2
    await hear(third, "both")
    await hear(second, "away", "both")
    assert not await redis.exists("qp:kept:ann")


async def test_a_second_server_of_one_name_is_refused_in_one_line_and_the_first_goes_on(
    nodes: SeveralNodes, redis: Redis
) -> None:
    client = await nodes.connect("n1", "ann", codes=["AAPL"])
    await nodes.registry_is_right(redis)
    twin = nodes.make("n1", "twin")
    twin.spawn()
    assert await twin.wait() == 1
    (line,) = [line for line in twin.log().splitlines() if "is taken" in line]
    assert f"pid {nodes.nodes['n1'].pid}" in line
    assert "--node" in line
    await client.ping()
    await nodes.registry_is_right(redis)
    assert await nodes.nodes["n1"].metric("lease_held") == 1


async def test_a_restarted_node_has_its_name_at_once_and_no_fd_comes_twice(nodes: SeveralNodes, redis: Redis) -> None:
    before = await nodes.connect("n1")
    await nodes.nodes["n1"].kill()
    await wait_until(lambda: before.has_ended)
    await nodes.nodes["n1"].start()
    assert "waiting until its lease" not in nodes.nodes["n1"].log()
    after = await nodes.connect("n1")
    old, new = (client.fd.split(".") for client in (before, after))
    assert int(new[2]) > int(old[2])
    await nodes.registry_is_right(redis)


class Expected:
    """Who belongs where, by what backends have said so far, and what everybody must have heard."""

    def __init__(self, clients: list[RecordingClient]) -> None:
        self.user: dict[str, str] = {}
        self.groups: dict[str, set[str]] = {client.fd: set() for client in clients}
        self.heard: dict[str, list[Any]] = {client.fd: [] for client in clients}

    def sent(self, number: int, fds: set[str]) -> int:
        for fd in fds:
            self.heard[fd].append(number)
        return len(fds)

    def of_users(self, users: list[str]) -> set[str]:
        return {fd for fd, user in self.user.items() if user in users}

    def in_group(self, group: str) -> set[str]:
        return {fd for fd, groups in self.groups.items() if group in groups}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
async def test_nobody_ever_hears_what_is_for_others_whatever_is_bound_joined_and_sent(
    nodes: SeveralNodes, backend: Backend, seed: int
) -> None:
    chance = random.Random(seed)
    clients = [await nodes.connect(name) for name in nodes.nodes for _ in range(4)]
    fds = [client.fd for client in clients]
    users, groups = ["ann", "bob", "cy"], ["g", "h"]
    expected = Expected(clients)
    for number in range(150):
        fd, user, group = chance.choice(fds), chance.choice(users), chance.choice(groups)
        some = chance.sample(fds, 3)
        match chance.randrange(10):
            case 0:
                await backend.unbind_user(fd)
                expected.user.pop(fd, None)
                await backend.bind_user(fd, user)
                expected.user[fd] = user
            case 1:
                await backend.unbind_user(fd)
                expected.user.pop(fd, None)
            case 2:
                await backend.join_group(fd, group)
                expected.groups[fd].add(group)
            case 3:
                await backend.leave_group(fd, group)
                expected.groups[fd].discard(group)
            case 4:
                sent = await backend.send_to_user(user, number, exclude=some)
                assert sent.delivered == expected.sent(number, expected.of_users([user]) - {*some})
            case 5:
                sent = await backend.send_to_users(users[:2], number)
                assert sent.delivered == expected.sent(number, expected.of_users(users[:2]))
            case 6:
                sent = await backend.send_to_group(group, number)
                assert sent.delivered == expected.sent(number, expected.in_group(group))
            case 7:
                sent = await backend.send_to_conns(some, number)
                assert sent.delivered == expected.sent(number, {*some})
            case 8:
                sent = await backend.send_to_all(number, exclude=some)
                assert sent.delivered == expected.sent(number, {*fds} - {*some})
            case _:
                sent = await backend.send_to_user(user, number, delivery="kept")
                assert sent.delivered == expected.sent(number, expected.of_users([user]))
                if not sent.delivered:  # it waits, and would come to whoever is bound next
                    await backend.bind_user(fd, user)
                    expected.user[fd] = user
                    await hear(next(c for c in clients if c.fd == fd), *expected.heard[fd], number)
                    expected.heard[fd].append(number)
    for client in clients:
        await client.ping()
        assert heard_by(client) == expected.heard[client.fd]
