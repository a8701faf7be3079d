"""The newest row of every code, numbered.

Laws: within an epoch a code's ``seq`` only rises. A plain tick is numbered here, by one more than the
last, in the board's own epoch; a tick of the log brings its number and the log's epoch. Whenever a code's
epoch changes, or rows of it were lost, its quote says so until the relay has passed it on. Memory is bounded
(``max_codes`` rows of ``max_row_bytes``); a refused tick is counted by reason and changes no row.
"""

from collections import Counter, deque
from collections.abc import Container, Iterable, Mapping
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import orjson

from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import (
    SHAPES,
    BadTick,
    Shape,
    check_tick,
    clear_nulls,
    decode_tick,
    has_book_news,
    has_news,
    merge_fields,
    shape_of,
    written_size,
)

__all__ = ["GAP", "NEW_EPOCH", "Board", "Quote", "RecentRow", "TradingDays", "exact"]

# Why a row is restated: it is numbered anew, or rows before it were lost. The second says more.
NEW_EPOCH, GAP = 1, 2

RecentRow = tuple[int, bytes, int, int]

_NEVER_MS = 1 << 62
# So many levels cannot be in fewer brackets, nor in fewer bytes: other ticks need no closer look.
_DEEP_LEVELS = 200
_DEEP_BYTES = 2 * _DEEP_LEVELS
_DERIVED_BYTES = 192  # code, seq, ts, change and change_pct with their names


def exact(text: bytes) -> bytes:
    """Return a copy that takes no more memory than it has bytes: what orjson 3.13 returns holds 4 KiB at least."""
    return bytes(memoryview(text))


class Quote:
    """What the board knows of one code.

    Attributes:
        code: canonical.
        epoch: in which ``seq`` counts.
        seq: number of the newest row; 0 before the first tick.
        restated: why those who watch need the row anew (:data:`NEW_EPOCH`, :data:`GAP`) before its next tick; or 0.
        gaps: how many times rows of it were lost.
        ts: of the newest row.
        row: fields in wire order, ``code``, ``seq`` and ``ts`` first; without the book.
        book: ``bids`` and ``asks``, up to five ``[price, size]`` each.
        arrived_ms: when the newest tick arrived here.
        day_end_ms: a tick with this ``ts`` or a later one begins a new trading day.
        recent: rows that were sent lately, oldest first: seq, JSON text, arrival and ordinal (``quote.ring``); whoever
            was sent the row ``recent_base`` or a later one can be brought up to date with them, and so can whoever
            had everything up to the ordinal ``recent_from``.
    """

    __slots__ = (
        "_book", "_encoded", "_encoded_book", "_row", "_row_bound", "_waiting", "_waiting_shape", "arrived_ms", "code",
        "day_end_ms", "epoch", "gaps", "recent", "recent_base", "recent_bytes", "recent_from", "restated", "seq", "ts",
    )  # fmt: skip

    def __init__(self, code: str, seq: int, epoch: str) -> None:
        self.code = code
        self.epoch = epoch
        self.seq = seq
        self.restated = 0
        self.gaps = 0
        self.recent: deque[RecentRow] | None = None
        self.recent_base = 0
        self.recent_from = 0
        self.recent_bytes = 0
        self.ts = 0
        self.arrived_ms = 0
        self.day_end_ms = 0  # the first tick begins a day
        self._row: dict[str, Any] = {"code": code, "seq": seq, "ts": 0}
        self._book: dict[str, Any] = {}
        self._row_bound = 0  # row and book are at most this long, encoded
        # A checked tick that nobody has asked for yet: the next one with the same fields takes its place, and only
        # the last of them is merged. As text, for it is most often thrown away, and a dict in cold memory is dear.
        self._waiting: bytes | None = None
        self._waiting_shape: Shape | None = None
        self._encoded: bytes | None = None
        self._encoded_book: bytes | None = None

    @property
    def row(self) -> dict[str, Any]:
        self._settle()
        return self._row

    @property
    def book(self) -> dict[str, Any]:
        self._settle()
        return self._book

    def encoded(self) -> bytes:
        """Return the row as JSON text, made once per tick."""
        text = self._encoded
        if text is None:
            text = self._encoded = exact(orjson.dumps(self.row))
        return text

    def encoded_book(self) -> bytes:
        """Return the book as JSON text, made once per tick."""
        self._settle()
        text = self._encoded_book
        if text is None:
            text = self._encoded_book = exact(orjson.dumps(self._book))
        return text

    def _settle(self) -> None:
        """Merge the tick that waits."""
        text, shape = self._waiting, self._waiting_shape
        if text is not None and shape is not None:
            self._encoded_book = None
            tick = decode_tick(text)
            check_tick(tick, shape)  # it was found good before; this makes its sizes whole numbers
            self._merge(tick, shape, len(text))

    def _merge(self, tick: dict[str, Any], shape: Shape, size: int) -> None:  # hot
        """Merge a checked tick of ``size`` bytes that is the newest; ``tick`` is used up."""
        self._waiting = None
        row = self._row
        has_nulls = None in tick.values()
        merge_fields(row, self._book, tick, shape)
        row["ts"] = self.ts
        row["seq"] = self.seq
        if has_nulls:
            clear_nulls(row)
        self._row_bound += size


