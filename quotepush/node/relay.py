"""Which worker wants which code, the rows on their way there, and which codes are stale.

Laws: a worker gets the rows of a code from the answer to its question until it gives the code
up, without a hole and in order; a worker that reads too slowly is held the newest row per code
and nothing else; a row is encoded at most once, and not at all when nobody wants its code; what a worker was told
last of a code, stale or fresh, is true since the last sweep.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from quotepush.node.bus import Answered, Ask, BusEnd, Freshness, Rows
from quotepush.quote.board import Board, Quote
from quotepush.quote.delay import DelayLine, plain_code
from quotepush.quote.ring import Ring

__all__ = ["Relay", "WorkerFeed"]

# Above so much unsent, a worker is slow: about 20,000 rows, some tens of milliseconds of its time.
_SLOW_BYTES = 4 << 20
# Codes that a sweep looks at in one turn of the loop: half a millisecond, for each of them is far away in memory.
_SWEPT_PER_SLICE = 500

# Code, seq and row; for a worker that has asked for it also the book; of a restated row also its epoch and the reason.
_Entry = tuple[str, int, bytes] | tuple[str, int, bytes, bytes | None] | tuple[str, int, bytes, bytes | None, str, int]


class WorkerFeed:
    """The rows for one worker.

    Attributes:
        codes: what it wants.
        books: of which of them it wants the book too.
        stale: of which of them it was told, or is about to be told, that they are stale.
        merged: rows that were merged because it was slow.
    """

    def __init__(self, bus: BusEnd) -> None:
        self._bus = bus
        self.codes: set[str] = set()
        self.books: set[str] = set()
        self.stale: set[str] = set()
        self.rows: list[_Entry] = []
        self.merged = 0
        self._held: dict[str, _Entry] | None = None
        self._ordinal = 0  # up to which it has been pushed everything
        self._changed: dict[str, None] = {}  # codes whose entry in ``stale`` the worker has yet to be told

    @property
    def is_holding(self) -> bool:
        """Whether rows are held for the worker, so that it has not been sent all that came before an answer."""
        return self._held is not None

    def push(self, ordinal: int) -> None:  # hot
        """Send what waits, or hold the newest of it while the worker is slow.

        Args:
            ordinal: of the newest row that there is (``quote.ring``); 0: main holds newer ones.
        """
        self._ordinal = ordinal
        rows = self.rows
        if not rows:
            return
        self.rows = []
        if self._held is None:
            if self._bus.unsent_bytes <= _SLOW_BYTES:
                self._bus.send_now(Rows(rows, ordinal))
                return
            self._held = {}
        for entry in rows:
            before = self._held.get(entry[0])
            if before is not None:
                self.merged += 1
                if len(before) == 6:  # it still has to be restated, and that rows were lost stays true
                    book = entry[3] if len(entry) > 3 else None
                    epoch, reason = (entry[4], max(before[5], entry[5])) if len(entry) == 6 else before[4:]
                    entry = (*entry[:3], book, epoch, reason)
            self._held[entry[0]] = entry

    def drained(self) -> None:
        """The worker has taken everything: what is held may go."""
        held, self._held = self._held, None
        if held:
            self._bus.send(Rows(list(held.values()), self._ordinal))

    def answer(
        self,
        question: int,
        rows: list[tuple[str, int, bytes | None, bytes | None, str]],
        refused: dict[str, str],
        missed: dict[str, list[tuple[int, bytes]]],
        stale: list[str],
        behind: dict[str, tuple[int | None, list[tuple[int, bytes, int]]]],
        ordinal: int,
    ) -> None:
        """Answer behind every row that is older than the answer, but for rows that are held."""
        self.push(ordinal)
        self._bus.send(Answered(question, rows, refused, missed, stale, behind, 0 if self.is_holding else ordinal))

    def watch(self, code: str, is_stale: bool) -> None:
        """From now on the worker wants this code; the answer that it is about to get says whether it is stale."""
        self.codes.add(code)
        if is_stale:
            self.stale.add(code)

    def unwatch(self, code: str) -> None:
        """The worker no longer wants this code."""
        self.codes.discard(code)
        if self._held is not None:  # should it ask again, the answer overtakes what is held
            self._held.pop(code, None)
        self.stale.discard(code)
        self._changed.pop(code, None)

    def note_freshness(self, code: str, is_stale: bool) -> None:
        """A code has become stale, or fresh again."""
        (self.stale.add if is_stale else self.stale.discard)(code)
        self._changed[code] = None

    def tell_freshness(self) -> None:
        """Tell the worker all that has been noted, in one message."""
        changed, self._changed = self._changed, {}
        if changed:
            stale = [code for code in changed if code in self.stale]
            self._bus.send(Freshness(stale, [code for code in changed if code not in self.stale]))


class Relay:
    """Hands the board's changes to the workers that want them.

    Args:
        is_known: whether a code may be subscribed to.
        ring: gets every row that is sent.
        keep_s: how long rows of a code are kept that nobody watches any more.
        stale_ms: a code whose newest tick arrived so long ago is stale; 0: no code ever is.
        delays: what is shown of codes whose names have a delay behind them; None: there are none.
        clock_ms: epoch milliseconds.

    Attributes:
        wanted: the codes that somebody on this machine watches, and the feeds of their workers; also codes that
            somebody watched a moment ago, with no feed: he may come back and ask for what he has missed.
        books: of which of them somebody wants the book, and how many workers do.
        is_lagging: main is behind the feed: per batch only a code's newest row is sent.
        merged: rows that were merged for this reason.
        stale: how many watched codes the last sweep found stale.
        life: of main, in which the ordinals of rows count.
    """

    def __init__(
        self,
        is_known: Callable[[str], bool],
        ring: Ring,
        keep_s: float,
        *,
        stale_ms: int = 0,
        delays: DelayLine | None = None,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._is_known = is_known
        self.life = ring.life
        self._stale_ms = stale_ms
        self._delays = delays
        self._clock_ms = clock_ms
        self._ring = ring
        self._keep_s = keep_s
        self._left: dict[str, float] = {}  # code that nobody watches any more to when that began; oldest first
        self.wanted: dict[str, list[WorkerFeed]] = {}
        self.books: Counter[str] = Counter()
        self.board: Board  # set by main: the board asks us what is watched, we ask it for rows
        self._dirty: list[WorkerFeed] = []
        self._late: dict[str, Quote] = {}
        self.is_lagging = False
        self.merged = 0
        self.stale = 0

    def offer(self, quote: Quote) -> None:  # hot
        """Queue a code's newest row for the workers that want it."""
        feeds = self.wanted.get(quote.code)
        if feeds is None:
            quote.restated = 0
            return
        if self.is_lagging:
            if quote.code in self._late:
                self.merged += 1
            self._late[quote.code] = quote
            return
        self._ring.add(quote)
        entry: _Entry = (quote.code, quote.seq, quote.encoded())
        for feed in feeds:
            if not feed.rows:
                self._dirty.append(feed)
            if quote.restated or quote.code in feed.books:
                feed.rows.append(self._whole_entry(feed, quote))
            else:
                feed.rows.append(entry)
        quote.restated = 0

    def _whole_entry(self, feed: WorkerFeed, quote: Quote) -> _Entry:
        book = quote.encoded_book() if quote.code in feed.books else None
        if quote.restated:
            return quote.code, quote.seq, quote.encoded(), book, quote.epoch, quote.restated
        return quote.code, quote.seq, quote.encoded(), book

    def flush(self) -> None:  # hot
        """Send what a batch of ticks has changed."""
        if self._late:
            late, self._late = self._late, {}
            lagging, self.is_lagging = self.is_lagging, False
            for quote in late.values():
                self.offer(quote)
            self.is_lagging = lagging
        dirty = self._dirty
        if dirty:
            self._dirty = []
            for feed in dirty:
                feed.push(self._ring.ordinal)

    def ask(self, feed: WorkerFeed, question: Ask) -> None:
        """Answer a worker's question; with ``watch`` also note what it wants from now on."""
        refused = {code: "unknown_code" for code in question.codes if not self._is_known(plain_code(code))}
        rows: list[tuple[str, int, bytes | None, bytes | None, str]] = []
        missed: dict[str, list[tuple[int, bytes]]] = {}
        behind: dict[str, tuple[int | None, list[tuple[int, bytes, int]]]] = {}
        now_ms = self._clock_ms()
        for code in question.codes:
            if code in refused:
                continue
            if question.watch:
                if code not in feed.codes:
                    feed.watch(code, self._is_stale(self._quote(code), now_ms))
                    self._want(code).append(feed)
                    self._left.pop(code, None)
                if question.books and code not in feed.books:
                    feed.books.add(code)
                    self.books[code] += 1
            quote = self._quote(code)
            since = question.since.get(code)
            # The ring has not got a row yet that waits because main is late.
            if since is not None and (code in self._late or feed.is_holding):
                since = None
            if since is not None and since[0].startswith("@"):
                place = self._ring.behind(code, quote, since[0][1:], since[1])
                if place is not None:
                    behind[code] = place
                since = None
            if quote is None:
                epoch = self.board.epoch + code[len(plain_code(code)) :]
                rows.append((code, 0, None, b"{}" if question.books else None, epoch))
            else:
                book = quote.encoded_book() if question.books else None
                rows.append((code, quote.seq, quote.encoded(), book, quote.epoch))
                if since is not None:
                    found = self._ring.since(quote, *since)
                    if found is not None:
                        missed[code] = found
        stale = [code for code in question.codes if code in feed.stale]
        # Rows that wait because main is late have no ordinals yet, and may be in this answer.
        ordinal = 0 if self._late else self._ring.ordinal
        feed.answer(question.question, rows, refused, missed, stale, behind, ordinal)

    def _want(self, code: str) -> list[WorkerFeed]:
        """Return the feeds that want a code; its rows are kept from now on."""
        feeds = self.wanted.get(code)
        if feeds is None:
            feeds = self.wanted[code] = []
            quote = self._quote(code)
            self._ring.watch(code, quote.seq if quote is not None else 0)
        return feeds

    def _quote(self, name: str) -> Quote | None:
        """Return what there is of a code, or of a code with a delay behind it."""
        quote = self.board.quotes.get(name)
        return self._delays.get(name) if quote is None and self._delays is not None else quote

    def unwatch(self, feed: WorkerFeed, codes: Iterable[str]) -> None:
        """A worker no longer wants these codes."""
        for code in codes:
            if code in feed.codes:
                feed.unwatch(code)
                feeds = self.wanted[code]
                feeds.remove(feed)
                if not feeds:
                    self._left[code] = time.monotonic()
            if code in feed.books:
                feed.books.discard(code)
                self.books[code] -= 1
                if not self.books[code]:
                    del self.books[code]

    def keep(self, code: str) -> None:
        """Go on as if somebody had just left this code: its recent rows are in the ring."""
        if code not in self.wanted:
            self._want(code)
            self._left[code] = time.monotonic()

    def tidy(self) -> None:
        """Give up the codes that nobody has come back to."""
        until_s = time.monotonic() - self._keep_s
        while self._left:
            code, since_s = next(iter(self._left.items()))
            if since_s > until_s:
                break
            del self._left[code], self.wanted[code]
            self._ring.unwatch(code)
            if (quote := self._quote(code)) is not None:
                self._ring.forget([quote])

    def _is_stale(self, quote: Quote | None, now_ms: int) -> bool:
        """Say whether a code's newest tick arrived too long ago; a code without any is neither stale nor fresh."""
        return bool(self._stale_ms and quote and quote.arrived_ms and now_ms - quote.arrived_ms >= self._stale_ms)

    def sweep(self) -> Iterator[None]:
        """Find the watched codes that have become stale or fresh again; tell the workers at the end.

        Yields after every slice, so that the caller can let others have a turn.
        """
        if not self._stale_ms:
            return
        wanted = self.wanted
        concerned: dict[WorkerFeed, None] = {}
        found = 0
        oldest_ms = self._clock_ms() - self._stale_ms
        codes = list(wanted)
        for start in range(0, len(codes), _SWEPT_PER_SLICE):
            for code in codes[start : start + _SWEPT_PER_SLICE]:
                feeds = wanted.get(code)
                quote = self._quote(code) if feeds else None
                if feeds is None or quote is None:
                    continue
                is_stale = 0 < quote.arrived_ms <= oldest_ms
                found += is_stale
                for feed in feeds:
                    if is_stale is not (code in feed.stale):
                        feed.note_freshness(code, is_stale)
                        concerned[feed] = None
            yield
        self.stale = found
        for feed in concerned:
            feed.tell_freshness()
            yield

    @property
    def watched(self) -> int:
        """How many codes somebody here watches."""
        return len(self.wanted) - len(self._left)

    def forget(self, feed: WorkerFeed) -> None:
        """A worker is gone."""
        self.unwatch(feed, list(feed.codes))
