"""``quotepush demo``: everything at once, and nothing left of it."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from quotepush.client import QuoteClient
from tests.support.waiting import wait_until

URL = re.compile(r"quotepush demo: (http://127\.0\.0\.1:\d+/)")
REDIS = re.compile(r"redis://127\.0\.0\.1:(\d+)/0")


class Demo:
    """A demo in a process group of its own, as in a terminal."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "quotepush", "demo", "--codes", "50", "--rate", "200", *flags],
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text()

    async def url(self) -> str:
        match = await wait_until(lambda: URL.search(self.said()), 40, "the demo is up")
        return str(match[1])

    async def end(self, number: signal.Signals) -> int:
        """Signal the whole group, as Ctrl-C does; return the exit status."""
        os.killpg(self.process.pid, number)
        return await asyncio.to_thread(self.process.wait, 30)


def is_listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


async def test_quotes_flow_until_ctrl_c_which_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "log", "--port", "0")
    try:
        url = await demo.url()
        async with asyncio.timeout(60), QuoteClient(url) as quotes:
            await quotes.subscribe(["600519", "AAPL"])
            seen: set[str] = set()
            async for row in quotes:
                seen |= {row["code"]} if "prev" in row else set()
                if seen == {"600519.SH", "AAPL"}:
                    break
        assert await demo.end(signal.SIGINT) == 0
    finally:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.process.wait()
    redis = REDIS.search(demo.said())
    assert redis is not None
    assert not is_listening(int(redis[1]))
    assert not is_listening(int(url.rsplit(":", 1)[1].strip("/")))
    assert "Traceback" not in demo.said()


async def test_a_port_that_is_taken_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = Demo(tmp_path / "log", "--port", str(taken.getsockname()[1]))
        status = await asyncio.to_thread(demo.process.wait, 40)
    assert status == 1
    assert "choose another with --port" in demo.said()
    assert "Traceback" not in demo.said()
