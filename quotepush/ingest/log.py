"""Ticks of the publishers' log: every batch once and in order, whatever happened to the link.

Laws:

1. A batch is taken when it is the next one; a batch that is not shows that some were missed, and they are
   read from the log before it. What comes meanwhile waits, bounded.
2. What the log does not have any more is announced: the rows concerned are read anew and marked as behind a gap.
3. A log that begins another life (its epoch has changed) or has gone back is read from its begin; a log
   that has gone back, be it to an earlier epoch, gets a new epoch by compare-and-set, so that no number is used twice.
   A replica is waited for instead: it may only be behind, and is not ours to write to.
4. What is read from the log has arrived when Redis got it, told by our own clock: a late catch-up makes nothing fresh.
5. A batch, tick or row that is none harms nothing else: it is counted as refused, and what it hides is a gap.

What publishers write: :mod:`quotepush.batches`.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import orjson
from redis.exceptions import DataError, NoPermissionError, ReadOnlyError, RedisError, ResponseError

from quotepush.errors import reason_of
from quotepush.ingest.keys import FeedKeys
from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote
from quotepush.quote.ring import Ring
from quotepush.store.clients import hang_up

__all__ = ["LogFollower"]

log = logging.getLogger("quotepush.feed")

_PAGE = 200  # batches per XRANGE
_ROWS_PER_SLICE = 200
_MOST_WAITING_BYTES = 32 << 20  # of batches that wait for older ones; more are read from the log again
_RETRY_S = 0.5
# Only an operator changes what we may read.
_FORBIDDEN_RETRY_S = 30.0
_FORBIDDEN = ("user executing the script", "ACL failure in script")  # of a command within one: Redis 6 and 7, Redis 8

_MOST_LEFT = 64

# Compare and set: the log whose last batch is below what we have seen is another life of it, and so is one that shows
# an epoch that we have seen the end of.
_NEW_LIFE = """
local epoch = redis.call('GET', KEYS[1])
if epoch and (string.find(ARGV[4], epoch, 1, true)
        or epoch == ARGV[1] and tonumber(redis.call('HGET', KEYS[2], '#') or 0) < tonumber(ARGV[2])) then
    epoch = ARGV[3]
    redis.call('SET', KEYS[1], epoch)
