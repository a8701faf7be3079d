"""Several real nodes of one cluster on one machine, and clients whose users and groups are known."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from quotepush.backend import Backend
from quotepush.cluster.commands import ClusterKeys
from quotepush.cluster.presence import records
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

__all__ = ["SeveralNodes", "heard_by", "several_nodes"]


class SeveralNodes:
    """Servers ``n1``, ``n2`` … of one cluster, and the clients that were connected through here.

    Args:
        directory: for their locks and logs.
        settings: of each server.
    """

    def __init__(self, directory: Path, redis_url: str, **settings: Any) -> None:
        self._directory = directory
        self._redis_url = redis_url
        self._settings = {"token_key": KEY, "anonymous": "yes", "lease_s": 4, "redis_timeout_s": 2, **settings}
        self.nodes: dict[str, QuotepushServer] = {}
        self.clients: list[RecordingClient] = []
        self._members: dict[str, set[str]] = {}

    def make(self, name: str, directory: str = "", **settings: Any) -> QuotepushServer:
        """Return a server that is not started, beside others of its name."""
        where = self._directory / (directory or name)
        return QuotepushServer(where, self._redis_url, node=name, **{**self._settings, **settings})

    async def start(self, *names: str, **settings: Any) -> None:
        """Start nodes side by side."""
        started = {name: self.make(name, **settings) for name in names}
        self.nodes |= started
        await asyncio.gather(*(server.start() for server in started.values()))

    async def connect(
        self, node: str, user: str = "", groups: Iterable[str] = (), codes: Iterable[str] = (), **options: Any
    ) -> RecordingClient:
        """Connect a client to a node."""
        names = list(groups)
        claims: dict[str, Any] = {"exp": 4_000_000_000, **({"sub": user} if user else {}), "groups": names}
        query = f"?token={token(**claims)}" if user or names else ""
        client = RecordingClient(self.nodes[node].ws_url + query, codes, **options)
        await client.open()
        self.clients.append(client)
        tags = {f"g:{name}" for name in names} | ({f"u:{user}"} if user else set())
        if tags:
            self._members[client.fd] = tags
        return client

    def members_of(self, client: RecordingClient) -> set[str]:
        """Return its user and groups, as ``u:<uid>`` and ``g:<group>``."""
        return self._members.get(client.fd, set())

    @property
    def live(self) -> list[RecordingClient]:
        """The clients whose connection is there."""
        return [client for client in self.clients if not client.has_ended]

    async def registry_is_right(self, redis: Any, timeout_s: float = 20.0) -> None:
        """Wait until the registry equals the live connections, and the nodes that run are those that are there."""
        running = {name for name, server in self.nodes.items() if server.is_running}

        async def are_there() -> bool:
            try:
                return set(await records(redis, ClusterKeys("qp:"))) == running
            except (RedisError, OSError):
                return False

        await wait_until(are_there, timeout_s, f"{running} are there")
        connections = {client.fd: client.codes for client in self.live}
        members = {fd: tags for fd, tags in self._members.items() if fd in connections}
        await registry_equals(redis, connections, members, nodes=list(self.nodes), timeout_s=timeout_s)

    async def crowd(self, of_each: int = 6) -> dict[str, list[RecordingClient]]:
        """Connect to every node: users who are on one node, one who is on all, groups, codes."""
        found: dict[str, list[RecordingClient]] = {}
        for name in self.nodes:
            found[name] = [
                await self.connect(name, f"u-{name}-{n % 3}", [f"g{n % 2}", "all"], [f"C{n}", "AAPL"])
                for n in range(of_each)
            ]
            found[name].append(await self.connect(name, "everywhere", codes=["AAPL"]))
        return found

    async def sends_are_right(self, backend: Backend, number: int) -> None:
        """See that what is sent to a user, a group and all reaches exactly whom it should, once."""
        live = self.live
        before = {client.fd: len(heard_by(client)) for client in live}
        of_tag = {tag: [c for c in live if tag in self.members_of(c)] for tag in ("u:everywhere", "g:g1")}
        sent = await backend.send_to_user("everywhere", ["user", number])
        assert (sent.delivered, sent.missing) == (len(of_tag["u:everywhere"]), ()), sent
        sent = await backend.send_to_group("g1", ["group", number])
        assert (sent.delivered, sent.missing) == (len(of_tag["g:g1"]), ()), sent
        sent = await backend.send_to_all(["all", number])
        assert (sent.delivered, sent.missing) == (len(live), ()), sent
        for client in live:
            await client.ping()
            expected = [["user", number]] if client in of_tag["u:everywhere"] else []
            expected += [["group", number]] if client in of_tag["g:g1"] else []
            assert heard_by(client)[before[client.fd] :] == [*expected, ["all", number]]

    def pause(self, node: str, *, only_main: bool = False) -> None:
        """SIGSTOP to a node."""
        self._signal(node, signal.SIGSTOP, only_main=only_main)

    def resume(self, node: str, *, only_main: bool = False) -> None:
        """SIGCONT to a node."""
        self._signal(node, signal.SIGCONT, only_main=only_main)

    def _signal(self, node: str, number: signal.Signals, *, only_main: bool) -> None:
        server = self.nodes[node]
        pids = [server.pid, *([] if only_main else server.worker_pids())]
        for pid in pids:
            os.kill(pid, number)

    async def aclose(self) -> None:
        """End everything; raise what a client has found broken."""
        try:
            for client in self.clients:
                await client.close()
        finally:
            for server in self.nodes.values():
                if server.is_running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(server.pid, signal.SIGCONT)
            await asyncio.gather(*(server.stop() for server in self.nodes.values()), return_exceptions=True)
            for server in self.nodes.values():
                server.kill_everything()


def heard_by(client: RecordingClient) -> list[Any]:
    """Return the data of the messages that a client was sent, in order."""
    client.check()
    return [message["data"] for message in client.control if message["type"] == "message"]


@contextlib.asynccontextmanager
async def several_nodes(
    directory: Path, redis_url: str, names: Iterable[str] = ("n1", "n2", "n3"), **settings: Any
) -> AsyncIterator[SeveralNodes]:
    """Start a cluster; end it in the end."""
    nodes = SeveralNodes(directory, redis_url, **settings)
    try:
        await nodes.start(*names)
        yield nodes
    finally:
        await nodes.aclose()
