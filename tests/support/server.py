"""A real quotepush server of one test's own: main and its workers, on a port of its own, with its own lock."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.ports import own_port
from tests.support.waiting import wait_until

__all__ = ["QuotepushServer"]

_READY = re.compile(r"quotepush ready http://127\.0\.0\.1:(\d+)\S* admin=http://127\.0\.0\.1:(\d+)")


class QuotepushServer:
    """``quotepush serve``; the same public port after a restart.

    Args:
        directory: for its lock and its log.
        redis_url: feed and registry.
        open_files: its limits, soft and hard; else those of the tests.
        environment: more variables.
        settings: any setting by name, e.g. ``workers=1``; lists and tables as on the command line.
    """

    def __init__(
        self,
        directory: Path,
        redis_url: str,
        *,
        open_files: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        self.open_files = open_files
        self._environment = environment or {}
        self.settings: dict[str, Any] = {
            "feed_redis": redis_url, "port": own_port(), "admin_port": 0, "workers": 2, "node": "test",
            "lock_file": str(directory / "lock"), "log_level": "debug",
            # A Redis that only stands still on a busy machine costs no link, and with it the plain ticks on their way.
            "probe_timeout_s": 20, **settings,
        }  # fmt: skip
        self.port = 0
        self.admin_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        return self.directory / "server.log"

    def log(self) -> str:
        """Everything it has printed since its last start."""
        return self.log_path.read_text()[self._log_from :] if self.log_path.exists() else ""

    def command(self) -> list[str]:
        flags = {"feed_redis": "redis"}
        arguments = [f"--{flags.get(k, k).replace('_', '-')}={v}" for k, v in self.settings.items()]
        command = [sys.executable, "-m", "quotepush", "serve", *arguments]
        if self.open_files is None:
            return command
        soft, hard = self.open_files
        return ["sh", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "sh", *command]

    def spawn(self) -> None:
        """Start it; do not wait until it is ready."""
        assert not self.is_running, "it runs already"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._log_from = len(self.log_path.read_text()) if self.log_path.exists() else 0
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")}
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=environment | dict(self._environment)
            )

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start it and return when every worker accepts connections."""
        self.spawn()
        try:
            await wait_until(self._is_ready, timeout_s, "quotepush ready")
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.log()}") from None

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"it ended with {self._process.returncode}")
        match = _READY.search(self.log())
        if match is None:
            return False
        self.port, self.admin_port = int(match[1]), int(match[2])
        self.settings["port"] = self.port
        return True

    async def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; return the exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return await self.wait(timeout_s)

    async def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; return the exit status."""
        process = self._process
        assert process is not None
        try:
            await wait_until(lambda: process.poll() is not None, timeout_s, "the end of the server")
        except AssertionError as e:
            self.kill_everything()
            raise AssertionError(f"{e}\n{self.log()}") from None
        self._process = None
        return process.returncode

    async def kill(self) -> None:
        """SIGKILL to main; its workers go by themselves."""
        workers = self.worker_pids()
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait, 10)
        self._process = None
        await wait_until(lambda: not any(_is_alive(pid) for pid in workers), 10, "the workers of a dead main end")

    def kill_everything(self) -> None:
        """For the end of a test that went wrong."""
        if self._process is None:
            return
        for pid in [*self.worker_pids(), self._process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait(10)
        self._process = None

    def worker_pids(self) -> list[int]:
        """The pids of its live workers, in no order."""
        if self._process is None:
            return []
        try:
            text = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [int(pid) for pid in text.split() if _is_alive(int(pid))]

    async def admin(self, path: str) -> tuple[int, Any]:
        """GET from the private listener; JSON where it is JSON, else text."""
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(self.admin_url + path) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all its label sets that carry ``labels``."""
        _, text = await self.admin("/metrics")
        total = 0.0
        for line in text.splitlines():
            match = re.match(rf"quotepush_{name}(?:_total)?(\{{[^}}]*\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    async def merged_by_main(self) -> int:
        """How many rows main has merged since it started: one that is late does, as it should."""
        return int(await self.metric("rows_merged_main"))


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
