"""Redis behind Sentinel: real servers and sentinels, one of which is always lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import RedisError

from quotepush.cluster import hearing
from quotepush.cluster.hearing import hear
from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.publisher import BlockingPublisher
from quotepush.store import sentinel
from quotepush.store.address import parse_address
from quotepush.store.clients import Store, hang_up
from quotepush.store.sentinel import Finder
from tests.support.redis_sentinel import SentinelGroup, running_sentinels
from tests.support.redis_server import RedisServer
from tests.support.redis_tls import Certificates
from tests.support.waiting import wait_until


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinel, "_LOOK_S", 0.05)
    monkeypatch.setattr(hearing, "_LOOK_S", 0.05)


@pytest.fixture
async def client(redis_sentinel: SentinelGroup) -> AsyncIterator[Any]:
    made = Store(redis_sentinel.url).client()
    yield made
    await made.aclose()


async def cut_off(group: SentinelGroup) -> None:
    """Take the master from its sentinels, which replace it; who is connected to it goes on as if nothing were."""
    master = group.master
    async with master.client() as direct:
        entries = await direct.client_list()
        await direct.config_set("requirepass", "for nobody")
        for entry in entries:
            if entry["name"].startswith("sentinel-"):
                await direct.client_kill_filter(_id=entry["id"])
        await asyncio.to_thread(group.wait_until_replaced, master)
        assert (await direct.role())[0] == "master", "it does not know"


async def written(client: Any, key: str) -> None:
    async def is_written() -> bool:
        try:
            async with asyncio.timeout(2):
                await client.set(key, "1")
        except (RedisError, OSError):
            await hang_up(client)
            return False
        return True

    await wait_until(is_written, 15)


async def replicated(master: RedisServer) -> None:
    """A replica has all that was written to a master before."""
    async with master.client() as direct:

        async def is_replicated() -> bool:
            await direct.set("last", "1")  # WAIT looks at what its own connection has written
            return bool(await direct.wait(1, 1_000) == 1)

        await wait_until(is_replicated, 30)


async def test_a_client_writes_to_whoever_is_the_master(redis_sentinel: SentinelGroup, client: Any) -> None:
    await client.set("a", "1")
    async with redis_sentinel.master.client() as direct:
        assert await direct.get("a") == "1"
    old = redis_sentinel.master
    await replicated(old)
    await asyncio.to_thread(redis_sentinel.fail_over)
    master = redis_sentinel.master
    async with old.client() as direct:  # as the sentinels do, in ten seconds
        await direct.replicaof("127.0.0.1", master.port)
    await written(client, "b")
    await replicated(master)
    master.kill()
    await asyncio.to_thread(redis_sentinel.wait_until_replaced, master)
    await written(client, "c")
    async with redis_sentinel.master.client() as direct:
        assert await direct.mget("a", "b", "c") == ["1", "1", "1"]


@pytest.mark.usefixtures("impatient")
async def test_a_master_that_is_cut_off_is_left_without_waiting_for_its_end(
    redis_sentinel: SentinelGroup, client: Any
) -> None:
    await client.set("a", "1")
    await cut_off(redis_sentinel)

    async def is_there() -> bool:
        await client.set("b", "1")
        async with redis_sentinel.master.client() as direct:
            return await direct.get("b") == "1"

    await wait_until(is_there)


@pytest.mark.usefixtures("impatient")
async def test_who_hears_a_master_that_is_cut_off_is_told(redis_sentinel: SentinelGroup) -> None:
    said = hear(Store(redis_sentinel.url).links(), "news")
    assert await anext(said) is None
    await cut_off(redis_sentinel)
    with pytest.raises(ConnectionError, match="no longer the right one"):
        async with asyncio.timeout(10):
            await anext(said)
    anew = hear(Store(redis_sentinel.url).links(), "news")
    assert await anext(anew) is None
    async with redis_sentinel.master.client() as direct:
        await direct.publish("news", "x")
    assert await anext(anew) == b"x"
    await anew.aclose()


async def test_sentinels_that_hang_or_are_gone_hold_nobody_up(redis_sentinel: SentinelGroup, client: Any) -> None:
    redis_sentinel.sentinels[0].pause()
    redis_sentinel.sentinels[1].kill()
    await client.set("a", "1")
    redis_sentinel.sentinels[2].kill()
    await client.set("b", "1")  # what there is goes on
    await hang_up(client)
    with pytest.raises(redis.ConnectionError, match="no sentinel can say where quotes is"):
        await client.set("c", "1")
    redis_sentinel.sentinels[0].resume()
    await written(client, "c")


@asynccontextmanager
async def sentinel_that_says(epoch: int, port: int, flags: str = "master") -> AsyncIterator[int]:
    """Yield the port of what answers as a sentinel does, with what it is told to say."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = ["ip", "127.0.0.1", "port", str(port), "flags", flags, "config-epoch", str(epoch)]
        master = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        while request := await reader.read(65_536):
            writer.write(b"+OK\r\n" * request.count(b"SETINFO") + master.encode() * request.count(b"MASTER"))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def test_the_newest_word_of_the_sentinels_counts() -> None:
    async def found(*said: tuple[int, int] | tuple[int, int, str]) -> int:
        async with AsyncExitStack() as stack:
            ports = [await stack.enter_async_context(sentinel_that_says(*words)) for words in said]
            places = ",".join(f"127.0.0.1:{port}" for port in ports)
            return (await Finder(parse_address(f"redis+sentinel://{places}/quotes"), 1).master())[1]

    assert await found((3, 1), (4, 2)) == await found((4, 2), (3, 1), (4, 2)) == 2
    assert await found((3, 1, "master,s_down"), (3, 1)) == 1, "one that cannot reach it is not everybody"
    for down in ("master,s_down", "master,o_down", "slave", "master,disconnected"):
        with pytest.raises(redis.ConnectionError, match="know of no master of quotes that is up"):
            await found((4, 2, down), (3, 1))


