"""A node without a server: it stands in Redis as one does, hears commands and answers as it is told.

For what callers make of answers, of their absence, and of a registry in a given state; what real nodes do is tested
with real servers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable

import orjson
from redis.asyncio import Redis

from quotepush.cluster.commands import ClusterKeys, Command, NodeRecord, Reply, encode, parse_command
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

__all__ = ["StandInNode", "stand_in"]


class StandInNode:
    """A node called ``name``.

    Attributes:
        heard: the commands that came, in order.
        answer: makes the reply to a command; None: it is silent.
        conns: its connections, which it says were served.
    """

    def __init__(self, redis: Redis, name: str, prefix: str = "qp:") -> None:
        self.name = name
        self.keys = ClusterKeys(prefix)
        self.life = "0.1000"
        self.heard: list[Command] = []
        self.conns: set[str] = set()
        self.answer: Callable[[Command], Reply | None] = self.served
        self._redis = redis
        self._prefix = prefix
        self._age_ms = 0

    def fd(self, number: int) -> str:
        return f"{self.name}.0.{1000 + number}"

    def served(self, command: Command) -> Reply:
        """What a node says that has done it."""
        fds = [fd for fd in command.fds() or () if fd in self.conns]
        return Reply(command.id, self.name, len(fds) if command.fds() is not None else len(self.conns), fds)

    async def renew(self, age_ms: int = 0) -> None:
        """Be alive, as of so long ago, from now on."""
        self._age_ms = age_ms
        now_ms = time.time_ns() // 1_000_000 - age_ms
        await self._redis.hset(self.keys.nodes, self.name, encode(NodeRecord(now_ms, now_ms, "0.1.0", 2)))

    async def connect(
        self, number: int, *, user: str = "", groups: Iterable[str] = (), codes: Iterable[str] = ()
    ) -> str:
        """Have a connection, and enter it where the registry has it."""
        fd, keys, redis = self.fd(number), self.keys, self._redis
        self.conns.add(fd)
        await redis.sadd(f"{self._prefix}node:{self.name}", self.life)
        await redis.sadd(f"{self._prefix}node:{self.name}:{self.life}", fd)
        if user:
            await redis.sadd(keys.user(user), fd)
            await redis.sadd(keys.members, f"u:{user}")
        for group in groups:
            await redis.sadd(keys.group(group), fd)
            await redis.sadd(keys.members, f"g:{group}")
        for code in codes:
            await redis.sadd(f"{self._prefix}code:{code}", fd)
            await redis.sadd(f"{self._prefix}fd:{fd}", code)
            await redis.sadd(f"{self._prefix}codes", code)
        if user or groups:
            said = {"user": user or None, "opened": 5, "groups": list(groups), "data": {"n": number}}
            await redis.set(keys.conn(fd), orjson.dumps(said))
        return fd

    async def keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(1)
            await self.renew(self._age_ms)

    async def listen(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(self.keys.to_all, self.keys.to_node(self.name))
            async for message in pubsub.listen():
                if message["type"] == "message":
                    command = parse_command(message["data"].encode())
                    self.heard.append(command)
                    reply = self.answer(command)
                    if reply is not None and command.reply:
                        await self._redis.publish(command.reply, encode(reply))


@contextlib.asynccontextmanager
async def stand_in(server: RedisServer, name: str = "n1") -> AsyncIterator[StandInNode]:
    """Run one; it hears commands when this begins."""
    async with server.client() as redis:
        node = StandInNode(redis, name)
        await node.renew()
        tasks = [asyncio.create_task(node.listen()), asyncio.create_task(node.keep_renewing())]

        async def is_heard() -> bool:
            return bool(dict(await redis.pubsub_numsub(node.keys.to_node(name)))[node.keys.to_node(name)])

        try:
            await wait_until(is_heard)
            yield node
        finally:
            for task in tasks:
                task.cancel()
            # Of a Redis that was killed they have heard.
            await asyncio.gather(*tasks, return_exceptions=True)
