"""A server with two workers on each kind of Redis: ticks, messages and the registry, whatever happens to a Redis."""

import asyncio
import datetime
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from redis.exceptions import RedisError

import quotepush
from quotepush import Backend
from quotepush.errors import BackendUnavailable, RedisUnavailable
from quotepush.store.clients import Store, hang_up
from tests.support.command import run_quotepush
from tests.support.numbered_feed import NumberedFeed
from tests.support.redis_cluster import running_cluster
from tests.support.redis_sentinel import running_sentinels
from tests.support.redis_server import RedisServer
from tests.support.redis_tls import Certificates
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.store import running
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

PLAIN, LOGGED = "PLAIN.US", "LOGGED.US"

Start = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    servers: list[QuotepushServer] = []

    async def started(url: str, **settings: Any) -> QuotepushServer:
        # A master that hangs is found out.
        server = QuotepushServer(tmp_path / f"server-{len(servers)}", url, **{"probe_timeout_s": 1.5, **settings})
        servers.append(server)
        await server.start()
        return server

    yield started
    for server in servers:
        try:
            await server.stop()
        finally:
            server.kill_everything()


class Stage:
    """Six clients of a server, of whom two are ann and three in a group; a feed that publishes in both ways."""

    def __init__(self, clients: Sequence[RecordingClient], feed: NumberedFeed, plain: Any, backend: Backend) -> None:
        self.clients = clients
        self.feed = feed
        self.plain = plain
        self.backend = backend
        self._said = 0

    async def is_right(self) -> None:
        """See that every kind of tick and of message comes to whom it is for."""
        await self.is_right_but_for_the_log()
        newest = self.feed.newest[LOGGED]
        await wait_until(lambda: self.feed.newest[LOGGED] > newest, 30, "the log takes batches")
        newest = self.feed.newest[LOGGED]

        def has_come() -> bool:
            return all(client.rows[LOGGED]["seq"] >= newest for client in self.clients)

        await wait_until(has_come, 30, "a tick of the log")

    async def is_right_but_for_the_log(self) -> None:
        """See that plain ticks and messages come to whom they are for."""
        self._said += 1
        said = self._said

        async def is_heard() -> bool:
            try:
                async with asyncio.timeout(2):
                    await self.plain.publish(f"quote.{PLAIN}", b'{"last":%d}' % said)
            except (RedisError, OSError):
                await hang_up(self.plain)
            await asyncio.sleep(0.05)
            return all(client.last(PLAIN) == said for client in self.clients)

        await wait_until(is_heard, 30, "a plain tick")
        await wait_until(lambda: self._reach(2, lambda: self.backend.send_to_user("ann", said)), 30, "sends to a user")
        await wait_until(lambda: self._reach(3, lambda: self.backend.send_to_group("g", said)), 30, "sends to a group")
        await wait_until(lambda: self._reach(6, lambda: self.backend.send_to_all(said)), 30, "sends to all")

    async def serves_backends(self) -> None:
        """See that what waits, what is sent later, what is counted and what is told work, too."""
        backend, (first, *_) = self.backend, self.clients
        async with backend.events() as events:
            sent = await backend.send_to_users(["ann", "eve"], "kept", delivery="kept")
            assert (sent.delivered, sent.kept) == (2, 1)
            await backend.bind_user(first.fd, "eve")
            await wait_until(
                lambda: [said["data"] for said in first.control if said["type"] == "message"][-1] == "kept"
            )
            assert (await anext(events))["event"] == "user_online"
        await backend.bind_user(first.fd, "ann")
        assert await backend.conn_count() == 6
        assert sorted(await backend.code_conns(PLAIN)) == sorted(self.connections)
        assert {session["user"] for session in await backend.sessions()} == {"ann", None}
        async with backend.demand() as demand:
            assert set((await anext(demand)).wanted) == {PLAIN, LOGGED}
            await first.subscribe("LATE.US")
            assert (await anext(demand)).wanted == ("LATE.US",)
            await first.unsubscribe("LATE.US")
        job = await backend.send_to_all("later", at=datetime.timedelta(milliseconds=50), every=1)
        await wait_until(lambda: any(said.get("data") == "later" for said in first.control))
        assert [found.id for found in await backend.jobs()] == [job.id]
        assert await backend.cancel_job(job.id)

    async def _reach(self, count: int, send: Callable[[], Awaitable[Any]]) -> bool:
        try:
            sent = await send()
        except BackendUnavailable:
            return False
        return bool(sent.delivered == count and not sent.missing)

    @property
    def connections(self) -> dict[str, set[str]]:
        return {client.fd: client.codes for client in self.clients}

    @property
    def members(self) -> dict[str, set[str]]:
        ann, ann2, third, *_ = self.clients
        return {ann.fd: {"u:ann", "g:g"}, ann2.fd: {"u:ann", "g:g"}, third.fd: {"g:g"}}


