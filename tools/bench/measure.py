"""One run: a Redis, a server, clients and ticks, and what is measured of them."""

import asyncio
import contextlib
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import BenchError, Child, Server, running_child, running_server
from bench.loads import Load
from bench.machine import allowed_cores, busy_s, cpu_s, memory_kib, on_cores, resident_kib
from quotepush.private_redis import private_redis

__all__ = ["Figures", "Placement", "Subject", "baseline", "median_figures", "quotepush", "run_once"]

_HERE = Path(__file__).resolve().parent
_PHASE_TIMEOUT_S = 60.0
_AT_ONCE = 64  # handshakes under way per loader
_SETTLE_S, _SETTLE_MOST_S, _SETTLED_SHARE = 0.25, 5.0, 0.05
_STORM_AFTER_S = 1.0
_DRAIN_S = 10.0
_WATCH_S = 1.0
_NEARLY_ALL = 0.9
_AGE_BITS = 4


@dataclass(frozen=True)
class Subject:
    """A server to measure.

    Attributes:
        command: ``{redis}`` and ``{lock}`` in it are filled in.
        workers: its processes that serve clients.
    """

    name: str
    command: tuple[str, ...]
    workers: int = 1


def quotepush(workers: int, settings: list[str]) -> Subject:
    """The server of this checkout; settings like ``max_flush_delay_ms=2``."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, _, value in (one.partition("=") for one in settings)]
    command = [
        sys.executable, "-m", "quotepush", "serve", f"--workers={workers}", "--port=0", "--admin-port=0",
        "--redis={redis}", "--lock-file={lock}", "--log-level=warning", *flags,
    ]  # fmt: skip
    return Subject("quotepush", tuple(command), workers)


def baseline(name: str) -> Subject:
    """One of the plain servers of ``baselines``."""
    return Subject(name, (sys.executable, str(_HERE / "baselines.py"), name, "{redis}"))


@dataclass(frozen=True)
class Placement:
    """Who runs where.

    Attributes:
        loaders: processes that hold the clients.
        server_cores: None: wherever the kernel likes; so for the load (clients, publisher, Redis).
    """

    loaders: int
    server_cores: list[int] | None = None
    load_cores: list[int] | None = None

    @classmethod
    def of(cls, workers: int, loaders: int | None, is_pinned: bool) -> "Placement":
        """Choose for so many workers.

        Raises:
            BenchError: there is nothing to choose from.
        """
        cores = allowed_cores()
        if not is_pinned:
            return cls(loaders or min(4, max(1, len(cores) // 2)))
        if len(cores) < 2:
            raise BenchError("--pin needs two cores; leave it out")
        for_server = max(1, min(workers, len(cores) - max(1, len(cores) // 3)))
        server, load = cores[-for_server:], cores[:-for_server]
        return cls(loaders or min(4, max(1, len(load) - 1)), server, load)

    def __str__(self) -> str:
        of = f"{self.loaders} load {'process' if self.loaders == 1 else 'processes'}"
        if self.server_cores is None or self.load_cores is None:
            return f"not pinned, {of}"
        return f"server on core {_list(self.server_cores)}, Redis and {of} on core {_list(self.load_cores)}"


def _list(cores: list[int]) -> str:
    return ",".join(map(str, cores))


Figures = dict[str, Any]
"""What a run found, or the median of several. All of it stands in the answer of ``--json``.

