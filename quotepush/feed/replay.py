"""Ticks out of lines of text: CSV with a header, or one JSON object a line; and when each of them is due.

A line becomes a tick or is refused with a reason, and never harms the next one. What a server would refuse (a wrong
type, a negative price, a code that cannot be one) is refused here, where its line number is known. Field list:
docs/protocol.md, "The tick". Nothing here waits, opens a file or looks at a clock.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import orjson

from quotepush.errors import SettingsError
from quotepush.quote.tick import SERVERS_OWN

__all__ = [
    "MAX_LINE_BYTES",
    "CodedTick",
    "CsvLines",
    "LineFault",
    "LineSplitter",
    "Pacer",
    "Tick",
    "parse_json_line",
    "parse_lines",
]

Tick: TypeAlias = dict[str, Any]
"""The fields of one tick, without its code."""

CodedTick: TypeAlias = tuple[str, Tick]
"""A code and one tick of it."""

MAX_LINE_BYTES = 65_536
"""A longer line is refused and not kept: input without newlines costs no memory."""

_CODE = re.compile(r"[A-Za-z0-9._:=^-]{1,32}\Z", re.ASCII)
_MAX_TS_MS = 10**14  # later than the year 5138: not milliseconds, but micro- or nanoseconds by mistake
_MAX_INT = 2**63 - 1  # what JSON readers of typed languages take

_PRICE, _SIZE, _TS, _TEXT, _LEVELS = "a number", "a whole number", "epoch milliseconds", "a text", "[[price, size], …]"
_KINDS = {
    **dict.fromkeys(
        ("last", "prev_close", "open", "high", "low", "amount", "bid", "ask", "limit_up", "limit_down"), _PRICE
    ),
    **dict.fromkeys(("volume", "last_size", "bid_size", "ask_size"), _SIZE),
    **dict.fromkeys(("name", "phase", "status"), _TEXT),
    **dict.fromkeys(("bids", "asks"), _LEVELS),
    "ts": _TS,
}


class LineFault(ValueError):
    """A line that is no tick. Its text says why."""


class LineSplitter:
    """Cuts chunks of bytes, as they come, into lines without their line ends.

    At most `MAX_LINE_BYTES` + 1 bytes of an unfinished line are kept: enough for the line to be refused as too long.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that ``chunk`` completes."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()[: MAX_LINE_BYTES + 1]
        return lines

    def end(self) -> list[bytes]:
        """Return the last line if it had no line end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class CsvLines:
    """Parses the lines of one CSV file, its header first.

    ``code`` and at least one other tick column must be there, in any order. An empty cell leaves its field unchanged.
    ``bids`` and ``asks`` are JSON in a quoted cell. Columns that the server sets itself are ignored.

    Args:
        warn: takes one line if the header has columns that no tick has.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._columns: list[tuple[int, str, str]] = []
        self._width = 0
        self._code_at = -1

    @property
    def has_header(self) -> bool:
        """Whether a first line has been read."""
        return self._width > 0

    def parse(self, line: bytes) -> CodedTick | None:
        """Return the tick of one line; None for the header and for an empty line.

        Raises:
            LineFault: the line is refused.
            SettingsError: the first line is not a header that ticks can be read by.
        """
        if not self._width:
            self._read_header(_text_of(line.removeprefix(b"\xef\xbb\xbf")))
            return None
        text = _text_of(line)
        if not text:
            return None
        cells = _cells_of(text)
        if len(cells) != self._width:
            raise LineFault(f"{len(cells)} cells where the header has {self._width}")
        code = _checked_code(cells[self._code_at])
        tick: Tick = {}
        for at, name, kind in self._columns:
            cell = cells[at]
            if cell:
                tick[name] = _value_of(name, kind, cell)
        if not tick:
            raise LineFault("nothing but a code")
        return code, tick

    def _read_header(self, text: str) -> None:
        names = [name.strip() for name in _cells_of(text)]
        if "code" not in names or not any(name in _KINDS for name in names):
            raise SettingsError(
                [
                    "--csv: the first line must name the columns, code and at least one tick field among them, "
                    "such as ts,code,last,last_size,bid,bid_size,ask,ask_size,volume"
                ]
            )
        if twice := sorted({name for name in names if names.count(name) > 1 and name in {*_KINDS, "code"}}):
            raise SettingsError([f"--csv: the header names {', '.join(twice)} twice; keep one of each"])
        self._width = len(names)
        self._code_at = names.index("code")
        self._columns = [(at, name, _KINDS[name]) for at, name in enumerate(names) if name in _KINDS]
        unknown = [name for name in names if name not in _KINDS and name not in SERVERS_OWN]
        if unknown:
            self._warn(f"columns that are no tick fields are ignored: {', '.join(unknown)}")


