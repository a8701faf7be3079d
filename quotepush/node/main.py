"""Main: one machine's lock, ticks, board and workers.

Start: 1 lock, 2 listening sockets, 3 Redis answers, 4 what an earlier life left in the registry is
cleared, 5 keys of tokens, 6 private listener, 7 feed listener, 8 workers, 9 ready.
Stop: 1 not ready, 2 workers close their sessions and clear the registry, 3 what they left is
cleared, 4 the lock is released.
"""

import asyncio
import contextlib
import logging
import math
import resource
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web
from redis.exceptions import RedisError
from setproctitle import setproctitle

from quotepush import __version__
from quotepush.backend import Backend
from quotepush.cluster.nodes import purge_node
from quotepush.cluster.presence import redis_us
from quotepush.errors import OperatorError, PortUnavailable, RedisUnavailable, SettingsError, reason_of
from quotepush.ingest.keys import FeedKeys
from quotepush.ingest.listener import FeedListener
from quotepush.ingest.log import LogFollower
from quotepush.ingest.rows import RowStore
from quotepush.metrics import Sample
from quotepush.node import lock
from quotepush.node.admin import make_admin_app
from quotepush.node.api import BODY_BYTES, add_api
from quotepush.node.collector import quiet_collector
from quotepush.node.delaying import Delaying
from quotepush.node.directory import Directory
from quotepush.node.keyring import Keyring
from quotepush.node.logs import set_up_logging
from quotepush.node.notify import notify, watchdog_interval_s
from quotepush.node.relay import Relay
from quotepush.node.sockets import inherited_sockets, open_sockets
from quotepush.node.supervisor import Supervisor
from quotepush.node.switchboard import Switchboard
from quotepush.quote.board import Board, TradingDays
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.delay import DelayLine
from quotepush.quote.ring import Ring
from quotepush.settings import Settings
from quotepush.store.address import without_password
from quotepush.store.clients import Store

__all__ = ["serve"]

log = logging.getLogger("quotepush.main")

