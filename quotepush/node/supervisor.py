"""The workers of one machine: started, named, watched, replaced.

Laws:

1. Each slot has its own listening socket, opened once by main and inherited, so that a worker's
   restart loses no pending connection. A slot that stays empty lends its socket to a sibling. A
   systemd socket is shared by all slots.
2. A worker is started by exec with just the descriptors it needs, never by fork.
3. What a dead worker had in the registry is removed only after its Redis connection is cut, so that
   no write of the dead comes behind the clean-up.
4. A worker that ends is replaced, with backoff; one that ends with 3 can never run and ends main.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from quotepush import __version__
from quotepush.cluster.nodes import cut_connection, lives_of, purge_life
from quotepush.errors import WorkerUnfit
from quotepush.node import bus
from quotepush.node.allotment import Allotment
from quotepush.node.directory import Directory
from quotepush.node.keyring import Keyring
from quotepush.node.relay import Relay, WorkerFeed
from quotepush.node.switchboard import Switchboard
from quotepush.settings import Settings

__all__ = ["Supervisor", "WorkerSlot"]

log = logging.getLogger("quotepush.main")

UNFIT = 3
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.1, 10.0
# A worker that has lived so long was fit: the next death starts the backoff anew.
_HEALTHY_AFTER_S = 30.0
# Workers hear of a tick at once, but not more often than this, nor later when nobody has hurried us: a heartbeat's
# feed_age_ms may be wrong by 50 ms, and the way takes its time.
_FEED_NEWS_S, _FEED_NEWS_AGAIN_S = 0.02, 0.1
_KILL_AFTER_S = 3.0
# On a busy machine Python takes its time to import what a worker needs.
_START_PATIENCE_S = 30.0
_LEND_AFTER_S = 0.4
_PURGE_AGAIN_S = 2.0
_STRANGERS_S = 15.0
# The collector is off while it starts: quotepush.node.collector.
_WORKER = "import gc; gc.disable(); from quotepush.node.worker import main; main()"


class WorkerSlot:
    """A worker's place: it outlives the workers that fill it.

    Attributes:
        figures: what the worker last counted.
    """

    def __init__(self, index: int, listening: socket.socket) -> None:
        self.index = index
        self.listening = listening
        self.process: asyncio.subprocess.Process | None = None
        self.bus: bus.BusEnd | None = None
        self.feed: WorkerFeed | None = None
        self.life = ""
        self.registry_clients: dict[str, int] = {}  # by what its life is called there
        self.is_ready = False
        self.borrower: WorkerSlot | None = None  # accepts at our socket while we are empty
        self.restarts = 0
        self.heard_s = 0.0
        self.figures: dict[str, Any] = {}
        self._merged_before = 0  # by the feeds of earlier workers

    @property
    def rows_merged(self) -> int:
        """Rows merged on the way to this place's workers, because they were slow."""
        return self._merged_before + (self.feed.merged if self.feed is not None else 0)

    def end_feed(self) -> None:
        """Its worker is gone."""
        self._merged_before = self.rows_merged
        self.feed = None


