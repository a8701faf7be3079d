"""A real Redis Cluster on this machine."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis as blocking_redis
from redis.crc import key_slot

from tests.support.redis_server import RedisServer
from tests.support.redis_tls import Certificates

__all__ = ["RedisCluster", "running_cluster"]

_SLOTS = 16_384


class RedisCluster:
    """Masters that share the slots, each with as many replicas; a master that is gone for half a second is replaced.

    Args:
        directory: for what they keep and log.
        replicas: of each master.
        certificates: with them clients may speak TLS, and nodes do so with each other.
    """

    def __init__(
        self, directory: Path, *, masters: int = 3, replicas: int = 0, certificates: Certificates | None = None
    ) -> None:
        always = (
            "--cluster-enabled", "yes", "--cluster-node-timeout", "500", "--cluster-replica-validity-factor", "0",
            "--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb",
        )  # fmt: skip
        self._of_masters = masters
        self.servers: list[RedisServer] = []
        self._tls_ports: list[int] = []
        for n in range(masters * (1 + replicas)):
            port, of_tls = (0, ()) if certificates is None else certificates.server_options("--tls-cluster")
            self.servers.append(RedisServer(directory / f"redis-{n}", options=(*always, *of_tls)))
            self._tls_ports.append(port)

    @property
    def url(self) -> str:
        """The address for feed and registry, by two of its nodes."""
        return f"redis+cluster://{self.places}"

    @property
    def places(self) -> str:
        return ",".join(f"127.0.0.1:{server.port}" for server in self.servers[:2])

    @property
    def tls_places(self) -> str:
        """The same for TLS."""
        return ",".join(f"127.0.0.1:{port}" for port in self._tls_ports[:2])

    def start(self) -> None:
        """Start all of them and make them a cluster; return when each says that it is well."""
        for server in self.servers:
            server.start()
        masters, replicas = self.servers[: self._of_masters], self.servers[self._of_masters :]
        for n, server in enumerate(masters):
            first, after = (_SLOTS * k // len(masters) for k in (n, n + 1))
            self.ask(server, "CLUSTER", "ADDSLOTS", *range(first, after))
            # Else nodes that have just met argue first about who is the older one.
            self.ask(server, "CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for server in self.servers[1:]:
            self.ask(server, "CLUSTER", "MEET", "127.0.0.1", self._tls_ports[0] or self.servers[0].port)
        self.wait_until(
            lambda: all(self._knows(server) == len(self.servers) for server in self.servers), "all have met"
        )
        for n, server in enumerate(replicas):
            self.ask(server, "CLUSTER", "REPLICATE", self.ask(masters[n % len(masters)], "CLUSTER", "MYID"))
        self.wait_until(self.is_well, "the cluster is well")

    def stop(self) -> None:
        for server in self.servers:
            server.stop()

    def is_well(self, apart_from: RedisServer | None = None) -> bool:
        """Every server that runs says that the cluster is well, and replicas are in step."""
        with contextlib.suppress(blocking_redis.RedisError):
            for server in self.servers:
                if not server.is_running or server is apart_from:
                    continue
                if "cluster_state:ok" not in self.ask(server, "CLUSTER", "INFO"):
                    return False
                said = self.ask(server, "INFO", "replication")
                if "role:slave" in said and "master_link_status:up" not in said:
                    return False
            return True
        return False

    def master_of(self, key: str, apart_from: RedisServer | None = None) -> RedisServer:
        """Return who holds a key now, as the first server that runs says."""
        found = self._holder_of(key, apart_from)
        assert found is not None, f"nobody holds {key}"
        return found

    def _holder_of(self, key: str, apart_from: RedisServer | None) -> RedisServer | None:
        slot = key_slot(key.encode())
        asked = next(server for server in self.servers if server.is_running and server is not apart_from)
        for first, last, owner, *_ in self.ask(asked, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(server for server in self.servers if server.port == owner[1])
        return None  # while it is being replaced

    def wait_until_replaced(self, old: RedisServer, key: str) -> None:
        """Return when another server than one that is gone, or hangs, holds a key, and the others are well."""
        self.wait_until(lambda: self._holder_of(key, old) not in (old, None) and self.is_well(old), "another master")

    def move(self, key: str, to: RedisServer) -> None:
        """Have the slot of a key, which may hold nothing else, with another master."""
        for _ in self.moving(key, to, keys_at_once=100):
            pass

    def moving(self, key: str, to: RedisServer, keys_at_once: int = 1) -> Iterator[int]:
        """Move the slot of a key in steps; yield between them how many of its keys are still to be moved."""
        slot = key_slot(key.encode())
        source = self.master_of(key)
        name = self.ask(to, "CLUSTER", "MYID")
        self.ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.ask(source, "CLUSTER", "MYID"))
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", name)
        yield self.ask(source, "CLUSTER", "COUNTKEYSINSLOT", slot)
        while keys := self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, keys_at_once):
            self.ask(source, "MIGRATE", "127.0.0.1", to.port, "", 0, 5_000, "KEYS", *keys)
            yield self.ask(source, "CLUSTER", "COUNTKEYSINSLOT", slot)
        for server in (to, source, *(server for server in self.servers if server.is_running)):
            with contextlib.suppress(blocking_redis.ResponseError):  # a replica
                self.ask(server, "CLUSTER", "SETSLOT", slot, "NODE", name)

    def ask(self, server: RedisServer, *command: Any) -> Any:
        """Return what one server answers."""
        with blocking_redis.Redis(port=server.port, decode_responses=True, protocol=2, socket_timeout=5) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < deadline, f"not within 30 s: {what}"
            time.sleep(0.02)

    def _knows(self, server: RedisServer) -> int:
        lines = self.ask(server, "CLUSTER", "NODES").splitlines()
        return sum("handshake" not in line for line in lines)


@contextlib.contextmanager
def running_cluster(directory: Path, **options: Any) -> Iterator[RedisCluster]:
    """Yield a cluster that runs, and end it."""
    cluster = RedisCluster(directory, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
