"""The programs of docs/clients.md, as they stand there, against a real server; the pages are in tests/browser."""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from quotepush.cli import cli
from tests.support import store
from tests.support.door import Door, door_to
from tests.support.examples import ROOT, Block, blocks_of, running
from tests.support.redis_server import RedisServer
from tests.support.script_client import NODE_FLAGS, STATIC, node
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

# One server for all.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = ROOT / "docs" / "clients.md"


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with store.running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[QuotepushServer]:
    server = QuotepushServer(tmp_path_factory.mktemp("server"), redis_server.url, workers=1)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def door(server: QuotepushServer) -> AsyncIterator[Door]:
    async with door_to(server, "127.0.0.1:{port}") as door:
        yield door


# --- what a program is run with ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """An example: where it stands, the file it is put into, what runs it, whether it comes back by itself."""

    heading: str
    file: str
    command: tuple[str, ...]
    comes_back: bool

    def __str__(self) -> str:
        return self.heading.replace(" ", "-")


SUBSCRIBERS = [
    Program("Node", "watch.mjs", ("node", *NODE_FLAGS), True),
    Program("Python with asyncio", "watch.py", (sys.executable, "-u"), True),
    Program("Python without asyncio", "watch.py", (sys.executable, "-u"), True),
    Program("Go", "watch.go", ("go",), True),
    Program("Java", "Watch.java", ("java", "-Xshare:auto", "-XX:TieredStopAtLevel=1"), False),
]


def example(heading: str) -> Block:
    (block,) = [block for block in blocks_of(CLIENTS) if block.heading == heading and block.language != "sh"]
    return block


def need(program: str) -> None:
    """Skip where a language is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on PATH")
    if program == "node" and node() is None:
        pytest.skip("this node has no WebSocket: it takes Node 22, or 20.10 with a flag")
    if program == "java":
        said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
        version = re.search(r'version "(\d+)', said)
        if version is None or int(version[1]) < 11:
            pytest.skip("this java cannot run a source file: it takes Java 11")


def need_php(*extensions: str) -> None:
    need("php")
    has = subprocess.run(["php", "-m"], capture_output=True, text=True, check=False).stdout.split()
    for extension in extensions:
        if extension not in has:
            pytest.skip(f"no extension {extension} of php")


def write(program: Program, folder: Path, server: str) -> list[str]:
    """Write the example as it stands but for the server's address; return the command that runs it."""
    block = example(program.heading)
    assert block.tags in ((), (program.file,)), block
    assert block.text.count("127.0.0.1:8008") == 1, block
    (folder / program.file).write_text(block.text.replace("127.0.0.1:8008", server), encoding="utf-8")
    (folder / "node_modules").mkdir()
    (folder / "node_modules" / "quotepush").symlink_to(STATIC)
    if program.heading == "Go":  # `go run` in its two steps: the first time it compiles the standard library, too
        subprocess.run(["go", "build", "-o", "watch", program.file], cwd=folder, check=True, timeout=240)
        return [str(folder / "watch")]
    return [*program.command, program.file]


# --- subscribers ------------------------------------------------------------------------------------------------------


async def publish(redis_server: RedisServer, code: str, last: float) -> None:
    async with redis_server.client() as redis:
        assert await redis.publish(f"quote.{code}", json.dumps({"last": last, "prev_close": 100})) == 1


async def quote(server: QuotepushServer, code: str) -> Any:
    """The newest row."""
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/quotes", params={"codes": code}) as response:
        (row,) = (await response.json())["quotes"]
    return row


async def until_last(server: QuotepushServer, code: str, last: float) -> None:
    async def is_so() -> bool:
        return bool((await quote(server, code)).get("last") == last)

    await wait_until(is_so, 30, f"{code} is at {last}")


async def start_at(server: QuotepushServer, redis_server: RedisServer, last: float) -> None:
    """Give both codes of the examples a price that they had not before."""
    for code in ("600519.SH", "AAPL"):
        await publish(redis_server, code, last)
        await until_last(server, code, last)


