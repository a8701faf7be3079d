"""Delayed quotes: what the board showed a while ago, for those who may see no more.

Laws: what is shown with a delay was on the board at least so long ago; the rows of a code come in order, at most one
per :attr:`DelayLine.interval_s`, and its newest one always comes in the end; what waits is bounded in bytes: above it,
and as long as it has to be, rows of a code stand for longer intervals.

The board is looked at once an interval, so ticks cost nothing here. What was new then makes a *round*; each delay shows
a round when it is old enough. A delayed quote is called like its code with the delay behind it, which no code is, and
counts in epochs of its own: whoever has rows of the one has none of the other.

Pure: the clock is an argument.
"""

from bisect import bisect_right
from collections.abc import Collection, Container, Iterator
from operator import attrgetter
from typing import Any

import orjson

from quotepush.quote.board import GAP, NEW_EPOCH, Quote

__all__ = ["DelayLine", "DelayedQuote", "Sample", "delayed_name", "plain_code", "suffix_of"]

_SEPARATOR = "~"  # no letter of a code (docs/protocol.md, "Codes")
_FIRST_INTERVAL_S = 1.0
# So many rounds are kept at least of the shortest delay, however much is in them.
_LEAST_ROUNDS = 8
_SHOWN_PER_SLICE = 200
# What a sample takes besides its texts: itself, its numbers, its place in a round.
_SAMPLE_BYTES = 300


def suffix_of(delay_s: int) -> str:
    """Return what stands behind a code, or an epoch, that is shown with this delay; nothing without one."""
    return f"{_SEPARATOR}{delay_s}" if delay_s else ""


def delayed_name(code: str, delay_s: int) -> str:
    """Return what a code is called that is shown with this delay."""
    return code + suffix_of(delay_s)


def plain_code(name: str) -> str:
    """Return the code that a name stands for, delayed or not."""
    return name.partition(_SEPARATOR)[0]


class Sample:
    """The row of a code at some time.

    Attributes:
        seq: its number, in ``epoch``.
        text: JSON, whole but for the book.
        book: JSON.
        gaps: how many times rows had been lost until then.
    """

    __slots__ = ("book", "epoch", "gaps", "seq", "text")

    def __init__(self, seq: int, epoch: str, text: bytes, book: bytes, gaps: int) -> None:
        self.seq = seq
        self.epoch = epoch
        self.text = text
        self.book = book
        self.gaps = gaps

    @classmethod
    def of(cls, quote: Quote) -> "Sample":
        """Return what the board shows of a code now."""
        return cls(quote.seq, quote.epoch, quote.encoded(), quote.encoded_book(), quote.gaps)

    @property
    def bytes(self) -> int:
        """About what it takes."""
        return len(self.text) + len(self.book) + _SAMPLE_BYTES


def _said(text: bytes) -> bytes:
    """Return what a row says besides its code, number and time, which stand first."""
    return text.split(b",", 3)[-1] if text.count(b",", 0, 256) > 2 else b""


class DelayedQuote(Quote):
    """A quote as it was; what can be asked of a quote that is sent can be asked of it."""

    __slots__ = ("_gaps", "_suffix")

    def __init__(self, code: str, epoch: str, suffix: str) -> None:
        super().__init__(code + suffix, 0, epoch + suffix)
        self._suffix = suffix
        self._gaps = 0

    @property
    def row(self) -> dict[str, Any]:
        fields: dict[str, Any] = orjson.loads(self.encoded())
        return fields

    @property
    def book(self) -> dict[str, Any]:
        fields: dict[str, Any] = orjson.loads(self.encoded_book())
        return fields

    def show(self, sample: Sample, now_ms: int, *, is_book_news: bool) -> bool:
        """Become what ``sample`` says; True: those who watch have something new to see.

        Args:
            is_book_news: somebody watches the book, too.
        """
        epoch = sample.epoch + self._suffix
        if epoch != self.epoch:
            self.restated = NEW_EPOCH
        elif sample.seq <= self.seq:
            return False
        if sample.gaps != self._gaps and self.seq:
            self.restated = GAP
        is_new = (
            bool(self.restated)
            or _said(sample.text) != _said(self._encoded or b"")
            or (is_book_news and sample.book != self._encoded_book)
        )
        self.epoch, self.seq, self._gaps = epoch, sample.seq, sample.gaps
        self._encoded, self._encoded_book = sample.text, sample.book
        self.arrived_ms = now_ms
        return is_new


