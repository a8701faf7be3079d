"""Rows that were sent lately, for clients that come back: what they have missed, and nothing twice.

Law: the rows of a code are without a hole from its base on, in one epoch; memory is bounded in bytes per
code, in bytes in all and in age. Rows that are behind a gap, or numbered anew, begin a new ring.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from quotepush.quote.board import Quote, RecentRow, exact
from quotepush.quote.tick import BadTick, check_tick, clear_nulls, derive_change, merge_fields, shape_of

__all__ = ["Ring"]

_DERIVED = frozenset(("seq", "ts", "change", "change_pct"))


class Ring:
    """The recent rows of all codes.

    Args:
        max_bytes: of all rows; above it every code gives up the older half of its own.
        max_code_bytes: of the rows of one code; the oldest go first.
        max_age_ms: older rows go.
    """

    def __init__(self, *, max_bytes: int, max_code_bytes: int, max_age_ms: int) -> None:
        self.max_bytes = max_bytes
        self._max_code_bytes = max_code_bytes
        self.max_age_ms = max_age_ms
        self._quotes: dict[Quote, None] = {}
        self.bytes = 0

    def add(self, quote: Quote) -> None:  # hot
        """Keep the newest row of a code, which is being sent."""
        recent = quote.recent
        if recent is None or quote.restated:
            recent = self._begin(quote)
            if quote.restated:
                return
        text = quote.encoded()
        size = len(text)
        recent.append((quote.seq, text, quote.arrived_ms))
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
        return [(number, text) for number, text, _ in quote.recent if number > seq]

    def fill(self, quote: Quote, ticks: Sequence[tuple[int, dict[str, Any], int]]) -> bool:
        """Keep rows from before our time, made of the ticks that led to the newest one; True if it is so.

        A field that only later ticks speak of is not in the earlier rows: nobody knows what it was.

        Args:
            ticks: seq, decoded tick (used up) and arrival, oldest first.
        """
        if not ticks or ticks[-1][0] != quote.seq or quote.recent:
            return False
        told = {name for _, tick, _ in ticks for name in tick}
        row = {"code": quote.code, "seq": 0, "ts": 0}
        row |= {name: value for name, value in quote.row.items() if name not in told and name not in _DERIVED}
        _derive(row)
        recent = self._begin(quote)
        quote.recent_base = ticks[0][0] - 1
        for seq, tick, arrived_ms in ticks:
            shape = shape_of(tick)
            try:
                check_tick(tick, shape)
            except BadTick:
                continue
            if shape.resets and tick["reset"] is True:
                row = {"code": quote.code, "seq": 0, "ts": 0}
            ts = tick.get("ts") or arrived_ms
            merge_fields(row, {}, tick, shape)
            clear_nulls(row)
            row["seq"], row["ts"] = seq, ts
            text = quote.encoded() if seq == quote.seq else exact(orjson.dumps(row))
            recent.append((seq, text, arrived_ms))
            quote.recent_bytes += len(text)
            self.bytes += len(text)
        while recent and quote.recent_bytes > self._max_code_bytes:
            self._drop_oldest(quote, recent)
        self._shrink()
        return True

    def forget(self, quotes: Iterable[Quote]) -> None:
        """Keep nothing of these codes any more: their next rows will not come here."""
        for quote in quotes:
            self._quotes.pop(quote, None)
            self.bytes -= quote.recent_bytes
            quote.recent_bytes = 0
            quote.recent = None

    def _begin(self, quote: Quote) -> deque[RecentRow]:
        self.forget([quote])
        self._quotes[quote] = None
        quote.recent = deque()
        quote.recent_base = quote.seq if quote.restated else quote.seq - 1
        return quote.recent

    def _shrink(self) -> None:
        while self.bytes > self.max_bytes:
            for quote in self._quotes:
                for _ in range((len(quote.recent or ()) + 1) // 2):
                    self._drop_oldest(quote, quote.recent)

    def _drop_oldest(self, quote: Quote, recent: deque[RecentRow] | None) -> None:
        assert recent is not None
        seq, text, _ = recent.popleft()
        quote.recent_base = seq
        quote.recent_bytes -= len(text)
        self.bytes -= len(text)


def _derive(row: dict[str, Any]) -> None:
    change = derive_change(row.get("last"), row.get("prev_close"))
    if change is not None:
        row["change"], row["change_pct"] = change
