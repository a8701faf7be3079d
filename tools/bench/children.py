"""Processes of a run: started on their cores, spoken to in JSON lines, ended by pid whatever happens."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bench.machine import cpu_s, family, on_cores

__all__ = ["BenchError", "Child", "Server", "ServerEnded", "running_child", "running_server"]

_HERE = Path(__file__).resolve().parent
_READY = re.compile(r"ready (https?)://127\.0\.0\.1:(\d+)\S*(?: admin=(\S+))?")
_READY_TIMEOUT_S = 30.0
_SERVER_END_TIMEOUT_S = 6.0
_CHILD_END_TIMEOUT_S = 1.0
_LINE_BYTES = 1 << 26


class BenchError(Exception):
    """A run cannot be made; printed in one line."""


class ServerEnded(BenchError):
    """A server has ended during a run."""


class Child:
    """A loader, asker or publisher.

    Attributes:
        pid: for /proc.
    """

    def __init__(self, name: str, process: "asyncio.subprocess.Process") -> None:
        self.pid = process.pid
        self._name = name
        self._process = process

    def tell(self, line: str) -> None:
        """Say a word to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def expect(
        self, event: str, timeout_s: float, on_other: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Return the next event of this kind; hand others over.

        Raises:
            BenchError: it failed, ended, or said nothing in time.
        """
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := await self._process.stdout.readline():
                    said: dict[str, Any] = json.loads(line)
                    if said["event"] == event:
                        return said
                    if said["event"] == "failed":
                        raise BenchError(said["why"])
                    if on_other is not None:
                        on_other(said)
        except TimeoutError:
            raise BenchError(f"the {self._name} did not get to {event!r} in {timeout_s:.0f} s") from None
        raise BenchError(f"the {self._name} ended before it got to {event!r}")


@contextlib.asynccontextmanager
async def running_child(name: str, job: dict[str, Any]) -> AsyncIterator[Child]:
    """Run ``loader``, ``asker`` or ``publisher``; it is gone afterwards."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_HERE / f"{name}.py"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, limit=_LINE_BYTES,
    )  # fmt: skip
    try:
        child = Child(name, process)
        child.tell(json.dumps(job))
        await child.expect("ready", _READY_TIMEOUT_S)
        yield child
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the end for those who listen; a publisher at work does not
        await _gone_within(process, _CHILD_END_TIMEOUT_S)


class Server:
    """A server under load.

    Attributes:
        pid: of its first process.
        port: where it accepts.
        is_tls: whether it speaks TLS there.
        admin_url: of its private listener; empty: it has none.
        left: what stands in the files ``*.left`` of its directory, once it has ended.
    """

    def __init__(self, name: str, pid: int, ready: "re.Match[str]", log: Path) -> None:
        self.name = name
        self.pid = pid
        self.is_tls = ready[1] == "https"
        self.port = int(ready[2])
        self.admin_url = ready[3] or ""
        self.left: list[str] = []
        self._log = log

    def cpu(self) -> dict[int, float]:
        """CPU time in seconds by process."""
        return {pid: cpu_s(pid) for pid in family(self.pid)}

    def last_words(self) -> str:
        """The last line it printed."""
        return _last_line(self._log)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it says nothing"


@contextlib.asynccontextmanager
async def running_server(
    name: str, command: list[str], environment: dict[str, str], cores: list[int] | None
) -> AsyncIterator[Server]:
    """Start a server that prints ``ready http://127.0.0.1:PORT``; end it and what it started.

    Args:
        command: ``{directory}`` in it stands for a directory of its own; where ``{directory}/cert.pem`` is spoken of,
            that is a certificate, and ``{directory}/key.pem`` is its key.
        environment: the same, beside ours.

    Raises:
        BenchError: it does not get ready; with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="quotepush-bench-") as directory:
        log = Path(directory) / "server.log"
        words = [word.replace("{directory}", directory) for word in command]
        if any("{directory}/cert.pem" in word for word in command):
            await _make_certificate(Path(directory))
        ours = {key: value for key, value in os.environ.items() if not key.startswith("QUOTEPUSH_")}
        theirs = {key: value.replace("{directory}", directory) for key, value in environment.items()}
        with on_cores(cores), open(log, "wb") as output:
            # A session of its own: Ctrl-C is for us, we end it.
            process = await asyncio.create_subprocess_exec(
                *words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=ours | theirs,
                start_new_session=True,
            )  # fmt: skip
        server: Server | None = None
        try:
            server = Server(name, process.pid, await _ready_line(name, process, log), log)
            yield server
            if process.returncode is not None:
                raise ServerEnded(f"{name} ended with {process.returncode} during the run: {_last_line(log)}")
        finally:
            await _end(process)
            if server is not None:
                server.left = [path.read_text() for path in sorted(Path(directory).glob("*.left"))]


async def _make_certificate(directory: Path) -> None:
    """Write a self-signed certificate of the kind that most public ones are (P-256)."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise BenchError("--tls needs a certificate, and openssl, which makes one, is not on PATH")
    process = await asyncio.create_subprocess_exec(
        openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=127.0.0.1", "-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(_READY_TIMEOUT_S):
        _, said = await process.communicate()
    if process.returncode:
        raise BenchError(f"openssl makes no certificate: {said.decode(errors='replace').strip()[-200:]}")


async def _ready_line(name: str, process: "asyncio.subprocess.Process", log: Path) -> "re.Match[str]":
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while process.returncode is None and time.monotonic() < deadline:
        # Whole lines only: its end may still be on the way.
        if found := _READY.search(log.read_text(errors="replace").rpartition("\n")[0]):
            return found
        await asyncio.sleep(0.02)
    if process.returncode is None:
        raise BenchError(f"{name} was not ready in {_READY_TIMEOUT_S:.0f} s: {_last_line(log)}")
    raise BenchError(f"{name} ended with {process.returncode}: {_last_line(log)}")


async def _end(process: "asyncio.subprocess.Process") -> None:
    """SIGTERM, and SIGKILL for whatever of it is still there later."""
    below = family(process.pid)[1:]
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        await _gone_within(process, _SERVER_END_TIMEOUT_S)
    for pid in below:
        # Workers end with their main; one that hangs does not.
        if b"quotepush" in _command_line(pid):
            _signal(pid, signal.SIGKILL)


async def _gone_within(process: "asyncio.subprocess.Process", timeout_s: float) -> None:
    """Wait for its end, or bring it about."""
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        _signal(process.pid, signal.SIGKILL)
        await process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    # Not Process.kill(): before it signals it reaps, and asyncio then complains of an unknown child (CPython 3.11).
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