end
return {epoch, redis.call('TIME')}
"""


class _Batch(msgspec.Struct, gc=False):
    """One message of the publishers."""

    epoch: str
    n: int
    at: int
    ticks: list[tuple[int, str, dict[str, Any]]]


_decode_batch = msgspec.json.Decoder(_Batch).decode


class _Behind(Exception):
    """This replica does not have yet what we have seen."""


class LogFollower:
    """Keeps a board in step with the log.

    Args:
        redis: the feed's; redis-py's annotations fit neither of its two protocols.
        ring: filled at the begin.
        on_filled: called with each code whose recent rows are in the ring now.
        publish: takes a quote that has news.
        on_batch: called when the ticks of a batch have been taken.

    Attributes:
        epoch: of the log; empty: there is none.
        n: number of the last batch that was taken.
        caught_up: how many times batches were read from the log because they had been missed.
        gaps: rows that were read anew because the log was too short.
        bugs: ticks that were lost to a bug of ours.
        is_in_step: nothing is missing, as far as we know.
        is_forbidden: this Redis user may not read the log.
    """

    def __init__(
        self,
        redis: Any,
        keys: FeedKeys,
        board: Board,
        ring: Ring,
        *,
        on_filled: Callable[[str], None],
        publish: Callable[[Quote], None],
        on_batch: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._board = board
        self._ring = ring
        self._on_filled = on_filled
        self._publish = publish
        self._on_batch = on_batch
        self._timeout_s = timeout_s
        self.epoch = ""
        self.n = 0
        self._left: deque[str] = deque(maxlen=_MOST_LEFT)  # epochs that were over
        self.caught_up = 0
        self.gaps = 0
        self.bugs = 0
        self.is_in_step = False
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._is_lost = True  # something may be missing
        self._losses = 0  # how often that came to pass
        self._has_begun = False  # the rows that were there before us are on the board
        self._is_failing = False
        self._is_waiting = False
        self.is_forbidden = False
        self._skew_ms = 0  # what our clock is ahead of the one of Redis

    @property
    def state(self) -> str:
        """``unreadable``, ``none`` (there is no log), ``in step`` or ``behind``."""
        if self._is_failing:
            return "unreadable"
        if not self.epoch:
            return "none"
        return "in step" if self.is_in_step else "behind"

    def take(self, message: bytes, has_waited: bool = False) -> None:  # hot
        """Take a message of the feed's channel.

        Args:
            has_waited: it did not come just now.
        """
        if not self._is_lost:
            try:
                batch = _decode_batch(message)
            except msgspec.MsgspecError as e:
                self._refuse("bad_batch", e)
                return
            if batch.epoch == self.epoch and batch.n == self.n + 1:
                self._apply(batch, self._arrived_ms(batch.at) if has_waited else _now_ms())
                self._on_batch()
                return
            if batch.epoch == self.epoch and batch.n <= self.n:
                return
            self.lose_step()
        if self._waiting_bytes > _MOST_WAITING_BYTES:
            self.lose_step()
        self._waiting.append(message)
        self._waiting_bytes += len(message)

    def lose_step(self) -> None:
        """Something may have been missed: read the log before anything else is taken."""
        self._is_lost = True
        self._losses += 1
        self.is_in_step = False
        self._drop_waiting()
        self._wake.set()

    def _drop_waiting(self) -> list[bytes]:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return waiting

    def note_cut(self) -> None:
        """The link is cut: what is published from now on is missed until it is back."""
        self.is_in_step = False

    async def begin(self) -> None:
        """Hold the newest rows, and those that led to them, before anybody asks for them; if Redis lets us."""
        if not await self._try_to_catch_up() or not self.epoch:
            return
        try:
            await self._fill_ring()
        except (RedisError, OSError, TimeoutError) as e:
            log.warning("recent rows cannot be read from the log: %s", reason_of(e, self._timeout_s))

    async def read_past(
        self,
        oldest_ms: int,
        note: Callable[[str, Mapping[str, Any]], None],
        take: Callable[[str, int, dict[str, Any], int], None],
    ) -> None:
        """Read the end of the log twice, as far as it is of this epoch and Redis got it at ``oldest_ms`` or later.

        Args:
            note: called first with each code and tick, newest first.
            take: called then with each code, seq, tick and arrival, oldest first.

        Raises:
            RedisError, OSError, TimeoutError: Redis did not answer, or not that.
        """
        if not self.epoch:
            return
        first, end = self.n + 1, f"{self.n}-0"
        while end:
            page = await self._page_of(end, newest_first=True)
            end = f"({_text(page[-1][0])}" if page else ""
            for batch in self._batches_of(page):
                if batch is None or batch.epoch != self.epoch or self._arrived_ms(batch.at) < oldest_ms:
                    end = ""  # what is before it is no past of ours, or nobody knows what is missing there
                    break
                first = batch.n
                for _, code, tick in batch.ticks:
                    note(code, tick)
            await asyncio.sleep(0)
        start = f"{first}-0"
        while start and first <= self.n:
            page = await self._page_of(start, newest_first=False)
            start = f"({_text(page[-1][0])}" if page else ""
            for batch in self._batches_of(page):
                if batch is not None and batch.epoch == self.epoch and batch.n <= self.n:
                    for seq, code, tick in batch.ticks:
                        take(code, seq, tick, self._arrived_ms(batch.at))
            await asyncio.sleep(0)

    async def _page_of(self, edge: str, *, newest_first: bool) -> list[Any]:
        async with asyncio.timeout(self._timeout_s):
            if newest_first:
                page = await self._redis.xrevrange(self._keys.log, max=edge, min="-", count=_PAGE)
            else:
                page = await self._redis.xrange(self._keys.log, min=edge, max="+", count=_PAGE)
        return list(page)

    @staticmethod
    def _batches_of(page: Iterable[Any]) -> Iterator[_Batch | None]:
        """Yield the batches of a page; None: it is none."""
        for _, fields in page:
            try:
                yield _decode_batch(fields.get(b"batch", b""))
            except msgspec.MsgspecError:
                yield None

    async def run(self) -> None:
        """Catch up whenever step is lost, until cancelled."""
        while True:
            await self._wake.wait()  # no timeout: the listener wakes us with every new link
            self._wake.clear()
            # What cut the feed's link has most likely cut the connections that wait here, too.
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(self._timeout_s):
                    await hang_up(self._redis, in_use=False)
            if not await self._try_to_catch_up():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FORBIDDEN_RETRY_S if self.is_forbidden else _RETRY_S):
                        await self._wake.wait()
                self._wake.set()

    async def _try_to_catch_up(self) -> bool:
        try:
            await self._catch_up()
        except _Behind:
            if not self._is_waiting:
                log.warning("this replica is behind what its log has shown before; waiting for it")
            self._is_waiting = True
            self._is_failing = self.is_forbidden = False
            return False
        except (RedisError, OSError, TimeoutError) as e:
            if not self._is_failing:
                log.warning("the publishers' log cannot be read (%s); trying again", reason_of(e, self._timeout_s))
            self._is_failing = True
            self.is_forbidden = isinstance(e, NoPermissionError) or any(words in str(e) for words in _FORBIDDEN)
            return False
        self._is_failing = self.is_forbidden = self._is_waiting = False
        return True

    async def _catch_up(self) -> None:
        """Read what is missing; afterwards take what has waited."""
        while self._is_lost:
            losses = self._losses
            self._drop_waiting()  # what has come until now is in the log, or of a life that is over
            async with asyncio.timeout(self._timeout_s):
                epoch = await self._current_epoch()
            if epoch != self.epoch or not self._has_begun:
                await self._begin_life(epoch)
            elif epoch:
                await self._read_on()
            if losses != self._losses:
                continue  # what came meanwhile is not all here
            # No await between here and the end: whatever comes now is taken in order.
            self._is_lost = False
            for message in self._drop_waiting():
                self.take(message, has_waited=True)
                if self._is_lost:
                    break
        self.is_in_step = True
        self._on_batch()

    async def _current_epoch(self) -> str:
        asked_ms = _now_ms()
        try:
            epoch, (seconds, microseconds) = await self._redis.eval(
                _NEW_LIFE, 2, self._keys.epoch, self._keys.seq, self.epoch, str(self.n), secrets.token_hex(8),
                " ".join(self._left),
            )  # fmt: skip
        except ResponseError as e:
            if isinstance(e, ReadOnlyError) or "-READONLY" in str(e):  # Redis 6.2 names it in the middle
                raise _Behind from None
            raise
        # Redis looked at its clock at some time between the question and now.
        self._skew_ms = (asked_ms + _now_ms()) // 2 - (int(seconds) * 1000 + int(microseconds) // 1000)
        return _text(epoch or b"")

    def _arrived_ms(self, logged_ms: int) -> int:
        """Return when Redis got something, by our own clock."""
        return min(_now_ms(), logged_ms + self._skew_ms)

    async def _begin_life(self, epoch: str) -> None:
        """The log is another one, or the first we see: its rows count anew."""
        if self.epoch and epoch != self.epoch:
            log.warning("the log of the publishers has begun another life; clients get their rows anew")
            self._left.append(self.epoch)
        self.epoch = self._board.log_epoch = epoch
        self.n = 0
        if epoch and not self._has_begun:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hget(self._keys.seq, "#")
            pipeline.hkeys(self._keys.seq)
            async with asyncio.timeout(self._timeout_s):
                last, codes = await pipeline.execute()
            # Rows first: they are at least as new as batch `last`; ticks of the log behind it follow. Later lives are
            # read from the log, which adds to the rows that we hold: a Redis that came back empty knows less than we.
            await self._read_rows((_text(code) for code in codes if code != b"#"), NEW_EPOCH)
            self.n = _number(last)
        self._has_begun = True
        if epoch:
            await self._read_on()

    async def _read_on(self) -> None:
        """Take the batches of the log behind ours."""
        is_first = True
        start = f"({self.n}-0"
        while True:
            # The number first: what is published behind it may be missing in the page, but is no gap.
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.hget(self._keys.seq, "#")
            pipeline.xrange(self._keys.log, min=start, max="+", count=_PAGE)
            async with asyncio.timeout(self._timeout_s):
                last, page = await pipeline.execute()
            for entry, fields in page:
                start = f"({_text(entry)}"
                try:
                    batch = _decode_batch(fields.get(b"batch", b""))
                except msgspec.MsgspecError as e:
                    self._refuse("bad_batch", e)
                    continue
                if batch.epoch != self.epoch:
                    self.n = batch.n
                    continue  # of another life
                if batch.n > self.n + 1:
                    await self._bridge()
                if batch.n <= self.n:
                    continue
                if is_first:
                    is_first = False
                    self.caught_up += 1
                self._apply(batch, self._arrived_ms(batch.at))
            self._on_batch()
            if len(page) < _PAGE:
                break
            await asyncio.sleep(0)
        if _number(last) > self.n:  # the log is shorter than what we have missed
            await self._bridge()

    async def _bridge(self) -> None:
        """The log is too short: read the rows that have changed since, and say so."""
        async with asyncio.timeout(self._timeout_s):
            seqs = await self._redis.hgetall(self._keys.seq)
        numbers = {_text(code): _number(seq) for code, seq in seqs.items()}
        last = numbers.pop("#", 0)
        quotes = self._board.quotes
        behind = [
            code
            for code, seq in numbers.items()
            if (quote := quotes.get(code)) is None or quote.epoch != self.epoch or quote.seq < seq
        ]
        log.warning("the log does not reach back far enough: %d rows are read anew", len(behind))
        self.gaps += await self._read_rows(behind, GAP)
        self.n = max(self.n, last)

    async def _read_rows(self, codes: Iterable[str], reason: int) -> int:
        """Read whole rows that publishers have kept; return how many were newer than ours."""
        found = 0
        todo = list(codes)
        for start in range(0, len(todo), _ROWS_PER_SLICE):
            some = todo[start : start + _ROWS_PER_SLICE]
            pipeline = self._redis.pipeline(transaction=False)
            for code in some:
                pipeline.hgetall(self._keys.row + code)
            async with asyncio.timeout(self._timeout_s):
                rows = await pipeline.execute(raise_on_error=False)
            for code, row in zip(some, rows, strict=True):
                quote = self._restate(code, row, reason)
                if quote is not None:
                    found += 1
                    self._publish(quote)
            self._on_batch()
            await asyncio.sleep(0)
        return found

    def _restate(self, code: str, row: Mapping[bytes, bytes] | ResponseError, reason: int) -> Quote | None:
        if isinstance(row, ResponseError):
            if not str(row).startswith("WRONGTYPE"):
                raise row
            self._refuse("bad_row", f"{code}: {row}")
            return None
        if b"@" not in row:
            return None
        try:
            seq, epoch, at = row[b"@"].decode().split(" ")
            fields = {_text(name): orjson.loads(value) for name, value in row.items() if not name.startswith(b"@")}
            number, at_ms = int(seq), int(at)
        except ValueError as e:
            self._refuse("bad_row", f"{code}: {e}")
            return None
        # At the begin also rows without a tick since the log has gone back: their numbers go on in the new epoch.
        if epoch != self.epoch and self._has_begun:
            return None
        fields.setdefault("ts", at_ms)
        return self._board.restate(code, self.epoch, number, fields, self._arrived_ms(at_ms), reason)

    async def _fill_ring(self) -> None:
        """Read the end of the log backwards, as far as the ring reaches, and keep the rows that its ticks make."""
        oldest_ms = _now_ms() - self._ring.max_age_ms
        ticks: dict[str, list[tuple[int, dict[str, Any], int]]] = {}
        size = 0
        end = f"{self.n}-0"
        while end:
            page = await self._page_of(end, newest_first=True)
            end = f"({_text(page[-1][0])}" if page else ""
            for _, fields in page:
                message = fields.get(b"batch", b"")
                size += len(message)
                try:
                    batch = _decode_batch(message)
                except msgspec.MsgspecError:
                    end = ""  # nobody knows what is missing there
                    break
                if batch.epoch != self.epoch or batch.at < oldest_ms or size > self._ring.max_bytes:
                    if batch.epoch != self.epoch and ticks:  # ours came after it
                        self._left.append(batch.epoch)
                    end = ""
                    break
                for seq, code, tick in reversed(batch.ticks):
                    ticks.setdefault(code, []).append((seq, tick, batch.at))
            await asyncio.sleep(0)
        for code, found in ticks.items():
            found.reverse()
            quote = self._board.quotes.get(code)
            if quote is not None and quote.epoch == self.epoch and self._ring.fill(quote, found):
                self._on_filled(code)

    def _apply(self, batch: _Batch, arrived_ms: int) -> None:  # hot
        apply, publish = self._board.apply_numbered, self._publish
        logged_ms = batch.at
        for seq, code, tick in batch.ticks:
            try:
                news = apply(code, seq, tick, arrived_ms, logged_ms)
                if news is not None:
                    publish(news)
            except Exception:
                # A tick that hits a bug of ours is lost, the next one is not; nor is it read again for ever.
                self.bugs += 1
                if self.bugs == 1:
                    log.exception("a tick of the log could not be taken; further ones are counted only")
        self.n = batch.n

    def _refuse(self, reason: str, fault: object) -> None:
        self._board.refused[reason] += 1
        self._board.last_fault = f"{reason}: {fault}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _number(data: bytes | None) -> int:
    try:
        return int(data or 0)
    except ValueError:
        raise DataError(f"a number of the log is {data!r}") from None


def _text(data: bytes | str) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data
