"""Rows as they were: made again of the ticks that led to the newest one.

Law: a row says nothing that was not known when it was the newest. A field that only later ticks speak of is not in the
earlier rows, for nobody knows what it was.
"""

from collections.abc import Collection
from typing import Any

import orjson

from quotepush.quote.board import Quote, exact
from quotepush.quote.tick import BadTick, check_tick, clear_nulls, derive_change, merge_fields, shape_of

__all__ = ["PastRow"]

_DERIVED = frozenset(("seq", "ts", "change", "change_pct"))


class PastRow:
    """The row of one code, from before some ticks on.

    Args:
        quote: as it is now, behind these ticks.
        told: the fields that they speak of.
    """

    def __init__(self, quote: Quote, told: Collection[str]) -> None:
        self._code = quote.code
        self._row = self._empty()
        self._row |= {name: value for name, value in quote.row.items() if name not in told and name not in _DERIVED}
        self._book = {name: levels for name, levels in quote.book.items() if name not in told}
        change = derive_change(self._row.get("last"), self._row.get("prev_close"))
        if change is not None:
            self._row["change"], self._row["change_pct"] = change

    def _empty(self) -> dict[str, Any]:
        return {"code": self._code, "seq": 0, "ts": 0}

    def merge(self, seq: int, tick: dict[str, Any], arrived_ms: int) -> bool:
        """Merge the next tick (used up); False: it was refused, and the row stays as it was."""
        shape = shape_of(tick)
        try:
            check_tick(tick, shape)
        except BadTick:
            return False
        if shape.resets and tick["reset"] is True:
            self._row, self._book = self._empty(), {}
        ts = tick.get("ts") or arrived_ms
        merge_fields(self._row, self._book, tick, shape)
        clear_nulls(self._row)
        self._row["seq"], self._row["ts"] = seq, ts
        return True

    def encoded(self) -> bytes:
        """Return the row as JSON text."""
        return exact(orjson.dumps(self._row))

    def encoded_book(self) -> bytes:
        """Return the book as JSON text."""
        return exact(orjson.dumps(self._book))