class _Round:
    """What was new on the board: ``at_ms`` is when it had all been looked at, ``from_ms`` when the oldest of it had."""

    __slots__ = ("at_ms", "from_ms", "samples")

    def __init__(self, from_ms: int, at_ms: int, samples: dict[str, Sample]) -> None:
        self.from_ms = from_ms
        self.at_ms = at_ms
        self.samples = samples


_AT_MS = attrgetter("at_ms")


class _Market:
    """What is shown with one delay."""

    def __init__(self, delay_s: int) -> None:
        self.delay_ms = delay_s * 1000
        self.suffix = suffix_of(delay_s)
        self.shown_ms = 0  # time of the newest round that is shown
        self.quotes: dict[str, DelayedQuote] = {}  # by code


class DelayLine:
    """What the board has shown lately, and the quotes of each delay.

    Begin with :meth:`note_past` for what is known of the time before, and :meth:`begin`; then, every
    :attr:`interval_s`, :meth:`take` each quote of the board, :meth:`end_round`, and :meth:`release`.

    Args:
        delays_s: at least one, each above 0.
        epoch: of plain ticks, which is that of a code without any.
        max_bytes: of what waits to be shown.

    Attributes:
        books_watched: names of delayed quotes whose book somebody watches.
        interval_s: how often the board is to be looked at.
        bytes: about what waits to be shown.
    """

    def __init__(self, delays_s: Collection[int], *, epoch: str, max_bytes: int) -> None:
        self._epoch = epoch
        self._markets = {delay_s: _Market(delay_s) for delay_s in sorted(delays_s)}
        self._longest_interval_s = min(delays_s) / _LEAST_ROUNDS
        self._max_bytes = max_bytes
        self.books_watched: Container[str] = frozenset()
        self._rounds: list[_Round] = []
        self._open: dict[str, Sample] = {}  # of the round that is being made
        self._newest: dict[str, Sample] = {}
        self.interval_s = _FIRST_INTERVAL_S
        self.bytes = 0

    @property
    def longest_ms(self) -> int:
        """The longest delay."""
        return max(market.delay_ms for market in self._markets.values())

    def quotes(self, delay_s: int) -> dict[str, DelayedQuote]:
        """Return the quotes of a delay by code, alive."""
        return self._markets[delay_s].quotes

    def get(self, name: str) -> DelayedQuote | None:
        """Return a delayed quote by its name; None: nothing is shown of it yet."""
        code, _, delay = name.partition(_SEPARATOR)
        market = self._markets.get(int(delay)) if delay else None
        return market.quotes.get(code) if market is not None else None

    # What was, before we began to look

    def note_past(self, code: str, sample: Sample, at_ms: int) -> None:
        """Note what the board would have shown of a code at some time, in any order of codes and times."""
        width_ms = round(self.interval_s * 1000)
        # The end of its interval, so that it is never shown too early; what is older than all delays comes at once.
        end_ms = (max(at_ms, 0) // width_ms + 1) * width_ms
        rounds = self._rounds
        place = bisect_right(rounds, end_ms - 1, key=_AT_MS)
        if place == len(rounds) or rounds[place].at_ms != end_ms:
            rounds.insert(place, _Round(end_ms, end_ms, {}))
        samples = rounds[place].samples
        before = samples.get(code)
        if before is None or before.epoch != sample.epoch or before.seq < sample.seq:
            samples[code] = sample
            self.bytes += sample.bytes - (before.bytes if before is not None else 0)
            self._thin()

    def begin(self, now_ms: int) -> None:
        """Everything that is known of the past has been noted."""
        oldest_ms = now_ms - self.longest_ms
        old = bisect_right(self._rounds, oldest_ms, key=_AT_MS)
        self._merge(0, old)
        for made in self._rounds:
            self._newest.update(made.samples)

    # What is

    def take(self, quote: Quote) -> None:
        """Note what the board shows of a code, if it is something new."""
        before = self._newest.get(quote.code)
        if before is not None and before.seq == quote.seq and before.epoch == quote.epoch:
            return
        self._newest[quote.code] = self._open[quote.code] = Sample.of(quote)

    def end_round(self, now_ms: int) -> None:
        """The board has been looked at, as of now."""
        if self._open:
            samples, self._open = self._open, {}
            at_ms = max(now_ms, self._rounds[-1].at_ms + 1 if self._rounds else 0)
            self._rounds.append(_Round(at_ms, at_ms, samples))
            self.bytes += sum(sample.bytes for sample in samples.values())
            self._thin()

    def release(self, now_ms: int) -> Iterator[DelayedQuote | None]:
        """Show what is old enough; yields the quotes that have something new, and None now and then for a rest."""
        for market in self._markets.values():
            rounds = self._rounds
            first = bisect_right(rounds, market.shown_ms, key=_AT_MS)
            until = bisect_right(rounds, now_ms - market.delay_ms, key=_AT_MS)
            for made in rounds[first:until]:
                for number, (code, sample) in enumerate(made.samples.items(), 1):
                    quote = market.quotes.get(code)
                    if quote is None:
                        quote = market.quotes[code] = DelayedQuote(code, self._epoch, market.suffix)
                    if quote.show(sample, now_ms, is_book_news=quote.code in self.books_watched):
                        yield quote
                    if not number % _SHOWN_PER_SLICE:
                        yield None
                market.shown_ms = made.at_ms
        self._forget_shown()

    def expire(self, codes: Container[str], keep: Container[str]) -> None:
        """Forget codes that have left the board; those stay that are watched (by name) or wait to be shown."""
        for market in self._markets.values():
            left = [q for code, q in market.quotes.items() if code not in codes and q.code not in keep]
            for quote in left:
                code = plain_code(quote.code)
                if not any(code in made.samples for made in self._rounds):
                    del market.quotes[code]
        for code in [code for code in self._newest if code not in codes]:
            del self._newest[code]

    # In bounds

    def _forget_shown(self) -> None:
        """Drop the rounds that every delay has shown, and look more often again when there is room."""
        shown = bisect_right(self._rounds, min(m.shown_ms for m in self._markets.values()), key=_AT_MS)
        for made in self._rounds[:shown]:
            self.bytes -= sum(sample.bytes for sample in made.samples.values())
        del self._rounds[:shown]
        if self.interval_s > _FIRST_INTERVAL_S and self.bytes < self._max_bytes // 4:
            self.interval_s /= 2

    def _thin(self) -> None:
        """Let rounds stand for twice the time while they are too much, up to a share of the shortest delay.

        Then only the newest one grows, and no longer than that: the older ones are shown in their time and make room.
        """
        while self.bytes > self._max_bytes and len(self._rounds) > 1:
            if self.interval_s * 2 > self._longest_interval_s:
                before, newest = self._rounds[-2:]
                if newest.at_ms - before.from_ms <= self._longest_interval_s * 1000:
                    self._merge(len(self._rounds) - 2, len(self._rounds))
                return
            self.interval_s *= 2
            for start in range(len(self._rounds) // 2):  # each pair becomes one, so the next begins one further on
                self._merge(start, start + 2)

    def _merge(self, start: int, end: int) -> None:
        """Make one round of several: of each code its newest sample, shown when the last of them would have been."""
        merged = self._rounds[start:end]
        if len(merged) < 2:
            return
        samples: dict[str, Sample] = {}
        for made in merged:
            for code, sample in made.samples.items():
                before = samples.pop(code, None)
                if before is not None:
                    self.bytes -= before.bytes
                samples[code] = sample
        self._rounds[start:end] = [_Round(merged[0].from_ms, merged[-1].at_ms, samples)]
