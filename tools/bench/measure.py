"""One run: a Redis, a server, clients and ticks, and what is measured of them."""

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import BenchError, Child, Server, running_child, running_server
from bench.figures import PERCENTILES, Figures, feed_figures, notes_on, percentile, shares_of_cores, waits
from bench.loads import Load
from bench.machine import allowed_cores, busy_s, cpu_s, memory_kib, on_cores, resident_kib, wanted_s
from bench.own_figures import ask_server
from bench.pauses import noting_pauses, summary
from quotepush.private_redis import private_redis

__all__ = ["Placement", "Subject", "baseline", "quotepush", "run_once", "with_default_collector"]

_HERE = Path(__file__).resolve().parent
_PHASE_TIMEOUT_S = 60.0
_AT_ONCE = 64  # handshakes under way per loader
_SETTLE_S, _SETTLE_MOST_S, _SETTLED_SHARE = 0.25, 5.0, 0.05
_STORM_AFTER_S = 1.0
_DRAIN_S = 10.0
_WATCH_S = 1.0
_WATCH_FEED_S = 0.1
_ASKERS, _ASKERS_AT_ONCE = 48, (1, 4)
_ASK_AFTER_S = 0.5


@dataclass(frozen=True)
class Subject:
    """A server to measure.

    Attributes:
        command: ``{redis}`` and ``{directory}`` in it are filled in.
        workers: its processes that serve clients.
        environment: what it gets beside ours.
    """

    name: str
    command: tuple[str, ...]
    workers: int = 1
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """What it is called in the table."""
        return f"{self.name} x{self.workers}" if "quotepush" in self.command else self.name


def quotepush(workers: int, settings: list[str], *, is_tls: bool = False, is_noting_pauses: bool = False) -> Subject:
    """The server of this checkout; settings like ``max_flush_delay_ms=2``."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, _, value in (one.partition("=") for one in settings)]
    if is_tls:
        flags += ["--tls-cert={directory}/cert.pem", "--tls-key={directory}/key.pem"]
    command = [
        sys.executable, "-m", "quotepush", "serve", f"--workers={workers}", "--port=0", "--admin-port=0",
        "--redis={redis}", "--lock-file={directory}/lock", "--log-level=warning", *flags,
    ]  # fmt: skip
    environment = noting_pauses(os.environ.get("PYTHONPATH"), has_defaults=False) if is_noting_pauses else {}
    return Subject("quotepush", tuple(command), workers, tuple(environment.items()))


def with_default_collector(subject: Subject) -> Subject:
    """The same server, held to the thresholds that Python's garbage collector has by itself."""
    environment = noting_pauses(os.environ.get("PYTHONPATH"), has_defaults=True)
    return Subject("default gc", subject.command, subject.workers, tuple(environment.items()))


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
        running = running_server(subject.name, command, dict(subject.environment), placement.server_cores)
        server = await stack.enter_async_context(running)
        run = _Run(load, server, redis.process.pid, placement, tell)
        try:
            figures = await run.measure(stack, redis.port)
        except BenchError as e:
            words = server.last_words()
            raise BenchError(f"{e}" + ("" if "ready http" in words else f" ({subject.name}: {words})")) from None
    if subject.environment:  # its pauses are written down when it ends
        figures["gc"] = summary(server.left, run.phases)
        if len(server.left) <= subject.workers:
            figures["notes"].append("not every process of the server could write down its pauses")
    return figures


