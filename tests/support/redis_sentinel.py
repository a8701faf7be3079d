"""A real Redis with replicas, and sentinels that look after them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis as blocking_redis

from tests.support.redis_server import RedisServer
from tests.support.redis_tls import Certificates

__all__ = ["SentinelGroup", "running_sentinels"]

_SERVICE = "quotes"
_QUORUM = 2


class SentinelGroup:
    """One master, replicas, and three sentinels that replace a master which is gone for half a second.

    Args:
        directory: for what they keep and log.
        replicas: how many.
        certificates: with them clients may speak TLS, and servers and sentinels do so with each other.
    """

    def __init__(self, directory: Path, *, replicas: int = 1, certificates: Certificates | None = None) -> None:
        self._directory = directory
        self._password = self._sentinel_password = ""
        self._certificates = certificates
        # A replica is in step at once, and keeps no file.
        always = ("--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb")
        self.servers: list[RedisServer] = []
        self._ports: list[int] = []  # by which they know each other
        for n in range(1 + replicas):
            port, of_tls = self._of_tls()
            of_master = ("--replicaof", "127.0.0.1", str(self._ports[0])) if n else ()
            self.servers.append(RedisServer(directory / f"redis-{n}", options=(*always, *of_tls, *of_master)))
            self._ports.append(port or self.servers[n].port)
        self.sentinels: list[RedisServer] = []
        self._sentinel_ports: list[int] = []

    def _of_tls(self) -> tuple[int, tuple[str, ...]]:
        return (0, ()) if self._certificates is None else self._certificates.server_options("--tls-replication")

    @property
    def url(self) -> str:
        """The address for feed and registry, without passwords and TLS."""
        return f"redis+sentinel://{self.places}/{_SERVICE}"

    @property
    def places(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports)

    def start(self) -> None:
        """Start all of them; return when the sentinels know each other and the replicas follow."""
        for server in self.servers:
            server.start()
        for n in range(3):
            directory = self._directory / f"sentinel-{n}"
            directory.mkdir(parents=True)
            config = directory / "sentinel.conf"
            config.write_text(
                f"sentinel monitor {_SERVICE} 127.0.0.1 {self._ports[0]} {_QUORUM}\n"
                f"sentinel down-after-milliseconds {_SERVICE} 500\n"
                f"sentinel failover-timeout {_SERVICE} 2000\n"
            )
            port, of_tls = self._of_tls()
            sentinel = RedisServer(directory, config=(str(config), "--sentinel"), options=of_tls)
            self.sentinels.append(sentinel)
            self._sentinel_ports.append(port or sentinel.port)
            sentinel.start()
        self.wait_until(self._is_whole, "the sentinels know each other and the replicas")

    def set_passwords(self, of_servers: str, of_sentinels: str) -> None:
        """From now on who comes has to know these. Sentinels that begin with them take ten seconds more."""
        for server in self.servers:
            self._tell(server, "", "CONFIG", "SET", "masterauth", of_servers, "requirepass", of_servers)
        for sentinel in self.sentinels:
            self._tell(sentinel, "", "SENTINEL", "SET", _SERVICE, "auth-pass", of_servers)
            self._tell(sentinel, "", "SENTINEL", "CONFIG", "SET", "sentinel-pass", of_sentinels)
            self._tell(sentinel, "", "ACL", "SETUSER", "default", "resetpass", f">{of_sentinels}")
        self._password, self._sentinel_password = of_servers, of_sentinels

    def stop(self) -> None:
        for server in [*self.sentinels, *self.servers]:
            server.stop()

    @property
    def master(self) -> RedisServer:
        """Who is the master, as most of the sentinels say."""
        said = [self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME") for sentinel in self.sentinels]
        ports = [int(answer[1]) for answer in said if answer]
        port = max(ports, key=ports.count)
        return self.servers[self._ports.index(port)]

    def fail_over(self) -> None:
        """Have another server made the master, while the old one lives; return when it is done."""
        old = self.master
        self._ask(self.sentinels[0], "FAILOVER")
        self.wait_until_replaced(old)

    def wait_until_replaced(self, old: RedisServer) -> None:
        """Return when all sentinels say that another server is the master, and it is one."""

        def is_replaced() -> bool:
            answers = [self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME") for sentinel in self.sentinels]
            masters = {self._ports.index(int(answer[1])) for answer in answers}
            if len(masters) != 1:
                return False
            (new,) = (self.servers[n] for n in masters)
            return new is not old and self._role(new) == "master"

        self.wait_until(is_replaced, "another master")

    def wait_until(self, is_so: Any, what: str) -> None:
        deadline = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < deadline, f"not within 30 s: {what}"
            time.sleep(0.02)

    def _is_whole(self) -> bool:
        for sentinel in self.sentinels:
            facts = self._ask(sentinel, "MASTER")
            facts = dict(zip(facts[::2], facts[1::2], strict=True))
            if facts["num-other-sentinels"] != "2" or facts["num-slaves"] != str(len(self.servers) - 1):
                return False
            replicas = [dict(zip(one[::2], one[1::2], strict=True)) for one in self._ask(sentinel, "REPLICAS")]
            if any(one["master-link-status"] != "ok" for one in replicas):
                return False
        return True

    def _role(self, server: RedisServer) -> str:
        client = blocking_redis.Redis(port=server.port, password=self._password or None, socket_timeout=1)
        with contextlib.suppress(blocking_redis.RedisError), client:
            return str(client.info("replication")["role"])
        return ""

    def _ask(self, sentinel: RedisServer, word: str) -> Any:
        return self._tell(sentinel, self._sentinel_password, "SENTINEL", word, _SERVICE)

    def _tell(self, server: RedisServer, password: str, *command: str) -> Any:
        with blocking_redis.Redis(
            port=server.port, password=password or None, decode_responses=True, protocol=2
        ) as client:
            return client.execute_command(*command)


@contextlib.contextmanager
def running_sentinels(directory: Path, **options: Any) -> Iterator[SentinelGroup]:
    """Yield a group that runs, and end it."""
    group = SentinelGroup(directory, **options)
    try:
        group.start()
        yield group
    finally:
        group.stop()