class TradingDays:
    """When a code's trading day ends, by the market that its code names.

    Args:
        zones: market suffix to IANA zone; the key "" is for codes without a suffix.
    """

    def __init__(self, zones: Mapping[str, str]) -> None:
        self._zones = {market: ZoneInfo(zone) for market, zone in zones.items()}
        self._last: dict[str, tuple[int, int]] = {}  # market to the day it was last asked about

    def end_ms(self, code: str, ts_ms: int) -> int:
        """Return the local midnight that ends the day of ``ts_ms``; far away for unlisted markets."""
        market = code.rpartition(".")[2] if "." in code else ""
        begin, end = self._last.get(market, (0, 0))
        if begin <= ts_ms < end:
            return end
        zone = self._zones.get(market)
        if zone is None:
            return _NEVER_MS
        day = datetime.fromtimestamp(ts_ms / 1000, zone).date()
        begin, end = (int(datetime.combine(d, time(), zone).timestamp() * 1000) for d in (day, day + timedelta(days=1)))
        self._last[market] = begin, end
        return end


def _agreed_code(code: str | None, own: Any) -> str:
    """Return the code that the channel and the tick itself speak of.

    Raises:
        BadTick: they contradict each other, or the tick's is none.
    """
    if own is None and code is not None:
        return code
    if type(own) is not str:
        raise BadTick("wrong_type", "code must be a text")
    if own == code:
        return own
    try:  # one look-up when it was spelled so before
        parsed = parse_code(own)
    except BadCode as e:
        raise BadTick("bad_code", str(e)) from None
    if code is not None and parsed != code:
        raise BadTick("wrong_channel", f"{own} came on the channel of {code}")
    return parsed