async def until_printed(output: asyncio.StreamReader, code: str, last: float) -> list[str]:
    """Read up to a row, in words or as a message of the protocol; return the lines before it."""
    before: list[str] = []
    while said := await output.readline():
        line = said.decode().strip()
        in_json = re.findall(r'"code":"([^"]+)"[^{}]*"last":([\d.]+)[^{}]*"change_pct":([-\d.]+)', line)
        for found, price, change in in_json or re.findall(r"^(\S+) (\S+) (\S+)$", line):
            if (found, price.removesuffix(".0")) == (code, f"{last:g}"):
                assert float(change) == last - 100, line
                return before
        before.append(line)
    pytest.fail(f"it ended before it printed {code} at {last}; it said {before}")


@pytest.mark.timeout(360)
@pytest.mark.parametrize("program", SUBSCRIBERS, ids=str)
async def test_subscriber_prints_rows_and_does_what_the_table_says_when_it_is_cut_off(
    program: Program, server: QuotepushServer, redis_server: RedisServer, door: Door, tmp_path: Path
) -> None:
    need(program.command[0])
    price = 110.0 + 10 * SUBSCRIBERS.index(program)
    command = await asyncio.to_thread(write, program, tmp_path, door.url)
    await start_at(server, redis_server, price)
    async with (
        asyncio.timeout(90),
        # Rows are kept for who comes back while somebody watches the code.
        RecordingClient(server.ws_url) as other,
        running(*command, cwd=tmp_path) as output,
    ):
        await other.subscribe("600519.SH", "AAPL")
        await until_printed(output, "AAPL", price)
        await publish(redis_server, "sh600519", price + 1)
        await until_printed(output, "600519.SH", price + 1)

        door.shut()
        for missed in (2, 3):
            await publish(redis_server, "AAPL", price + missed)
            await until_last(server, "AAPL", price + missed)
        door.open()
        if program.comes_back:
            # Both rows and not the newest alone.
            for missed in (2, 3):
                assert not [row for row in await until_printed(output, "AAPL", price + missed) if "AAPL" in row]
            await publish(redis_server, "AAPL", price + 4)
            assert not [row for row in await until_printed(output, "AAPL", price + 4) if "AAPL" in row]
        else:
            assert await output.read() == b""


