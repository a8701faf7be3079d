"""A Redis Cluster of three nodes, by the clients and links that are made for it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from quotepush.cluster import hearing
from quotepush.cluster.hearing import hear
from quotepush.cluster.nodes import cut_connection, purge_life
from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.publisher import BlockingPublisher, Publisher
from quotepush.store.clients import Store, hang_up
from tests.support.redis_cluster import RedisCluster, running_cluster
from tests.support.redis_tls import Certificates
from tests.support.waiting import wait_until

KEYS = [f"key:{n}" for n in range(50)]


@pytest.fixture
def with_replicas(tmp_path: Path) -> Iterator[RedisCluster]:
    with running_cluster(tmp_path / "cluster", replicas=1) as found:
        yield found


@pytest.fixture
async def client(redis_cluster: RedisCluster) -> AsyncIterator[Any]:
    made = Store(redis_cluster.url).client()
    yield made
    await made.aclose()


async def set_all(client: Any, value: str) -> None:
    pipeline = client.pipeline(transaction=False)
    for key in KEYS:
        pipeline.execute_command("SET", key, value)
    async with asyncio.timeout(5):
        await pipeline.execute()


async def get_all(client: Any) -> list[bytes]:
    pipeline = client.pipeline(transaction=False)
    for key in KEYS:
        pipeline.get(key)
    replies: list[bytes] = await pipeline.execute()
    return replies


async def test_a_pipeline_goes_to_all_nodes_and_comes_back_in_order(redis_cluster: RedisCluster, client: Any) -> None:
    pipeline = client.pipeline(transaction=False)
    for n, key in enumerate(KEYS):
        pipeline.set(key, n)
        pipeline.execute_command("INCR", key)
    pipeline.execute_command("TIME")
    pipeline.publish("news", b"\xff")
    pipeline.execute_command("PUBLISH", "news", "x")
    *replies, now, heard, heard2 = await pipeline.execute()
    assert replies == [reply for n in range(50) for reply in (True, n + 1)]
    assert (heard, heard2) == (0, 0) and now[0] > 1_700_000_000
    assert [redis_cluster.ask(server, "DBSIZE") > 5 for server in redis_cluster.servers] == [True] * 3
    assert await client.eval("return redis.call('GET', KEYS[1])", 1, KEYS[7]) == b"8"
    assert await client.time() >= now
    assert await client.ping()


async def test_what_one_command_is_refused_spoils_no_other(redis_cluster: RedisCluster, client: Any) -> None:
    pipeline = client.pipeline(transaction=False)
    for key in KEYS:
        pipeline.execute_command("SADD", key, 1)
        pipeline.execute_command("INCR", key)
    replies = await pipeline.execute(raise_on_error=False)
    assert replies[::2] == [1] * 50
    assert all(isinstance(reply, ResponseError) for reply in replies[1::2])


async def test_keys_that_move_are_followed(redis_cluster: RedisCluster, client: Any) -> None:
    await set_all(client, "1")
    for key in KEYS[:5]:
        source = redis_cluster.master_of(key)
        redis_cluster.move(key, next(server for server in redis_cluster.servers if server is not source))
    assert await get_all(client) == [b"1"] * 50
    await set_all(client, "2")
    assert await client.get(KEYS[0]) == b"2"


async def test_a_node_that_is_gone_is_an_error_until_it_is_back(redis_cluster: RedisCluster, client: Any) -> None:
    await set_all(client, "1")
    first, *others = redis_cluster.servers  # the first has the first slot, and is the first one of the address
    first.kill()
    with pytest.raises(RedisConnectionError):
        await set_all(client, "2")
    for _ in range(3):
        with pytest.raises(RedisError):
            await set_all(client, "2")
    first.start()

    async def is_back() -> bool:
        try:
            await set_all(client, "3")
        except (RedisError, TimeoutError):
            return False
        return True

    await wait_until(is_back, 30)
    for server in others:
        server.restart()
    await wait_until(is_back, 30)


async def test_a_replica_takes_the_place_of_its_master(with_replicas: RedisCluster) -> None:
    cluster = with_replicas
    client = Store(cluster.url).client()
    await set_all(client, "1")
    async with cluster.servers[0].client() as direct:
        await direct.wait(1, 5_000)
    cluster.servers[0].kill()

    async def is_written() -> bool:
        try:
            async with asyncio.timeout(2):
                await set_all(client, "2")
        except (RedisError, TimeoutError):
            await hang_up(client)
            return False
        return True

    await wait_until(is_written, 20)
    anew = Store(cluster.url).client()  # although the first node of the address is gone
    assert await get_all(anew) == [b"2"] * 50
    await anew.aclose()
    await client.aclose()


async def test_a_node_that_hangs_holds_nobody_up_longer_than_it_takes_to_replace_it(
    with_replicas: RedisCluster,
) -> None:
    cluster = with_replicas
    client = Store(cluster.url).client()
    await set_all(client, "1")
    silent = cluster.servers[0]
    silent.pause()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await set_all(client, "2")
    await asyncio.to_thread(cluster.wait_until_replaced, silent, "")
    async with asyncio.timeout(5):
        await set_all(client, "2")  # and not again to where it went before
    anew = Store(cluster.url).client()
    async with asyncio.timeout(5):
        assert await get_all(anew) == [b"2"] * 50, "although the first node of the address hangs"
        said = hear(Store(cluster.url).links(), "a")
        assert await anext(said) is None
    silent.resume()
    await said.aclose()
    await anew.aclose()
    await client.aclose()


async def test_nobody_there_is_an_error_like_any_other(tmp_path: Path) -> None:
    client = Store("redis+cluster://127.0.0.1:1,127.0.0.1:2").client()
    for ask in (client.ping, lambda: set_all(client, "1"), Store("redis+cluster://127.0.0.1:1").links().connect):
        with pytest.raises(RedisConnectionError):
            await ask()
    with pytest.raises(RedisConnectionError):
        Store("redis+cluster://127.0.0.1:1").blocking_client(1).ping()


async def test_a_server_that_is_no_cluster_is_told(redis_server: Any) -> None:
    url = redis_server.url.replace("redis://", "redis+cluster://")
    client = Store(url).client()
    with pytest.raises(RedisConnectionError, match="Cluster mode is not enabled"):
        await client.ping()
    with pytest.raises(RedisConnectionError, match="no Redis Cluster"):
        await Store(url).links().connect()


async def test_a_channel_is_heard_from_any_node_as_long_as_it_has_its_cluster(
    redis_cluster: RedisCluster, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = Store(redis_cluster.url).links()
    said = hear(links, "a", "b")
    assert await anext(said) is None
    for n, channel in enumerate("abab"):
        await client.publish(channel, str(n))
    found = [await anext(said) for _ in range(4)]
    # The messages of one channel go through one node, so they keep their order.
    assert [n for n in found if n in (b"0", b"2")] == [b"0", b"2"]
    assert [n for n in found if n in (b"1", b"3")] == [b"1", b"3"]

    connection: Any = await links.connect()
    here = next(server for server in redis_cluster.servers if server.port == connection.port)
    assert await links.is_current(connection)
    for server in redis_cluster.servers:
        if server is not here:
            server.pause()  # a node without the others hears nothing, and knows it
    monkeypatch.setattr(hearing, "_LOOK_S", 0.05)

    async def is_wrong() -> bool:
        return not await links.is_current(connection)

    await wait_until(is_wrong, 30)
    await connection.disconnect()
    with pytest.raises(OSError):
        async with asyncio.timeout(10):
            await anext(said)
    for server in redis_cluster.servers:
        server.resume()

    async def is_heard_again() -> bool:
        anew = hear(links, "a")
        try:
            return await anext(anew) is None
        except (RedisError, OSError):
            return False
        finally:
            await anew.aclose()

    await wait_until(is_heard_again, 30)


async def sets_in(cluster: RedisCluster) -> dict[str, set[str]]:
    found = {}
    for server in cluster.servers:
        for key in cluster.ask(server, "KEYS", "qp:*"):
            found[key] = set(cluster.ask(server, "SMEMBERS", key))
    return found


async def test_a_mirror_notices_a_node_that_came_back_empty(redis_cluster: RedisCluster) -> None:
    client = registry_client(redis_cluster.url)
    mirror = RegistryMirror(client, prefix="qp:", node="n1", life="0.5", interval_s=0.01, check_interval_s=0.1)
    codes = [f"C{n}" for n in range(20)]
    mirror.open("n1.0.5", codes)
    running = asyncio.create_task(mirror.run())
    await wait_until(lambda: mirror.healthy and not mirror.pending)
    whole = await sets_in(redis_cluster)
    assert whole["qp:fd:n1.0.5"] == whole["qp:codes"] == set(codes)
    for server in redis_cluster.servers:
        server.restart()
        redis_cluster.wait_until(redis_cluster.is_well, "it is back")

        async def is_whole() -> bool:
            try:
                return await sets_in(redis_cluster) == whole
            except ResponseError:  # that server does not know yet that all are there again
                return False

        await wait_until(is_whole, 30)
    assert mirror.repairs == 0, "it did not have to be found"
    redis_cluster.move(
        "qp:codes", next(s for s in redis_cluster.servers if s is not redis_cluster.master_of("qp:codes"))
    )
    mirror.open("n1.0.6", ["MSFT"])
    await wait_until(lambda: mirror.healthy and not mirror.pending, 30)
    assert "MSFT" in (await sets_in(redis_cluster))["qp:codes"]
    running.cancel()
    await asyncio.wait([running])
    assert await mirror.finish()
    assert await sets_in(redis_cluster) == {}
    await client.aclose()


async def test_the_connections_of_a_dead_worker_are_cut_and_its_life_is_purged(
    redis_cluster: RedisCluster, client: Any
) -> None:
    dead = registry_client(redis_cluster.url)
    mirror = RegistryMirror(dead, prefix="qp:", node="n1", life="0.5", interval_s=0.01)
    mirror.open("n1.0.5", [f"C{n}" for n in range(20)])
    running = asyncio.create_task(mirror.run())
    await wait_until(lambda: mirror.healthy and not mirror.pending)
    running.cancel()
    await asyncio.wait([running])
    assert await cut_connection(client, "n1", "0.5", 1)
    for server in redis_cluster.servers:
        assert "name=quotepush:n1:0.5" not in redis_cluster.ask(server, "CLIENT", "LIST")
    assert not await cut_connection(client, "n1", "0.5", 1)
    assert await purge_life(client, "qp:", "n1", "0.5") == 1
    assert await sets_in(redis_cluster) == {}
    await dead.aclose()


async def test_both_publishers_log_in_one_slot(redis_cluster: RedisCluster) -> None:
    async with Publisher(redis_cluster.url, copies="quote.{code}") as publisher:
        assert await publisher.publish([{"code": code, "last": 1} for code in ("AAPL", "MSFT", "AAPL")]) == [1, 1, 2]
        holder = redis_cluster.master_of("{qp:}log")
        assert redis_cluster.ask(holder, "XLEN", "{qp:}log") == 1

        def publish_blocking() -> list[int]:
            with BlockingPublisher(redis_cluster.url) as blocking:
                return blocking.publish([{"code": "MSFT", "last": 2}])

        assert await asyncio.to_thread(publish_blocking) == [2]
        holder.restart()
        assert await publisher.publish([{"code": "AAPL", "last": 3}]) == [1], "it came back empty"


async def test_a_cluster_speaks_tls_with_everybody(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "certificates")
    with running_cluster(tmp_path / "cluster", certificates=certificates) as cluster:
        url = f"rediss+cluster://{cluster.tls_places}?{certificates.client_options}"
        client = Store(url).client()
        await set_all(client, "1")
        assert await get_all(client) == [b"1"] * 50
        said = hear(Store(url).links(), "a")
        assert await anext(said) is None
        await client.publish("a", "x")
        assert await anext(said) == b"x"
        await said.aclose()
        await client.aclose()
        await asyncio.to_thread(Store(url).blocking_client(5).ping)
        without = Store(f"rediss+cluster://{cluster.tls_places}").client()
        with pytest.raises(RedisConnectionError, match="certificate verify failed"):
            await without.ping()
        await without.aclose()
