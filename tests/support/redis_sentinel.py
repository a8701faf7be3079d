"""A real Redis with replicas, and sentinels that look after them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis as blocking_redis

from tests.support.redis_server import RedisServer

__all__ = ["SentinelGroup", "running_sentinels"]

_SERVICE = "quotes"
_QUORUM = 2


class SentinelGroup:
    """One master, replicas, and three sentinels that replace a master which is gone for half a second.

    Args:
        directory: for what they keep and log.
        replicas: how many.
        options: of each server, e.g. for TLS.
    """

    def __init__(self, directory: Path, *, replicas: int = 1, options: tuple[str, ...] = ()) -> None:
        self._directory = directory
        # A replica is in step at once, and keeps no file.
        always = ("--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb", *options)
        self.servers = [RedisServer(directory / "redis-0", options=always)]
        master = str(self.servers[0].port)
        self.servers += [
            RedisServer(directory / f"redis-{n}", options=("--replicaof", "127.0.0.1", master, *always))
            for n in range(1, replicas + 1)
        ]
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        """The address for feed and registry."""
        return f"redis+sentinel://{self.places}/{_SERVICE}"

    @property
    def places(self) -> str:
        return ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)

    def start(self) -> None:
        """Start all of them; return when the sentinels know each other and the replicas follow."""
        for server in self.servers:
            server.start()
        for n in range(3):
            directory = self._directory / f"sentinel-{n}"
            directory.mkdir(parents=True)
            config = directory / "sentinel.conf"
            config.write_text(
                f"sentinel monitor {_SERVICE} 127.0.0.1 {self.servers[0].port} {_QUORUM}\n"
                f"sentinel down-after-milliseconds {_SERVICE} 500\n"
                f"sentinel failover-timeout {_SERVICE} 2000\n"
            )
            sentinel = RedisServer(directory, config=(str(config), "--sentinel"))
            self.sentinels.append(sentinel)
            sentinel.start()
        self.wait_until(self._is_whole, "the sentinels know each other and the replicas")

    def stop(self) -> None:
        for server in [*self.sentinels, *self.servers]:
            server.stop()

    @property
    def master(self) -> RedisServer:
        """Who is the master, as most of the sentinels say."""
        said = [self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME") for sentinel in self.sentinels]
        ports = [int(answer[1]) for answer in said if answer]
        port = max(ports, key=ports.count)
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> None:
        """Have another server made the master, while the old one lives; return when it is done."""
        old = self.master
        self._ask(self.sentinels[0], "FAILOVER")
        self.wait_until_replaced(old)

    def wait_until_replaced(self, old: RedisServer) -> None:
        """Return when all sentinels say that another server is the master, and it is one."""

        def is_replaced() -> bool:
            answers = [self._ask(sentinel, "GET-MASTER-ADDR-BY-NAME") for sentinel in self.sentinels]
            ports = {int(answer[1]) for answer in answers}
            return len(ports) == 1 and ports != {old.port} and _role(ports.pop()) == "master"

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

    def _ask(self, sentinel: RedisServer, word: str) -> Any:
        with blocking_redis.Redis(port=sentinel.port, decode_responses=True, protocol=2) as client:
            return client.execute_command("SENTINEL", word, _SERVICE)


def _role(port: int) -> str:
    with contextlib.suppress(blocking_redis.RedisError), blocking_redis.Redis(port=port, socket_timeout=1) as client:
        return str(client.info("replication")["role"])
    return ""


@contextlib.contextmanager
def running_sentinels(directory: Path, **options: Any) -> Iterator[SentinelGroup]:
    """Yield a group that runs, and end it."""
    group = SentinelGroup(directory, **options)
    try:
        group.start()
        yield group
    finally:
        group.stop()
