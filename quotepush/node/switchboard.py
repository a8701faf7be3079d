"""Main's side of what the cluster says to this node, and of what this node's workers say to the cluster.

The wiring of :mod:`quotepush.cluster` and :mod:`quotepush.node.errands`: commands in, replies out, kept messages, the
record of this node, demand, events.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from quotepush import __version__
from quotepush.cluster.announcer import Announcer
from quotepush.cluster.cleaner import Cleaner
from quotepush.cluster.commands import ClusterKeys, Command, NodeRecord
from quotepush.cluster.crowds import Crowds
from quotepush.cluster.demand import DemandTeller
from quotepush.cluster.firing import Firing
from quotepush.cluster.inbox import Inbox
from quotepush.cluster.line import Line
from quotepush.cluster.nodes import Told
from quotepush.cluster.presence import Presence
from quotepush.cluster.routing import Sent
from quotepush.cluster.schedule import Schedule
from quotepush.errors import NodeTaken
from quotepush.node import bus
from quotepush.node.errands import Errands
from quotepush.node.posts import Posts
from quotepush.node.whereabouts import birth_of, here, is_running
from quotepush.settings import Settings
from quotepush.store.address import shown_address
from quotepush.store.clients import Links

__all__ = ["Switchboard"]


# After a start what is due waits until clients can be back at each worker, or for so long after the first one is there.
_LATE_WORKER_S = 30.0


class Switchboard:
    """Connects the cluster with the workers.

    Args:
        redis: a client of the registry.
        links: make the connection on which commands are heard.
        on_up: called when they are.
        on_lost: called when another main has this node's name.
        on_removed: called when what the registry says about this node's connections may have been removed.

    Attributes:
        told: who hears what a purge finds.
    """

    def __init__(
        self,
        settings: Settings,
        redis: Any,
        links: Links,
        *,
        on_up: Callable[[], None],
        on_lost: Callable[[NodeTaken], None],
        on_removed: Callable[[], None],
    ) -> None:
        self._ends: dict[int, bus.BusEnd] = {}
        keys = ClusterKeys(settings.redis_prefix)
        timeout_s = settings.redis_timeout_s
        self._errands = Errands(settings.node, lambda: self._ends)
        self._inbox = Inbox(
            redis, links, keys, settings.node, self._errands.give,
            concurrency=settings.inbox_concurrency, kept_max=settings.kept_max, kept_ttl_s=settings.kept_ttl_s,
            timeout_s=timeout_s, on_up=on_up, may_work=lambda: self.is_held,
        )  # fmt: skip
        self._presence = Presence(
            redis, keys, settings.node, _record(settings),
            is_running=lambda record: is_running(record.pid, record.born),
            ttl_s=settings.registry_ttl_s, timeout_s=timeout_s, on_lost=on_lost, on_removed=on_removed,
        )  # fmt: skip
        self._announcer = Announcer(redis, keys.events, clock_ms=_clock_ms, timeout_s=timeout_s)
        self._demand = DemandTeller(
            redis, keys, settings.node,
            debounce_s=settings.demand_debounce_s, ttl_s=settings.registry_ttl_s, timeout_s=timeout_s,
        )  # fmt: skip
        self.told: Told = _Findings(self._demand, self._announcer if settings.events else None)
        self._cleaner = Cleaner(
            redis, keys, settings.node, self._presence.owner,
            look_s=settings.lease_s / 4, kept_max=settings.kept_max, kept_ttl_s=settings.kept_ttl_s,
            ttl_s=settings.registry_ttl_s, timeout_s=timeout_s, told=self.told, may_work=lambda: self.is_held,
        )  # fmt: skip
        self._crowds = Crowds(redis, keys, timeout_s=timeout_s)
        self._posts = Posts(settings)
        self._line = Line(redis, shown_address(settings.registry_url), timeout_s)
        self._firing = Firing(Schedule(self._line.ask, settings.redis_prefix), self._send, is_open=self._may_fire)
        self._is_leaving = False
        self._worker_count = settings.worker_count
        self._may_fire_from_s: float | None = None  # None: no worker was there yet

    @property
    def is_settled(self) -> bool:
        """Commands are heard, or this user of Redis may not hear any."""
        return self._inbox.is_up or self._inbox.is_forbidden

    @property
    def is_held(self) -> bool:
        """Nobody takes this node for dead."""
        return self._presence.is_held

    @property
    def is_lost(self) -> bool:
        """Another main has this node's name."""
        return self._presence.is_lost

    @property
    def figures(self) -> Mapping[str, float]:
        """What is counted, by the name of its metric."""
        inbox = self._inbox
        return {
            "commands": inbox.heard,
            "commands_refused": inbox.refused + self._errands.refused,
            "messages_kept": inbox.kept,
            "messages_collected": inbox.collected,
            "commands_up": inbox.is_up,
            "client_messages": self._posts.sent,
            "client_messages_refused": self._posts.refused,
            "connections_replaced": self._crowds.closed,
            "lease_held": self.is_held,
            "nodes_cleared": self._cleaner.cleared,
            "node_connections_cleared": self._cleaner.removed,
            "demand_told": self._demand.told,
            "demand_pending": self._demand.pending,
            "events_told": self._announcer.told,
            "events_dropped": self._announcer.dropped,
            "jobs_fired": self._firing.fired,
            "jobs_failed": self._firing.failed,
            "jobs_waiting": self._firing.waiting,
        }

    async def join(self) -> None:
        """Take this node's name in the cluster; from then on :meth:`keep_name` must run.

        Raises:
            NodeTaken: another main has it.
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        await self._presence.take()

    async def keep_name(self) -> None:
        """Hold this node's name until cancelled."""
        await self._presence.run()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._inbox.run(), name="inbox")
            group.create_task(self._cleaner.run(), name="cleaner")
            group.create_task(self._demand.run(), name="demand")
            group.create_task(self._announcer.run(), name="events")
            group.create_task(self._crowds.run(), name="crowds")
            group.create_task(self._posts.run(), name="posts")
            group.create_task(self._firing.run(), name="jobs")

    def stop_firing(self) -> None:
        """The connections of this node are about to be closed: others send what is due now."""
        self._is_leaving = True

    async def leave(self) -> None:
        """This node leaves the cluster; one attempt.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        await self._line.aclose()
        try:
            await self._announcer.flush()
        finally:
            if not self.is_lost:
                await self._inbox.move()  # where there is no record nobody looks into the inbox
                await self._presence.leave()

    # Workers

    def ready(self, worker: int, end: bus.BusEnd) -> None:
        """A worker takes commands."""
        self._ends[worker] = end
        now_s = asyncio.get_running_loop().time()
        if len(self._ends) == self._worker_count:
            self._may_fire_from_s = now_s
        elif self._may_fire_from_s is None:
            self._may_fire_from_s = now_s + _LATE_WORKER_S

    def gone(self, worker: int) -> None:
        """It does so no more."""
        self._ends.pop(worker, None)
        self._errands.gone(worker)

    def heard(self, worker: int, message: Any) -> None:
        """A worker says something that is for us."""
        match message:
            case bus.Carried():
                self._errands.carried(worker, message)
            case bus.UsersCame():
                self._inbox.users_came(message.users)
                if message.limited:
                    self._crowds.came(message.limited)
            case bus.ClientSend():
                self._posts.send(self._ends.get(worker), message)
            case bus.Happened():
                self._announcer.happened(message.events)
            case bus.Listed():
                self._demand.came(message.came)
                self._demand.left(message.left)

    # Messages that are sent later

    def _may_fire(self) -> bool:
        if not self._ends or self._may_fire_from_s is None or not self.is_held or self._is_leaving:
            return False
        return asyncio.get_running_loop().time() >= self._may_fire_from_s

    async def _send(self, command: Command, is_kept: bool, name: str) -> Sent:
        return await self._posts.route().send(command, kept=is_kept, name=name)


class _Findings:
    """What a purge finds, to each who wants to know it."""

    def __init__(self, demand: DemandTeller, announcer: Announcer | None) -> None:
        self._announcer = announcer
        self.wanted = demand.wanted

    def listed(self, tag: str, is_listed: bool) -> None:
        if self._announcer is not None:
            self._announcer.listed(tag, is_listed)

    def closed(self, users: Mapping[str, str | None]) -> None:
        if self._announcer is not None:
            self._announcer.closed(users)


def _record(settings: Settings) -> NodeRecord:
    return NodeRecord(
        0, 0, __version__, settings.worker_count,
        lease=round(settings.lease_s * 1000), owner=secrets.token_hex(8),
        place=here(), pid=os.getpid(), born=birth_of(os.getpid()),
    )  # fmt: skip


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
