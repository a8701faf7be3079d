"""At most so many connections of one user, in the whole cluster.

Law: whichever nodes look, and however often, they choose the same connections: by when these were opened, as Redis says
it. Each node looks when Redis knows of a new connection of its own, so whoever comes last sees all; the number is right
within the registry's interval.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import orjson
from redis.exceptions import RedisError

from quotepush.cluster.commands import ClusterKeys, Command, encode, node_of

__all__ = ["Crowds", "surplus"]

log = logging.getLogger("quotepush.main")

_AGAIN_S = 1.0


async def surplus(redis: Any, keys: ClusterKeys, user: str, most: int, *, newest_stay: bool) -> list[str]:
    """Return the connections of a user that are too many.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    fds = [fd.decode("utf-8", "replace") for fd in await redis.smembers(keys.user(user))]
    if len(fds) <= most:
        return []
    pipeline = redis.pipeline(transaction=False)
    for fd in fds:
        pipeline.get(keys.conn(fd))
    opened = [(_opened(text), fd) for fd, text in zip(fds, await pipeline.execute(), strict=True)]
    opened.sort(reverse=newest_stay)
    return [fd for _, fd in opened[most:]]


def _opened(text: bytes | None) -> int:
    try:
        at = orjson.loads(text or b"")["opened"]
    except (ValueError, TypeError, KeyError):
        return 0
    return at if type(at) is int else 0


class Crowds:
    """Closes what is too much.

    Args:
        redis: a client of the registry that answers with bytes.

    Attributes:
        closed: connections that were told to close.
    """

    def __init__(self, redis: Any, keys: ClusterKeys, *, timeout_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._timeout_s = timeout_s
        self._came: dict[str, tuple[int, bool]] = {}
        self._has_come = asyncio.Event()
        self.closed = 0

    def came(self, users: Iterable[tuple[str, int, bool]]) -> None:
        """Users have got a connection, and Redis knows of it: how many each may have, and whether the newest stay."""
        for user, most, newest_stay in users:
            self._came[user] = (most, newest_stay)
        self._has_come.set()

    async def run(self) -> None:
        """Look after them until cancelled."""
        while True:
            await self._has_come.wait()
            self._has_come.clear()
            while self._came:
                user = next(iter(self._came))
                most, newest_stay = self._came.pop(user)
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await self._thin_out(user, most, newest_stay)
                except (RedisError, OSError, TimeoutError):
                    self._came.setdefault(user, (most, newest_stay))
                    await asyncio.sleep(_AGAIN_S)

    async def _thin_out(self, user: str, most: int, newest_stay: bool) -> None:
        places: defaultdict[str, list[str]] = defaultdict(list)
        for fd in await surplus(self._redis, self._keys, user, most, newest_stay=newest_stay):
            places[node_of(fd)].append(fd)
        code, reason = (4409, "replaced") if newest_stay else (4429, "conn_limit")
        for node, fds in places.items():
            command = Command(op="close", conns=fds, code=code, reason=reason)
            await self._redis.publish(self._keys.to_node(node), encode(command))
            self.closed += len(fds)
