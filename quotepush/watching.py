"""``quotepush watch``: live quotes in the terminal, or as JSON lines in a pipe.

Law: whatever a publisher or a server says reaches the terminal as plain text: no markup, no control character.
"""

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quotepush.client import QuoteClient, Refused, Rejected, Row, StateChange, WrongUrl
from quotepush.errors import OperatorError, SettingsError

__all__ = ["ConnectionRefused", "NeverConnected", "QuoteTable", "Rate", "RowLines", "run"]

_FRAME_S = 0.2
_FLASH_S = 0.8
_RATE_WINDOW_S = 3.0
# A pipe that says it is writable takes this much without making us wait (POSIX: PIPE_BUF).
_PIPE_BYTES = 4096
_MAX_LINES_PER_WRITE = 256
_UP, _DOWN = "green", "red"
_COLUMNS = ("code", "name", "last", "change", "change %", "bid", "ask", "volume", "age", "rows/s", "merged")
_FIRST_TO_GO = ("merged", "rows/s", "name", "age", "volume", "ask", "bid", "change", "change %")
_MAX_NAME_CELLS = 20


class ConnectionRefused(OperatorError):
    """The server refuses this client for good."""

    exit_code = 2

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        return f"{_plain(str(self.refusal))}; check --url"


class NeverConnected(OperatorError):
    """The time was over before there was a connection."""

    def __init__(self, url: str, seconds: float, reason: str) -> None:
        super().__init__(url, seconds, reason)
        self.url = url
        self.seconds = seconds
        self.reason = reason

    def __str__(self) -> str:
        why = f" ({_plain(self.reason)})" if self.reason else ""
        return f"no connection to {self.url} within {self.seconds:g} s{why}; start the server or set --url"


def run(codes: Sequence[str], url: str, *, is_json: bool, seconds: float | None) -> int:
    """Watch codes until Ctrl-C, SIGTERM or the end of the time; return the exit status.

    Args:
        is_json: one row a line on standard output, everything else on standard error; so it is too
            when standard output is no terminal.
        seconds: end after so long; None: never.

    Raises:
        SettingsError: the URL cannot be one of a server.
        ConnectionRefused: the server wants none of us.
        NeverConnected: ``seconds`` were over before there was a connection.
    """
    console = Console()
    is_table = not is_json and console.is_terminal and not console.is_dumb_terminal
    return asyncio.run(_watch(list(dict.fromkeys(codes)), url, console if is_table else None, seconds))