class Supervisor:
    """Keeps ``settings.worker_count`` workers running.

    Args:
        listening: one socket per worker, or one for all.
        directories: of live quotes (0), and of those with a delay.
        registry: for cleaning up after dead workers.
        feed_news: the feed's state and the arrival of its newest tick.
        on_ready: called whenever the number of ready workers changes.
        keyring: the keys of tokens.
        start_us: now, by the clock of Redis; it never goes back.

    Attributes:
        places: of this machine, and who has them.
    """

    def __init__(
        self,
        settings: Settings,
        listening: list[socket.socket],
        relay: Relay,
        directories: Mapping[int, Directory],
        registry: Redis,
        max_connections: int,
        feed_news: Callable[[], tuple[str, int, str]],
        on_ready: Callable[[], None],
        keyring: Keyring,
        switchboard: Switchboard,
        start_us: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._keyring = keyring
        self._switchboard = switchboard
        self._start_us = start_us
        self._relay = relay
        self._directories = directories
        self._registry = registry
        self._feed_news = feed_news
        self._on_ready = on_ready
        self.places = Allotment(settings.worker_count, max_connections, settings.max_connections_per_ip)
        self.slots = [WorkerSlot(i, listening[i % len(listening)]) for i in range(settings.worker_count)]
        self._stopping = asyncio.Event()
        self._drain: bus.Drain | None = None
        self._may_be_news = asyncio.Event()
        self._unpurged: list[tuple[str, dict[str, int]]] = []  # dead lives that the registry still holds
        self._has_unpurged = asyncio.Event()
        self._strangers: set[str] = set()

    @property
    def ready(self) -> int:
        """Workers that accept connections."""
        return sum(slot.is_ready for slot in self.slots)

    @property
    def connections(self) -> int:
        """Open connections of this machine, at most about a second ago; admission counts places instead."""
        return sum(slot.figures.get("connections", 0) for slot in self.slots)

    async def run(self) -> None:
        """Keep the workers running until :meth:`stop` has ended them.

        Raises:
            WorkerUnfit: a worker can never run here.
        """
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._tell_news()), group.create_task(self._keep_purging())]
                async with asyncio.TaskGroup() as workers:
                    for slot in self.slots:
                        workers.create_task(self._fill(slot))
                for helper in helpers:
                    helper.cancel()
        finally:
            for slot in self.slots:
                if slot.process is not None and slot.process.returncode is None:
                    slot.process.kill()

    async def stop(self, timeout_s: float, retry_after_ms: int) -> None:
        """Let every worker close its sessions and end; kill the ones that do not."""
        self._drain = bus.Drain(timeout_s, retry_after_ms)
        self._stopping.set()
        running = [slot for slot in self.slots if slot.process is not None]
        for slot in running:
            if slot.bus is not None:
                slot.bus.send(self._drain)
        deadline = time.monotonic() + timeout_s + _KILL_AFTER_S
        for slot in running:
            assert slot.process is not None
            try:
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    await slot.process.wait()
            except TimeoutError:
                log.warning("worker %d did not end in %.0f s and is killed", slot.index, timeout_s)
                slot.process.kill()

    # One slot

    async def _fill(self, slot: WorkerSlot) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._run_worker(slot)
            lived_s = time.monotonic() - began
            if status == UNFIT:
                raise WorkerUnfit(slot.index)
            if self._stopping.is_set():
                return
            slot.restarts += 1
            if lived_s >= _HEALTHY_AFTER_S:
                backoff_s = _BACKOFF_FIRST_S
            log.warning("worker %d %s after %.1f s; a new one follows", slot.index, _ended(status), lived_s)
            self._bury(slot)
            if backoff_s >= _LEND_AFTER_S:
                self._lend(slot)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stopping.wait()
            backoff_s = min(_BACKOFF_MOST_S, backoff_s * 2)

    def _lend(self, slot: WorkerSlot) -> None:
        """Let the least busy sibling accept what waits at the socket of an empty slot."""
        siblings = [s for s in self.slots if s.is_ready and s.listening is not slot.listening]
        if slot.borrower is None and siblings:
            slot.borrower = min(siblings, key=lambda s: self.places.held(s.index))
            assert slot.borrower.bus is not None
            slot.borrower.bus.send(bus.Lend(slot.index, True))

    def _take_back(self, slot: WorkerSlot) -> None:
        borrower, slot.borrower = slot.borrower, None
        if borrower is not None and borrower.bus is not None:
            borrower.bus.send(bus.Lend(slot.index, False))

    async def _run_worker(self, slot: WorkerSlot) -> int:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        listening = [s.listening.fileno() for s in self.slots]
        try:
            slot.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _WORKER,
                f"--index={slot.index}", f"--bus={theirs.fileno()}", f"--listen={','.join(map(str, listening))}",
                stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(), *set(listening)),
            )  # fmt: skip
        except OSError as e:
            log.error("worker %d cannot be started: %s", slot.index, e)
            ours.close()
            return 1
        finally:
            theirs.close()
        ours.setblocking(False)
        end = bus.BusEnd(
            bus.ToMain,
            lambda message: self._receive(slot, message),
            on_lost=lambda: None,
            on_drained=lambda: slot.feed.drained() if slot.feed is not None else None,
        )
        await loop.create_unix_connection(lambda: end, sock=ours)
        slot.bus = end
        slot.feed = WorkerFeed(end)
        slot.heard_s = loop.time()
        end.send(
            bus.Setup(
                bus.BUS_VERSION,
                dataclasses.asdict(self._settings),
                self._settings.node,
                self._feed_news()[2],
                __version__,
                self._relay.life,
                self._keyring.sources,
                self._start_us(),
            )
        )
        end.send(bus.Feed(*self._feed_news()))
        if self._drain is not None:  # we were told to stop while it was started
            end.send(self._drain)
        try:
            return await self._watch(slot)
        finally:
            slot.is_ready = False
            self._switchboard.gone(slot.index)
            for other in self.slots:
                if other.borrower is slot:
                    other.borrower = None
            self.places.forget(slot.index)
            slot.figures = {}
            self._relay.forget(slot.feed)
            slot.end_feed()
            slot.bus = None
            end.close()
            self._on_ready()

    async def _watch(self, slot: WorkerSlot) -> int:
        """Wait for the end of a worker; bring it about when the worker is silent."""
        loop = asyncio.get_running_loop()
        assert slot.process is not None
        silence_s = self._settings.worker_silence_s
        ended = asyncio.ensure_future(slot.process.wait())
        try:
            while True:
                asked = loop.time()
                done, _ = await asyncio.wait([ended], timeout=1.0)
                if done:
                    return ended.result()
                now = loop.time()
                if now - asked > 2.0:  # it was us who slept: whoever is silent gets his time again
                    slot.heard_s = now
                elif now - slot.heard_s >= (silence_s if slot.life else max(silence_s, _START_PATIENCE_S)):
                    log.error("worker %d has been silent for %.0f s and is killed", slot.index, now - slot.heard_s)
                    slot.process.kill()
                    return await ended
        finally:
            if not ended.done():
                slot.process.kill()
                ended.cancel()

    def _bury(self, slot: WorkerSlot) -> None:
        """Have removed what the dead worker had in the registry; the next worker does not wait for that."""
        if slot.life:
            self._unpurged.append((slot.life, slot.registry_clients))
            self._has_unpurged.set()
        slot.life, slot.registry_clients = "", {}

    async def _purge(self) -> None:
        node, prefix = self._settings.node, self._settings.redis_prefix
        while self._unpurged:
            life, clients = self._unpurged[0]
            try:
                async with asyncio.timeout(self._settings.redis_timeout_s):
                    for name, client_id in clients.items():
                        await cut_connection(self._registry, node, name, client_id)
                # Of many connections that takes its time; each of its steps is bounded.
                removed = await purge_life(self._registry, prefix, node, life, self._switchboard.told)
            except (RedisError, OSError, TimeoutError) as e:
                log.warning("registry: dead worker %s is not cleared yet: %s", life, str(e) or type(e).__name__)
                return
            log.info("registry: %d connections of dead worker %s removed", removed, life)
            self._unpurged.remove((life, clients))

    async def _keep_purging(self) -> None:
        """Clear the dead at once, and those whom Redis would not let us clear again and again."""
        looked_s = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PURGE_AGAIN_S):
                    await self._has_unpurged.wait()
            self._has_unpurged.clear()
            await self._purge()
            if time.monotonic() - looked_s >= _STRANGERS_S and self._switchboard.is_held:
                looked_s = time.monotonic()
                await self._look_for_strangers()

    async def _look_for_strangers(self) -> None:
        """Have removed what is in the registry under our name and is not ours.

        A former holder of the name who was taken for dead, and woke up, may have written before it knew.
        """
        try:
            async with asyncio.timeout(self._settings.redis_timeout_s):
                lives = await lives_of(self._registry, self._settings.redis_prefix, self._settings.node)
        except (RedisError, OSError, TimeoutError):
            return
        ours = {slot.life for slot in self.slots} | {life for life, _ in self._unpurged}
        strangers = {life for life in lives if life not in ours}
        # A worker may just have begun, and its word not have been read: at the next look it is known.
        for life in strangers & self._strangers:
            self._unpurged.append((life, {}))
            self._has_unpurged.set()
        self._strangers = strangers

    # What workers say

    def _receive(self, slot: WorkerSlot, message: Any) -> None:
        slot.heard_s = asyncio.get_running_loop().time()
        assert slot.bus is not None and slot.feed is not None
        match message:
            case bus.Ask():
                self._relay.ask(slot.feed, message)
            case bus.Find():
                answering, question = slot.bus, message.question
                self._directories[message.delay_s].ask(
                    message.text, message.limit, lambda text: answering.send(bus.Found(question, text)), message.codes
                )
            case bus.KeysWanted():
                asking = slot.bus
                self._keyring.renew(lambda: asking.send(bus.TokenKeys(None, True)))
            case bus.Unwatch():
                self._relay.unwatch(slot.feed, message.codes)
            case bus.PlacesWanted():
                granted = self.places.grant(slot.index, message.needed, message.spare)
                slot.bus.send(bus.PlacesGranted(granted, self.places.seat(slot.index, message.addresses)))
            case bus.PlacesBack():
                self.places.give_back(slot.index, message.count, message.addresses)
            case bus.Figures():
                slot.figures = message.figures
            case bus.RegistryClient():
                slot.registry_clients[message.life] = message.client_id
            case bus.Hello():
                slot.life = message.life
            case bus.Ready():
                slot.is_ready = True
                self._switchboard.ready(slot.index, slot.bus)
                self._take_back(slot)
                self._on_ready()
            case _:
                self._switchboard.heard(slot.index, message)

    def doubt_registry(self) -> None:
        """What the registry says about our connections may have been removed: write it again."""
        for slot in self.slots:
            if slot.bus is not None:
                slot.bus.send(bus.Doubt())

    def tell_keys(self, sources: list[tuple[str, bool]]) -> None:
        """The keys of tokens have changed."""
        for slot in self.slots:
            if slot.bus is not None:
                slot.bus.send(bus.TokenKeys(sources))

    def hurry_news(self) -> None:  # hot
        """There may be news of the feed: tell the workers soon."""
        self._may_be_news.set()

    async def _tell_news(self) -> None:
        """Tell the workers how the feed is, whenever that changes."""
        told: tuple[str, int, str] | None = None
        while True:
            await asyncio.sleep(_FEED_NEWS_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FEED_NEWS_AGAIN_S):
                    await self._may_be_news.wait()
            self._may_be_news.clear()
            news = self._feed_news()
            if news != told:
                told = news
                for slot in self.slots:
                    if slot.bus is not None:
                        slot.bus.send(bus.Feed(*news))


def _ended(status: int) -> str:
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with {status}"