@asynccontextmanager
async def staged(
    server: QuotepushServer, url: str, *, publisher_url: str = "", plain_url: str = ""
) -> AsyncIterator[Stage]:
    plain = Store(plain_url or publisher_url or url).client()
    async with (
        NumberedFeed(publisher_url or url, LOGGED) as feed,
        Backend(url) as backend,
        connected_clients(server.ws_url, 6, lambda n: [PLAIN, LOGGED]) as clients,
    ):
        feed.start()
        for client in clients[:2]:
            await backend.bind_user(client.fd, "ann")
        for client in clients[:3]:
            await backend.join_group(client.fd, "g")
        try:
            yield Stage(clients, feed, plain, backend)
            await feed.stop()
            await wait_until(
                lambda: all(c.rows[LOGGED]["seq"] == feed.newest[LOGGED] for c in clients), 30, "the last tick"
            )
            assert all(c.lives == 1 for c in clients), "nobody was disconnected"
        finally:
            await plain.aclose()


async def registry_is(store: Store, stage: Stage) -> None:
    client = store.client(decode_responses=True)
    try:
        await registry_equals(client, stage.connections, stage.members, timeout_s=30)
    finally:
        await client.aclose()


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_everything_works_where_a_redis_is_many(start: Start, tmp_path: Path, kind: str) -> None:
    running_kind = {"sentinel": running_sentinels, "cluster": running_cluster}[kind]
    with running_kind(tmp_path / "redis") as found:
        server = await start(found.url, events=True)
        async with staged(server, found.url) as stage:
            await stage.is_right()
            await stage.serves_backends()
            await registry_is(Store(found.url), stage)


@pytest.mark.fault
@pytest.mark.long
async def test_masters_behind_sentinel_are_replaced(start: Start, tmp_path: Path) -> None:
    with running_sentinels(tmp_path / "group") as group:
        server = await start(group.url, events=True)
        async with staged(server, group.url) as stage:
            await stage.is_right()
            await asyncio.to_thread(group.fail_over)
            await stage.is_right()
            master = group.master
            master.kill()
            await asyncio.to_thread(group.wait_until_replaced, master)
            await stage.is_right()
            await registry_is(Store(group.url), stage)
            assert (await server.admin("/readyz"))[0] == 200