async def _watch(codes: list[str], url: str, console: Console | None, seconds: float | None) -> int:
    try:
        quotes = QuoteClient(url)
    except WrongUrl as e:
        raise SettingsError([f"--url: {_plain(str(e))}"]) from None
    was_open = False
    reason = ""

    def note(change: StateChange) -> None:
        nonlocal was_open, reason
        was_open = was_open or change.state == "open"
        reason = change.reason

    quotes.on("state", note)
    with _stop_on_signals() as stop:
        async with quotes:
            show = _show_table(quotes, codes, console) if console is not None else _print_lines(quotes, codes)
            shown, stopped = asyncio.create_task(show), asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({shown, stopped}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopped.cancel()
                shown.cancel()
                await asyncio.wait({shown, stopped})
            if not shown.cancelled():
                try:
                    return shown.result()
                except Refused as e:
                    raise ConnectionRefused(e) from None
            if seconds is not None and not was_open and not stop.is_set():
                raise NeverConnected(quotes.url, seconds, reason)
            return 0


@contextmanager
def _stop_on_signals() -> Iterator[asyncio.Event]:
    """Turn Ctrl-C and SIGTERM into an event: being told to end is no failure."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


# JSON lines


async def _print_lines(quotes: QuoteClient, codes: list[str]) -> int:
    """Print rows as they come; return 2 when all codes are refused, 0 when the reader has gone."""
    _complain_about(quotes)
    lines = RowLines(sys.stdout.fileno())
    subscribing = asyncio.create_task(quotes.subscribe(codes))
    pouring = asyncio.create_task(_pour(quotes, lines))
    leaving = asyncio.create_task(lines.gone.wait())
    try:
        await asyncio.wait({subscribing, pouring, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if subscribing.done():
            result = subscribing.result()
            for refusal in result.rejected:
                _complain(_plain(str(refusal)))
            if not result.accepted:
                return 2
        await asyncio.wait({pouring, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if pouring.done():
            pouring.result()
    finally:
        await _end(subscribing, pouring, leaving)
        lines.close()
    return 0


async def _pour(quotes: QuoteClient, lines: "RowLines") -> None:
    while rows := await quotes.next_rows(_MAX_LINES_PER_WRITE):
        await lines.write(rows)


async def _end(*tasks: "asyncio.Task[Any]") -> None:
    """End tasks whose outcome is known or does not matter any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class RowLines:
    """Writes rows as JSON lines to a descriptor, without holding the loop when it is a pipe that nobody empties.

    Attributes:
        gone: set when the reader has closed its end.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self.gone = asyncio.Event()
        try:
            # A pipe's writing end becomes "readable" when its reader goes, also while there is nothing to write.
            self._loop.add_reader(fd, self._reader_gone)
            self._is_pipe = True
        except (OSError, ValueError):  # a file; it never makes us wait
            self._is_pipe = False
        if self._is_pipe and os.isatty(fd):
            self._loop.remove_reader(fd)  # what can be read there is the keyboard

    async def write(self, rows: Iterable[Row]) -> None:
        """Write rows; return when the descriptor has taken them, or when the reader has gone."""
        rest = memoryview(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
        while rest and not self.gone.is_set():
            if self._is_pipe:
                await self._writable()
            try:
                rest = rest[os.write(self._fd, rest[:_PIPE_BYTES] if self._is_pipe else rest) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                self.gone.set()

    def close(self) -> None:
        """Let go of the descriptor; it stays open."""
        if self._is_pipe:
            self._loop.remove_reader(self._fd)

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._fd, _wake, ready)
        try:
            await ready  # no timeout: a reader may take its time; when it goes, the pipe is "writable" too
        finally:
            self._loop.remove_writer(self._fd)

    def _reader_gone(self) -> None:
        self._loop.remove_reader(self._fd)
        self.gone.set()


def _wake(sleeper: "asyncio.Future[None]") -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def _complain_about(quotes: QuoteClient) -> None:
    """Say on standard error when the connection is lost, why it cannot be made, and when it is back."""
    told = ""

    def state(change: StateChange) -> None:
        nonlocal told
        if change.state == "waiting" and change.reason != told:
            told = change.reason
            _complain(f"{quotes.url}: {_plain(change.reason)}; trying again until it works")
        elif change.state == "open" and told:
            told = ""
            _complain(f"{quotes.url}: connected")

    quotes.on("state", state)
    quotes.on("error", lambda message: _complain(_plain(f"{message.get('error')}: {message.get('message')}")))


def _complain(line: str) -> None:
    sys.stderr.write(f"quotepush: {line}\n")
    sys.stderr.flush()


# The table


async def _show_table(quotes: QuoteClient, codes: list[str], console: Console) -> int:
    """Draw the table until cancelled; return 2 when all codes are refused."""
    table = QuoteTable(quotes)
    quotes.on("state", table.take_state)
    subscribing = asyncio.create_task(quotes.subscribe(codes))
    reading = asyncio.create_task(table.read())
    live = Live(console=console, auto_refresh=False, transient=False)
    try:
        with live:
            while not reading.done():
                live.update(table.render(time.monotonic(), time.time() * 1000, console.width), refresh=True)
                if subscribing.done():
                    result = subscribing.result()
                    table.codes, table.refused = result.codes, result.rejected
                    if not result.accepted:
                        live.update(table.render(time.monotonic(), time.time() * 1000, console.width), refresh=True)
                        return 2
                await asyncio.wait({reading}, timeout=_FRAME_S)
            reading.result()
    finally:
        await _end(subscribing, reading)
    return 0


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

    __slots__ = ("changed_s", "direction", "rate")

    def __init__(self) -> None:
        self.rate = Rate()
        self.direction = 0
        self.changed_s = -math.inf


class QuoteTable:
    """The rows of a client as a table, with a line on the connection below.

    Attributes:
        codes: in which order the codes are shown; empty: as their rows come.
        refused: codes that the server refused, shown with their reason.
    """

    def __init__(self, quotes: QuoteClient) -> None:
        self.codes: tuple[str, ...] = ()
        self._quotes = quotes
        self._lines: dict[str, _Line] = {}
        self._rows: dict[str, Row] = {}
        self._state = StateChange("connecting")
        self._retry_at_s = 0.0
        self._clock_offset_ms = 0.0
        self.refused: tuple[Rejected, ...] = ()

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
        line.rate.count(now_s)
        self._rows[code] = row

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
        shown = _columns_in(width, rows)
        for column in shown:
            is_text = column in ("code", "name")
            table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(cells[column] for column in shown))
        refused = [Text(_plain(f"refused: {refusal}"), style="yellow") for refusal in self.refused]
        return Group(table, *refused, self._connection(now_s))

    def _cells(self, code: str, row: Row, now_s: float, now_ms: float) -> dict[str, Text]:
        line = self._lines.get(code) or _Line()
        change = row.get("change")
        tone = "" if not _is_number(change) or not change else _UP if change > 0 else _DOWN
        last, mark = tone, " "
        if now_s - line.changed_s < _FLASH_S:
            last = f"bold reverse {_UP if line.direction > 0 else _DOWN}"
            mark = "▲" if line.direction > 0 else "▼"  # not by colour alone
        ts = row.get("ts")
        name = Text(_plain(row.get("name", "")))
        name.truncate(_MAX_NAME_CELLS, overflow="ellipsis")
        return {
            "code": Text(_plain(code), style="bold"),
            "name": name,
            "last": Text(mark + _number(row.get("last")), style=last),
            "change": Text(_number(change, sign=True), style=tone),
            "change %": Text(_number(row.get("change_pct"), sign=True, decimals=2), style=tone),
            "bid": Text(_number(row.get("bid"))),
            "ask": Text(_number(row.get("ask"))),
            "volume": Text(_number(row.get("volume"))),
            "age": Text(_age((now_ms - ts) / 1000) if _is_number(ts) else ""),
            "rows/s": Text(f"{line.rate.at(now_s):.1f}"),
            "merged": Text(str(self._quotes.merged[code] or "")),
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
                text.append(f"  feed {_plain(feed)}{age}", style="default" if feed == "ok" else "yellow")
            if self._quotes.merged_locally:
                text.append(f"  {self._quotes.merged_locally} merged here", style="yellow")
            return text
        if state.state == "waiting":
            left_s = max(0.0, self._retry_at_s - now_s)
            return Text(f"○ {url}: {_plain(state.reason)}; next attempt in {left_s:.0f} s", style="yellow")
        reason = f" (before: {_plain(state.reason)})" if state.reason else ""
        return Text(f"○ {url}: {state.state}{reason}", style="yellow")


def _columns_in(width: int, rows: Sequence[dict[str, Text]]) -> list[str]:
    """Return the columns that fit into ``width``: a price that is cut short is worse than none."""
    widths = {name: max(len(name), *(cells[name].cell_len for cells in rows), 0) for name in _COLUMNS}
    shown = list(_COLUMNS)
    for name in _FIRST_TO_GO:
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


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for size_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.1f} s"


def _plain(text: Any) -> str:
    """Return text that a terminal shows and never obeys."""
    return "".join(c if c.isprintable() else "�" for c in str(text))
