"""Which nodes are there: each holds its name by a lease, a record in ``<p>nodes`` that it renews.

Laws: one main at a time has a name; whoever has not renewed its record for its lease counts as nobody, and knows it.
Times are by the clock of Redis, so that nodes whose clocks differ agree; how long we ourselves have not renewed is
told by a clock that never jumps. Each change of a record says what it was before, so of two that change it one does.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace
from redis.exceptions import RedisError

from quotepush.cluster.commands import ClusterKeys, NodeRecord, decode_node, encode
from quotepush.errors import NodeTaken

__all__ = ["Presence", "change_record", "read_records", "records", "redis_us"]

log = logging.getLogger("quotepush.main")

_LOOK_S = 0.25
_AGAIN_S = 0.5
# So much of the lease is given away, for clocks that run differently and for what is on its way.
_MARGIN = 0.9

# KEYS: <p>nodes. ARGV: node, what it was (empty: nothing), what it shall be (empty: nothing).
_CHANGE = """
local is = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if is ~= ARGV[2] then return 0 end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return 1
"""


async def redis_us(redis: Any) -> int:
    """Return the microseconds since the epoch by the clock of Redis.

    Raises:
        RedisError, OSError: it does not answer.
    """
    seconds, micros = await redis.time()
    return int(seconds) * 1_000_000 + int(micros)


async def read_records(redis: Any, keys: ClusterKeys) -> tuple[int, dict[str, bytes]]:
    """Return the time in milliseconds, and the text of each node's record.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    now_ms = await redis_us(redis) // 1000
    return now_ms, {_text(name): _bytes(said) for name, said in (await redis.hgetall(keys.nodes)).items()}


