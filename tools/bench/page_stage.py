"""The ticker page on stage for a measurement: a private Redis, a server, a Chromium, and ticks at a fixed rate."""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import orjson
from playwright.async_api import Browser, async_playwright
from redis.asyncio import Redis

from quotepush.private_redis import private_redis

__all__ = ["Stage", "codes_of", "page_stage", "ticking"]

_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
_TURN_S = 0.02


@dataclass(frozen=True, slots=True)
class Stage:
    """What a measurement plays on."""

    url: str
    redis_url: str
    browser: Browser


def codes_of(number: int) -> list[str]:
    """Return so many codes, as an address lists them."""
    return [f"X{n:04}" for n in range(number)]


@contextlib.asynccontextmanager
async def page_stage() -> AsyncIterator[Stage]:
    """Start Redis, one worker and Chromium; end them afterwards.

    Raises:
        RuntimeError: there is no Chromium.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise RuntimeError("no Chromium on PATH: apt-get install chromium")
    async with private_redis() as redis, _server(redis.url) as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_FLAGS)
        yield Stage(url, redis.url, browser)
        await browser.close()


@contextlib.asynccontextmanager
async def _server(redis_url: str) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="quotepush-page-") as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "quotepush", "serve", f"--redis={redis_url}", "--port=0", "--admin-port=0",
            "--workers=1", "--node=page", f"--lock-file={Path(directory) / 'lock'}", "--log-level=warning",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                while (words := (await process.stdout.readline()).decode().split())[:2] != ["quotepush", "ready"]:
                    pass
            yield words[2]
        finally:
            process.terminate()
            await process.wait()


@contextlib.asynccontextmanager
async def ticking(redis_url: str, codes: list[str], per_s: float) -> AsyncIterator[None]:
    """Publish ticks of the codes in turn; each changes price, book and volume of its code."""
    async with asyncio.TaskGroup() as group:
        feed = group.create_task(_publish(redis_url, codes, per_s))
        yield
        feed.cancel()


async def _publish(redis_url: str, codes: list[str], per_s: float) -> None:
    loop = asyncio.get_running_loop()
    due, owed, count = loop.time(), 0.0, 0
    async with Redis.from_url(redis_url) as redis:
        while True:
            owed += per_s * _TURN_S
            pipe = redis.pipeline(transaction=False)
            for _ in range(int(owed)):
                pipe.publish(f"quote.{codes[count % len(codes)]}", orjson.dumps(_tick(count)))
                count += 1
            owed %= 1
            await pipe.execute()
            due = max(due + _TURN_S, loop.time() - 0.2)  # a publisher that was late does not make up for more
            await asyncio.sleep(max(0.0, due - loop.time()))


def _tick(count: int) -> dict[str, object]:
    last = round(100 + count * 7919 % 400 / 100, 2)
    return {
        "name": "measured", "last": last, "prev_close": 102, "open": 101, "high": 104, "low": 100,
        "volume": 100 * (count + 1), "amount": 1e4 * (count + 1),
        "bid": round(last - 0.01, 2), "ask": round(last + 0.01, 2),
        "bids": [[round(last - n / 100, 2), 100 * n + count % 900] for n in range(1, 6)],
        "asks": [[round(last + n / 100, 2), 100 * n + count % 700] for n in range(1, 6)],
        "phase": "regular", "status": "trading",
    }  # fmt: skip
