"""A feed as a whole, in process and as the command line, into a real Redis that comes and goes."""

import asyncio
import gzip
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.feed import FeedOptions, FeedSummary, JsonLines, Recording, Simulation, run_feed
from quotepush.feed.replay import CodedTick, CsvLines
from tests.support.manual_clock import ManualClock
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "tests" / "data" / "us-ticks-small.csv.gz"
TOOL = ROOT / "tools" / "feed.py"


def recorded() -> list[CodedTick]:
    header, *lines = gzip.decompress(RECORDING.read_bytes()).splitlines()
    reader = CsvLines(pytest.fail)
    reader.parse(header)
    ticks = [reader.parse(line) for line in lines]
    return [tick for tick in ticks if tick is not None]


@pytest.fixture(params=[None, "quote.{code}"], ids=["logged", "plain"])
def channel(request: pytest.FixtureRequest) -> str | None:
    """Where ticks go: into the log, or plainly on channels."""
    return request.param


class Heard:
    """What a subscriber of everything got."""

    def __init__(self) -> None:
        self.ticks: list[CodedTick] = []


@asynccontextmanager
async def hearing(server: RedisServer) -> AsyncIterator[Heard]:
    """Subscribe to plain ticks and to batches of the log; ends quietly with its Redis."""
    heard = Heard()
    client = server.client()
    pubsub = client.pubsub()
    await pubsub.psubscribe("quote.*", "qp:feed")
    for _ in range(2):
        assert await pubsub.get_message(timeout=5)

    async def listen() -> None:
        while True:
            message = await pubsub.get_message(timeout=1)
            if message is None:
                continue
            said = orjson.loads(message["data"])
            if message["channel"] == "qp:feed":
                heard.ticks += [(code, tick) for _, code, tick in said["ticks"]]
            else:
                heard.ticks.append((message["channel"].removeprefix("quote."), said))

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pubsub.aclose()
        await client.aclose()


async def test_recording_at_full_speed_arrives_whole_and_in_order(redis_server: RedisServer, channel: str | None):
    source = Recording(path=RECORDING, speed=float("inf"))
    async with hearing(redis_server) as heard:
        summary = await run_feed(FeedOptions(redis_url=redis_server.url, source=source, channel=channel))
        await wait_until(lambda: len(heard.ticks) == summary.sent)

    assert heard.ticks == recorded()
    assert (summary.codes, summary.bad_lines, summary.dropped) == (7, 0, 0)