@pytest.mark.fault
@pytest.mark.long
async def test_masters_of_a_cluster_die_and_hang(start: Start, tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster", replicas=1) as cluster:
        server = await start(cluster.url, events=True)
        async with staged(server, cluster.url) as stage:
            await stage.is_right()
            for arguments, said in (
                (("publish", "OTHER.US", "last=1"), "OTHER.US: seq 1"),
                (("publish", "OTHER.US", "last=1", "--plain"), "quote.OTHER.US: published"),
                (("stats",), "test  6 connections  2 workers"),
                (("send", "--user", "ann", "x"), "delivered to 2 connections"),
            ):
                outcome = await run_quotepush(*arguments, "--redis", cluster.url)
                assert outcome.status == 0 and outcome.stdout.startswith(said), outcome
            for key in ("{qp:}log", "qp:nodes"):
                master = cluster.master_of(key)
                if key == "qp:nodes":
                    master.pause()  # it hangs
                else:
                    master.kill()
                await asyncio.to_thread(cluster.wait_until_replaced, master, key)
                await stage.is_right()
                if key == "qp:nodes":
                    master.resume()
                else:
                    master.start()
                await asyncio.to_thread(cluster.wait_until, cluster.is_well, "it is a replica")
            await registry_is(Store(cluster.url), stage)
            assert (await server.admin("/readyz"))[0] == 200


@pytest.mark.long
@pytest.mark.fault
async def test_slots_of_a_cluster_move_while_their_keys_are_used(start: Start, tmp_path: Path) -> None:
    told: list[str] = []
    told_blocking: list[str] = []
    with running_cluster(tmp_path / "cluster") as cluster:
        server = await start(cluster.url, registry_interval_s=0.1, events=True)
        async with (
            staged(server, cluster.url) as stage,
            quotepush.Publisher(cluster.url, on_link=told.append) as publisher,
        ):
            blocking = quotepush.BlockingPublisher(cluster.url, give_up_s=100, on_link=told_blocking.append)
            assert await publisher.publish([{"code": "A", "last": 1}]) == [1]
            assert await asyncio.to_thread(blocking.publish, [{"code": "A", "last": 2}]) == [2]
            batches: list[asyncio.Task[list[int]]] = []
            await stage.is_right()
            for key in (f"qp:code:{PLAIN}", "qp:user:ann", "qp:codes", "qp:node:test", "qp:nodes", "{qp:}log"):
                source = cluster.master_of(key)
                steps = cluster.moving(key, next(other for other in cluster.servers if other is not source))
                while await asyncio.to_thread(next, steps, None) is not None:
                    if key != "{qp:}log":
                        await stage.is_right()
                        continue
                    # Some keys of a batch are here, others there: Redis takes none until all have been moved.
                    await stage.is_right_but_for_the_log()
                    if not told:
                        batches.append(asyncio.create_task(publisher.publish([{"code": "A", "last": 3}])))
                        await wait_until(lambda: told or batches[-1].done(), 30)
                    if not told_blocking:
                        batches.append(
                            asyncio.create_task(asyncio.to_thread(blocking.publish, [{"code": "A", "last": 3}]))
                        )
                        await wait_until(lambda: told_blocking or batches[-1].done(), 30)
                await stage.is_right()
            seqs = [await batch for batch in batches]
            assert sorted(seqs) == [[seq] for seq in range(3, 3 + len(batches))]
            assert told[:2] == told_blocking[:2] == ["its keys are being moved to another node", ""]
            await asyncio.to_thread(blocking.close)
            await stage.serves_backends()
            await registry_is(Store(cluster.url), stage)


def documented_rights() -> list[list[str]]:
    """The lines ``ACL SETUSER`` of docs/operations.md."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    return [line.split() for line in text.splitlines() if line.startswith("ACL SETUSER ")]


async def test_ticks_from_a_replica_and_the_registry_elsewhere(start: Start, tmp_path: Path) -> None:
    with running(RedisServer(tmp_path / "master")) as master, running(RedisServer(tmp_path / "registry")) as registry:
        of_master = ("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
        with running(RedisServer(tmp_path / "replica", options=of_master)) as replica:
            server = await start(replica.url, registry_redis=registry.url)
            async with staged(server, registry.url, publisher_url=master.url) as stage:
                await stage.is_right()
                replica.restart()
                await stage.is_right()
                registry.restart()
                await stage.is_right()
                await registry_is(Store(registry.url), stage)
                assert (await server.admin("/readyz"))[1]["log"] == "in step"
                async with master.client() as direct:
                    names = [entry["name"] for entry in await direct.client_list()]
                assert not any(name.startswith("quotepush") for name in names), "it leaves the master alone"


@pytest.mark.fault
@pytest.mark.long
async def test_a_replica_of_sentinel_for_ticks(start: Start, tmp_path: Path) -> None:
    with running_sentinels(tmp_path / "group", replicas=2) as group:
        server = await start(f"{group.url}?role=replica")

        async def hearers() -> list[int]:
            found = []
            for one in group.servers:
                if one.is_running:
                    async with one.client() as direct:
                        if await direct.pubsub_numpat():
                            found.append(one.port)
            return found

        async with staged(server, group.url) as stage:
            await stage.is_right()
            (port,) = await hearers()
            assert port != group.master.port
            next(one for one in group.servers if one.port == port).kill()
            await stage.is_right()
            await asyncio.to_thread(group.fail_over)
            await stage.is_right()

            async def hears_a_replica() -> bool:
                found = await hearers()
                return len(found) == 1 and found != [group.master.port]

            await wait_until(hears_a_replica, 30)
            await stage.is_right()
            await registry_is(Store(group.url), stage)


async def test_tls_and_users_with_the_least_rights(start: Start, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "certificates")
    port, options = certificates.server_options()
    odd = "p@ss/w:rd#?%"
    with running(RedisServer(tmp_path / "redis", options=options)) as store:
        async with store.client() as direct:
            for rights in documented_rights():
                await direct.execute_command(*(word.replace(">secret", f">{odd}") for word in rights))

        def address(user: str, password: str = quote(odd, safe="")) -> str:
            return f"rediss://{user}:{password}@127.0.0.1:{port}/0?{certificates.client_options}"

        password = tmp_path / "password"
        password.write_text(odd + "\n")
        server = await start(
            address("feed"),
            registry_redis=address("registry").replace(f":{quote(odd, safe='')}@", "@"),
            registry_redis_password_file=str(password),
            events=True,
        )
        assert odd not in server.log() and quote(odd, safe="") not in server.log()
        async with staged(
            server, address("backend"), publisher_url=address("publisher"), plain_url=address("vendor")
        ) as stage:
            await stage.is_right()
            await stage.serves_backends()
            await registry_is(Store(store.url), stage)
        async with store.client() as direct:

            async def lives() -> set[str]:
                return {life.removesuffix(":members") for life in await direct.smembers("qp:node:test")}

            before = await lives()
            os.kill(server.worker_pids()[0], signal.SIGKILL)

            async def is_replaced() -> bool:
                now = await lives()
                return len(now) == 2 and not now <= before and (await server.admin("/readyz"))[0] == 200

            await wait_until(is_replaced, 20, "the dead worker's life is cleared")
            assert await server.stop() == 0
            assert await direct.smembers("qp:node:test") == set()
            refused = {(entry["username"], entry["object"]) for entry in await direct.acl_log(100)}
            assert {(user, word) for user, word in refused if word != "client|setinfo"} == set()

        for wrong, reason in (
            (address("feed", "wrong-one"), "invalid username-password pair"),
            (f"rediss://feed:wrong-one@127.0.0.1:{port}", "certificate verify failed"),
            (f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates.ca}", "certificate required|[Cc]losed|reset"),
        ):
            async with quotepush.Publisher(wrong) as publisher:
                with pytest.raises(RedisUnavailable, match=reason) as error:
                    await publisher.connect()
                assert "wrong-one" not in str(error.value) and odd not in str(error.value)