async def test_the_role_replica_hears_a_replica_and_the_master_while_there_is_none(
    redis_sentinel: SentinelGroup,
) -> None:
    links = Store(f"{redis_sentinel.url}?role=replica").links(may_be_replica=True)
    (replica,) = (server for server in redis_sentinel.servers if server is not redis_sentinel.master)
    connection: Any = await links.connect()
    assert connection.port == replica.port
    assert await links.is_current(connection)
    await connection.disconnect()

    replica.kill()

    async def is_with_master() -> bool:
        try:
            found: Any = await links.connect()
        except RedisError:
            return False
        port = found.port
        is_right = await links.is_current(found)
        await found.disconnect()
        return bool(port == redis_sentinel.master.port and is_right)

    await wait_until(is_with_master)
    with_master: Any = await links.connect()
    replica.start()

    async def is_wrong_by_now() -> bool:
        return not await links.is_current(with_master)

    await wait_until(is_wrong_by_now, 15)
    await with_master.disconnect()


async def test_the_mirror_writes_all_of_it_again_to_a_new_master(redis_sentinel: SentinelGroup) -> None:
    client = registry_client(redis_sentinel.url)
    ids: list[int] = []
    mirror = RegistryMirror(
        client, prefix="qp:", node="n1", life="0.5", interval_s=0.01, check_interval_s=0.1, on_client_id=ids.append
    )
    mirror.open("n1.0.5", ["AAPL"])
    running = asyncio.create_task(mirror.run())
    await wait_until(lambda: mirror.healthy and not mirror.pending)
    old = redis_sentinel.master
    old.kill()
    await wait_until(lambda: not mirror.healthy)
    mirror.open("n1.0.6", ["MSFT"])
    await wait_until(lambda: mirror.healthy and not mirror.pending, 15)
    async with redis_sentinel.master.client() as direct:
        assert redis_sentinel.master is not old
        assert await direct.smembers("qp:codes") == {"AAPL", "MSFT"}
        assert [entry["name"] for entry in await direct.client_list(client_id=[str(ids[-1])])] == ["quotepush:n1:0.5"]
    running.cancel()
    await asyncio.wait([running])
    assert await mirror.finish()
    await client.aclose()


async def test_a_publisher_without_a_loop_follows_the_master(redis_sentinel: SentinelGroup) -> None:
    def publish(publisher: BlockingPublisher) -> list[int]:
        return publisher.publish([{"code": "AAPL", "last": 1}])

    with BlockingPublisher(redis_sentinel.url, give_up_s=20) as publisher:
        assert await asyncio.to_thread(publish, publisher) == [1]
        old = redis_sentinel.master
        await replicated(old)
        old.kill()
        assert await asyncio.to_thread(publish, publisher) == [2]


async def test_tls_and_the_passwords_of_servers_and_of_sentinels(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "certificates")
    with running_sentinels(tmp_path / "group", certificates=certificates) as group:
        group.set_passwords("of-servers", "of-sentinels")
        options = f"?sentinel_password=of-sentinels&{certificates.client_options}"
        url = group.url.replace("redis+", "rediss+").replace("//", "//:of-servers@") + options
        client = Store(url).client()
        await client.set("a", "1")
        await asyncio.to_thread(group.fail_over)
        await written(client, "b")
        await client.aclose()
        said = hear(Store(f"{url}&role=replica").links(may_be_replica=True), "news")
        assert await anext(said) is None
        await said.aclose()

        def publish() -> list[int]:
            with BlockingPublisher(url, give_up_s=5) as publisher:
                return publisher.publish([{"code": "AAPL", "last": 1}])

        assert await asyncio.to_thread(publish) == [1]
        for wrong, reason in (
            (url.replace("of-sentinels", "wrong"), "no sentinel can say where quotes is: invalid"),
            (url.replace("sentinel_password=of-sentinels&", ""), "no sentinel can say where quotes is: Auth"),
            (url.replace("of-servers", "wrong"), "invalid username-password pair"),
            (url.replace("/quotes", "/other"), "no sentinel can say where other is: No such master"),
            (url.replace("ssl_ca_certs", "ssl_ciphers=ALL&ssl_ca_path"), "certificate verify failed"),
        ):
            refused = Store(wrong).client()
            with pytest.raises(redis.RedisError, match=reason):
                await refused.ping()
            await refused.aclose()