async def test_redis_killed_in_the_middle_of_a_recording_loses_nothing_that_was_not_sent(
    tmp_path: Path, channel: str | None
):
    directory = tmp_path / "r"
    server = RedisServer(directory, options=("--unixsocket", str(directory / "s")))
    server.start()
    door = tmp_path / "door"  # the feed's way to Redis; shut until the new subscriber is there
    door.symlink_to(directory / "s")
    expected, manual = recorded(), ManualClock()
    middle_ms = expected[len(expected) // 2][1]["ts"]
    before = [one for one in expected if one[1]["ts"] <= middle_ms]
    reports: list[str] = []
    options = FeedOptions(redis_url=f"unix://{door}", source=Recording(path=RECORDING), channel=channel)
    feed: asyncio.Task[FeedSummary] | None = None
    try:
        async with hearing(server) as heard:
            feed = asyncio.create_task(run_feed(options, report=reports.append, clock=manual.clock))
            await wait_until(lambda: manual.is_slept_on)
            while manual.at_s < (middle_ms - expected[0][1]["ts"]) / 1000:
                manual.advance(0.001)
                await asyncio.sleep(0)
            await wait_until(lambda: len(heard.ticks) == len(before))
            assert heard.ticks == before
            await wait_until(lambda: manual.is_slept_on)  # every tick so far is answered

            # What is due now goes to a Redis that does not read it any more, and dies.
            server.pause()
            manual.advance(1)
            for _ in range(20):
                await asyncio.sleep(0)
            door.unlink()
            server.kill()
        await wait_until(lambda: reports)
        assert not feed.done()
        await asyncio.to_thread(server.start)
        async with hearing(server) as heard:
            door.symlink_to(directory / "s")
            manual.advance(3600)
            summary = await asyncio.wait_for(feed, 20)
            await wait_until(lambda: len(heard.ticks) >= len(expected) - len(before))
            assert heard.ticks == expected[len(before) :]
    finally:
        if feed is not None:
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
        server.stop()

    assert (summary.sent, summary.outages, summary.dropped) == (len(expected), 1, 0)
    assert len(reports) == 2 and "went away" in reports[0] and "is back" in reports[1]


async def test_simulation_goes_on_after_an_outage_and_counts_what_it_dropped(
    redis_server: RedisServer, channel: str | None
):
    reports: list[str] = []
    shown: list[FeedSummary] = []
    stop = asyncio.Event()
    options = FeedOptions(redis_url=redis_server.url, source=Simulation(codes=50), channel=channel)
    feed = asyncio.create_task(run_feed(options, stop=stop, report=reports.append, progress=shown.append))
    await wait_until(lambda: shown and shown[-1].sent)

    redis_server.kill()
    await wait_until(lambda: shown[-1].dropped)
    await asyncio.to_thread(redis_server.start)
    await wait_until(lambda: len(reports) == 2)
    sent_before = shown[-1].sent
    await wait_until(lambda: shown[-1].sent > sent_before)
    stop.set()
    summary = await asyncio.wait_for(feed, 20)

    assert summary.outages == 1 and summary.dropped > 0
    assert "outages of Redis: 1" in str(summary)


async def test_pinned_codes_come_first_and_full_from_a_simulation(redis_server: RedisServer):
    async with hearing(redis_server) as heard:
        summary = await run_feed(FeedOptions(redis_url=redis_server.url, count=2))
        await wait_until(lambda: len(heard.ticks) == 2)

    assert summary.sent == summary.codes == 2
    (first, maotai), (second, apple) = heard.ticks
    assert (first, second) == ("600519.SH", "AAPL")
    assert maotai["name"] == "贵州茅台" and "limit_up" in maotai
    assert len(maotai["bids"]) == len(apple["asks"]) == 5


async def test_feed_of_lines_reports_bad_ones_and_ends_with_its_input(redis_server: RedisServer, channel: str | None):
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b'{"code":"A","last":1}\nrubbish\n{"code":"B","last":2}\n')
    os.close(write_fd)
    reports: list[str] = []
    async with hearing(redis_server) as heard:
        options = FeedOptions(redis_url=redis_server.url, source=JsonLines(fd=read_fd), channel=channel)
        summary = await run_feed(options, report=reports.append)
        await wait_until(lambda: len(heard.ticks) == 2)
    os.close(read_fd)

    assert heard.ticks == [("A", {"last": 1}), ("B", {"last": 2})]
    assert summary.bad_lines == 1
    assert [report.split(":")[0] for report in reports] == ["line 2 skipped"]


async def want(url: str, *codes: str) -> None:
    """What servers do when somebody subscribes."""
    async with Redis.from_url(url) as redis:
        for code in codes:
            await redis.sadd("qp:codes", code)
            await redis.publish("qp:demand", orjson.dumps({"code": code, "demand": True, "time": 1}))


async def test_on_demand_only_wanted_codes_are_published_and_others_as_soon_as_they_are(
    redis_server: RedisServer, channel: str | None
):
    registry_url = redis_server.url.replace("/0", "/1")
    await want(registry_url, "600519.SH")
    read_fd, write_fd = os.pipe()
    options = FeedOptions(
        redis_url=redis_server.url, source=JsonLines(fd=read_fd), channel=channel,
        is_on_demand=True, registry_url=registry_url,
    )  # fmt: skip
    shown: list[FeedSummary] = []
    async with hearing(redis_server) as heard:
        feed = asyncio.create_task(run_feed(options, report=pytest.fail, progress=shown.append))
        os.write(write_fd, b'{"code":"A","last":1,"open":2}\n{"code":"sh600519","last":3}\n{"code":"A","last":4}\n')
        await wait_until(lambda: shown and shown[-1].withheld == 2)
        await wait_until(lambda: heard.ticks)  # they are counted before the others are published
        assert [tick for _, tick in heard.ticks] == [{"last": 3}]
        await want(registry_url, "A")
        await wait_until(lambda: heard.ticks[1:] == [("A", {"last": 4, "open": 2})])
        os.write(write_fd, b'{"code":"A","last":5}\n{"code":"B","last":6}\n')
        await wait_until(lambda: heard.ticks[2:] == [("A", {"last": 5})])
        os.close(write_fd)
        summary = await feed
    os.close(read_fd)
    assert (summary.sent, summary.withheld, summary.codes) == (3, 3, 2)
    assert "3 unwanted" in str(summary)