class Board:
    """Merges ticks into rows.

    Args:
        epoch: of plain ticks.
        days: ends of trading days; a later day's first tick replaces the row.
        drop_older: refuse a tick whose ``ts`` is below the row's.
        watched: codes whose news somebody waits for; None: all of them.
        books_watched: codes of which a change of the book is news too.

    Attributes:
        epoch: of plain ticks.
        newest_ms: when the newest accepted tick arrived; 0: none yet.
        log_epoch: the log's, for copies of its ticks that also come in plainly; empty: none.
        copies: how many of these were ignored.
    """

    def __init__(
        self,
        *,
        epoch: str = "",
        days: TradingDays,
        max_codes: int = 200_000,
        max_row_bytes: int = 16_384,
        max_tick_bytes: int = 8_192,
        drop_older: bool = False,
        watched: Container[str] | None = None,
        books_watched: Container[str] = (),
    ) -> None:
        self.quotes: dict[str, Quote] = {}
        self.accepted = 0
        self.refused: Counter[str] = Counter()
        self.last_fault = ""
        self.newest_ms = 0
        self.log_epoch = ""
        self.copies = 0
        self.epoch = epoch
        self._returns = 0  # how often a code came back from the log to plain ticks
        self._left: dict[str, tuple[str, int]] = {}  # such codes: where they were in the log
        self._watched = watched
        self._books_watched = books_watched
        self._days = days
        self._max_codes = max_codes
        self._max_row_bytes = max_row_bytes
        self._max_tick_bytes = max_tick_bytes
        self._drop_older = drop_older
        self._retired_seq = 0  # highest seq of a row or epoch that was left: a code that returns goes on above it

    def seq(self, code: str) -> int:
        """Return the seq of a code's newest row, 0 when there is none."""
        quote = self.quotes.get(code)
        return quote.seq if quote else 0

    def apply(self, code: str | None, payload: bytes, now_ms: int) -> Quote | None:  # hot
        """Take in one plain tick.

        Args:
            code: canonical, from the channel; None: the tick's own ``code`` counts.
            payload: JSON text.
            now_ms: arrival, epoch milliseconds.

        Returns:
            The quote when its row has something new to show to those who watch it; None when
            nobody does, when the tick was refused (see ``refused``), or changed only ``ts``.
        """
        try:
            size = len(payload)
            if size > self._max_tick_bytes:
                raise BadTick("too_large", f"a tick has at most {self._max_tick_bytes} bytes")
            tick = decode_tick(payload)
            shape = SHAPES.get(tuple(tick)) or shape_of(tick)
            if shape.copies and self.log_epoch and tick["epoch"] == self.log_epoch:
                self.copies += 1
                return None
            if shape.codes or code is None:
                code = _agreed_code(code, tick.get("code"))
            check_tick(tick, shape)
            if size >= _DEEP_BYTES and payload.count(b"[") + payload.count(b"{") >= _DEEP_LEVELS:
                written_size(tick)
            ts = tick["ts"] if shape.ts else None
            if ts is None:
                ts = now_ms
            quote = self.quotes.get(code)
            if quote is None:
                quote = self._admit(code)
            elif self._drop_older and ts < quote.ts:
                raise BadTick("older", f"ts {ts} is before the row's {quote.ts}")
            is_fresh = ts >= quote.day_end_ms or (shape.resets and tick["reset"] is True)
            if quote._waiting is not None and (quote._waiting_shape is not shape or is_fresh):
                quote._settle()
            if (0 if is_fresh else quote._row_bound) + size + _DERIVED_BYTES > self._max_row_bytes:
                self._measure(quote, tick, shape, is_fresh)
        except BadTick as e:
            self.refused[e.reason] += 1
            self.last_fault = f"{code or '?'}: {e}"
            return None
        if self.log_epoch and quote.epoch == self.log_epoch:
            self._returns += 1
            self._left[code] = quote.epoch, quote.seq
            quote.epoch = f"{self.epoch}.{self._returns}"
            quote.restated = max(quote.restated, NEW_EPOCH)
        if is_fresh:
            self._begin_day(quote, ts)
        self.accepted += 1
        quote.ts = ts
        quote.seq += 1
        quote.arrived_ms = self.newest_ms = now_ms
        quote._encoded = None
        watched = self._watched
        if watched is not None and code not in watched:
            quote._waiting = payload
            quote._waiting_shape = shape
            return None
        if quote._waiting is not None:
            quote._settle()
        return self._news(quote, tick, shape, size, is_fresh)

    def apply_numbered(
        self, code: str, seq: int, tick: dict[str, Any], arrived_ms: int, logged_ms: int | None = None
    ) -> Quote | None:
        """Take in a tick of the log; ``seq`` counts in :attr:`log_epoch`.

        Args:
            code: canonical.
            tick: decoded; it is used up.
            arrived_ms: by this machine's clock.
            logged_ms: by the clock of Redis, the same for every server: ``ts`` of a tick without one; None: arrival.

        Returns:
            As :meth:`apply`; also None for a tick that is known already.
        """
        quote = self.quotes.get(code)
        if quote is not None and self._is_known(quote, self.log_epoch, seq):
            return None
        try:
            if quote is None:
                quote = self._admit(code)
            quote._settle()
            if quote.epoch != self.log_epoch:
                self._retired_seq = max(self._retired_seq, quote.seq)
                quote.restated = max(quote.restated, NEW_EPOCH)
                quote.epoch = self.log_epoch
            elif seq > quote.seq + 1:
                quote.restated = GAP
                quote.gaps += 1
            # Also when it is refused below: the next one must not look like one behind a gap.
            quote.seq = seq
            shape = SHAPES.get(tuple(tick)) or shape_of(tick)
            check_tick(tick, shape)
            size = written_size(tick)
            if size > self._max_tick_bytes:
                raise BadTick("too_large", f"a tick has at most {self._max_tick_bytes} bytes")
            ts = tick["ts"] if shape.ts else None
            if ts is None:
                ts = arrived_ms if logged_ms is None else logged_ms
            if self._drop_older and ts < quote.ts:
                raise BadTick("older", f"ts {ts} is before the row's {quote.ts}")
            is_fresh = ts >= quote.day_end_ms or (shape.resets and tick["reset"] is True)
            if (0 if is_fresh else quote._row_bound) + size + _DERIVED_BYTES > self._max_row_bytes:
                self._measure(quote, tick, shape, is_fresh)
        except BadTick as e:
            self.refused[e.reason] += 1
            self.last_fault = f"{code}: {e}"
            if quote is None or not quote.arrived_ms:  # there is nothing to show of it yet
                self.quotes.pop(code, None)
                return None
            quote._row["seq"] = seq
            quote._encoded = None
            return quote if quote.restated else None
        if is_fresh:
            self._begin_day(quote, ts)
        self.accepted += 1
        quote.ts = ts
        quote.arrived_ms = arrived_ms
        self.newest_ms = max(self.newest_ms, arrived_ms)
        quote._encoded = None
        return self._news(quote, tick, shape, size, is_fresh)

    def restate(
        self, code: str, epoch: str, seq: int, fields: dict[str, Any], arrived_ms: int, reason: int
    ) -> Quote | None:
        """Hold a whole row that somebody else has kept; None when it is older than ours or bad.

        Args:
            epoch: in which ``seq`` counts.
            fields: of the row and its book; used up.
            reason: :data:`NEW_EPOCH` or :data:`GAP`.
        """
        quote = self.quotes.get(code)
        if quote is not None and self._is_known(quote, epoch, seq):
            return None
        shape = shape_of(fields)
        try:
            check_tick(fields, shape)
            size = written_size(fields)
            if size > self._max_row_bytes:
                raise BadTick("row_too_large", f"the row of {code} would pass {self._max_row_bytes} bytes")
            if quote is None:
                quote = self._admit(code)
        except BadTick as e:
            self.refused[e.reason] += 1
            self.last_fault = f"{code}: {e}"
            return None
        quote._waiting = None
        if quote.epoch != epoch:
            self._retired_seq = max(self._retired_seq, quote.seq)
        quote.restated = max(quote.restated, reason)
        quote.gaps += reason == GAP
        quote.epoch, quote.seq = epoch, seq
        quote.ts = fields.get("ts") or arrived_ms
        quote.arrived_ms = arrived_ms
        self.newest_ms = max(self.newest_ms, arrived_ms)
        quote._encoded = None
        self._begin_day(quote, quote.ts)
        quote._merge(fields, shape, size)
        return quote

    def _is_known(self, quote: Quote, epoch: str, seq: int) -> bool:
        """Say whether ``seq`` is not above what the code has had in this epoch."""
        if quote.epoch == epoch:
            return seq <= quote.seq
        left, last = self._left.get(quote.code, ("", 0))
        return left == epoch and seq <= last

    def _begin_day(self, quote: Quote, ts: int) -> None:
        """Forget the row: what comes replaces it."""
        quote._row = {"code": quote.code, "seq": quote.seq, "ts": 0}
        quote._book = {}
        quote._encoded_book = None
        quote._row_bound = 0
        quote.day_end_ms = self._days.end_ms(quote.code, ts)

    def _news(  # hot
        self, quote: Quote, tick: dict[str, Any], shape: Shape, size: int, is_fresh: bool
    ) -> Quote | None:
        """Merge a checked tick that somebody watches; return the quote when it shows something new."""
        is_news = is_fresh or has_news(quote._row, tick, shape)
        if shape.levels:
            quote._encoded_book = None
            if not is_news and quote.code in self._books_watched:
                is_news = has_book_news(quote._book, tick, shape)
        quote._merge(tick, shape, size)
        return quote if is_news or quote.restated else None

    def _admit(self, code: str) -> Quote:
        if len(self.quotes) >= self._max_codes:
            raise BadTick("board_full", f"the board holds {self._max_codes} codes")
        quote = self.quotes[code] = Quote(code, self._retired_seq, self.epoch)
        return quote

    def _measure(self, quote: Quote, tick: dict[str, Any], shape: Shape, is_fresh: bool) -> None:
        """Refuse a tick that would really make its row too large; the bound is a sum and forgets what is replaced."""
        row = {"code": quote.code} if is_fresh else dict(quote.row)
        book = {} if is_fresh else dict(quote.book)
        merge_fields(row, book, dict(tick), shape)
        clear_nulls(row)
        size = len(orjson.dumps(row)) + (len(orjson.dumps(book)) if book else 0)
        if size > self._max_row_bytes:
            if not quote.arrived_ms:
                del self.quotes[quote.code]
            raise BadTick("row_too_large", f"the row of {quote.code} would pass {self._max_row_bytes} bytes")
        quote._row_bound = size

    def expire(self, older_than_ms: int, keep: Iterable[str] = ()) -> int:
        """Drop the rows whose newest tick arrived before ``older_than_ms``; return how many.

        Args:
            keep: codes that somebody watches; they stay.
        """
        kept = set(keep)
        old = [q for q in self.quotes.values() if q.arrived_ms < older_than_ms and q.code not in kept]
        for quote in old:
            self._retired_seq = max(self._retired_seq, quote.seq)
            del self.quotes[quote.code]
            self._left.pop(quote.code, None)
        return len(old)
