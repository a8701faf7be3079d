"""``quotepush watch``: rows in a pipe, and a table on a terminal, from a real server."""

import asyncio
import fcntl
import io
import itertools
import os
import pty
import signal
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from quotepush.client import Gap, QuoteClient, Rejected, StateChange
from quotepush.watching import RowLines
from quotepush.watching_table import QuoteTable, Rate
from tests.support.command import run_quotepush
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until

_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_") and k != "NO_COLOR"}


async def publish(server: RedisServer, code: str, **fields: Any) -> None:
    async with server.client() as redis:
        await redis.publish(f"quote.{code}", orjson.dumps(fields))


@asynccontextmanager
async def watching(
    *arguments: str, stdout: int = asyncio.subprocess.PIPE, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quotepush", "watch", *arguments, stdout=stdout, stderr=asyncio.subprocess.PIPE,
        env={**_ENVIRONMENT, **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # Read to its end, or the pipes stay open behind the test.
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    return orjson.loads(await asyncio.wait_for(process.stdout.readline(), 20))


async def test_rows_go_into_a_pipe_one_a_line_until_ctrl_c(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    await publish(redis_server, "sh600519", last=1)
    await wait_until(lambda: quotepush_server.metric("ticks_accepted"))
    async with watching("600519", "no such", "--url", quotepush_server.url) as process:
        assert (await line_of(process))["last"] == 1
        await publish(redis_server, "sh600519", last=2)
        row = await line_of(process)
        assert (row["code"], row["prev"], row["seq"], row["last"]) == ("600519.SH", 1, 2, 2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, stdout) == (0, b"")
        assert stderr == b"quotepush: no such: bad_code: a code is made of A-Z a-z 0-9 . _ : = ^ -\n"


async def test_a_closed_pipe_ends_it_quietly_also_while_nothing_comes(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    await publish(redis_server, "A", last=1)
    await wait_until(lambda: quotepush_server.metric("ticks_accepted"))
    reading, writing = os.pipe()
    async with watching("A", "--json", "--url", quotepush_server.url, stdout=writing) as process:
        os.close(writing)
        assert orjson.loads(await asyncio.to_thread(os.read, reading, 4096))["last"] == 1
        os.close(reading)
        _, stderr = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, stderr) == (0, b"")


async def test_rows_go_into_a_file_until_it_is_told_to_end(
    quotepush_server: QuotepushServer, redis_server: RedisServer, tmp_path: Any
):
    await publish(redis_server, "A", last=1)
    await wait_until(lambda: quotepush_server.metric("ticks_accepted"))
    with open(tmp_path / "rows", "wb") as file:
        async with watching("A", "--url", quotepush_server.url, "--seconds", "60", stdout=file.fileno()) as process:
            await wait_until((tmp_path / "rows").read_bytes, 20)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0
    assert orjson.loads((tmp_path / "rows").read_bytes())["last"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["A", "--url", "ftp://example.com"], 2, "is not the address of a server"),
        (["A", "--url", "http://127.0.0.1:1", "--seconds", "0.2"], 1, "no connection to ws://127.0.0.1:1/ws within"),
        ([], 2, "Missing argument"),
    ],
)
async def test_what_is_wrong_with_the_address_is_said_in_one_line(arguments: list[str], status: int, words: str):
    outcome = await run_quotepush("watch", *arguments)
    assert outcome.status == status
    assert words in outcome.stderr.splitlines()[-1]
    assert "Traceback" not in outcome.stderr


async def test_options_and_a_token_from_the_environment_or_a_file_reach_the_server(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis_server: RedisServer, tmp_path: Path
):
    server = await start_server(workers=1, token_key=KEY)
    good = token(sub="ann", exp=int(time.time()) + 3600)
    (tmp_path / "token").write_text(good + "\n")
    await publish(redis_server, "A", last=1, volume=5)
    await wait_until(lambda: server.metric("ticks_accepted"))
    arguments = ("A", "--url", server.url, "--fields", "last, change_pct", "--max-rate", "50")
    for more, environment in (([], {"QUOTEPUSH_TOKEN": good}), (["--token-file", str(tmp_path / "token")], {})):
        async with watching(*arguments, *more, **environment) as process:
            row = await line_of(process)
            assert row.keys() == {"code", "seq", "ts", "last"}
            command = Path(f"/proc/{process.pid}/cmdline").read_text()
            assert good not in command

    outcome = await run_quotepush("watch", "A", "--url", server.url)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert outcome.stderr.endswith("check --token-file or QUOTEPUSH_TOKEN\n")
    outcome = await run_quotepush("watch", "A", "--url", server.url, "--token-file", str(tmp_path / "none"))
    assert (outcome.status, len(outcome.stderr.splitlines())) == (2, 1)
    outcome = await run_quotepush("watch", "A", "--url", server.url, "--token", "two words")
    assert (outcome.status, len(outcome.stderr.splitlines())) == (2, 1)
    assert "two words" not in outcome.stderr


async def test_its_help_tells_the_exit_codes():
    outcome = await run_quotepush("watch", "--help")
    assert outcome.status == 0
    assert "Exit codes: 0" in outcome.stdout and "QUOTEPUSH_TOKEN" in outcome.stdout


async def test_all_codes_refused_or_a_wrong_path_end_it_with_2(quotepush_server: QuotepushServer):
    outcome = await run_quotepush("watch", "no such", "不", "--url", quotepush_server.url)
    assert (outcome.status, outcome.stdout, len(outcome.stderr.splitlines())) == (2, "", 2)
    outcome = await run_quotepush("watch", "A", "--url", quotepush_server.url + "/elsewhere")
    assert (outcome.status, outcome.stdout, len(outcome.stderr.splitlines())) == (2, "", 1)
    assert "HTTP 404 Not Found" in outcome.stderr


async def test_an_unreachable_server_is_said_once_and_found_when_it_is_there(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    await quotepush_server.stop()
    async with watching("A", "--url", quotepush_server.url) as process:
        assert process.stderr is not None
        assert b"Connection refused; trying again" in await asyncio.wait_for(process.stderr.readline(), 20)
        await quotepush_server.start()
        line = await asyncio.wait_for(process.stderr.readline(), 30)
        while b"no answer within 10 s; trying again" in line:  # it listens before it answers
            line = await asyncio.wait_for(process.stderr.readline(), 30)
        assert b": connected\n" in line

        async def is_watched() -> bool:
            return await quotepush_server.metric("ticks_accepted") > 0

        await publish(redis_server, "A", last=1)
        await wait_until(is_watched)
        assert (await line_of(process))["last"] == 1


# Writing


def unread(fd: int) -> int:
    """How many bytes wait in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


async def test_a_pipe_that_nobody_empties_holds_nothing_else_up():
    reading, writing = os.pipe()
    lines = RowLines(writing)
    rows = [{"code": "A", "seq": n, "text": "x" * 1000} for n in range(200)]
    pouring = asyncio.create_task(lines.write(rows))
    await wait_until(lambda: unread(reading) >= 61_440)  # as much as fits into a pipe
    assert not pouring.done()
    read = b""
    while read.count(b"\n") < 200:
        read += await asyncio.to_thread(os.read, reading, 65_536)
    await pouring
    assert [orjson.loads(line) for line in read.splitlines()] == rows

    pouring = asyncio.create_task(lines.write(rows))
    await asyncio.sleep(0)
    os.close(reading)
    await asyncio.wait_for(pouring, 10)
    assert lines.gone.is_set()
    lines.close()
    os.close(writing)


# The table


def test_the_rate_is_a_mean_that_forgets():
    rate = Rate(window_s=3)
    for n in range(200):
        rate.count(n / 10)
    assert 9 < rate.at(20.0) < 11
    assert rate.at(60.0) < 0.001


def drawn(table: QuoteTable, now_s: float = 100.0, now_ms: float = 10_000.0, width: int = 140) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard", record=True)
    console.print(table.render(now_s, now_ms, width))
    return console.export_text(styles=True)


def test_a_row_is_shown_with_its_change_in_colour_and_a_mark():
    table = QuoteTable(QuoteClient("http://h"))
    row = {"code": "A", "seq": 1, "ts": 5_000, "name": "Acme", "last": 10.5, "change": -0.25, "change_pct": -2.33,
           "bid": 10.4, "ask": 10.6, "volume": 1_234_567}  # fmt: skip
    table.take(row, 90.0)
    text = drawn(table)
    for shown in ("Acme", "10.5", "-0.25", "-2.33", "10.4", "10.6", "1,234,567", "5.0 s"):
        assert shown in text
    assert "\x1b[32m" in text  # green: below yesterday's close, as on the page
    assert "▲" not in text and "▼" not in text

    table.take({**row, "last": 10.75}, 99.9)
    text = drawn(table)
    assert "▲10.75" in text and "▁█" in text
    assert "\x1b[1;7;31m" in text  # red: it rises
    assert "▲" not in drawn(table, now_s=102.0)


def test_rising_prices_are_green_where_that_is_usual():
    table = QuoteTable(QuoteClient("http://h"), up="green")
    table.take({"code": "A", "seq": 1, "last": 1, "change": 0.5}, 90.0)
    assert "\x1b[32m" in drawn(table) and "\x1b[31m" not in drawn(table)
    table.take({"code": "A", "seq": 2, "last": 0.5, "change": -0.5}, 99.9)
    assert "\x1b[1;7;31m" in drawn(table)


def test_the_last_prices_are_drawn_as_bars_and_the_oldest_go():
    table = QuoteTable(QuoteClient("http://h"))
    for n, last in enumerate([50, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4], 1):
        table.take({"code": "A", "seq": n, "last": last}, 90.0)
    assert "▁█▂▃▄▅▆▇█▇▆▅" in drawn(table)


def test_gaps_are_counted_where_they_happened():
    table = QuoteTable(QuoteClient("http://h"))
    for code in "AB":
        table.take({"code": code, "seq": 1, "last": 1}, 90.0)
    table.take_gap(Gap("B", "away", "e", 2, 5))
    lines = drawn(table).splitlines()
    assert ["✗1" in line for line in lines[1:3]] == [False, True]


def test_the_fields_of_a_view_are_the_columns_in_its_order():
    table = QuoteTable(QuoteClient("http://h"), fields=("bids", "change_pct", "last", "ts"))
    table.take(
        {"code": "A", "seq": 1, "ts": 5, "last": 2.5, "change_pct": 1.0, "bids": [[1.5, 100], [1.25, 7], [1, 1]]}, 90.0
    )
    header, line = drawn(table).splitlines()[:2]
    order = [header.index(name) for name in ("code", "bids", "change %", "last", "trend", "age", "gaps")]
    assert order == sorted(order)
    assert "volume" not in header
    assert "[[1.5, 100], [1.25, 7],…" in line


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140])
def test_a_narrow_terminal_shows_fewer_columns_and_never_half_a_price(width: int):
    table = QuoteTable(QuoteClient("http://h"))
    row = {"code": "600519.SH", "seq": 1, "name": "贵州茅台", "last": 1688.25, "change": -11.75, "change_pct": -0.69,
           "bid": 1688.2, "ask": 1688.3, "volume": 12_345_678}  # fmt: skip
    table.take(row, 90.0)
    header, line = drawn(table, width=width).splitlines()[:2]
    assert "1,688.25" in line
    assert "…" not in header + line


def test_what_others_say_is_shown_and_never_obeyed():
    table = QuoteTable(QuoteClient("http://h"))
    table.take({"code": "A", "seq": 1, "name": "[red]x\x1b]0;y\x07"}, 90.0)
    table.refused = (Rejected("B", "unknown_code", "no\x1b[2J"),)
    table.take_state(StateChange("waiting", "gone\x9b2J", 3, 5.0))
    text = drawn(table)
    assert "[red]x�]0;y�" in text
    assert "refused: B: unknown_code: no�[2J" in text
    assert "gone�2J; next attempt in" in text


def test_subscribed_codes_without_a_value_have_a_line_in_the_order_asked_for():
    table = QuoteTable(QuoteClient("http://h"))
    table.codes = ("B", "A")
    table.take({"code": "A", "seq": 1, "last": 1}, 90.0)
    lines = drawn(table).splitlines()
    assert ["B" in lines[1], "A" in lines[2]] == [True, True]


class Terminal:
    """A program on a terminal of the test's own."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 140, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.output = b""

    async def __aenter__(self) -> "Terminal":
        asyncio.get_running_loop().add_reader(self.master, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self.slave)

    async def run(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "quotepush", *arguments, stdin=self.slave, stdout=self.slave, stderr=self.slave,
            env={**_ENVIRONMENT, "TERM": "xterm-256color"}, start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip

    def _read(self) -> None:
        self.output += os.read(self.master, 65_536)

    def has(self, text: str) -> Callable[[], bool]:
        return lambda: text.encode() in self.output


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ^C in it becomes SIGINT


async def test_a_terminal_gets_a_live_table_and_is_left_as_it_was(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    async with Terminal() as terminal:
        process = await terminal.run("watch", "sh600519", "no such", "--url", quotepush_server.url)
        await wait_until(terminal.has("refused: no such: bad_code"), 20)
        await publish(redis_server, "600519", last=1688.25, prev_close=1700, name="贵州茅台")
        for shown in ("1,688.25", "贵州茅台", "-11.75", "●"):  # a frame may come in pieces
            await wait_until(terminal.has(shown))
        prices = itertools.count(1690, 0.01)

        async def is_marked() -> bool:
            """A mark fades within a second, and a busy machine may not have drawn it."""
            await publish(redis_server, "600519", last=round(next(prices), 2))
            return terminal.has("▲1,")()

        await wait_until(is_marked)

        os.write(terminal.master, b"\x03")
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await wait_until(lambda: terminal.output.rstrip().endswith(b"\x1b[?25h"))  # the cursor is back
        assert terminal.output.count(b"\x1b[?25l") == 1
        assert termios.tcgetattr(terminal.slave) == terminal.before
        assert b"Traceback" not in terminal.output


async def test_a_terminal_is_told_that_the_server_cannot_be_reached():
    async with Terminal() as terminal:
        process = await terminal.run("watch", "A", "--url", "http://127.0.0.1:1")
        await wait_until(terminal.has("Connection refused; next attempt in"), 20)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
