"""Rows that were sent lately, for clients that come back: what they have missed, and nothing twice.

Law: the rows of a code are without a hole from its base on, in one epoch; memory is bounded in bytes per
code, in bytes in all and in age. Rows that are behind a gap, or numbered anew, begin a new ring.

Rows of all codes bear *ordinals*: they count them in the order in which they are sent, within one life of main. One
ordinal says of any number of codes up to where somebody has been sent everything, as ``seq`` does of one.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from quotepush.quote.board import Quote, RecentRow
from quotepush.quote.past import PastRow

__all__ = ["Ring"]


class Ring:
    """The recent rows of all codes.

    Args:
        max_bytes: of all rows; above it every code gives up the older half of its own.
        max_code_bytes: of the rows of one code; the oldest go first.
        max_age_ms: older rows go.
        life: in which ordinals count.

    Attributes:
        ordinal: of the newest row.
    """

    def __init__(self, *, max_bytes: int, max_code_bytes: int, max_age_ms: int, life: str = "") -> None:
        self.max_bytes = max_bytes
        self._max_code_bytes = max_code_bytes
        self.max_age_ms = max_age_ms
        self.life = life
        self.ordinal = 0
        self._quotes: dict[Quote, None] = {}
        self._watched: dict[str, tuple[int, int]] = {}  # code to ordinal and seq when its rows began to come here
        self.bytes = 0

    def add(self, quote: Quote) -> None:  # hot
        """Keep the newest row of a code, which is being sent."""
        self.ordinal += 1
        recent = quote.recent
        if recent is None or quote.restated:
            recent = self._begin(quote)
            if quote.restated:
                return
        text = quote.encoded()
        size = len(text)
        recent.append((quote.seq, text, quote.arrived_ms, self.ordinal))
        quote.recent_bytes += size
        self.bytes += size
        oldest_ms = quote.arrived_ms - self.max_age_ms
        while recent and (quote.recent_bytes > self._max_code_bytes or recent[0][2] < oldest_ms):
            self._drop_oldest(quote, recent)
        self._shrink()

    def since(self, quote: Quote, epoch: str, seq: int) -> list[tuple[int, bytes]] | None:
        """Return the rows behind ``seq``, oldest first; None when they are not all here."""
        if epoch != quote.epoch:
            return None
        if seq >= quote.seq:
            return []
        if quote.recent is None or seq < quote.recent_base:
            return None
        return [(number, text) for number, text, _, _ in quote.recent if number > seq]

    def watch(self, code: str, seq: int) -> None:
        """From now on every row of a code comes here; ``seq`` is that of its newest one."""
        self.ordinal += 1  # whoever had everything up to now need not have had this code's rows
        self._watched[code] = self.ordinal, seq

    def behind(
        self, code: str, quote: Quote | None, life: str, ordinal: int
    ) -> tuple[int | None, list[tuple[int, bytes, int]]] | None:
        """Return what somebody has missed of a code who had everything up to ``ordinal``; None: it is not all here.

        Returns:
            The seq of the row that he was sent last (None: numbers without a row stand behind it, and he may have been
            shown one of them in a snapshot), and the rows since then with their ordinals, oldest first.
        """
        began, last = self._watched.get(code, (math.inf, 0))
        if life != self.life or not began <= ordinal <= self.ordinal:
            return None
        missed: list[tuple[int, bytes, int]] = []
        if quote is None:
            return last, missed
        if quote.recent is not None:
            if ordinal < quote.recent_from:
                return None
            for seq, text, _, number in quote.recent:
                if number > ordinal:
                    missed.append((seq, text, number))
                else:
                    last = seq
            if quote.recent_from != began and (not quote.recent or quote.recent[0][3] > ordinal):
                last = quote.recent_base
        following = missed[0][0] if missed else quote.seq + 1
        return (last if last == following - 1 else None), missed

    def fill(self, quote: Quote, ticks: Sequence[tuple[int, dict[str, Any], int]]) -> bool:
        """Keep rows from before our time, made of the ticks that led to the newest one; True if it is so.

        A field that only later ticks speak of is not in the earlier rows: nobody knows what it was.

        Args:
            ticks: seq, decoded tick (used up) and arrival, oldest first.
        """
        if not ticks or ticks[-1][0] != quote.seq or quote.recent:
            return False
        row = PastRow(quote, {name for _, tick, _ in ticks for name in tick})
        recent = self._begin(quote)
        quote.recent_base, quote.recent_from = ticks[0][0] - 1, self.ordinal
        for seq, tick, arrived_ms in ticks:
            if not row.merge(seq, tick, arrived_ms):
                continue
            text = quote.encoded() if seq == quote.seq else row.encoded()
            recent.append((seq, text, arrived_ms, self.ordinal))
            quote.recent_bytes += len(text)
            self.bytes += len(text)
        while recent and quote.recent_bytes > self._max_code_bytes:
            self._drop_oldest(quote, recent)
        self._shrink()
        return True

    def forget(self, quotes: Iterable[Quote]) -> None:
        """Keep nothing of these codes any more: their next rows will not come here."""
        for quote in quotes:
            self.unwatch(quote.code)
            self._clear(quote)

    def unwatch(self, code: str) -> None:
        """The rows of a code no longer come here."""
        self._watched.pop(code, None)

    def _clear(self, quote: Quote) -> None:
        self._quotes.pop(quote, None)
        self.bytes -= quote.recent_bytes
        quote.recent_bytes = 0
        quote.recent = None

    def _begin(self, quote: Quote) -> deque[RecentRow]:
        self._clear(quote)
        self._quotes[quote] = None
        quote.recent = deque()
        quote.recent_base = quote.seq if quote.restated else quote.seq - 1
        began, _ = self._watched.get(quote.code, (self.ordinal, 0))
        quote.recent_from = self.ordinal if quote.restated else began
        return quote.recent

    def _shrink(self) -> None:
        while self.bytes > self.max_bytes:
            for quote in self._quotes:
                for _ in range((len(quote.recent or ()) + 1) // 2):
                    self._drop_oldest(quote, quote.recent)

    def _drop_oldest(self, quote: Quote, recent: deque[RecentRow] | None) -> None:
        assert recent is not None
        seq, text, _, ordinal = recent.popleft()
        quote.recent_base, quote.recent_from = seq, ordinal
        quote.recent_bytes -= len(text)
        self.bytes -= len(text)
