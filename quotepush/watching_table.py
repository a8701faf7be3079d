"""The table of ``quotepush watch``: what it shows of each code, and in how much room.

Law: whatever a publisher or a server says reaches the terminal as plain text: no markup, no control character.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeGuard

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quotepush.client import Gap, QuoteClient, Rejected, Row, StateChange

__all__ = ["QuoteTable", "Rate", "plain"]

_FLASH_S = 0.8
_RATE_WINDOW_S = 3.0
_TREND_PRICES = 12
_TREND_MARKS = "▁▂▃▄▅▆▇█"
_COLUMNS = (
    "code", "name", "last", "change", "change %", "trend", "bid", "ask", "volume", "age", "rows/s", "merged", "gaps",
)  # fmt: skip
# Columns that stand for fields of the row, and those that stand for more than one.
_FIELDS = {"name": "name", "last": "last", "change": "change", "change_pct": "change %", "bid": "bid", "ask": "ask",
           "volume": "volume"}  # fmt: skip
_OF_EVERY_VIEW = ("age", "rows/s", "merged", "gaps")
_FIRST_TO_GO = (
    "merged", "rows/s", "gaps", "name", "trend", "age", "volume", "ask", "bid", "change", "change %",
)  # fmt: skip
_MAX_NAME_CELLS = 20
_MAX_VALUE_CELLS = 24


class Rate:
    """Events per second, as a mean that forgets: what is ``window_s`` old counts for a third."""

    def __init__(self, window_s: float = _RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._value = 0.0
        self._at_s = 0.0

    def count(self, now_s: float) -> None:
        """One event now."""
        self._value = self.at(now_s) + 1 / self._window_s
        self._at_s = now_s

    def at(self, now_s: float) -> float:
        """Return the rate."""
        return self._value * math.exp(min(0.0, self._at_s - now_s) / self._window_s)


class _Line:
    """What the table knows of one code beside its newest row."""

    __slots__ = ("changed_s", "direction", "gaps", "prices", "rate")

    def __init__(self) -> None:
        self.rate = Rate()
        self.direction = 0
        self.changed_s = -math.inf
        self.prices: deque[float] = deque(maxlen=_TREND_PRICES)
        self.gaps = 0


class QuoteTable:
    """The rows of a client as a table, with a line on the connection below.

    Args:
        fields: the view that was subscribed to; its fields are the columns. None: the usual columns.
        up: the colour of rising prices, ``red`` (as in China and, at first, on the page) or ``green``; falling ones
            have the other.

    Attributes:
        codes: in which order the codes are shown; empty: as their rows come.
        refused: codes that the server refused, shown with their reason.
    """

    def __init__(self, quotes: QuoteClient, *, fields: Sequence[str] | None = None, up: str = "red") -> None:
        self.codes: tuple[str, ...] = ()
        self.refused: tuple[Rejected, ...] = ()
        self._quotes = quotes
        self._up, self._down = ("red", "green") if up == "red" else ("green", "red")
        self._columns = _COLUMNS if fields is None else _columns_of(fields)
        self._lines: dict[str, _Line] = {}
        self._rows: dict[str, Row] = {}
        self._state = StateChange("connecting")
        self._retry_at_s = 0.0
        self._clock_offset_ms = 0.0

    async def read(self) -> None:
        """Take rows for ever."""
        async for row in self._quotes:
            self.take(row, time.monotonic())

    def take(self, row: Row, now_s: float) -> None:
        """Take a new row."""
        code = row["code"]
        line = self._lines.setdefault(code, _Line())
        before, after = self._rows.get(code, {}).get("last"), row.get("last")
        if _is_number(before) and _is_number(after) and before != after:
            line.direction = 1 if after > before else -1
            line.changed_s = now_s
        if _is_number(after) and (not line.prices or after != line.prices[-1]):
            line.prices.append(after)
        line.rate.count(now_s)
        self._rows[code] = row

    def take_gap(self, gap: Gap) -> None:
        """Take note that rows of a code were lost."""
        self._lines.setdefault(gap.code, _Line()).gaps += 1

    def take_state(self, change: StateChange) -> None:
        """Take a change of the connection's state."""
        self._state = change
        if change.retry_in_s is not None:
            self._retry_at_s = time.monotonic() + change.retry_in_s
        told_ms = (self._quotes.hello or {}).get("time")
        if change.state == "open" and _is_number(told_ms):
            # Ages are told by the server's clock: ours may be minutes off.
            self._clock_offset_ms = told_ms - time.time() * 1000

    def render(self, now_s: float, now_ms: float, width: int) -> RenderableType:
        """Return the table as it is now, with as many of its columns as fit into ``width``."""
        rows = [
            self._cells(code, self._rows.get(code, {}), now_s, now_ms + self._clock_offset_ms)
            for code in self.codes or self._rows
        ]
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = _columns_in(width, self._columns, rows)
        for column in shown:
            is_text = column in ("code", "name")
            table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(cells[column] for column in shown))
        refused = [Text(plain(f"refused: {refusal}"), style="yellow") for refusal in self.refused]
        return Group(table, *refused, self._connection(now_s))

    def _cells(self, code: str, row: Row, now_s: float, now_ms: float) -> dict[str, Text]:
        line = self._lines.get(code) or _Line()
        change = row.get("change")
        tone = "" if not _is_number(change) or not change else self._up if change > 0 else self._down
        last, mark = tone, " "
        if now_s - line.changed_s < _FLASH_S:
            last = f"bold reverse {self._up if line.direction > 0 else self._down}"
            mark = "▲" if line.direction > 0 else "▼"  # not by colour alone
        ts = row.get("ts")
        name = Text(plain(row.get("name", "")))
        name.truncate(_MAX_NAME_CELLS, overflow="ellipsis")
        others = {name: Text(_value(row.get(name))) for name in self._columns if name not in _COLUMNS}
        return {
            **others,
            "code": Text(plain(code), style="bold"),
            "name": name,
            "last": Text(mark + _number(row.get("last")), style=last),
            "change": Text(_number(change, sign=True), style=tone),
            "change %": Text(_number(row.get("change_pct"), sign=True, decimals=2), style=tone),
            "trend": Text(_trend(line.prices), style=tone),
            "bid": Text(_number(row.get("bid"))),
            "ask": Text(_number(row.get("ask"))),
            "volume": Text(_number(row.get("volume"))),
            "age": Text(_age((now_ms - ts) / 1000) if _is_number(ts) else ""),
            "rows/s": Text(f"{line.rate.at(now_s):.1f}"),
            "merged": Text(str(self._quotes.merged[code] or "")),
            "gaps": Text(f"✗{line.gaps}" if line.gaps else "", style="bold yellow"),
        }

    def _connection(self, now_s: float) -> Text:
        state = self._state
        url = self._quotes.url
        if state.state == "open":
            feed = self._quotes.feed
            age_ms = self._quotes.feed_age_ms
            text = Text(f"● {url}", style="green")
            if feed is not None:
                age = f", last tick {_age(age_ms / 1000)} ago" if age_ms is not None else ""
                text.append(f"  feed {plain(feed)}{age}", style="default" if feed == "ok" else "yellow")
            if self._quotes.merged_locally:
                text.append(f"  {self._quotes.merged_locally} merged here", style="yellow")
            return text
        if state.state == "waiting":
            left_s = max(0.0, self._retry_at_s - now_s)
            return Text(f"○ {url}: {plain(state.reason)}; next attempt in {left_s:.0f} s", style="yellow")
        reason = f" (before: {plain(state.reason)})" if state.reason else ""
        return Text(f"○ {url}: {state.state}{reason}", style="yellow")


