"""Commands to a cluster as any program would give them: published on Redis, with the replies that come back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from tests.support.waiting import wait_until

__all__ = ["Caller", "calling"]


class Caller:
    """Somebody who commands one node."""

    def __init__(self, redis: Redis, node: str, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._node = node
        self._count = 0
        self.channel = f"{prefix}reply:tests"
        self.replies: dict[str, dict[str, Any]] = {}

    async def call(self, op: str, *, to_all: bool = False, **words: Any) -> dict[str, Any]:
        """Give a command and return the node's reply to it."""
        name = await self.tell(op, to_all=to_all, **words)
        return await wait_until(lambda: self.replies.pop(name, None), 15, f"the reply to {op}")

    async def tell(self, op: str, *, to_all: bool = False, **words: Any) -> str:
        """Give a command; return what it is called."""
        self._count += 1
        name = f"{self._count:016x}"
        channel = f"{self._prefix}to" if to_all else f"{self._prefix}to:{self._node}"
        await self._redis.publish(channel, json.dumps({"id": name, "reply": self.channel, "op": op, **words}))
        return name

    async def keep(self, op: str = "send", **words: Any) -> str:
        """Put a command into the node's inbox and poke it."""
        self._count += 1
        name = f"{self._count:016x}"
        command = json.dumps({"id": name, "reply": self.channel, "op": op, "keep": True, **words})
        await self._redis.xadd(f"{self._prefix}inbox:{self._node}", {"c": command})
        await self._redis.publish(f"{self._prefix}to:{self._node}", '{"op":"poke"}')
        return name


@asynccontextmanager
async def calling(redis: Redis, node: str = "test", prefix: str = "qp:") -> AsyncIterator[Caller]:
    """Yield a caller that hears replies.

    Args:
        redis: a client that answers with ``str``.
    """
    caller = Caller(redis, node, prefix)
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(caller.channel)
        assert (await pubsub.get_message(timeout=10))["type"] == "subscribe"

        async def hear() -> None:
            async for message in pubsub.listen():
                reply = {"delivered": 0, "fds": [], **json.loads(message["data"])}
                caller.replies[reply["id"]] = reply

        task = asyncio.create_task(hear())
        try:
            yield caller
        finally:
            task.cancel()
            await asyncio.wait([task])
