"""Main's side of what the cluster says to this node, and of what this node's workers say to the cluster.

The wiring of :mod:`quotepush.cluster` and :mod:`quotepush.node.errands`: commands in, replies out, kept messages, the
record of this node, events.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from redis.asyncio import ConnectionPool

from quotepush import __version__
from quotepush.cluster.announcer import Announcer
from quotepush.cluster.commands import ClusterKeys
from quotepush.cluster.crowds import Crowds
from quotepush.cluster.inbox import Inbox
from quotepush.cluster.nodes import Told
from quotepush.cluster.presence import Presence
from quotepush.node import bus
from quotepush.node.errands import Errands
from quotepush.node.posts import Posts
from quotepush.settings import Settings

__all__ = ["Switchboard"]


class Switchboard:
    """Connects the cluster with the workers.

    Args:
        redis: a client of the registry.
        pool: makes the connection on which commands are heard.
        on_up: called when they are.
    """

    def __init__(self, settings: Settings, redis: Any, pool: ConnectionPool, on_up: Callable[[], None]) -> None:
        self._ends: dict[int, bus.BusEnd] = {}
        keys = ClusterKeys(settings.redis_prefix)
        timeout_s = settings.redis_timeout_s
        self._errands = Errands(settings.node, lambda: self._ends)
        self._inbox = Inbox(
            redis, pool, keys, settings.node, self._errands.give,
            concurrency=settings.inbox_concurrency, kept_max=settings.kept_max, kept_ttl_s=settings.kept_ttl_s,
            timeout_s=timeout_s, on_up=on_up,
        )  # fmt: skip
        self._presence = Presence(
            redis, keys, settings.node,
            version=__version__, workers=settings.worker_count, ttl_s=settings.registry_ttl_s, timeout_s=timeout_s,
        )  # fmt: skip
        self._announcer = Announcer(redis, keys.events, clock_ms=_clock_ms, timeout_s=timeout_s)
        self._crowds = Crowds(redis, keys, timeout_s=timeout_s)
        self._posts = Posts(settings)
        self._has_events = settings.events

    @property
    def told(self) -> Told | None:
        """Who hears what a purge finds; None: nobody wants to know."""
        return self._announcer if self._has_events else None

    @property
    def is_settled(self) -> bool:
        """Commands are heard, or this user of Redis may not hear any."""
        return self._inbox.is_up or self._inbox.is_forbidden

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
            "events_told": self._announcer.told,
            "events_dropped": self._announcer.dropped,
        }

    async def begin(self) -> None:
        """Let the cluster know of this node, if Redis lets us; :meth:`run` goes on trying."""
        await self._presence.renew()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._inbox.run(), name="inbox")
            group.create_task(self._presence.run(), name="presence")
            group.create_task(self._announcer.run(), name="events")
            group.create_task(self._crowds.run(), name="crowds")
            group.create_task(self._posts.run(), name="posts")

    async def leave(self) -> None:
        """This node leaves the cluster; one attempt.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        await self._announcer.flush()
        await self._presence.leave()

    # Workers

    def ready(self, worker: int, end: bus.BusEnd) -> None:
        """A worker takes commands."""
        self._ends[worker] = end

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


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
