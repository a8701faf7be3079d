"""The walk through two nodes in docs/coming-from.md, command by command as it stands there."""

import asyncio
import os
import re
import shutil
import signal
import sys
from asyncio.subprocess import DEVNULL, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.support.examples import ROOT, Block, blocks_of
from tests.support.ports import own_port
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

COMING_FROM = ROOT / "docs" / "coming-from.md"
WALK = [block for block in blocks_of(COMING_FROM) if block.heading == "Two nodes on one machine"]
NODES = ("n1", "n2")
PORTS = ("8008", "8009", "8018", "8019", "8028", "8029")


def timeless(text: str) -> list[str]:
    """The lines of an output without what differs from run to run."""
    for pattern, word in (
        (r',"epoch":"\w+"', ""),  # an answer has none until its node has heard of the log's
        (r"\b\d{13,}\b", "<time>"),
        (r"\bpid \d+", "pid <pid>"),
        (r"/\S+/(?=quotepush-\w+\.lock)", "<folder>/"),
        (r"\b\d+\.\d+\.\d+\b(?=  up)", "<version>"),
        (r"\bup \d+ min", "up <time>"),
    ):
        text = re.sub(pattern, word, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def is_question(block: Block) -> bool:
    """Whether asking again changes nothing."""
    return block.text.startswith(("quotepush stats", "for port", "grep"))


def test_an_epoch_that_looks_like_a_time_is_none() -> None:
    assert timeless('{"time":1795778935709,"epoch":"469344197673753b"}') == ['{"time":<time>}']


class Terminals:
    """The reader's terminals: one for each node, and one for all other commands, in one folder."""

    def __init__(self, folder: Path, redis_server: RedisServer) -> None:
        self._folder = folder
        self._here = {port: str(own_port()) for port in PORTS}
        self._back = {here: port for port, here in self._here.items()}
        programs = folder / "bin"
        programs.mkdir()
        for name, line in {"python": "", "quotepush": " -m quotepush"}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{line} "$@"\n')
            (programs / name).chmod(0o755)
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")} | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "QUOTEPUSH_FEED_REDIS": redis_server.url,
            "XDG_RUNTIME_DIR": str(folder),
        }
        self.nodes: dict[str, asyncio.subprocess.Process] = {}
        self._outputs: dict[str, Path] = {}
        self.background: list[int] = []

    def ported(self, text: str) -> str:
        return re.sub("|".join(PORTS), lambda match: self._here[match[0]], text)

    async def serve(self, name: str, block: Block) -> None:
        *before, last = self.ported(block.text).splitlines()
        assert last.startswith("quotepush serve "), block
        self._outputs[name] = self._folder / f"{name}.out"
        with open(self._outputs[name], "wb") as output:
            self.nodes[name] = await asyncio.create_subprocess_exec(
                "sh", "-c", "\n".join([*before, f"exec {last}"]),
                cwd=self._folder, env=self._environment, stdin=DEVNULL, stdout=output, stderr=DEVNULL,
            )  # fmt: skip

    def said(self, name: str) -> str:
        """What the node has printed, with the ports of the page."""
        text = self._outputs[name].read_text()
        return re.sub("|".join(self._back), lambda match: self._back[match[0]], text)

    async def until_said(self, name: str, block: Block) -> None:
        """Wait until the node has printed what stands in a block."""
        expected = timeless(block.text)
        await wait_until(lambda: timeless(self.said(name)) == expected, 60, f"{block}: what {name} says")

    async def run(self, block: Block) -> str:
        """Run what stands in a block; return what the terminal shows."""
        script = self.ported(block.text)
        if script.rstrip().endswith("&"):
            script += "\necho $!"
        shown = self._folder / "shown.out"  # no pipe: what goes on in the background would hold it open
        with open(shown, "wb") as output:
            process = await asyncio.create_subprocess_exec(
                "sh", "-c", script,
                cwd=self._folder, env=self._environment, stdin=DEVNULL, stdout=output, stderr=STDOUT,
            )  # fmt: skip
            await asyncio.wait_for(process.wait(), 60)
        if script.endswith("echo $!"):
            self.background.append(int(shown.read_text()))
            return ""
        return shown.read_text()

    async def until_shown(self, question: Block, block: Block) -> None:
        """Ask until the terminal shows what stands in a block."""

        shown = ""

        async def is_shown() -> bool:
            nonlocal shown
            shown = await self.run(question)
            return timeless(shown) == timeless(block.text)

        try:
            await wait_until(is_shown, 30)
        except AssertionError:
            raise AssertionError(f"{block}: what is shown, for 30 s:\n{shown}") from None

    async def interrupt(self, name: str) -> None:
        """Ctrl-C."""
        node = self.nodes.pop(name)
        node.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(node.wait(), 30) == 0


@asynccontextmanager
async def terminals(folder: Path, redis_server: RedisServer) -> AsyncIterator[Terminals]:
    found = Terminals(folder, redis_server)
    try:
        yield found
    finally:
        for pid in found.background:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in found.nodes.values():
            if node.returncode is None:
                node.kill()
            await node.wait()


async def test_two_nodes_do_what_the_walk_through_says(redis_server: RedisServer, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH")
    folder = tmp_path / "reader"
    folder.mkdir()
    stream = folder / "ann.txt"
    compared = 0
    async with terminals(folder, redis_server) as reader:
        for block in WALK:
            name = " ".join(block.tags)
            if block.language == "sh" and name in NODES:
                await reader.serve(name, block)
            elif block.language == "sh":
                if name == "without-n2":
                    await reader.interrupt("n2")
                asked, shown = block, await reader.run(block)
                if name == "client":
                    await wait_until(lambda: stream.exists() and "event: snapshot" in stream.read_text(), 30, "ann")
            elif name in NODES:
                await reader.until_said(name, block)
                compared += 1
            else:
                if timeless(shown) != timeless(block.text):
                    # The registry, or a tick, may have been under way: ask once more, as a reader would.
                    assert is_question(asked), f"{block}:\n{shown}"
                    await reader.until_shown(asked, block)
                compared += 1
    assert compared >= 10
