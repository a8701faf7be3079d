"""Which nodes are there: each renews its record in ``<p>nodes``, and whose record is old is not asked.

Times are by the clock of Redis, so that nodes whose clocks differ agree. Law: a record that is not renewed for
``SILENT_MS`` counts as nobody's; one that nobody renews goes in the end.
"""

import asyncio
import logging
from typing import Any

from redis.exceptions import RedisError

from quotepush.cluster.commands import ClusterKeys, NodeRecord, decode_node, encode

__all__ = ["RENEW_S", "SILENT_MS", "Presence", "records"]

log = logging.getLogger("quotepush.main")

RENEW_S = 3.0
SILENT_MS = 10_000


async def records(redis: Any, keys: ClusterKeys) -> tuple[dict[str, NodeRecord], dict[str, int]]:
    """Return the nodes that have renewed their record lately, and the age of every other record in milliseconds.

    Args:
        redis: any client of the registry, whatever it answers with.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    now_ms = await _now_ms(redis)
    live: dict[str, NodeRecord] = {}
    old: dict[str, int] = {}
    for name, text in (await redis.hgetall(keys.nodes)).items():
        node = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        record = decode_node(text.encode() if isinstance(text, str) else text)
        if record is not None and now_ms - record.renewed < SILENT_MS:
            live[node] = record
        else:
            old[node] = 1 << 62 if record is None else now_ms - record.renewed
    return live, old


async def _now_ms(redis: Any) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


class Presence:
    """The record of this node.

    Args:
        ttl_s: whose record is older than that is removed.
    """

    def __init__(
        self, redis: Any, keys: ClusterKeys, node: str, *, version: str, workers: int, ttl_s: int, timeout_s: float
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._node = node
        self._record = NodeRecord(0, 0, version, workers)
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._is_well = True

    async def run(self) -> None:
        """Renew the record until cancelled."""
        while True:
            await self.renew()
            await asyncio.sleep(RENEW_S)

    async def renew(self) -> None:
        """Renew the record once, if Redis takes it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._renew()
            self._is_well = True
        except (RedisError, OSError, TimeoutError) as e:
            if self._is_well:
                log.warning("nodes: this node cannot renew its record: %s", str(e) or type(e).__name__)
            self._is_well = False

    async def _renew(self) -> None:
        now_ms = await _now_ms(self._redis)
        self._record.renewed = now_ms
        self._record.started = self._record.started or now_ms
        await self._redis.hset(self._keys.nodes, self._node, encode(self._record))
        await self._redis.expire(self._keys.nodes, self._ttl_s)
        _, old = await records(self._redis, self._keys)
        dead = [node for node, age_ms in old.items() if age_ms > self._ttl_s * 1000 and node != self._node]
        if dead:
            await self._redis.hdel(self._keys.nodes, *dead)

    async def leave(self) -> None:
        """Remove the record; one attempt.

        Raises:
            RedisError, OSError: it stays, and is too old soon.
        """
        await self._redis.hdel(self._keys.nodes, self._node)
