"""The browser client in a Node of its own, driven by a test: real sockets, real timers."""

import asyncio
import json
import shutil
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.waiting import wait_until

__all__ = ["NODE_FLAGS", "STATIC", "ScriptClient", "node"]

STATIC = Path(__file__).parents[2] / "quotepush" / "static"
_DRIVER = Path(__file__).parents[1] / "browser" / "client.mjs"
# What a browser has and Node 20 has only when asked; later versions take the flags too.
NODE_FLAGS = ("--no-warnings", "--experimental-websocket", "--experimental-eventsource")


@cache
def node() -> str | None:
    """Return the path of a Node that can run the browser client; None: there is none."""
    path = shutil.which("node")
    if path is None:
        return None
    script = "process.exit(typeof WebSocket === 'function' && typeof EventSource === 'function' ? 0 : 1)"
    found = subprocess.run([path, *NODE_FLAGS, "-e", script], capture_output=True, check=False)
    return path if found.returncode == 0 else None


class ScriptClient:
    """One ``connect()`` of ``quotepush.js``.

    Args:
        url: of the server.
        token: a text, or a function that is called whenever the client asks for one; None of it: the client's
            function fails.
        options: of ``connect()``; ``without`` names what this place does not have, e.g. ``["fetch"]``, and ``hurry``
            is by how much its pauses are shorter.

    Attributes:
        events: name and payload of every event, in order.
        tokens_asked: how often it has asked for a token.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | Callable[[], str | None] | None = None,
        without: Iterable[str] = (),
        **options: Any,
    ) -> None:
        self._url = url
        self._token = token
        self._options = {**options, "without": list(without)}
        if token is not None:
            self._options["token"] = token if isinstance(token, str) else "ask"
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.events: list[tuple[str, Any]] = []
        self.tokens_asked = 0

    async def __aenter__(self) -> "ScriptClient":
        path = node()
        assert path is not None, "needs Node"
        self._process = await asyncio.create_subprocess_exec(
            path, *NODE_FLAGS, str(_DRIVER), stdin=PIPE, stdout=PIPE, limit=1 << 24
        )
        self._reader = asyncio.create_task(self._read())
        await self.call("connect", self._url, self._options)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._reader is not None and self._process.stdin is not None
        self._process.stdin.close()
        status = await asyncio.wait_for(self._process.wait(), 20)
        await self._reader
        if error is None:
            assert status == 0, f"Node ended with {status}"

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        async for line in self._process.stdout:
            event, *payload = json.loads(line)
            if event == "token":
                self.tokens_asked += 1
                assert callable(self._token)
                await self.call("token", self._token())
            else:
                self.events.append((event, payload[0] if payload else None))

    async def call(self, name: str, *parameters: Any) -> None:
        """Call a method of the client."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *parameters]).encode() + b"\n")
        await self._process.stdin.drain()

    async def look(self) -> dict[str, Any]:
        """Return its state, its count of merged rows and its newest rows."""
        before = len(self.of("look"))
        await self.call("look")
        await wait_until(lambda: len(self.of("look")) > before, what="the client answers")
        return dict(self.of("look")[-1])

    async def subscribe(self, *codes: str, **options: Any) -> None:
        """Subscribe, and return when the server has answered."""
        before = len(self.acks("subscribe"))
        await self.call("subscribe", list(codes), options)
        await wait_until(lambda: len(self.acks("subscribe")) > before, what="an ack")

    def of(self, event: str) -> list[Any]:
        """Return the payloads of an event."""
        return [payload for name, payload in self.events if name == event]

    def acks(self, action: str) -> list[Any]:
        return [ack for ack in self.of("ack") if ack.get("action") == action]

    def rows(self, code: str) -> list[dict[str, Any]]:
        """Return the rows of a code that its listeners got."""
        return [row for row in self.of("row") if row["code"] == code]

    def seqs(self, code: str) -> list[int]:
        return [row["seq"] for row in self.rows(code)]

    @property
    def state(self) -> str:
        """The newest state, by its word."""
        states = self.of("state")
        return str(states[-1]["state"]) if states else "connecting"

    async def until(self, predicate: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_s: float = 20.0) -> Any:
        """Wait; the events are shown when it does not come."""
        try:
            return await wait_until(predicate, timeout_s)
        except AssertionError as e:
            seen = "\n".join(str(event)[:200] for event in self.events[-40:])
            raise AssertionError(f"{e}\n{seen}") from None

    async def is_open(self) -> None:
        await self.until(lambda: self.state == "open")