# Descriptors that are not clients: Redis, bus, files, listening sockets, the private listener.
_FILE_RESERVE = 256
# A link whose probe takes so long is behind: rows are merged before they are encoded.
_LAGGING_S = 0.25
_EXPIRE_EVERY_S = 10.0
_SWEEP_LEAST_S, _SWEEP_MOST_S = 0.05, 1.0
# So a sweep takes at most a twentieth of main, however many codes are watched.
_SWEEP_REST_S = 0.01
_PORT_PATIENCE_S = 3.0
_RETRY_AFTER_MS = 1000
_REPORT_EVERY_S = 60.0


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Run the server in the foreground until SIGTERM or SIGINT.

    Args:
        announce: gets the one line that says that every worker accepts connections.

    Raises:
        OperatorError: it cannot start, or cannot go on; ``exit_code`` is the process's.
    """
    set_up_logging(settings.log_level, "main")
    setproctitle(f"quotepush[{settings.node}]: main")
    with lock.hold(settings.lock_file) as held, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Main(settings, held, announce).run())


class _Main:
    def __init__(self, settings: Settings, held: lock.Lock, announce: Callable[[str], None]) -> None:
        self._settings = settings
        self._lock = held
        self._announce = announce
        self._epoch = secrets.token_hex(8)
        self._stop = asyncio.Event()
        self._fault: OperatorError | None = None
        self._is_ready = False
        self._ring = Ring(
            max_bytes=settings.ring_bytes,
            max_code_bytes=settings.ring_code_bytes,
            max_age_ms=round(settings.ring_age_s * 1000),
            life=self._epoch[:8],
        )
        is_known = _symbol_check(settings.symbol_file)
        self._delays = _delay_line(settings, self._epoch)
        self._relay = Relay(
            is_known,
            self._ring,
            settings.ring_age_s,
            stale_ms=math.ceil(settings.code_stale_s * 1000),
            delays=self._delays,
        )
        self._board = self._relay.board = Board(
            epoch=self._epoch,
            days=TradingDays(settings.trading_day_zones),
            max_codes=settings.max_board_codes,
            max_row_bytes=settings.max_row_bytes,
            max_tick_bytes=settings.max_tick_bytes,
            drop_older=settings.drop_older,
            watched=self._relay.wanted,
            books_watched=self._relay.books,
        )
        self._directories = {0: Directory(self._board.quotes, is_known)}
        if self._delays is not None:
            self._delays.books_watched = self._relay.books
            for delay_s in settings.delays:
                self._directories[delay_s] = Directory(self._delays.quotes(delay_s), is_known)
        self._keyring = Keyring(settings, on_change=self._tell_keys)
        self._listener: FeedListener
        self._follower: LogFollower
        self._rows: RowStore
        self._delaying: Delaying | None = None
        self._supervisor: Supervisor
        self._has_workers = False
        self._is_clear = False  # the registry surely holds nothing of this node
        self._switchboard: Switchboard
        self._addresses = ""

    async def run(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        max_connections = _raise_file_limit(settings.max_connections)
        sockets = inherited_sockets() or await _open_public(settings)
        feed = _store(settings, settings.feed_redis)
        store = _store(settings, settings.registry_url)
        log_redis = feed.client("log")
        registry = store.client("main")
        keys = FeedKeys(settings.redis_prefix, feed.is_cluster)
        self._switchboard = Switchboard(
            settings, registry, store.links("commands"),
            on_up=self._tell_readiness, on_lost=self._give_up, on_removed=self._doubt_registry,
        )  # fmt: skip
        keeping_name: asyncio.Task[None] | None = None
        try:
            await _check_redis(log_redis, "feed_redis", settings.feed_redis, settings)
            await _check_redis(registry, "registry_redis", settings.registry_url, settings)
            try:
                if not await self._joins():
                    return
                keeping_name = asyncio.create_task(self._switchboard.keep_name(), name="presence")
                began_us = await redis_us(registry) - time.monotonic_ns() // 1000
                removed = await purge_node(registry, settings.redis_prefix, settings.node, told=self._switchboard.told)
            except (RedisError, OSError, TimeoutError) as e:
                reason = reason_of(e, settings.redis_timeout_s)
                raise RedisUnavailable("registry_redis", without_password(settings.registry_url), reason) from None
            self._is_clear = True
            if removed:
                log.info("registry: %d connections of an earlier life removed", removed)
            self._follower = LogFollower(
                log_redis,
                keys,
                self._board,
                self._ring,
                on_filled=self._relay.keep,
                publish=self._relay.offer,
                on_batch=self._relay.flush,
                timeout_s=settings.redis_timeout_s,
            )
            self._listener = FeedListener(
                feed.links("feed", may_be_replica=True),
                settings.feed_channels,
                merge=self._board.apply,
                publish=self._relay.offer,
                on_batch=self._end_batch,
                on_link=self._note_link,
                log_channel=keys.channel,
                own_prefix=settings.redis_prefix,
                take_batch=self._follower.take,
                probe_interval_s=settings.probe_interval_s,
                probe_timeout_s=settings.probe_timeout_s,
                timeout_s=settings.redis_timeout_s,
            )
            await self._follower.begin()
            self._rows = RowStore(
                registry,
                FeedKeys(settings.redis_prefix, store.is_cluster),
                self._board,
                interval_s=settings.rows_interval_s,
                max_age_s=settings.last_max_age_s,
                timeout_s=settings.redis_timeout_s,
            )
            await self._rows.load()
            if self._delays is not None:
                self._delaying = Delaying(
                    self._delays, self._board, self._follower, publish=self._relay.offer, on_batch=self._relay.flush
                )
                await self._delaying.begin()
            await self._keyring.begin()
            self._supervisor = Supervisor(
                settings, sockets, self._relay, self._directories, registry, max_connections, self._feed_news,
                self._tell_readiness, self._keyring, self._switchboard,
                lambda: began_us + time.monotonic_ns() // 1000,
            )  # fmt: skip
            async with self._admin_site() as admin_address:
                # Only now: a start that fails says so in one line.
                open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                log.info("open-file limit %d, max_connections %d", open_files, max_connections)
                self._lock.write(admin_address)
                self._addresses = f"{_public_url(settings, sockets[0])} admin=http://{admin_address}"
                self._has_workers, self._is_clear = True, False
                await self._serve_until_stopped(keeping_name)
            if settings.rows_interval_s:
                await self._rows.flush()
            if self._fault is not None:
                raise self._fault  # the registry's entries under this name are another main's now
            try:
                async with asyncio.timeout(settings.redis_timeout_s):
                    await purge_node(registry, settings.redis_prefix, settings.node, told=self._switchboard.told)
                self._is_clear = True
            except (RedisError, OSError, TimeoutError) as e:
                log.warning("registry: not cleared; the next start does it: %s", str(e) or type(e).__name__)
        finally:
            for s in sockets:
                s.close()
            if keeping_name is not None:
                keeping_name.cancel()
                await asyncio.wait([keeping_name])
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                # Where entries may be left the record stays: it leads others to them.
                if keeping_name is not None and self._is_clear:
                    async with asyncio.timeout(settings.redis_timeout_s):
                        await self._switchboard.leave()
                await registry.aclose()
                await log_redis.aclose()

    async def _joins(self) -> bool:
        """Take this node's name, which may take as long as its lease; False: we were stopped before."""
        joined = asyncio.ensure_future(self._switchboard.join())
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([joined, stopped], return_when=asyncio.FIRST_COMPLETED)
            if joined.done():
                joined.result()
            return joined.done()
        finally:
            joined.cancel()
            stopped.cancel()

    async def _serve_until_stopped(self, keeping_name: "asyncio.Task[None]") -> None:
        quiet_collector()
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._listener.run(), name="feed"),
                    group.create_task(self._follower.run(), name="log"),
                    group.create_task(self._rows.run(), name="rows"),
                    group.create_task(self._expire_rows(), name="expire"),
                    group.create_task(self._sweep_codes(), name="sweep"),
                    *(group.create_task(d.run(), name="directory") for d in self._directories.values()),
                    group.create_task(self._keyring.run(), name="keys"),
                    group.create_task(_end_of(keeping_name), name="presence"),
                    group.create_task(self._switchboard.run(), name="switchboard"),
                    group.create_task(self._report_faults(), name="faults"),
                    group.create_task(self._feed_watchdog(), name="watchdog"),
                ]
                if self._delaying is not None:
                    helpers.append(group.create_task(self._delaying.run(), name="delays"))
                workers = group.create_task(self._supervisor.run(), name="workers")
                stopped = group.create_task(self._stop.wait(), name="stop")
                await asyncio.wait([workers, stopped], return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    log.info("stopping: %d connections are closed", self._supervisor.connections)
                    notify(STOPPING="1", STATUS="stopping")
                    self._switchboard.stop_firing()
                    await self._supervisor.stop(self._settings.drain_timeout_s, _RETRY_AFTER_MS)
                    await workers
                for task in (*helpers, stopped):
                    task.cancel()
        except* OperatorError as found:
            fault: BaseException = found
            while isinstance(fault, BaseExceptionGroup):
                fault = fault.exceptions[0]
            raise fault from None

    # Ticks

    def _end_batch(self) -> None:  # hot
        self._relay.flush()
        self._relay.is_lagging = self._listener.lag_s > _LAGGING_S
        self._supervisor.hurry_news()

    def _note_link(self, is_up: bool) -> None:
        if is_up:
            self._follower.lose_step()
            self._tell_readiness()
        else:
            self._follower.note_cut()
        self._supervisor.hurry_news()

    def _feed_news(self) -> tuple[str, int, str]:
        epoch = self._follower.epoch or self._epoch
        if not self._listener.is_up:
            return "down", self._board.newest_ms, epoch
        age_s = time.time() - self._board.newest_ms / 1000
        return "ok" if age_s < self._settings.feed_stale_s else "stale", self._board.newest_ms, epoch

    async def _expire_rows(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            self._relay.tidy()
            oldest = time.time_ns() // 1_000_000 - self._settings.last_max_age_s * 1000
            self._board.expire(oldest, keep=self._relay.wanted)
            if self._delays is not None:
                self._delays.expire(self._board.quotes, keep=self._relay.wanted)

    async def _sweep_codes(self) -> None:
        """Find the codes that have become stale or fresh, and let those who watch them know."""
        every_s = min(_SWEEP_MOST_S, max(_SWEEP_LEAST_S, self._settings.code_stale_s / 4))
        while True:
            await asyncio.sleep(every_s)
            for _ in self._relay.sweep():
                await asyncio.sleep(_SWEEP_REST_S)

    async def _report_faults(self) -> None:
        """One line a minute about ticks that were refused, with the newest example."""
        told = 0
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            refused = self._board.refused.total()
            if refused != told:
                log.warning("%d ticks refused in a minute; the newest: %s", refused - told, self._board.last_fault)
                told = refused

    # How we are

    def _give_up(self, fault: OperatorError) -> None:
        """We must not go on: end as if told to stop, and say why."""
        self._fault = fault
        self._stop.set()

    def _doubt_registry(self) -> None:
        if self._has_workers:
            self._supervisor.doubt_registry()

    def _tell_keys(self, sources: list[tuple[str, bool]]) -> None:
        self._supervisor.tell_keys(sources)

    def _tell_readiness(self) -> None:
        ready, count = self._supervisor.ready, len(self._supervisor.slots)
        notify(STATUS=f"{ready} of {count} workers ready")
        # Whoever publishes or commands once we are ready is heard, so these links must have been made, too.
        is_heard = self._listener.links and self._switchboard.is_settled
        if ready == count and is_heard and not self._is_ready:
            self._is_ready = True
            self._announce(f"quotepush ready {self._addresses} node={self._settings.node} workers={count}")
            notify(READY="1")

    async def _feed_watchdog(self) -> None:
        interval_s = watchdog_interval_s()
        while interval_s:
            notify(WATCHDOG="1")
            await asyncio.sleep(interval_s)

    def _readiness(self) -> tuple[list[str], Mapping[str, Any]]:
        supervisor, listener = self._supervisor, self._listener
        state, last_tick_ms, _ = self._feed_news()
        reasons = []
        if supervisor.ready < len(supervisor.slots):
            reasons.append(f"{supervisor.ready} of {len(supervisor.slots)} workers are ready")
        if not listener.is_up:
            reasons.append("the feed link is down")
        elif self._follower.state == "unreadable" and not self._follower.is_forbidden:
            reasons.append("the publishers' log cannot be read")
        if self._keyring.lacks_keys:
            reasons.append("the keys of tokens cannot be fetched")
        if self._stop.is_set():
            reasons.append("stopping")
        facts: dict[str, Any] = {
            "feed": state,
            "feed_lag_ms": round(listener.lag_s * 1000),
            "log": self._follower.state,
            "lease": "held" if self._switchboard.is_held else "not held",
            "workers": supervisor.ready,
            "connections": supervisor.connections,
            "max_connections": supervisor.places.most,
            "codes": len(self._board.quotes),
            "registry_lag_ms": round(1000 * max([s.figures.get("registry_lag_seconds", 0) for s in supervisor.slots])),
        }
        if last_tick_ms:
            facts["feed_age_ms"] = max(0, time.time_ns() // 1_000_000 - last_tick_ms)
        return reasons, facts

    def _samples(self) -> Mapping[str, Iterable[Sample]]:
        board, listener, supervisor = self._board, self._listener, self._supervisor
        nothing: dict[str, str] = {}
        samples: dict[str, list[Sample]] = {
            "ticks_accepted": [(board.accepted, nothing)],
            "ticks_refused": [(count, {"reason": reason}) for reason, count in board.refused.items()],
            "ticks_ignored": [(listener.ignored, nothing)],
            "tick_copies": [(board.copies, nothing)],
            "log_catch_ups": [(self._follower.caught_up, nothing)],
            "log_gap_rows": [(self._follower.gaps, nothing)],
            "tick_bugs": [(listener.bugs + self._follower.bugs, nothing)],
            "board_codes": [(len(board.quotes), nothing)],
            "feed_up": [(listener.is_up, nothing)],
            "feed_links": [(listener.links, nothing)],
            "feed_lag_seconds": [(listener.lag_s, nothing)],
            "rows_merged_main": [(self._relay.merged + sum(s.rows_merged for s in supervisor.slots), nothing)],
            "codes_watched": [(self._relay.watched, nothing)],
            "codes_stale": [(self._relay.stale, nothing)],
            "workers_ready": [(supervisor.ready, nothing)],
            **{name: [(value, nothing)] for name, value in self._switchboard.figures.items()},
            "client_addresses": [(supervisor.places.addresses, nothing)],
            "worker_restarts": [(s.restarts, {"worker": str(s.index)}) for s in supervisor.slots],
        }
        if self._delays is not None:
            samples["delay_bytes"] = [(self._delays.bytes, nothing)]
            samples["delay_interval_seconds"] = [(self._delays.interval_s, nothing)]
        if self._board.newest_ms:
            samples["feed_age_seconds"] = [(max(0.0, time.time() - self._board.newest_ms / 1000), nothing)]
        for slot in supervisor.slots:
            worker = {"worker": str(slot.index)}
            for name, value in slot.figures.items():
                if isinstance(value, dict):
                    samples.setdefault(name, []).extend((n, {**worker, "reason": r}) for r, n in value.items())
                else:
                    samples.setdefault(name, []).append((value, worker))
        return samples

    @contextlib.asynccontextmanager
    async def _admin_site(self) -> AsyncIterator[str]:
        settings = self._settings
        host, port = settings.admin_host, settings.admin_port
        app = make_admin_app(self._readiness, self._samples, BODY_BYTES)
        # It connects with the first call.
        backend = _backend(settings) if settings.api_token else None
        add_api(app, backend, settings.api_token, __version__, is_kept=settings.delivery == "kept")
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        try:
            (listening,) = await _patiently(lambda: open_sockets(host, port, 1, 64), host, port, "--admin-port")
            await web.SockSite(runner, listening).start()
            yield _address(listening)
        finally:
            await runner.cleanup()
            if backend is not None:
                await backend.aclose()


async def _end_of(task: "asyncio.Task[None]") -> None:
    """Wait for a task that others stop; what it raises is raised here."""
    await asyncio.wait([task])
    task.result()


async def _open_public(settings: Settings) -> list[socket.socket]:
    def attempt() -> list[socket.socket]:
        return open_sockets(settings.host, settings.port, settings.worker_count, settings.backlog)

    return await _patiently(attempt, settings.host, settings.port, "--port")


async def _patiently(
    attempt: Callable[[], list[socket.socket]], host: str, port: int, flag: str
) -> list[socket.socket]:
    """Open sockets; wait a moment for workers of a main that has just died to let go of the port."""
    deadline = time.monotonic() + _PORT_PATIENCE_S
    while True:
        try:
            return attempt()
        except OSError as e:
            if time.monotonic() > deadline or isinstance(e, socket.gaierror):
                raise PortUnavailable(host, port, e.strerror or str(e), flag) from None
            await asyncio.sleep(0.1)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _public_url(settings: Settings, listening: socket.socket) -> str:
    return f"{'https' if settings.tls_cert else 'http'}://{_address(listening)}{settings.base_path}/"


def _store(settings: Settings, url: str) -> Store:
    return Store(url, timeout_s=settings.redis_timeout_s, name=f"quotepush-{settings.node}")


def _backend(settings: Settings) -> Backend:
    return Backend(
        settings.registry_url, feed_url=settings.feed_redis, prefix=settings.redis_prefix,
        inbox_max=settings.inbox_max, kept_max=settings.kept_max, kept_ttl_s=settings.kept_ttl_s,
        jobs_max=settings.jobs_max,
    )  # fmt: skip


async def _check_redis(redis: Any, role: str, url: str, settings: Settings) -> None:
    try:
        async with asyncio.timeout(settings.redis_timeout_s):
            await redis.ping()
    except (RedisError, OSError, TimeoutError) as e:
        raise RedisUnavailable(role, without_password(url), reason_of(e, settings.redis_timeout_s)) from None


def _raise_file_limit(wanted: int) -> int:
    """Raise the open-file limit as far as allowed; return how many connections that leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    room = max(1, soft - _FILE_RESERVE)
    if wanted > room:
        log.warning("max_connections is lowered from %d to %d: only %d files may be open", wanted, room, soft)
    return min(wanted, room) if wanted else room


def _delay_line(settings: Settings, epoch: str) -> DelayLine | None:
    """Return what keeps the board for delayed quotes; None where nobody can be entitled to any."""
    if not settings.delays or not settings.has_tokens:
        return None
    return DelayLine(settings.delays, epoch=epoch, max_bytes=settings.delay_bytes)


def _symbol_check(path: str) -> Callable[[str], bool]:
    if not path:
        return lambda code: True
    faults = []
    known = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                known.add(parse_code(text))
            except BadCode as e:
                faults.append(f"symbol_file: {path}:{number}: {e}")
    if faults:
        raise SettingsError(faults[:20])
    return known.__contains__