async def test_curl_prints_the_events_of_a_stream(
    server: QuotepushServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    need("curl")
    stream, once = next(block for block in blocks_of(CLIENTS) if block.heading == "curl").text.splitlines()
    words = [shlex.split(line.replace("127.0.0.1:8008", f"127.0.0.1:{server.port}")) for line in (stream, once)]
    await start_at(server, redis_server, 91)
    async with asyncio.timeout(60):
        async with running(*words[0]) as output:
            await until_printed(output, "AAPL", 91)
            await publish(redis_server, "AAPL", 92)
            await until_printed(output, "AAPL", 92)
        async with running(*words[1]) as output:
            rows = json.loads(await output.read())["quotes"]
    assert [(row["code"], row["last"], row["change_pct"]) for row in rows] == [("600519.SH", 91, -9), ("AAPL", 92, -8)]


# --- publishers -------------------------------------------------------------------------------------------------------


async def run(*command: str, said: str = "") -> str:
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    output, errors = await asyncio.wait_for(process.communicate(said.encode()), 60)
    assert process.returncode == 0, errors.decode() + output.decode()
    return output.decode()


def written(heading: str, folder: Path, redis_server: RedisServer) -> str:
    """Write a publisher's file as it stands but for Redis' port; return its path."""
    block = example(heading)
    assert block.text.count("6379") == 1, block
    path = folder / (block.tags[0] if block.tags else "publish.py")
    path.write_text(block.text.replace("6379", str(redis_server.port)), encoding="utf-8")
    return str(path)


async def test_redis_cli_publishes_a_tick(server: QuotepushServer, redis_server: RedisServer) -> None:
    need("redis-cli")
    await start_at(server, redis_server, 81)
    (block,) = [block for block in blocks_of(CLIENTS) if block.heading == "redis-cli"]
    program, *arguments = shlex.split(block.text)
    assert await run(program, "-p", str(redis_server.port), *arguments) == "1\n"
    await until_last(server, "600519.SH", 1688.2)


async def test_python_publishes_a_batch(server: QuotepushServer, redis_server: RedisServer, tmp_path: Path) -> None:
    await start_at(server, redis_server, 82)
    await run(sys.executable, written("Python", tmp_path, redis_server))
    await until_last(server, "600519.SH", 1688.2)
    await until_last(server, "AAPL", 199.8)


async def test_another_feed_is_piped_through_the_command(server: QuotepushServer, redis_server: RedisServer) -> None:
    await start_at(server, redis_server, 83)
    text = CLIENTS.read_text(encoding="utf-8")
    found = re.search(r"`your-feed \| quotepush ([^`]+)` reads one tick a line,\s+as `([^`]+)`", text)
    assert found is not None
    arguments, line = shlex.split(found[1]), found[2]
    await run(sys.executable, "-m", "quotepush", *arguments, "--redis", redis_server.url, said=f"{line}\n")
    await until_last(server, "AAPL", 199.5)


async def test_php_publishes_a_tick(server: QuotepushServer, redis_server: RedisServer, tmp_path: Path) -> None:
    need_php("redis")
    await start_at(server, redis_server, 84)
    await run("php", written("PHP", tmp_path, redis_server))
    await until_last(server, "600519.SH", 1688.2)


@pytest.mark.parametrize("heading", ["PHP", "Swoole"])
async def test_php_can_read_the_examples(heading: str, redis_server: RedisServer, tmp_path: Path) -> None:
    need_php()
    await run("php", "-l", written(heading, tmp_path, redis_server))


async def test_swoole_publishes_lines_and_waits_for_a_redis_that_is_away(
    server: QuotepushServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    need_php("redis", "swoole")
    await start_at(server, redis_server, 85)
    async with door_to(redis_server, "{port}") as door:
        path = Path(written("Swoole", tmp_path, redis_server))
        path.write_text(path.read_text(encoding="utf-8").replace(str(redis_server.port), door.url), encoding="utf-8")
        feed = await asyncio.create_subprocess_exec("php", str(path), stdin=PIPE, stderr=PIPE)
        assert feed.stdin is not None and feed.stderr is not None
        feed.stdin.write(b'no tick\n{"code":"sh600519","last":86}\n')
        await until_last(server, "600519.SH", 86)
        door.shut()
        before = (await quote(server, "AAPL"))["seq"]
        feed.stdin.write(b'{"code":"AAPL","last":87}\n{"code":"AAPL","last":88}\n')
        assert await asyncio.wait_for(feed.stderr.readline(), 30)  # why not
        door.open()
        feed.stdin.close()
        await until_last(server, "AAPL", 88)
        assert (await quote(server, "AAPL"))["seq"] == before + 2
        assert await asyncio.wait_for(feed.wait(), 30) == 0


# --- the other commands -----------------------------------------------------------------------------------------------


async def test_the_commands_that_prepare_something_are_right() -> None:
    """Those above the examples: they are not run here."""
    lines = [
        line
        for block in blocks_of(CLIENTS)
        if block.language == "sh" and block.heading not in ("curl", "redis-cli")
        for line in block.text.splitlines()
    ]
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["quotepush", "serve"]:
            cli.commands["serve"].make_context("serve", words[2:]).close()
        elif words[:2] == ["npm", "install"]:
            assert json.loads((ROOT / words[2] / "package.json").read_text(encoding="utf-8"))["name"] == "quotepush"
        else:
            assert words[:2] == ["redis-cli", "PUBLISH"] and json.loads(words[3]), line
