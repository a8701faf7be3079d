"""Everything at once on one machine: a private Redis, the server, a simulated market, the ticker page.

Start: 1 Redis, 2 server, 3 feed. Stop, by Ctrl-C or because one of them has ended: 1 feed,
2 server, 3 Redis.
"""

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from quotepush.errors import OperatorError
from quotepush.feed import FeedOptions, Simulation, run_feed
from quotepush.private_redis import PrivateRedis, private_redis

__all__ = ["DemoOptions", "run_demo"]

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to show: where the page is, how many codes tick, how often in all (1/s)."""

    host: str = "127.0.0.1"
    port: int = 8008
    codes: int = 3000
    rate_per_s: float = 1000.0
    seed: int = 1


class _ServerFailed(OperatorError):
    """The server has ended; it has said why itself."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.exit_code = status

    def __str__(self) -> str:
        return f"the server has ended with {self.exit_code}; its lines above say why"


def run_demo(options: DemoOptions, say: Callable[[str], None]) -> None:
    """Run the demo until SIGINT or SIGTERM.

    Args:
        say: prints a line.

    Raises:
        OperatorError: there is no Redis to start, or the server cannot run.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_demo(options, say))


async def _demo(options: DemoOptions, say: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with private_redis() as redis, _server(options, redis) as server:
        assert server.stdout is not None
        ready = asyncio.create_task(_url_of_ready_line(server.stdout))
        ended = asyncio.create_task(server.wait())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([ready, ended, stopped], timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        url = ready.result() if ready.done() else None
        if url is None and not stopped.done():
            raise _ServerFailed(await ended if ended.done() else 1)
        if url is not None:
            say(f"quotepush demo: {url}  (Ctrl-C ends it)")
            rate = f"{options.codes:,} codes, about {options.rate_per_s:,.0f} ticks/s"
            say(f"  {rate} through {redis.program} at {redis.url}")
            # As it was called, so that the line can be copied: in a checkout it is .venv/bin/quotepush.
            program = sys.argv[0] if sys.argv[0].endswith("quotepush") else "quotepush"
            say(f"  a tick of your own:  {program} publish AAPL last=199.5 --redis {redis.url}")
            market = Simulation(codes=options.codes, rate_per_s=options.rate_per_s, seed=options.seed)
            feed = asyncio.create_task(
                run_feed(FeedOptions(redis_url=redis.url, source=market), stop=stop, report=say), name="feed"
            )
            await asyncio.wait([feed, ended, stopped], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            summary = await feed
            if ended.done():
                raise _ServerFailed(ended.result())
            say(f"\nstopping: {summary}")
        ready.cancel()


@contextlib.asynccontextmanager
async def _server(options: DemoOptions, redis: PrivateRedis) -> AsyncIterator["asyncio.subprocess.Process"]:
    with tempfile.TemporaryDirectory(prefix="quotepush-demo-") as directory:
        # A session of its own: Ctrl-C is for us, and the feed is stopped first.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "quotepush", "serve", f"--redis={redis.url}", f"--host={options.host}",
            f"--port={options.port}", "--admin-port=0", "--node=demo", f"--lock-file={Path(directory) / 'lock'}",
            "--redis-prefix=qp:", "--log-level=warning", "--drain-timeout-s=2",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    async with asyncio.timeout(_STOP_TIMEOUT_S):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _url_of_ready_line(output: asyncio.StreamReader) -> str | None:
    # Ends with the server's output at the latest.
    while line := await output.readline():
        words = line.decode().split()
        if words[:2] == ["quotepush", "ready"]:
            return words[2]
    return None
