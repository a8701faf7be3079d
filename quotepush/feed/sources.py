"""Where ticks come from: a simulated market, a recording, or standard input, each as a stream of batches.

A source yields a batch when its ticks are due and waits in between; it asks for nothing while its last batch is being
published, so whoever publishes slowly slows it down and nothing piles up. Time comes from a `Clock`.
"""

import asyncio
import gzip
import io
import math
import os
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from quotepush.errors import OperatorError, SettingsError
from quotepush.feed.replay import CodedTick, CsvLines, LineSplitter, Pacer, parse_json_line, parse_lines
from quotepush.feed.simulate import Market

__all__ = ["MAX_BATCH", "Clock", "RecordingUnreadable", "piped", "replayed", "simulated"]

MAX_BATCH = 500
"""Most ticks in one batch."""

_SIMULATION_STEP_S = 0.01
_MAX_ARREARS_S = 0.25  # a simulation that fell behind by more goes on from now instead of flooding
_CHUNK_BYTES = 32_768
_CHUNKS_AHEAD = 4
_GZIP_MAGIC = b"\x1f\x8b"

Reject = Callable[[int, str], None]
"""Takes the number of a bad line and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The three ways in which a source meets time; tests hand over their own."""

    now_s: Callable[[], float] = time.monotonic
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class RecordingUnreadable(OperatorError):
    """A recording that was opened cannot be read to its end.

    Args:
        path: the file.
        reason: what reading it said.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.path} to its end: {self.reason}; fetch or make it again"


async def simulated(
    market: Market, rate_per_s: float, *, is_steady: bool, clock: Clock
) -> AsyncGenerator[list[CodedTick], None]:
    """Yield the market's ticks for ever, ``rate_per_s`` of them a second as the day's mean.

    The rate follows the day and its bursts (`Market.activity`) unless ``is_steady``. Ticks that could not be published
    in time are not made up for.
    """
    due = 0.0
    at_s = clock.now_s()
    while True:
        now_s, now_ms = clock.now_s(), clock.now_ms()
        elapsed_s = min(now_s - at_s, _MAX_ARREARS_S)
        at_s = now_s
        due += elapsed_s * rate_per_s * (1.0 if is_steady else market.activity(now_ms))
        while due >= 1:
            n = min(int(due), MAX_BATCH)
            due -= n
            yield market.ticks(now_ms, n)
        await clock.sleep(_SIMULATION_STEP_S)


async def replayed(
    path: Path, *, speed: float, is_now: bool, clock: Clock, reject: Reject, warn: Callable[[str], None]
) -> AsyncGenerator[list[CodedTick], None]:
    """Yield the ticks of a CSV file, plain or gzip, when they are due by their own ``ts``; end with the file.

    A tick without ``ts`` is due with the one before it. ``speed`` and ``is_now`` (``ts`` becomes the time of the
    replay) as in `Pacer`. A replay that was held up catches up.

    Raises:
        SettingsError: no such file, or no header in it.
        RecordingUnreadable: it breaks off in the middle; what stood before was yielded.
    """
    pacer = Pacer(speed, clock.now_s(), clock.now_ms())
    splitter, rows = LineSplitter(), CsvLines(warn)
    number = 1
    batch: list[CodedTick] = []
    with _opened(path) as file:
        plain: io.BufferedReader | gzip.GzipFile | None = None
        while True:
            try:
                plain = plain or _uncompressed(file)
                chunk = plain.read(_CHUNK_BYTES)
            except (OSError, EOFError, zlib.error) as e:
                if batch:
                    yield batch
                raise RecordingUnreadable(str(path), str(e)) from None
            lines = splitter.feed(chunk) if chunk else splitter.end()
            for coded in parse_lines(lines, number, rows.parse, reject):
                tick = coded[1]
                ts = tick.get("ts")
                if ts is not None:
                    wait_s = pacer.due_at_s(ts) - clock.now_s() if math.isfinite(speed) else 0.0
                    if wait_s > 0:
                        if batch:
                            yield batch
                            batch = []
                        while (wait_s := pacer.due_at_s(ts) - clock.now_s()) > 0:
                            await clock.sleep(wait_s)
                    if is_now:
                        tick["ts"] = pacer.moved_ts(ts, clock.now_ms())
                batch.append(coded)
                if len(batch) == MAX_BATCH:
                    yield batch
                    batch = []
            number += len(lines)
            if not chunk:
                break
            await asyncio.sleep(0)  # a file of nothing but bad lines must not hold up the loop
    if not rows.has_header:
        raise SettingsError([f"--csv: {path} is empty; its first line must name the columns"])
    if batch:
        yield batch


async def piped(fd: int, *, reject: Reject) -> AsyncGenerator[list[CodedTick], None]:
    """Yield the ticks of JSON lines read from a descriptor of any kind as they come; end with the input.

    A thread reads, because neither a file nor every terminal can be waited for by an event loop. It is a daemon and
    may stay in its last read when the stream is closed: it then takes one chunk at most that nobody gets.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue()
    room = threading.BoundedSemaphore(_CHUNKS_AHEAD)
    closed = threading.Event()

    def read() -> None:
        chunk = b"?"
        while chunk:
            room.acquire()
            try:
                chunk = b"" if closed.is_set() else os.read(fd, _CHUNK_BYTES)
            except OSError:
                chunk = b""
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # the loop is closed
                return

    threading.Thread(target=read, name="feed input", daemon=True).start()
    splitter = LineSplitter()
    number = 1
    try:
        chunk = b"?"
        while chunk:
            chunk = await chunks.get()  # no timeout: a quiet input is a quiet market
            room.release()
            lines = splitter.feed(chunk) if chunk else splitter.end()
            ticks = parse_lines(lines, number, parse_json_line, reject)
            number += len(lines)
            for start in range(0, len(ticks), MAX_BATCH):
                yield ticks[start : start + MAX_BATCH]
    finally:
        closed.set()
        try:
            room.release()
        except ValueError:  # nobody waits for room
            pass


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as e:
        raise SettingsError([f"--csv: cannot open {path}: {e.strerror}"]) from None


def _uncompressed(file: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    """Return a reader of the plain bytes; the file's first two bytes say whether it is compressed, not its name."""
    return gzip.GzipFile(fileobj=file, mode="rb") if file.peek(2)[:2] == _GZIP_MAGIC else file
