"""Examples of the documents: taken out of their Markdown, and run as a reader would."""

import asyncio
import os
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "Block", "blocks_of", "name_of", "running"]

ROOT = Path(__file__).parents[2]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the further words after it, its text, the heading that it stands below."""

    path: Path
    line: int
    language: str
    tags: tuple[str, ...]
    text: str
    heading: str

    def __str__(self) -> str:
        return f"{name_of(self.path)}:{self.line}"


@cache
def blocks_of(path: Path) -> tuple[Block, ...]:
    found: list[Block] = []
    fence: re.Match[str] | None = None
    lines: list[str] = []
    began = 0
    heading = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.match(r"( *)```(.*)$", line)
        if fence is None and match:
            fence, lines, began = match, [], number
        elif fence is not None and match:
            words = fence[2].split() or [""]
            found.append(Block(path, began, words[0], tuple(words[1:]), "\n".join(lines), heading))
            fence = None
        elif fence is not None:
            lines.append(line.removeprefix(fence[1]))
        elif title := re.match(r"#+ (.+)$", line):
            heading = title[1]
    assert fence is None, f"{name_of(path)}:{began}: a fence that is not closed"
    return tuple(found)


@asynccontextmanager
async def running(program: str, *arguments: str, cwd: Path | None = None) -> AsyncIterator[asyncio.StreamReader]:
    """A program of the reader's; yields what it prints."""
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=DEVNULL, stdout=PIPE, cwd=cwd, start_new_session=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        # The whole group: what `go run` has started does not end with it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()
