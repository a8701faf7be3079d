"""Clearing up after nodes that have died: what they had in the registry goes, and what waited for their users moves on.

Laws: one node at a time clears up after a dead one, and says so in its record; whatever was found before that is of a
dead life, for a main that is back writes its record before anything else. Nobody is called dead by a clock alone, as
clocks jump: a record has to stand still for its lease before our own eyes, too, while Redis answers.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace
from redis.exceptions import RedisError

from quotepush.cluster.commands import CLAIM_MS, ClusterKeys, NodeRecord, decode_node, encode
from quotepush.cluster.mail import move_mail
from quotepush.cluster.nodes import Told, lives_of, purge_life
from quotepush.cluster.presence import change_record, read_records, redis_us

__all__ = ["Cleaner"]

log = logging.getLogger("quotepush.main")

_CLAIM_AGAIN_S = 3.0


class Cleaner:
    """Looks after the other nodes' records.

    Args:
        owner: of this node's own record; nobody clears up who has lost his name.
        ttl_s: no set of the registry outlives the node that renews it for longer.
        told: hears what is found.
        may_work: whether this node surely is alive itself.

    Attributes:
        cleared: dead nodes that it has cleared up after.
        removed: connections of theirs.
    """

    def __init__(
        self,
        redis: Any,
        keys: ClusterKeys,
        node: str,
        owner: str,
        *,
        look_s: float,
        kept_max: int,
        kept_ttl_s: int,
        ttl_s: int,
        timeout_s: float,
        told: Told | None = None,
        may_work: Callable[[], bool] = lambda: True,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._node = node
        self._owner = owner
        self._look_s = look_s
        self._kept_max = kept_max
        self._kept_ttl_s = kept_ttl_s
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._told = told
        self._may_work = may_work
        self._clock_s = clock_s
        self._answered_s = float("-inf")  # when Redis did last, and we ran
        self._seen: dict[str, tuple[bytes, float]] = {}  # node to its record, and since when it has stood so
        self.cleared = 0
        self.removed = 0

    async def run(self) -> None:
        """Look and clear up until cancelled."""
        is_well = True
        while True:
            await asyncio.sleep(self._look_s)
            if not self._may_work():
                continue
            try:
                await self.look()
                is_well = True
            except (RedisError, OSError, TimeoutError) as e:
                if is_well:
                    log.warning("nodes: cannot look after dead nodes: %s", str(e) or type(e).__name__)
                is_well = False

    async def look(self) -> None:
        """Look at all records once, and clear up after those who are dead.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer; look again.
        """
        async with asyncio.timeout(self._timeout_s):
            now_ms, found = await read_records(self._redis, self._keys)
        now_s = self._clock_s()
        away_s = now_s - self._answered_s
        seen, self._seen = self._seen, {}
        for node, text in found.items():
            before = seen.get(node)
            since = before[1] if before is not None and before[0] == text else now_s
            self._seen[node] = (text, since)
        for node, (text, since) in list(self._seen.items()):
            record = decode_node(text)
            if record is not None and away_s > record.lease / 2000:
                self._seen[node] = (text, now_s)  # where Redis was away for us, it may have been for all
                continue
            if node == self._node or record is None or record.is_claimed(now_ms):
                continue
            if record.is_alive(now_ms) and record.renewed <= now_ms:  # else the clock of Redis has gone back
                continue
            if now_s - since >= record.lease / 1000:
                await self._clear_up_after(node, text, record, now_ms)
        self._answered_s = self._clock_s()

    async def _clear_up_after(self, node: str, text: bytes, record: NodeRecord, now_ms: int) -> None:
        async with asyncio.timeout(self._timeout_s):
            lives = await lives_of(self._redis, self._keys.prefix, node)
            if record.is_cleaned and not lives:
                # A part of it may live on and write, so its record stays for as long as that would.
                if now_ms - record.renewed >= 1000 * self._ttl_s:
                    await change_record(self._redis, self._keys, node, text, b"")
                return
            claim = _Claim(self._redis, self._keys, node, self._owner, self._timeout_s)
            if not await claim.make(text, record):
                return
        # No TaskGroup: trouble with Redis in one of the two must come out as what it is.
        keeping = asyncio.create_task(claim.keep())
        work = asyncio.create_task(self._remove(node, lives))
        try:
            await asyncio.wait([keeping, work], return_when=asyncio.FIRST_COMPLETED)
            is_done = work.done()
        finally:
            keeping.cancel()
            work.cancel()
            await asyncio.wait([keeping, work])
        trouble = None if keeping.cancelled() else keeping.exception()
        if not is_done:  # somebody else has it now, or the node is back
            if trouble is not None:
                raise trouble
            log.warning("nodes: clearing up after %s was broken off: it is back, or another node does it", node)
            return
        removed = work.result()
        if await claim.end():
            self.cleared += 1
            self.removed += removed
            log.info("nodes: %s has died; %d connections of it removed", node, removed)

    async def _remove(self, node: str, lives: Sequence[str]) -> int:
        removed = sum([await purge_life(self._redis, self._keys.prefix, node, life, self._told) for life in lives])
        await move_mail(
            self._redis, self._keys, node,
            kept_max=self._kept_max, kept_ttl_s=self._kept_ttl_s, timeout_s=self._timeout_s,
        )  # fmt: skip
        return removed


class _Claim:
    """What we have written into the record of a dead node."""

    def __init__(self, redis: Any, keys: ClusterKeys, node: str, owner: str, timeout_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._node = node
        self._owner = owner
        self._timeout_s = timeout_s
        self._text = b""
        self._record: NodeRecord

    async def make(self, text: bytes, record: NodeRecord) -> bool:
        """Claim it; False: the record is not what it was."""
        self._text, self._record = text, record
        until = await redis_us(self._redis) // 1000 + CLAIM_MS
        return await self._change(replace(record, cleaner=self._owner, until=until, is_cleaned=False))

    async def keep(self) -> None:
        """Claim it again and again; return when it is not ours any more."""
        while True:
            await asyncio.sleep(_CLAIM_AGAIN_S)
            async with asyncio.timeout(self._timeout_s):
                if not await self.make(self._text, self._record):
                    return

    async def end(self) -> bool:
        """Say that all is done; False: somebody else has it now."""
        async with asyncio.timeout(self._timeout_s):
            return await self._change(replace(self._record, cleaner="", until=0, is_cleaned=True))

    async def _change(self, record: NodeRecord) -> bool:
        text = encode(record)
        if not await change_record(self._redis, self._keys, self._node, self._text, text):
            return False
        self._text, self._record = text, record
        return True