async def records(redis: Any, keys: ClusterKeys) -> dict[str, NodeRecord]:
    """Return the nodes whose lease holds.

    Args:
        redis: any client of the registry, whatever it answers with.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    now_ms, found = await read_records(redis, keys)
    decoded = {node: decode_node(said) for node, said in found.items()}
    return {node: record for node, record in decoded.items() if record is not None and record.is_alive(now_ms)}


async def change_record(redis: Any, keys: ClusterKeys, node: str, before: bytes, after: bytes) -> bool:
    """Make a record what it shall be, if it is what it was; empty: there is none.

    Raises:
        RedisError, OSError: Redis does not answer; it may have been done.
    """
    return bool(await redis.eval(_CHANGE, 1, keys.nodes, node, before, after))


class Presence:
    """The record of this node.

    Args:
        record: what it says of us; ``owner`` is unique.
        is_running: whether the main of a record with our own ``place`` still runs.
        ttl_s: the records go so long after the last node has renewed one.
        on_lost: called once when another main has our name.
        on_removed: called when what the registry says about our connections may have been removed, and we are back.
    """

    def __init__(
        self,
        redis: Any,
        keys: ClusterKeys,
        node: str,
        record: NodeRecord,
        *,
        is_running: Callable[[NodeRecord], bool],
        ttl_s: int,
        timeout_s: float,
        on_lost: Callable[[NodeTaken], None],
        on_removed: Callable[[], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._node = node
        self._record = record
        self._is_running = is_running
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._on_removed = on_removed
        self._clock_s = clock_s
        self._held_until_s = float("-inf")
        self._is_well = True
        self._was_away = False
        self.is_lost = False

    @property
    def owner(self) -> str:
        """What tells this main from all others."""
        return self._record.owner

    @property
    def is_held(self) -> bool:
        """Surely nobody takes us for dead."""
        return self._clock_s() < self._held_until_s

    async def take(self) -> None:
        """Take the name; wait for the lease of a former holder who is dead, or may be.

        Raises:
            NodeTaken: it has renewed its lease meanwhile.
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        is_told = False
        first: NodeRecord | None = None
        seen, since_s = b"", 0.0
        while True:
            asked_s = self._clock_s()
            async with asyncio.timeout(self._timeout_s):
                now_ms, before = await self._look()
                found = decode_node(before)
                if before != seen:
                    seen, since_s = before, self._clock_s()
                waits = found is not None and (
                    # Whoever clears up after the dead is left to it, so that each event is told once.
                    found.is_claimed(now_ms)
                    if found.cleaner
                    # Had the clock of Redis gone back, its lease would hold for as long as that was.
                    else found.is_alive(now_ms)
                    and self._clock_s() - since_s < found.lease / 1000
                    and not self._is_dead(found)
                )
                if not waits and await self._write(before, now_ms, asked_s):
                    return
            if waits:
                assert found is not None
                if first is not None and first.owner != found.owner:
                    raise NodeTaken(self._node, _holder(found))  # another one was faster
                if first is not None and found.renewed != first.renewed and not found.cleaner:
                    raise NodeTaken(self._node, _holder(found))
                if not is_told and not found.cleaner:
                    is_told = True
                    log.info(
                        "the name %s is held (%s); waiting until its lease has run out", self._node, _holder(found)
                    )
                first = first or found
                await asyncio.sleep(_LOOK_S)

    async def run(self) -> None:
        """Keep the name until cancelled, or lost."""
        renew_s = self._record.lease / 3000
        while not self.is_lost:
            is_renewed = await self.renew()
            await asyncio.sleep(renew_s if is_renewed else min(_AGAIN_S, renew_s))

    async def renew(self) -> bool:
        """Renew the record once; False: that was not possible, and may be soon."""
        try:
            async with asyncio.timeout(self._timeout_s):
                is_renewed = await self._renew()
            self._is_well = True
            return is_renewed
        except (RedisError, OSError, TimeoutError) as e:
            if self._is_well:
                log.warning("nodes: this node cannot renew its record: %s", str(e) or type(e).__name__)
            self._is_well = False
            return False

    async def _renew(self) -> bool:
        asked_s = self._clock_s()
        now_ms, before = await self._look()
        found = decode_node(before)
        # Whoever took the name later has it. An earlier life can be back in a Redis that has lost what came after it.
        if found is not None and found.owner != self.owner and found.started >= self._record.started:
            self.is_lost = True
            self._held_until_s = float("-inf")
            self._on_lost(NodeTaken(self._node, _holder(found)))
            return False
        if found is not None and found.is_claimed(now_ms):
            return False  # as soon as that is done
        # Remembered, as Redis may do what is asked now, and we not hear of it.
        self._was_away |= found is None or found.owner != self.owner or bool(found.cleaner) or found.is_cleaned
        if not await self._write(before, now_ms, asked_s):
            return False
        if self._was_away:
            self._was_away = False
            log.warning("nodes: this node was taken for dead, or Redis has lost its record; it is back")
            self._on_removed()
        return True

    async def leave(self) -> None:
        """Remove the record; one attempt.

        Raises:
            RedisError, OSError, TimeoutError: it stays, and is too old soon.
        """
        self._held_until_s = float("-inf")
        async with asyncio.timeout(self._timeout_s):
            _, text = await self._look()  # we may not have heard of our last renewal
            found = decode_node(text)
            if found is not None and found.owner == self.owner and not found.cleaner:
                await change_record(self._redis, self._keys, self._node, text, b"")

    async def _look(self) -> tuple[int, bytes]:
        """The time, and our record as it is."""
        now_ms = await redis_us(self._redis) // 1000
        return now_ms, _bytes(await self._redis.hget(self._keys.nodes, self._node) or b"")

    async def _write(self, before: bytes, now_ms: int, asked_s: float) -> bool:
        record = replace(self._record, renewed=now_ms, started=self._record.started or now_ms)
        text = encode(record)
        if before != text and not await change_record(self._redis, self._keys, self._node, before, text):
            return False
        self._record = record
        self._held_until_s = asked_s + record.lease / 1000 * _MARGIN
        await self._redis.expire(self._keys.nodes, self._ttl_s)
        return True

    def _is_dead(self, found: NodeRecord) -> bool:
        """Surely, as it was here."""
        return bool(found.place) and found.place == self._record.place and not self._is_running(found)


def _holder(record: NodeRecord) -> str:
    return f"pid {record.pid}, {record.place.partition('/')[0] or 'somewhere'}"


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _bytes(said: Any) -> bytes:
    return said.encode() if isinstance(said, str) else bytes(said)
