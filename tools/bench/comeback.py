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
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from quotepush import QuoteClient
from quotepush.client import StateChange

_STATIC = Path(__file__).resolve().parents[2] / "quotepush" / "static"
_SCRIPT = """
import { connect } from %(module)s;
const say = (word) => process.stdout.write(JSON.stringify([Date.now(), word]) + "\\n");
for (let n = 0; n < %(clients)d; n++) {
  const quotes = connect(%(url)s);
  quotes.on("state", ({ state, stream }) => say(stream ? "stream" : state));
  quotes.subscribe("AAPL");
}
"""


class Seen:
    """What the clients have done: ``connecting``, ``open``, ``waiting``, each with its time."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []

    def add(self, at_s: float, word: str) -> None:
        self.events.append((at_s, word))

    def count(self, word: str, since_s: float = 0.0) -> int:
        return sum(1 for at_s, said in self.events if said == word and at_s >= since_s)


async def _until(is_so: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.01)


async def _script_clients(url: str, clients: int, seen: Seen) -> asyncio.subprocess.Process:
    values = {"module": json.dumps((_STATIC / "quotepush.js").as_uri()), "clients": clients, "url": json.dumps(url)}
    node = await asyncio.create_subprocess_exec(
        "node", "--no-warnings", "--experimental-websocket", "--experimental-eventsource", "--input-type=module",
        "-e", _SCRIPT % values, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def read() -> None:
        async for line in node.stdout or ():
            at_ms, word = json.loads(line)
            seen.add(at_ms / 1000, word)

    node.reading = asyncio.create_task(read())  # type: ignore[attr-defined]
    return node


async def _python_clients(url: str, clients: int, seen: Seen) -> list[QuoteClient]:
    def noted(change: StateChange) -> None:
        seen.add(time.time(), change.state)

    opened = []
    for _ in range(clients):
        client = QuoteClient(url)
        client.on("state", noted)
        opened.append(await client.__aenter__())
    return opened


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
        server = _serve(redis_port, port, directory)
        try:
            if language == "script":
                node = await _script_clients(f"ws://127.0.0.1:{port}/ws", clients, seen)
            else:
                opened = await _python_clients(f"http://127.0.0.1:{port}", clients, seen)
            await _until(lambda: seen.count("open") + seen.count("stream") >= clients, "all are open")
            await asyncio.sleep(6)  # a heartbeat: their pauses begin anew
            lost_s = time.time()
            server.send_signal(signal.SIGKILL if end == "kill" else signal.SIGTERM)
            await asyncio.to_thread(server.wait)
            server = _serve(redis_port, port, directory)
            await _until(lambda: seen.count("open", lost_s) + seen.count("stream", lost_s) >= clients, "all are back")
            _show(seen, lost_s, clients)
            if language == "script":
                node.kill()
                await node.wait()
            else:
                for client in opened:
                    await client.close()
        finally:
            for process in (server, redis):
                process.terminate()
                process.wait()


def _show(seen: Seen, lost_s: float, clients: int) -> None:
    attempts = Counter(
        int((at_s - lost_s) * 10) for at_s, word in seen.events if word == "connecting" and at_s > lost_s
    )
    back = sorted(at_s - lost_s for at_s, word in seen.events if word in ("open", "stream") and at_s > lost_s)
    for tenth in range(max(attempts) + 1):
        print(f"{tenth / 10:5.1f} s {attempts[tenth]:5d} {'#' * (attempts[tenth] // 4)}")
    print(f"{attempts.total()} attempts of {clients} clients, at most {max(attempts.values())} in a tenth of a second;")
    print(f"back: the first after {back[0]:.2f} s, half {back[len(back) // 2]:.2f} s, the last {back[-1]:.2f} s;")
    print(f"{seen.count('stream', lost_s)} by a stream; load {os.getloadavg()[0]:.1f}")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--end", choices=["kill", "stop"], default="kill")
    parser.add_argument("--client", choices=["python", "script"], default="python")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.clients, arguments.end, arguments.client))


if __name__ == "__main__":
    main()
