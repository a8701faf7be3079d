"""How a thousand clients come back to a server that they have lost together.

    python tools/bench/comeback.py [--clients 1000] [--end kill|stop] [--client python|script]

A real Redis, a real server and real clients in one process of their own language. All are open and subscribed when the
server is killed, or told to stop, and started again; printed are the attempts by tenth of a second and when the last
client was back. docs/performance.md has the figures.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections import Counter
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

from quotepush import QuoteClient
from quotepush.client import StateChange

_STATIC = Path(__file__).resolve().parents[2] / "quotepush" / "static"
_OPEN = ("open", "stream")
_PATIENCE_S = 180.0
_SCRIPT = """
import { connect } from %(module)s;
const say = (client, word) => process.stdout.write(JSON.stringify([Date.now(), client, word]) + "\\n");
for (let n = 0; n < %(clients)d; n++) {
  const quotes = connect(%(url)s);
  quotes.on("state", ({ state, stream }) => say(n, stream ? "stream" : state));
  quotes.subscribe("AAPL");
}
"""


class Seen:
    """What the clients have done, by number: ``connecting``, ``open``, ``stream``, ``waiting``, each with its time.

    Attributes:
        attempts: when one began.
        newest: time and word of what each client did last.
    """

    def __init__(self) -> None:
        self.attempts: list[float] = []
        self.newest: dict[int, tuple[float, str]] = {}

    def add(self, at_s: float, client: int, word: str) -> None:
        if word == "connecting":
            self.attempts.append(at_s)
        self.newest[client] = at_s, word

    def back(self, since_s: float = 0.0) -> list[tuple[float, str]]:
        """Return when and how each client that is open now has opened, if it was after a moment."""
        return sorted((at_s, word) for at_s, word in self.newest.values() if word in _OPEN and at_s >= since_s)


async def _all_open(seen: Seen, clients: int, since_s: float = 0.0, node: "Process | None" = None) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while (count := len(seen.back(since_s))) < clients:
        if node is not None and node.returncode is not None:
            raise SystemExit(f"Node ended with {node.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"after {_PATIENCE_S:g} s only {count} are open; load {os.getloadavg()[0]:.1f}")
        await asyncio.sleep(0.05)


async def _script_clients(url: str, clients: int, seen: Seen) -> Process:
    values = {"module": json.dumps((_STATIC / "quotepush.js").as_uri()), "clients": clients, "url": json.dumps(url)}
    node = await asyncio.create_subprocess_exec(
        "node", "--no-warnings", "--experimental-websocket", "--experimental-eventsource", "--input-type=module",
        "-e", _SCRIPT % values, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def read() -> None:
        async for line in node.stdout or ():
            at_ms, client, word = json.loads(line)
            seen.add(at_ms / 1000, client, word)

    node.reading = asyncio.create_task(read())  # type: ignore[attr-defined]
    return node


async def _python_clients(url: str, clients: int, seen: Seen, stack: AsyncExitStack) -> None:
    def noted(n: int, change: StateChange) -> None:
        seen.add(time.time(), n, change.state)

    for n in range(clients):
        client = QuoteClient(url)
        client.on("state", partial(noted, n))
        await stack.enter_async_context(client)
        await client.subscribe(["AAPL"])


def _serve(redis_port: int, port: int, directory: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            sys.executable, "-m", "quotepush", "serve", f"--redis=redis://127.0.0.1:{redis_port}/0", f"--port={port}",
            "--admin-port=0", "--workers=1", "--node=comeback", f"--lock-file={directory}/lock", "--log-level=warning",
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


async def measure(clients: int, end: str, language: str) -> None:
    """Lose the server once and print how the clients came back."""
    this = asyncio.current_task()
    assert this is not None
    # Or `timeout`, which says it twice, would leave the server behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: this.cancelling() or this.cancel())
    redis_port, port, seen = _free_port(), _free_port(), Seen()
    with tempfile.TemporaryDirectory() as directory:
        redis = subprocess.Popen(  # noqa: ASYNC220
            [
                shutil.which("redis-server") or "redis-server",
                "--port",
                str(redis_port),
                "--save",
                "",
                "--dir",
                directory,
            ],
            stdout=subprocess.DEVNULL,
        )
        await asyncio.sleep(0.5)
        server, node, python = _serve(redis_port, port, directory), None, AsyncExitStack()
        try:
            if language == "script":
                node = await _script_clients(f"ws://127.0.0.1:{port}/ws", clients, seen)
            else:
                await _python_clients(f"http://127.0.0.1:{port}", clients, seen, python)
            await _all_open(seen, clients, node=node)
            await asyncio.sleep(6)  # a heartbeat: their pauses begin anew
            lost_s = time.time()
            server.send_signal(signal.SIGKILL if end == "kill" else signal.SIGTERM)
            await asyncio.to_thread(server.wait)
            server = _serve(redis_port, port, directory)
            await _all_open(seen, clients, lost_s, node)
            _show(seen, lost_s, clients)
        finally:
            # None may go on and load the machine of the next run.
            if node is not None and node.returncode is None:
                node.kill()
                await node.wait()
            await python.aclose()
            for process in (server, redis):
                process.terminate()
                process.wait()


def _show(seen: Seen, lost_s: float, clients: int) -> None:
    attempts = Counter(int((at_s - lost_s) * 10) for at_s in seen.attempts if at_s > lost_s)
    back = seen.back(lost_s)
    first_s, half_s, last_s = (back[n][0] - lost_s for n in (0, len(back) // 2, -1))
    streams = sum(word == "stream" for _, word in back)
    for tenth in range(max(attempts) + 1):
        print(f"{tenth / 10:5.1f} s {attempts[tenth]:5d} {'#' * (attempts[tenth] // 4)}")
    print(f"{attempts.total()} attempts of {clients} clients, at most {max(attempts.values())} in a tenth of a second;")
    print(f"back: the first after {first_s:.2f} s, half {half_s:.2f} s, the last {last_s:.2f} s;")
    print(f"{streams} by a stream; load {os.getloadavg()[0]:.1f}")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--end", choices=["kill", "stop"], default="kill")
    parser.add_argument("--client", choices=["python", "script"], default="python")
    arguments = parser.parse_args()
    with suppress(asyncio.CancelledError):
        return asyncio.run(measure(arguments.clients, arguments.end, arguments.client))
    raise SystemExit("ended before all were back")


if __name__ == "__main__":
    main()
