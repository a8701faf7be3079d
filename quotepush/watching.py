"""``quotepush watch``: live quotes in the terminal, or as JSON lines in a pipe.

Law: whatever a publisher or a server says reaches the terminal as plain text: no markup, no control character.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from rich.console import Console
from rich.live import Live

from quotepush.client import QuoteClient, Refused, Row, StateChange, SubscribeResult, Token, WrongUrl
from quotepush.errors import OperatorError, SettingsError
from quotepush.watching_table import QuoteTable, plain

__all__ = ["ConnectionRefused", "NeverConnected", "RowLines", "WatchOptions", "run"]

_FRAME_S = 0.2
# A pipe that says it is writable takes this much without making us wait (POSIX: PIPE_BUF).
_PIPE_BYTES = 4096
_MAX_LINES_PER_WRITE = 256


@dataclass(frozen=True)
class WatchOptions:
    """What ``quotepush watch`` was asked for.

    Attributes:
        url: of the server.
        is_json: one row a line on standard output, everything else on standard error; so it is too when standard
            output is no terminal.
        seconds: end after so long; None: never.
        fields: the view; None: the usual fields.
        max_rate: most rows a second and code; None: every row.
        token: for a server that wants one.
        token_file: whose text is the token; read again for each connection, and when the token is about to expire.
        up: the colour of rising prices in the table.
    """

    url: str
    is_json: bool = False
    seconds: float | None = None
    fields: tuple[str, ...] | None = None
    max_rate: float | None = None
    token: str | None = None
    token_file: str | None = None
    up: Literal["red", "green"] = "red"

    def tokens(self) -> Token | None:
        """Return where tokens come from.

        Raises:
            SettingsError: the file cannot be read.
        """
        if self.token_file is None:
            return self.token
        path = Path(self.token_file)
        try:
            path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else "it is not ASCII"
            raise SettingsError([f"--token-file: {plain(path)} cannot be read: {why}"]) from None
        return lambda: path.read_text(encoding="ascii").strip()


class ConnectionRefused(OperatorError):
    """The server refuses this client for good."""

    exit_code = 2

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal)
        self.refusal = refusal

    def __str__(self) -> str:
        remedy = "--token-file or QUOTEPUSH_TOKEN" if self.refusal.is_about_token else "--url"
        return f"{plain(str(self.refusal))}; check {remedy}"


class NeverConnected(OperatorError):
    """The time was over before there was a connection."""

    def __init__(self, url: str, seconds: float, reason: str) -> None:
        super().__init__(url, seconds, reason)
        self.url = url
        self.seconds = seconds
        self.reason = reason

    def __str__(self) -> str:
        why = f" ({plain(self.reason)})" if self.reason else ""
        return f"no connection to {self.url} within {self.seconds:g} s{why}; start the server or set --url"


def run(codes: Sequence[str], options: WatchOptions) -> int:
    """Watch codes until Ctrl-C, SIGTERM or the end of the time; return the exit status.

    Raises:
        SettingsError: the URL cannot be one of a server, or the token none.
        ConnectionRefused: the server wants none of us.
        NeverConnected: the time was over before there was a connection.
    """
    console = Console()
    is_table = not options.is_json and console.is_terminal and not console.is_dumb_terminal
    return asyncio.run(_watch(list(dict.fromkeys(codes)), options, console if is_table else None))


async def _watch(codes: list[str], options: WatchOptions, console: Console | None) -> int:
    try:
        quotes = QuoteClient(options.url, token=options.tokens())
    except WrongUrl as e:
        raise SettingsError([f"--url: {plain(str(e))}"]) from None
    except ValueError as e:
        raise SettingsError([f"--token: {e}"]) from None
    was_open = False
    reason = ""

    def note(change: StateChange) -> None:
        nonlocal was_open, reason
        was_open = was_open or change.state == "open"
        reason = change.reason

    quotes.on("state", note)
    with _stop_on_signals() as stop:
        async with quotes:
            asked = quotes.subscribe(codes, fields=options.fields, max_rate=options.max_rate)
            subscribing = asyncio.create_task(asked)
            if console is not None:
                show = _show_table(quotes, subscribing, options, console)
            else:
                show = _print_lines(quotes, subscribing)
            shown, stopped = asyncio.create_task(show), asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({shown, stopped}, timeout=options.seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _end(shown, stopped, subscribing)
            if not shown.cancelled():
                try:
                    return shown.result()
                except Refused as e:
                    raise ConnectionRefused(e) from None
            if options.seconds is not None and not was_open and not stop.is_set():
                raise NeverConnected(quotes.url, options.seconds, reason)
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


async def _print_lines(quotes: QuoteClient, subscribing: "asyncio.Task[SubscribeResult]") -> int:
    """Print rows as they come; return 2 when all codes are refused, 0 when the reader has gone."""
    _complain_about(quotes)
    lines = RowLines(sys.stdout.fileno())
    pouring = asyncio.create_task(_pour(quotes, lines))
    leaving = asyncio.create_task(lines.gone.wait())
    try:
        await asyncio.wait({subscribing, pouring, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if subscribing.done():
            result = subscribing.result()
            for refusal in result.rejected:
                _complain(plain(str(refusal)))
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
            _complain(f"{quotes.url}: {plain(change.reason)}; trying again until it works")
        elif change.state == "open" and told:
            told = ""
            _complain(f"{quotes.url}: connected")

    quotes.on("state", state)
    quotes.on("gap", lambda gap: _complain(plain(gap)))
    quotes.on("error", lambda message: _complain(plain(f"{message.get('error')}: {message.get('message')}")))


def _complain(line: str) -> None:
    sys.stderr.write(f"quotepush: {line}\n")
    sys.stderr.flush()


# The table


async def _show_table(
    quotes: QuoteClient, subscribing: "asyncio.Task[SubscribeResult]", options: WatchOptions, console: Console
) -> int:
    """Draw the table until cancelled; return 2 when all codes are refused."""
    table = QuoteTable(quotes, fields=options.fields, up=options.up)
    quotes.on("state", table.take_state)
    quotes.on("gap", table.take_gap)
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