_FEED_FIGURES = (
    "ticks_accepted_total", "ticks_refused_total", "feed_links_total", "feed_lag_seconds", "rows_merged_main_total",
)  # fmt: skip
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
        self.phases: dict[str, tuple[float, float]] = {}
        self._loaders: list[Child] = []
        self._asker: Child | None = None
        self._feed_samples: list[dict[str, float]] = []
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
        if load.asking:
            self._asker = await self._start_asker(stack)
        publisher = await self._start_publisher(stack, redis_port)
        await self._settle()
        # After everybody is started: what several processes share counts for each in part.
        idle_kib = memory_kib(server.pid)

        self._tell(f"connecting {load.clients:,} clients")
        began_connecting = time.time()
        connect_s = await self._in_all("connect", "connected")
        subscribe_s = await self._in_all("subscribe", "subscribed")
        self.phases["connecting"] = began_connecting, time.time()
        await self._settle()
        subscribed_kib = memory_kib(server.pid)
        began_kib = self._most_kib = resident_kib(server.pid)

        if self._asker is not None:
            self._asker.tell("connect")
            await self._asker.expect("connected", _PHASE_TIMEOUT_S)

        for loader in self._loaders:
            loader.tell("count")
        if load.watches_main and server.admin_url:
            await self._sample_feed()
        before = self._usage(publisher)
        began = time.time()
        publisher.tell("go")
        watching = self._start_watching(stack)
        ended = await publisher.expect("ended", load.seconds + _PHASE_TIMEOUT_S)
        during = self._usage(publisher)
        self.phases["ticks"] = began, time.time()
        counted = await self._collect(ended)
        storm, storm_counted = await watching.storm
        asked, asker_rows = await watching.asking
        after = server.cpu()
        self._is_over = True
        taken = await publisher.expect("taken", _PHASE_TIMEOUT_S)

        rows = sum(one["rows"] for one in counted)
        due = sum(self._due(ended, share) for share in self._shares)
        all_rows = rows + sum(one["rows"] for one in storm_counted) + asker_rows
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
            **{name: percentile(ages, part) for name, part in PERCENTILES.items()},
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
        figures |= shares_of_cores(before, during, counted, ended)
        if storm:
            figures["storm_s"] = storm["subscribed_s"]
            figures["connects_per_s"] = load.storm / storm["connected_s"]
            figures["subscribes_per_s"] = load.storm / storm["subscribed_s"]
        if asked:
            figures["subscribes"] = {f"{one['at_once']} at a time": waits(one) for one in asked}
        if self._feed_samples:
            await watching.feed
            figures["feed"] = feed_figures(self._feed_samples, ended["sent"], ended["due"])
        figures["notes"] = notes_on(figures, ended, taken, self._placement.server_cores)
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
            "port": self._server.port, "path": "/ws", "is_tls": self._server.is_tls, "first": share.start,
            "clients": len(share), "slow": load.slow,
            "codes": [[load.code(code) for code in load.watched(client)] for client in share],
            "at_once": len(share) if is_storm else _AT_ONCE, "subscribes_by_itself": is_storm,
            "timeout_s": _PHASE_TIMEOUT_S,
        }  # fmt: skip
        return await stack.enter_async_context(running_child("loader", job))

    async def _start_asker(self, stack: contextlib.AsyncExitStack) -> Child:
        load = self._load
        job = {
            "port": self._server.port, "path": "/ws", "is_tls": self._server.is_tls, "clients": _ASKERS,
            "codes": [load.code(i) for i in range(load.codes)], "asking": load.asking, "at_once": _ASKERS_AT_ONCE,
            "seconds": max(0.2, load.seconds - 2 * _ASK_AFTER_S),
        }  # fmt: skip
        return await stack.enter_async_context(running_child("asker", job))

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

    def _start_watching(self, stack: contextlib.AsyncExitStack) -> "_Watching":
        """Do what goes on beside the publishing."""
        memory = asyncio.create_task(self._watch_memory())
        watching = _Watching(
            asyncio.create_task(self._storm()), asyncio.create_task(self._ask()),
            asyncio.create_task(self._watch_feed()),
        )  # fmt: skip
        self._listening = [asyncio.create_task(self._listen(i, one)) for i, one in enumerate(self._loaders)]
        stack.push_async_callback(_cancel, [memory, watching.storm, watching.asking, watching.feed, *self._listening])
        return watching

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

    async def _ask(self) -> tuple[list[dict[str, Any]], int]:
        """Let the askers ask, if there are any; return their times, and the rows that they have read."""
        asker = self._asker
        if asker is None:
            return [], 0
        await asyncio.sleep(_ASK_AFTER_S)
        asker.tell("go")
        asked: list[dict[str, Any]] = []
        done = await asker.expect("done", self._load.seconds + _PHASE_TIMEOUT_S, asked.append)
        return asked, done["rows"]

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

    async def _watch_feed(self) -> None:
        """Ask main again and again how it keeps up, and until nothing more comes."""
        while self._feed_samples:
            await asyncio.sleep(_WATCH_FEED_S)
            await self._sample_feed()
            last, newest = self._feed_samples[-2:]
            if self._is_over and newest["ticks_accepted_total"] == last["ticks_accepted_total"]:
                return

    async def _sample_feed(self) -> None:
        try:
            said = await ask_server(self._server.admin_url)
        except (OSError, EOFError) as e:
            raise BenchError(f"the server does not say how it keeps up: {str(e) or 'no answer in time'}") from None
        sample = {name: said.get(name, 0.0) for name in _FEED_FIGURES}
        self._feed_samples.append(sample | {"time": asyncio.get_running_loop().time()})

    # What everybody used

    def _usage(self, publisher: Child) -> dict[str, Any]:
        load_pids = [publisher.pid, *(loader.pid for loader in self._loaders)]
        load_pids += [child.pid for child in (self._storm_loader, self._asker) if child is not None]
        return {
            "time": asyncio.get_running_loop().time(), "server": self._server.cpu(), "redis": cpu_s(self._redis_pid),
            "load": sum(map(cpu_s, load_pids)), "all": busy_s(), "redis_wanted": wanted_s(self._redis_pid),
            "publisher_wanted": wanted_s(publisher.pid),
            "asker_wanted": wanted_s(self._asker.pid) if self._asker is not None else 0.0,
        }  # fmt: skip


@dataclass(frozen=True)
class _Watching:
    """What goes on beside the publishing."""

    storm: "asyncio.Task[_StormResult]"
    asking: "asyncio.Task[tuple[list[dict[str, Any]], int]]"
    feed: "asyncio.Task[None]"


async def _cancel(tasks: "list[asyncio.Task[Any]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