def parse_json_line(line: bytes) -> CodedTick | None:
    """Return the tick of one line that holds a JSON object with a ``code``; None for an empty line.

    Known fields are checked; unknown ones pass.

    Raises:
        LineFault: the line is refused.
    """
    text = line.strip()
    if not text:
        return None
    if len(text) > MAX_LINE_BYTES:
        raise LineFault(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        tick = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise LineFault(f"not JSON: {e}") from None
    if not isinstance(tick, dict):
        raise LineFault("not a JSON object")
    code = tick.pop("code", None)
    if not isinstance(code, str):
        raise LineFault("no code")
    for name, value in tick.items():
        kind = _KINDS.get(name)
        if kind is not None and value is not None:
            _check(name, kind, value)
    return _checked_code(code), tick


class Pacer:
    """When each tick of a recording is due, from the times in it. The first one is due at once.

    Args:
        speed: how many times faster than recorded; ``math.inf``: everything is due at once.
        started_at_s: monotonic seconds, when the replay began.
        started_at_ms: epoch milliseconds of the same moment.
    """

    def __init__(self, speed: float, started_at_s: float, started_at_ms: int) -> None:
        self._speed = speed
        self._started_at_s = started_at_s
        self._started_at_ms = started_at_ms
        self._first_ts: int | None = None

    def due_at_s(self, ts: int) -> float:
        """Return the monotonic time at which a tick of the recorded time ``ts`` is due."""
        return self._started_at_s + self._offset_ms(ts) / 1000

    def moved_ts(self, ts: int, now_ms: int) -> int:
        """Return the epoch milliseconds at which ``ts`` happens in this replay; at full speed that is ``now_ms``."""
        if math.isinf(self._speed):
            return now_ms
        return self._started_at_ms + round(self._offset_ms(ts))

    def _offset_ms(self, ts: int) -> float:
        if self._first_ts is None:
            self._first_ts = ts
        return (ts - self._first_ts) / self._speed


def parse_lines(
    lines: Iterable[bytes],
    first_number: int,
    parse: Callable[[bytes], CodedTick | None],
    reject: Callable[[int, str], None],
) -> list[CodedTick]:
    """Return the ticks of ``lines``, which are numbered from ``first_number``; ``reject`` takes number and reason."""
    found = []
    for number, line in enumerate(lines, first_number):
        try:
            tick = parse(line)
        except LineFault as e:
            reject(number, str(e))
        else:
            if tick is not None:
                found.append(tick)
    return found


def _text_of(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise LineFault(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        raise LineFault("not UTF-8") from None


def _cells_of(text: str) -> list[str]:
    # Line by line, so that a stray quote spoils its own line and does not swallow those that follow.
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as e:
        raise LineFault(f"not CSV: {e}") from None


def _checked_code(code: str) -> str:
    if not _CODE.match(code):
        raise LineFault(f"{code[:40]!r} is no code: 1 to 32 characters A-Z a-z 0-9 . _ : = ^ -")
    return code


def _value_of(name: str, kind: str, cell: str) -> Any:
    """Return the value that a cell's text stands for."""
    value: Any = cell
    try:
        if kind is _PRICE:
            value = float(cell)
        elif kind is _SIZE or kind is _TS:
            value = int(cell)
        elif kind is _LEVELS:
            value = orjson.loads(cell)
        if "_" in cell and kind is not _TEXT:  # Python reads 1_000 as a number, nobody else does
            raise ValueError
    except ValueError:
        raise LineFault(f"{name} must be {kind}, not {cell[:40]!r}") from None
    _check(name, kind, value)
    return value


def _check(name: str, kind: str, value: Any) -> None:
    """Refuse what a server refuses. Written so that NaN fails: every comparison with it is false."""
    if kind is _PRICE:
        if type(value) not in (float, int) or not 0 <= value < math.inf:
            raise LineFault(f"{name} must be {kind} and not negative")
    elif kind is _SIZE:
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        if not is_whole or not 0 <= value <= _MAX_INT:
            raise LineFault(f"{name} must be {kind} and not negative")
    elif kind is _TS:
        if type(value) is not int or not 0 <= value < _MAX_TS_MS:
            raise LineFault(f"{name} must be {kind}")
    elif kind is _TEXT:
        if type(value) is not str:
            raise LineFault(f"{name} must be {kind}")
    elif not isinstance(value, list) or not all(_is_level(level) for level in value):
        raise LineFault(f"{name} must be {kind}")


def _is_level(level: Any) -> bool:
    return (
        isinstance(level, list)
        and len(level) == 2
        and all(type(number) in (float, int) and 0 <= number < math.inf for number in level)
    )