def _columns_of(fields: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a view, in its order."""
    named = [_FIELDS.get(name, name) for name in fields if name not in ("code", "seq", "prev", "ts")]
    trend = ["trend"] if "last" in fields else []
    return tuple(dict.fromkeys(["code", *named, *trend, *_OF_EVERY_VIEW]))


def _columns_in(width: int, columns: Sequence[str], rows: Sequence[dict[str, Text]]) -> list[str]:
    """Return the columns that fit into ``width``: a price that is cut short is worse than none."""
    widths = {name: max(len(name), *(cells[name].cell_len for cells in rows), 0) for name in columns}
    shown = list(columns)
    others = [name for name in reversed(columns) if name not in _COLUMNS]
    for name in (*others, *(name for name in _FIRST_TO_GO if name in columns)):
        if sum(widths[column] + 2 for column in shown) - 2 <= width:
            break
        shown.remove(name)
    return shown


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) is int or type(value) is float


def _number(value: Any, *, sign: bool = False, decimals: int | None = None) -> str:
    if not _is_number(value):
        return ""
    places = f".{decimals}f" if decimals is not None else ""
    return format(value, ("+" if sign and value else "") + "," + places)


def _value(value: Any) -> str:
    """Return any field of a row in one short line."""
    text = _number(value) if _is_number(value) else "" if value is None else plain(value)
    return text if len(text) <= _MAX_VALUE_CELLS else text[: _MAX_VALUE_CELLS - 1] + "…"


def _trend(prices: Sequence[float]) -> str:
    """Return the last prices as a line of bars, the lowest of them at the bottom."""
    if len(prices) < 2:
        return ""
    low, high = min(prices), max(prices)
    top = len(_TREND_MARKS) - 1
    return "".join(_TREND_MARKS[round((price - low) / (high - low) * top)] for price in prices)


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for size_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.1f} s"


def plain(text: Any) -> str:
    """Return text that a terminal shows and never obeys."""
    return "".join(c if c.isprintable() else "�" for c in str(text))
