"""``quotepush publish``: ticks by hand, and what it says when something is wrong with them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.asyncio.client import PubSub

from quotepush.errors import SettingsError
from quotepush.publishing import parse_fields
from tests.support.command import run_quotepush
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


@asynccontextmanager
async def listening(server: RedisServer, pattern: str = "quote.*") -> AsyncIterator[PubSub]:
    async with server.client() as client, client.pubsub() as pubsub:
        await pubsub.psubscribe(pattern)
        confirmation = await pubsub.get_message(timeout=5)
        assert confirmation and confirmation["type"] == "psubscribe"
        yield pubsub


@asynccontextmanager
async def publishing_lines(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``quotepush publish --json -`` with pipes at all ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quotepush", "publish", "--json", "-", *flags,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")},
        # It would inherit that SIGINT is ignored, which is so when a script runs the tests in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def heard(pubsub: PubSub) -> tuple[str, Any]:
    message = await pubsub.get_message(timeout=30)  # the program that publishes may have to start first
    assert message is not None
    return message["channel"], orjson.loads(message["data"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("last=1688.2", 1688.2),
        ("volume=100", 100),
        ("name=360", "360"),
        ("name=贵州茅台", "贵州茅台"),
        ("last=", None),
        ("reset=true", True),
        ("bids=[[1.5,100]]", [[1.5, 100]]),
        ("venue=XNAS=1", "XNAS=1"),
        ("lots=7", 7),
    ],
)
def test_a_value_is_what_its_field_says(field: str, value: Any):
    assert parse_fields([field]) == {field.partition("=")[0]: value}


@pytest.mark.parametrize(
    "field", ["last", "=1", "last=x", "last=NaN", "bid=-1", "volume=1.5", "code=A", "seq=1", "change=1", "name=\udcff"]
)
def test_a_field_that_is_none_is_a_fault(field: str):
    with pytest.raises(SettingsError):
        parse_fields([field])


def test_all_faults_are_named_at_once():
    with pytest.raises(SettingsError) as error:
        parse_fields(["last=x", "ask=1", "bid=-1"])
    assert len(error.value.faults) == 2
    with pytest.raises(SettingsError):
        parse_fields([])


async def test_one_tick_goes_into_the_log(redis_server: RedisServer):
    async with listening(redis_server, "qp:feed") as pubsub:
        outcome = await run_quotepush("publish", "sh600519", "last=1688.2", "name=茅台", "--redis", redis_server.url)
        assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "600519.SH: seq 1\n", "")
        _, batch = await heard(pubsub)
        assert batch["ticks"] == [[1, "600519.SH", {"last": 1688.2, "name": "茅台"}]]

    tick = '{"code":"sh600519","last":1,"x":[1]}'
    outcome = await run_quotepush("publish", "--json", tick, "--redis", redis_server.url)
    assert (outcome.status, outcome.stdout) == (0, "600519.SH: seq 2\n")

    environment = {"QUOTEPUSH_FEED_REDIS": redis_server.url, "QUOTEPUSH_REDIS_PREFIX": "x:"}
    for prefix in ([], ["--prefix", "y:"]):
        outcome = await run_quotepush("publish", "A", "last=1", *prefix, env=environment)
        assert outcome.stdout == "A: seq 1\n"
    async with redis_server.client() as client:
        assert await client.exists("qp:row:600519.SH", "x:row:A", "y:row:A") == 3


async def test_tick_that_the_log_cannot_take_is_said_in_one_line(redis_server: RedisServer):
    outcome = await run_quotepush("publish", "--json", '{"code":"A","@":1}', "--redis", redis_server.url)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "cannot be the name of a field" in outcome.stderr and outcome.stderr.count("\n") == 1


async def test_one_plain_tick_goes_to_the_channel_of_its_code(redis_server: RedisServer):
    async with listening(redis_server) as pubsub:
        outcome = await run_quotepush(
            "publish", "--plain", "sh600519", "last=1688.2", "name=茅台", "--redis", redis_server.url
        )
        assert (outcome.status, outcome.stdout, outcome.stderr) == (0, "quote.600519.SH: 1 subscriber\n", "")
        assert await heard(pubsub) == ("quote.600519.SH", {"last": 1688.2, "name": "茅台"})

        tick = '{"code":"AAPL","last":1,"x":[1]}'
        outcome = await run_quotepush("publish", "--plain", "--json", tick, "--redis", redis_server.url)
        assert outcome.status == 0
        assert await heard(pubsub) == ("quote.AAPL", {"last": 1, "x": [1]})

    outcome = await run_quotepush(
        "publish", "A", "last=1", "--plain", "--channel", "all", env={"QUOTEPUSH_FEED_REDIS": redis_server.url}
    )
    assert outcome.stdout == "all: 0 subscribers; does a server run on this Redis?\n"


async def test_lines_of_standard_input_go_into_the_log_as_they_come(redis_server: RedisServer):
    async with listening(redis_server, "qp:feed") as pubsub, publishing_lines("--redis", redis_server.url) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"code":"A","last":1}\n')
        _, batch = await heard(pubsub)
        assert batch["ticks"] == [[1, "A", {"last": 1}]]
        stdout, stderr = await asyncio.wait_for(
            process.communicate(b'\nnonsense\n{"code":"B","@":2}\n{"code":"B","last":2}\n{"code":"A","last":3}'), 20
        )
    async with redis_server.client() as client:
        assert await client.hgetall("qp:seq") == {"#": "3", "A": "2", "B": "1"}
    assert stdout == b"3 published, 2 refused\n"
    first, second = stderr.decode().splitlines()
    assert first.startswith("line 3: not JSON")
    assert second.startswith("a tick of B is refused")
    assert process.returncode == 2


async def test_lines_of_standard_input_wait_for_redis(redis_server: RedisServer):
    async with publishing_lines("--redis", redis_server.url) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b'{"code":"A","last":1}\n')
        async with redis_server.client() as client:
            await wait_until(lambda: client.exists("qp:seq"), 30)
        redis_server.kill()
        process.stdin.write(b'{"code":"A","last":2}\n')
        assert b"went away" in await asyncio.wait_for(process.stderr.readline(), 20)
        await asyncio.to_thread(redis_server.start)
        stdout, stderr = await asyncio.wait_for(process.communicate(b""), 20)
    assert (stdout, process.returncode) == (b"2 published\n", 0)
    assert b"is back" in stderr
    async with redis_server.client() as client:
        assert await client.hget("qp:row:A", "last") == "2"


async def test_plain_lines_of_standard_input_are_published_as_they_come(redis_server: RedisServer):
    flags = ("--plain", "--channel=all", "--redis", redis_server.url)
    async with listening(redis_server, "all") as pubsub, publishing_lines(*flags) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"code":"A","last":1}\n')
        assert await heard(pubsub) == ("all", {"code": "A", "last": 1})
        stdout, stderr = await asyncio.wait_for(
            process.communicate(b'\nnonsense\n{"code":"B","last":2}\n{"code":"A","last":3}'), 20
        )
        assert [await heard(pubsub) for _ in range(2)] == [
            ("all", {"code": "B", "last": 2}),
            ("all", {"code": "A", "last": 3}),
        ]
    assert stdout == b"3 published, 3 heard by a subscriber, 1 refused\n"
    assert stderr.startswith(b"line 3: not JSON")
    assert process.returncode == 2


async def test_ctrl_c_ends_a_stream_with_its_tally(redis_server: RedisServer):
    async with publishing_lines("--redis", redis_server.url) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"code":"A","last":1}\n')
        async with redis_server.client() as client:
            await wait_until(lambda: client.exists("qp:seq"), 30)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stderr is not None
        assert await asyncio.wait_for(process.stdout.read(), 20) == b"1 published\n"
        assert (await process.stderr.read()).strip() == b""
        assert await process.wait() == 130


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["AAPL", "last=x"], 2, "last must be a number"),
        (["no such", "last=1"], 2, "a code is made of"),
        (["AAPL"], 2, "at least one FIELD=VALUE"),
        ([], 2, "give either CODE"),
        (["AAPL", "last=1", "--json", "{}"], 2, "give either CODE"),
        (["--json", "[]"], 2, "not a JSON object"),
        (["AAPL", "last=1", "--plain", "--channel", "quote.*"], 2, "--channel"),
        (["AAPL", "last=1", "--plain", "--channel", ""], 2, "--channel"),
        (["AAPL", "last=1", "--channel", "quote.{code}"], 2, "--channel belongs to --plain"),
        (["AAPL", "last=1", "--redis", "http://x"], 2, "must begin with redis://"),
        (["AAPL", "last=1", "--redis", "redis://:secret@127.0.0.1:1"], 1, "Connection refused"),
        (["AAPL", "last=1", "--plain", "--redis", "redis://:secret@127.0.0.1:1"], 1, "Connection refused"),
    ],
)
async def test_what_is_wrong_is_said_in_one_line(arguments: list[str], status: int, words: str):
    outcome = await run_quotepush("publish", *arguments)
    assert outcome.status == status
    assert words in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert "secret" not in outcome.stderr
    assert outcome.stdout == ""
