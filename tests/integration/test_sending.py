"""Messages to connections, users and groups, and what else a backend does with connections: two workers, real Redis."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.commands import Caller, calling
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

Start = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    client = redis_server.client()
    yield client
    await client.aclose()


@pytest.fixture
async def caller(redis: Redis) -> AsyncIterator[Caller]:
    async with calling(redis) as it:
        yield it


def fd(client: RecordingClient) -> str:
    name: str = client.hello["conn"]
    return name


def heard(client: RecordingClient) -> list[dict[str, Any]]:
    client.check()
    return [message for message in client.control if message["type"] == "message"]


async def test_a_message_reaches_connections_users_and_everybody(
    start_server: Start, redis: Redis, caller: Caller
) -> None:
    server = await start_server()
    async with connected_clients(server.ws_url, 6) as clients:
        a, b, *others = clients
        reply = await caller.call("bind", conn=fd(a), user="alice")
        assert (reply["node"], reply["delivered"], reply["fds"]) == ("test", 1, [fd(a)])
        await caller.call("bind", conn=fd(b), user="alice")
        reply = await caller.call("send", to={"users": ["alice", "nobody"]}, data={"n": 1})
        assert reply["delivered"] == 2
        reply = await caller.call("send", to={"conns": [fd(others[0]), "test.0.5"]}, data="hi")
        assert (reply["delivered"], reply["fds"]) == (1, [fd(others[0])])
        reply = await caller.call("send", to_all=True, to={"all": True}, data=[1], exclude=[fd(b)])
        assert reply["delivered"] == 5
        await wait_until(lambda: all(heard(c) for c in (a, b, *others)), 10)
        assert [(m["from"], m["data"]) for m in heard(a)] == [("user", {"n": 1}), ("all", [1])]
        assert [(m["from"], m["data"]) for m in heard(b)] == [("user", {"n": 1})]
        assert [(m["from"], m["data"]) for m in heard(others[0])] == [("conn", "hi"), ("all", [1])]
