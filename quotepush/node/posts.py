"""What clients of this node say to others: handed to the cluster as any backend would, and answered.

Law: each message is answered once, and what is under way is bounded. A node that has nothing to send has no connection
for it.
"""

import asyncio
from typing import Any

from quotepush.cluster.commands import BadCommand, parse_command
from quotepush.cluster.line import Line
from quotepush.cluster.routing import Routing
from quotepush.errors import BackendUnavailable, CallRefused
from quotepush.node.bus import BusEnd, ClientSend, Sent
from quotepush.settings import Settings
from quotepush.store.clients import Store

__all__ = ["Posts"]

_MOST_UNDER_WAY = 1_000


class Posts:
    """Sends what clients say.

    Attributes:
        sent: messages that were handed on.
        refused: messages that were not.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis: Any = None
        self._line: Line | None = None
        self._routing: Routing | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self.sent = 0
        self.refused = 0

    def send(self, end: BusEnd | None, message: ClientSend) -> None:
        """Send a client's message and answer the worker at ``end``, if it is still there."""
        if end is None:
            return
        if len(self._under_way) >= _MOST_UNDER_WAY:
            self.refused += 1
            why = "too many messages are under way"
            end.send(Sent(message.question, 0, error="rate_limited", message=why, is_retryable=True))
            return
        task = asyncio.create_task(self._send(end, message), name="client send")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def run(self) -> None:
        """Wait until cancelled, then give up what is under way."""
        try:
            await asyncio.Event().wait()  # for nothing: sends are tasks of their own
        finally:
            for task in self._under_way:
                task.cancel()
            if self._routing is not None:
                await self._routing.aclose()
            if self._line is not None:
                await self._line.aclose()
            if self._redis is not None:
                await self._redis.aclose()

    async def _send(self, end: BusEnd, message: ClientSend) -> None:
        answer = Sent(message.question, 0, error="internal", message="a fault of the server; its log says more")
        try:
            answer = await self._sent(message)
        finally:
            self.refused += bool(answer.error)
            end.send(answer)

    async def _sent(self, message: ClientSend) -> Sent:
        number = message.question
        try:
            command = parse_command(message.command)
            is_kept = self._settings.delivery == "kept"
            sent = await self.route().send(command, kept=is_kept)
        except BadCommand as e:
            return Sent(number, 0, error=e.error, message=str(e))
        except CallRefused as e:
            return Sent(number, 0, error=e.error, message=e.message)
        except BackendUnavailable:
            why = "the cluster cannot be reached just now"
            return Sent(number, 0, error="internal", message=why, is_retryable=True)
        if command.to is not None and command.to.users and not sent.delivered and not sent.kept:
            return Sent(number, 0, error="not_online", message="this user has no connection that took it")
        self.sent += 1
        return Sent(number, sent.delivered, sent.kept)

    def route(self) -> Routing:
        """Return this node's own way to all nodes; it is made when somebody asks for it."""
        if self._routing is None:
            s = self._settings
            store = Store(s.registry_url, timeout_s=s.redis_timeout_s, name=f"quotepush-{s.node}")
            self._redis = store.client("posts")
            self._line = Line(self._redis, str(store), s.redis_timeout_s)
            self._routing = Routing(
                self._line, store.links("posts"), s.redis_prefix,
                counts_hearers=not store.is_cluster,
                timeout_s=min(3.0, s.redis_timeout_s), inbox_max=s.inbox_max, kept_max=s.kept_max,
                kept_ttl_s=s.kept_ttl_s,
            )  # fmt: skip
        return self._routing