``rows_per_s`` delivered, over the time in which they came; ``in_time`` the part that was there when the last tick was
sent; ``p50_ms`` and so on from publishing to the client's ``recv``; ``cpu_us_row`` and ``cpu_us_tick`` CPU time of all
processes of the server; ``kib_per_conn`` what its memory (PSS) grew by for each client until all had subscribed;
``mib_more`` what it (RSS) grew by afterwards, at most; ``notes`` what makes a figure doubtful.
"""


async def run_once(load: Load, subject: Subject, placement: Placement, tell: Callable[[str], None]) -> Figures:
    """Measure one load on one server, both started for this run alone.

    Raises:
        BenchError: it cannot be measured.
    """
    async with contextlib.AsyncExitStack() as stack:
        tell("starting")
        stack.enter_context(on_cores(placement.load_cores))  # what we do ourselves must not disturb the server
        redis = await stack.enter_async_context(private_redis())
        command = [word.replace("{redis}", redis.url) for word in subject.command]
        server = await stack.enter_async_context(running_server(subject.name, command, placement.server_cores))
        run = _Run(load, server, redis.process.pid, placement, tell)
        try:
            return await run.measure(stack, redis.port)
        except BenchError as e:
            words = server.last_words()
            raise BenchError(f"{e}" + ("" if "ready http" in words else f" ({subject.name}: {words})")) from None


_StormResult = tuple[dict[str, float], list[dict[str, Any]]]


class _Run:
    def __init__(
        self, load: Load, server: Server, redis_pid: int, placement: Placement, tell: Callable[[str], None]
    ) -> None:
        self._load = load
        self._server = server
        self._redis_pid = redis_pid
        self._placement = placement
        self._tell = tell
        self._loaders: list[Child] = []
        self._storm_loader: Child | None = None
        self._listening: list[asyncio.Task[dict[str, Any]]] = []
        self._shares: list[range] = []
        self._most_kib = 0.0
        self._is_over = False
        self._rows_so_far: dict[int, int] = {}

    async def measure(self, stack: contextlib.AsyncExitStack, redis_port: int) -> Figures:
        load, server = self._load, self._server
        await self._start_loaders(stack)
        if load.storm:
            newcomers = range(load.clients, load.clients + load.storm)
            self._storm_loader = await self._start_loader(stack, newcomers, is_storm=True)
        publisher = await self._start_publisher(stack, redis_port)
        await self._settle()
        # After everybody is started: what several processes share counts for each in part.
        idle_kib = memory_kib(server.pid)

        self._tell(f"connecting {load.clients:,} clients")
        connect_s = await self._in_all("connect", "connected")
        subscribe_s = await self._in_all("subscribe", "subscribed")
        await self._settle()
        subscribed_kib = memory_kib(server.pid)
        began_kib = self._most_kib = resident_kib(server.pid)

        for loader in self._loaders:
            loader.tell("count")
        before = self._usage(publisher)
        publisher.tell("go")
        storming = self._start_watching(stack)
        ended = await publisher.expect("ended", load.seconds + _PHASE_TIMEOUT_S)
        during = self._usage(publisher)
        counted = await self._collect(ended)
        storm, storm_counted = await storming
        after = server.cpu()
        self._is_over = True

        rows = sum(one["rows"] for one in counted)
        due = sum(self._due(ended, share) for share in self._shares)
        all_rows = rows + sum(one["rows"] for one in storm_counted)
        took_s = max(one["ended"] for one in counted) - min(one["began"] for one in counted)
        cpu_us = 1e6 * sum(after.get(pid, 0.0) - before["server"].get(pid, 0.0) for pid in after)
        ages: Counter[int] = Counter()
        for one in counted:
            ages.update({int(step): number for step, number in one["ages"].items()})
        figures: Figures = {
            "clients": load.clients,
            "rate": load.rate,
            "seconds": load.seconds,
            "ticks": ended["sent"],
            "rows": rows,
            "rows_due": due,
            "rows_per_s": rows / max(1e-6, took_s),
            "in_time": sum(one["in_time"] for one in counted) / due if due else 1.0,
            "lost": due - rows,
            **{name: _percentile(ages, part) for name, part in _PERCENTILES.items()},
            "cpu_us_row": cpu_us / max(1, all_rows),
            "cpu_us_tick": cpu_us / max(1, ended["sent"]),
            "kib_per_conn": (subscribed_kib - idle_kib) / load.clients,
            "mib_more": (self._most_kib - began_kib) / 1024,
            "connects_per_s": load.clients / connect_s,
            "subscribes_per_s": load.clients / (connect_s + subscribe_s),
            "reads": sum(one["reads"] for one in counted),
            "megabytes": sum(one["bytes"] for one in counted) / 1e6,
            "closed": sum(one["closed"] for one in [*counted, *storm_counted]),
        }
        figures |= _shares_of_cores(before, during, counted, ended)
        if storm:
            figures["storm_s"] = storm["subscribed_s"]
            figures["connects_per_s"] = load.storm / storm["connected_s"]
            figures["subscribes_per_s"] = load.storm / storm["subscribed_s"]
        figures["notes"] = _notes(figures, ended, self._placement)
        return figures

    # The phases

    async def _start_loaders(self, stack: contextlib.AsyncExitStack) -> None:
        load = self._load
        count = min(self._placement.loaders, load.clients)
        edges = [load.clients * i // count for i in range(count + 1)]
        self._shares = [range(a, b) for a, b in itertools.pairwise(edges)]
        for share in self._shares:
            self._loaders.append(await self._start_loader(stack, share, is_storm=False))

    async def _start_loader(self, stack: contextlib.AsyncExitStack, share: range, *, is_storm: bool) -> Child:
        load = self._load
        job = {
            "port": self._server.port, "path": "/ws", "first": share.start, "clients": len(share), "slow": load.slow,
            "codes": [[load.code(code) for code in load.watched(client)] for client in share],
            "at_once": len(share) if is_storm else _AT_ONCE, "subscribes_by_itself": is_storm,
            "timeout_s": _PHASE_TIMEOUT_S,
        }  # fmt: skip
        return await stack.enter_async_context(running_child("loader", job))

    async def _start_publisher(self, stack: contextlib.AsyncExitStack, redis_port: int) -> Child:
        load = self._load
        job = {
            "redis_port": redis_port, "codes": [load.code(i) for i in range(load.codes)], "payload": load.payload(),
            "rate": load.rate, "burst": load.burst, "zipf": load.zipf, "seconds": load.seconds,
        }  # fmt: skip
        return await stack.enter_async_context(running_child("publisher", job))

    async def _in_all(self, word: str, event: str) -> float:
        """Let all loaders do something at the same time; return how long it took them together."""
        for loader in self._loaders:
            loader.tell(word)
        done = await asyncio.gather(*(loader.expect(event, _PHASE_TIMEOUT_S + 5) for loader in self._loaders))
        ended, began = max(one["began"] + one["seconds"] for one in done), min(one["began"] for one in done)
        return float(ended - began)

    async def _settle(self) -> None:
        """Wait until the server has nothing to do any more, as far as that comes about."""
        self._tell("settling")
        waited = 0.0
        used = sum(self._server.cpu().values())
        while waited < _SETTLE_MOST_S:
            await asyncio.sleep(_SETTLE_S)
            waited += _SETTLE_S
            now = sum(self._server.cpu().values())
            if now - used < _SETTLED_SHARE * _SETTLE_S:
                return
            used = now

    def _start_watching(self, stack: contextlib.AsyncExitStack) -> "asyncio.Task[_StormResult]":
        """Do what goes on beside the publishing; return the storm."""
        watching = asyncio.create_task(self._watch_memory())
        storming = asyncio.create_task(self._storm())
        self._listening = [asyncio.create_task(self._listen(i, one)) for i, one in enumerate(self._loaders)]
        stack.push_async_callback(_cancel, [watching, storming, *self._listening])
        return storming

    async def _listen(self, index: int, loader: Child) -> dict[str, Any]:
        def note(said: dict[str, Any]) -> None:
            self._rows_so_far[index] = said["rows"]
            self._tell(f"{sum(self._rows_so_far.values()):,} rows")

        return await loader.expect("counted", self._load.seconds + 2 * _PHASE_TIMEOUT_S, note)

    async def _storm(self) -> _StormResult:
        """Let the newcomers come, if there are any; return how long they took, and what they counted."""
        loader = self._storm_loader
        if loader is None:
            return {}, []
        await asyncio.sleep(_STORM_AFTER_S)
        loader.tell("connect")
        connected = await loader.expect("connected", _PHASE_TIMEOUT_S + 5)
        subscribed = await loader.expect("subscribed", _PHASE_TIMEOUT_S + 5)
        await asyncio.wait(self._listening)
        loader.tell("stop 0 1")
        took = {
            "connected_s": connected["seconds"],
            "subscribed_s": subscribed["began"] + subscribed["seconds"] - connected["began"],
        }
        return took, [await loader.expect("counted", _PHASE_TIMEOUT_S)]

    async def _collect(self, ended: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the loaders counted, once everything has come or nothing more does."""
        patience_s = max(_DRAIN_S, self._load.seconds)
        for loader, share in zip(self._loaders, self._shares, strict=True):
            loader.tell(f"stop {self._due(ended, share)} {patience_s}")
        return list(await asyncio.gather(*self._listening))

    def _due(self, ended: dict[str, Any], share: range) -> int:
        return sum(a * n for a, n in zip(self._load.audience(share), ended["ticks"], strict=True))

    async def _watch_memory(self) -> None:
        while not self._is_over:
            await asyncio.sleep(_WATCH_S)
            self._most_kib = max(self._most_kib, resident_kib(self._server.pid))

    # What everybody used

    def _usage(self, publisher: Child) -> dict[str, Any]:
        load_pids = [publisher.pid, *(loader.pid for loader in self._loaders)]
        if self._storm_loader is not None:
            load_pids.append(self._storm_loader.pid)
        return {
            "time": asyncio.get_running_loop().time(), "server": self._server.cpu(), "redis": cpu_s(self._redis_pid),
            "load": sum(map(cpu_s, load_pids)), "all": busy_s(),
        }  # fmt: skip


