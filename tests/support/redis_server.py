"""A real Redis of one test's own, which can be killed, paused and started again."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import redis as blocking_redis
from redis.asyncio import Redis

from tests.support.ports import own_port

__all__ = ["RedisServer"]


class RedisServer:
    """``redis-server`` on a port of its own of 127.0.0.1; the same port after a restart.

    Args:
        directory: for its log and, with ``aof``, what it keeps.
        aof: keep everything over a kill and a restart; without it a restarted server is empty.
        options: more command line options, e.g. ``"--cluster-enabled", "yes"``.
        config: what stands first on the command line: a configuration file, and with it ``"--sentinel"``.
        program: path of the server to run; empty: ``redis-server`` or ``valkey-server`` from PATH.
    """

    def __init__(
        self,
        directory: Path,
        *,
        aof: bool = False,
        options: tuple[str, ...] = (),
        config: tuple[str, ...] = (),
        program: str = "",
    ) -> None:
        self.directory = directory
        self.aof = aof
        self.options = options
        self.config = config
        self.program = program
        self.port = own_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def client(self, **options: Any) -> Redis:
        """A new asyncio client that answers with ``str``; the caller closes it."""
        return Redis.from_url(self.url, **{"decode_responses": True, "socket_timeout": None, **options})

    def start(self, timeout_s: float = 20.0) -> None:
        """Start it and return when it answers."""
        assert self._process is None, "it runs already"
        program = self.program or shutil.which("redis-server") or shutil.which("valkey-server")
        assert program is not None, "redis-server is not on PATH"
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments = [*self.config, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        if "--sentinel" not in self.config:  # which knows nothing of these
            arguments += ["--save", "", "--appendonly", "yes" if self.aof else "no", "--appendfsync", "always"]
        arguments += ["--logfile", str(self.directory / "redis.log"), *self.options]
        self._process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"{program} does not answer; see {self.directory / 'redis.log'}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, as a crash. What it has to keep is in its file already; a SIGTERM takes it a tenth of a second."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self._process = None

    def stop(self) -> None:
        """End it whatever its state is; harmless when it does not run."""
        if self._process is not None:
            self.kill()

    @property
    def file_bytes(self) -> int:
        """The length of its append-only file, for :meth:`go_back`."""
        return self._file.stat().st_size

    def go_back(self, file_bytes: int) -> None:
        """Kill it, as a power cut that costs the end of its append-only file, and start it again."""
        self.kill()
        os.truncate(self._file, file_bytes)
        self.start()

    @property
    def _file(self) -> Path:
        return max(self.directory.rglob("*.aof"), key=lambda path: path.stat().st_size)

    def restart(self) -> None:
        """Kill it if it runs, and start it again on the same port."""
        if self._process is not None:
            self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        with blocking_redis.Redis(port=self.port, socket_timeout=1, socket_connect_timeout=1) as client:
            try:
                return bool(client.ping())
            except blocking_redis.AuthenticationError:
                return True
            except blocking_redis.RedisError:
                return False