async def test_a_simulation_on_demand_publishes_what_is_wanted_and_counts_only_that(redis_server: RedisServer):
    await want(redis_server.url, "AAPL", "600519.SH")
    async with hearing(redis_server) as heard:
        source = Simulation(codes=50, rate_per_s=20_000)
        summary = await run_feed(
            FeedOptions(redis_url=redis_server.url, source=source, is_on_demand=True, count=100), report=pytest.fail
        )
        await wait_until(lambda: len(heard.ticks) == 100)
    assert {code for code, _ in heard.ticks} == {"AAPL", "600519.SH"}
    assert summary.sent == 100 and summary.withheld > 100


async def test_a_feed_on_demand_does_not_start_without_the_registry(redis_server: RedisServer, tmp_path: Path):
    options = FeedOptions(redis_url=redis_server.url, is_on_demand=True, registry_url=f"unix://{tmp_path / 'none'}")
    with pytest.raises(RedisUnavailable, match="registry_redis"):
        await run_feed(options)
    with pytest.raises(SettingsError, match="--registry: "):
        await run_feed(replace(options, registry_url="http://x"))


def test_tool_follows_demand(redis_server: RedisServer):
    asyncio.run(want(redis_server.url, "AAPL"))
    done = run_tool("--redis", redis_server.url, "--csv", str(RECORDING), "--speed", "max", "--demand")
    assert (done.returncode, done.stderr) == (0, "")
    apple = len([code for code, _ in recorded() if code == "AAPL"])
    assert f"feed: {apple:,} ticks of 1 codes" in done.stdout
    assert f"{len(recorded()) - apple:,} unwanted" in done.stdout


async def test_duration_and_count_end_a_feed(redis_server: RedisServer, channel: str | None):
    source = Simulation(codes=10, rate_per_s=20_000)
    options = FeedOptions(redis_url=redis_server.url, source=source, channel=channel)

    assert (await run_feed(replace(options, count=1234))).sent == 1234
    timed = await run_feed(replace(options, duration_s=1.5))
    assert timed.sent > 0


async def test_cancelled_feed_ends_as_cancelled(redis_server: RedisServer, channel: str | None):
    shown: list[FeedSummary] = []
    options = FeedOptions(redis_url=redis_server.url, channel=channel)
    feed = asyncio.create_task(run_feed(options, progress=shown.append))
    await wait_until(lambda: shown)

    feed.cancel()

    with pytest.raises(asyncio.CancelledError):
        await feed
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_failing_progress_ends_the_feed_and_is_not_hidden(redis_server: RedisServer):
    def fail(summary: FeedSummary) -> None:
        raise LookupError("no screen")

    with pytest.raises(LookupError, match="no screen"):
        await run_feed(FeedOptions(redis_url=redis_server.url), progress=fail)


async def test_feed_without_redis_does_not_start(redis_server: RedisServer):
    redis_server.kill()

    with pytest.raises(RedisUnavailable):
        await run_feed(FeedOptions(redis_url=redis_server.url))


async def test_all_wrong_options_are_named_at_once():
    source = Simulation(codes=1, rate_per_s=0)
    with pytest.raises(SettingsError) as caught:
        await run_feed(FeedOptions(source=source, channel="{what}", duration_s=0, count=0))

    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "--codes",
        "--rate",
        "--duration",
        "--count",
        "--channel",
    ]


def test_options_do_not_show_the_password():
    assert "hunter2" not in repr(FeedOptions(redis_url="redis://:hunter2@127.0.0.1"))


# The command line.


def run_tool(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=60, env=environment, check=False,
    )  # fmt: skip


def test_tool_is_executable():
    assert os.access(TOOL, os.X_OK)


def test_tool_replays_a_recording_and_says_so_in_one_line(redis_server: RedisServer):
    done = run_tool("--redis", redis_server.url, "--csv", str(RECORDING), "--speed", "max", "--now")

    assert done.returncode == 0
    assert re.fullmatch(r"feed: 4,000 ticks of 7 codes in .* 0 bad lines, 0 dropped\n", done.stdout)
    assert done.stderr == ""