def _shares_of_cores(
    before: dict[str, Any], during: dict[str, Any], counted: list[dict[str, Any]], ended: dict[str, Any]
) -> Figures:
    took = max(1e-6, during["time"] - before["time"])
    server = [(cpu - before["server"].get(pid, 0.0)) / took for pid, cpu in during["server"].items()]
    redis = (during["redis"] - before["redis"]) / took
    load = (during["load"] - before["load"]) / took
    return {
        "server_cores": sum(server),
        "server_busiest": max(server, default=0.0),
        "redis_share": redis,
        "loader_share": max(one["cpu_share"] for one in counted),
        "loader_wanted": max(one["wanted_share"] for one in counted),
        "publisher_share": ended["cpu_share"],
        "others_cores": max(0.0, (during["all"] - before["all"]) / took - sum(server) - redis - load),
    }


_PERCENTILES = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}


def _percentile(ages: "Counter[int]", part: float) -> float | None:
    """Return the age in ms that ``part`` of all rows did not pass; None without rows."""
    left = part * sum(ages.values())
    for step in sorted(ages):
        left -= ages[step]
        if left <= 0:
            return ((step << _AGE_BITS) + (1 << _AGE_BITS >> 1)) / 1000
    return None


def _notes(figures: Figures, ended: dict[str, Any], placement: Placement) -> list[str]:
    """Say what makes the figures doubtful."""
    notes = []
    if figures["loader_wanted"] >= _NEARLY_ALL:
        notes.append(
            f"the load generator is the bottleneck (a load process ran or waited for a core "
            f"{figures['loader_wanted']:.0%} of the time): these figures are about it, not about the server"
        )
    if figures["redis_share"] >= _NEARLY_ALL:
        notes.append(f"Redis is the bottleneck ({figures['redis_share']:.0%} of a core)")
    if ended["sent"] < 0.98 * ended["due"]:
        notes.append(f"the publisher fell behind: {ended['sent']:,} of {ended['due']:,} ticks were sent")
    cores = placement.server_cores
    if figures["server_busiest"] >= _NEARLY_ALL or (cores and figures["server_cores"] >= _NEARLY_ALL * len(cores)):
        notes.append(f"the server used {figures['server_cores']:.2f} cores: it can take no more here")
    if figures["closed"]:
        notes.append(f"{figures['closed']:,} connections were closed by the server")
    if figures["others_cores"] >= 0.3:
        notes.append(f"other programs used {figures['others_cores']:.1f} cores meanwhile")
    return notes


def median_figures(runs: list[Figures]) -> Figures:
    """Return the median of every figure, and all notes."""
    found: Figures = {"runs": len(runs)}
    for key, value in runs[0].items():
        if key == "notes":
            found[key] = list(dict.fromkeys(note for run in runs for note in run[key]))
        elif isinstance(value, (int, float)):
            found[key] = statistics.median(run[key] for run in runs if run[key] is not None)
        else:
            found[key] = value
    return found


async def _cancel(tasks: "list[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
