"""The newest rows of codes that are fed by plain ticks, kept in Redis for the next life of this server.

Law: Redis is never waited for by a tick, and never holds an older row than it held: of several servers that keep
the same code, the one whose tick arrived last wins. What cannot be written is written with the next round.

In Redis: the hash ``<p>row:<code>`` has the row as JSON text in ``@row``, its book in ``@book`` and the arrival of its
newest tick (epoch milliseconds) in ``@plain``; the sorted set ``<p>rows`` has the codes by arrival. Rows of codes that
come through the publishers' log are kept by the publishers, in the same hash, field by field.
"""

import asyncio
import hashlib
import logging
import time
from typing import Any

import msgspec
import orjson
from redis.exceptions import NoScriptError, RedisError

from quotepush.ingest.keys import FeedKeys
from quotepush.quote.board import Board, Quote

__all__ = ["RowStore"]

log = logging.getLogger("quotepush.feed")

_PER_SLICE = 200
_LOOKED_AT_PER_SLICE = 5_000

_SCRIPT = """
for i, kept in ipairs(cmsgpack.unpack(ARGV[1])) do
    local key = KEYS[i + 1]
    local before = redis.call('HGET', key, '@plain')
    if not before or tonumber(before) <= tonumber(kept[2]) then
        redis.call('HSET', key, '@plain', kept[2], '@row', kept[3], '@book', kept[4])
        redis.call('EXPIRE', key, ARGV[2])
        redis.call('ZADD', KEYS[1], kept[2], kept[1])
    end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
_SCRIPT_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class RowStore:
    """Keeps a board's plain rows in Redis.

    Args:
        redis: the registry's; redis-py's annotations fit neither of its two protocols.
        interval_s: between two rounds of writing what has changed.
        max_age_s: rows without a tick for so long go.
    """

    def __init__(
        self, redis: Any, keys: FeedKeys, board: Board, *, interval_s: float, max_age_s: int, timeout_s: float
    ) -> None:
        self._redis = redis
        self._row = keys.row
        self._index = keys.rows
        self._board = board
        self._interval_s = interval_s
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._written_ms = 0  # what arrived before is in Redis
        self._is_failing = False

    async def load(self) -> int:
        """Put the kept rows on the board, for codes that it does not know; return how many."""
        oldest_ms = _now_ms() - self._max_age_s * 1000
        loaded = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                codes = [
                    code.decode() if isinstance(code, bytes) else code
                    for code in await self._redis.zrangebyscore(self._index, oldest_ms, "+inf")
                ]
            for start in range(0, len(codes), _PER_SLICE):
                some = codes[start : start + _PER_SLICE]
                pipeline = self._redis.pipeline(transaction=False)
                for code in some:
                    pipeline.hmget(self._row + code, "@plain", "@row", "@book")
                async with asyncio.timeout(self._timeout_s):
                    rows = await pipeline.execute()
                for code, (at_ms, row, book) in zip(some, rows, strict=True):
                    if at_ms is not None and code not in self._board.quotes:
                        loaded += self._put(code, int(at_ms), row, book)
        except (RedisError, OSError, TimeoutError) as e:
            log.warning("kept rows cannot be read: %s", str(e) or type(e).__name__)
        self._written_ms = _now_ms()
        return loaded

    def _put(self, code: str, at_ms: int, row: bytes, book: bytes) -> bool:
        try:
            fields = orjson.loads(row) | orjson.loads(book)
        except (orjson.JSONDecodeError, TypeError):  # not ours
            return False
        for name in ("code", "seq", "change", "change_pct"):
            fields.pop(name, None)
        quote = self._board.restate(code, self._board.epoch, 1, fields, at_ms, 0)
        return quote is not None

    async def run(self) -> None:
        """Write what has changed, round by round, until cancelled."""
        while self._interval_s:
            await asyncio.sleep(self._interval_s)
            await self.flush()

    async def flush(self) -> None:
        """Write what has changed since the last round."""
        begin_ms = _now_ms()
        try:
            changed: list[Quote] = []
            for number, quote in enumerate(list(self._board.quotes.values()), 1):
                if quote.arrived_ms >= self._written_ms and quote.epoch != self._board.log_epoch:
                    changed.append(quote)
                if len(changed) >= _PER_SLICE:
                    await self._write(changed)
                    changed.clear()
                elif not number % _LOOKED_AT_PER_SLICE:
                    await asyncio.sleep(0)
            if changed:
                await self._write(changed)
        except (RedisError, OSError, TimeoutError) as e:
            if not self._is_failing:
                log.warning("rows cannot be kept in Redis (%s); trying again", str(e) or type(e).__name__)
            self._is_failing = True
            return
        self._is_failing = False
        self._written_ms = begin_ms

    async def _write(self, quotes: list[Quote]) -> None:
        kept = [(q.code, str(q.arrived_ms), q.encoded().decode(), q.encoded_book().decode()) for q in quotes]
        oldest_ms = _now_ms() - self._max_age_s * 1000
        keys = (self._index, *(self._row + q.code for q in quotes))
        arguments = (len(keys), *keys, msgspec.msgpack.encode(kept), self._max_age_s, oldest_ms)
        async with asyncio.timeout(self._timeout_s):
            try:
                await self._redis.evalsha(_SCRIPT_SHA, *arguments)
            except NoScriptError:
                await self._redis.eval(_SCRIPT, *arguments)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