async def test_tool_publishes_into_the_log_or_plainly(redis_server: RedisServer):
    line = '{"code":"A","last":1}\n'
    plain = ("--plain", "--channel", "all")
    async with redis_server.client() as client, client.pubsub() as pubsub:
        await pubsub.subscribe("all", "x:feed")
        for options in (("--prefix", "x:"), plain):
            done = await asyncio.to_thread(run_tool, "--redis", redis_server.url, "--stdin", *options, stdin=line)
            assert done.stdout.startswith("feed: 1 ticks"), done.stderr
        heard = [await pubsub.get_message(timeout=5) for _ in range(4)][2:]
        assert [one["channel"] for one in heard if one] == ["x:feed", "all"]
        assert await client.hget("x:row:A", "last") == "1"


def test_tool_reports_bad_lines_of_standard_input_on_standard_error(redis_server: RedisServer):
    lines = '{"code":"A","last":1}\n{"last":[31m}\n{"code":"A"}'

    done = run_tool("--redis", redis_server.url, "--stdin", stdin=lines)

    assert done.returncode == 0
    assert done.stderr.startswith("feed: line 2 skipped: not JSON")
    assert done.stdout.startswith("feed: 2 ticks of 1 codes")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_tool_ends_cleanly_with_its_summary(redis_server: RedisServer, signum: signal.Signals):
    async with hearing(redis_server) as heard:
        tool = await asyncio.create_subprocess_exec(
            sys.executable, str(TOOL), "--redis", redis_server.url,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            await wait_until(lambda: len(heard.ticks) > 100, timeout_s=30)
            tool.send_signal(signum)
            stdout, stderr = await asyncio.wait_for(tool.communicate(), 20)
        finally:
            if tool.returncode is None:
                tool.kill()
                await tool.wait()
        sent = int(stdout.split()[1].replace(b",", b""))
        await wait_until(lambda: len(heard.ticks) == sent)

    assert tool.returncode == 0
    assert stdout.startswith(b"feed: ") and stdout.count(b"\n") == 1
    assert stderr == b""


def test_tool_without_redis_says_so_in_one_line_without_the_password(redis_server: RedisServer):
    redis_server.kill()

    done = run_tool("--redis", f"redis://:hunter2@127.0.0.1:{redis_server.port}/0")

    assert done.returncode == 1
    assert done.stderr.startswith("feed: cannot use Redis at 127.0.0.1") and done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--codes", "1"),
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--speed", "fast", "--csv", str(RECORDING)),
        ("--speed", "0", "--csv", str(RECORDING)),
        ("--speed", "2"),
        ("--seed", "2", "--stdin"),
        ("--now", "--stdin"),
        ("--stdin", "--csv", str(RECORDING)),
        ("--csv", "absent.csv"),
        ("--channel", "{what}", "--plain"),
        ("--channel", "quote.{code}"),
        ("--redis", "nowhere"),
        ("--demand", "--registry", "nowhere"),
        ("--registry", "redis://127.0.0.1:6379/0"),
        ("--what",),
    ],
)
def test_wrong_arguments_exit_with_two(arguments: tuple[str, ...]):
    done = run_tool(*arguments)

    assert done.returncode == 2
    assert done.stderr and "Traceback" not in done.stderr


def test_a_terminal_is_shown_one_refreshing_line(redis_server: RedisServer):
    controller, terminal = os.openpty()
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    tool = subprocess.Popen(
        [sys.executable, str(TOOL), "--redis", redis_server.url, "--duration", "60"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    is_told = False
    try:
        while chunk := os.read(controller, 65_536):
            shown += chunk
            if len(re.findall(rb"[0-9]+/s", shown)) >= 3 and not is_told:  # in how long, is the machine's affair
                is_told = True  # once: a second one may find it when it listens no more
                tool.send_signal(signal.SIGTERM)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(controller)
    stdout, _ = tool.communicate(timeout=20)

    assert tool.returncode == 0
    assert stdout.startswith("feed: ")
    assert len(re.findall(rb"[0-9]+/s", shown)) >= 3
    assert b"\n\n" not in shown.replace(b"\r", b"")
