"""What one worker holds: its sessions, its index, its hub, and the wheel that looks after the peers.

Knows neither main nor Redis: :mod:`quotepush.node.worker` hands in what it needs of them.

Law: a session that is gone is gone everywhere: index, hub, wheel, registry, count; also
when one of these steps fails.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from aiohttp import web

from quotepush.auth import Identity
from quotepush.push.addresses import UNKNOWN
from quotepush.push.desk import Desk
from quotepush.push.freshness import Freshness
from quotepush.push.hub import Hub
from quotepush.push.link import Detached, SocketLink
from quotepush.push.members import Members
from quotepush.push.orders import Orders
from quotepush.push.outbox import Outbox
from quotepush.push.refusals import Refusals
from quotepush.push.session import Session
from quotepush.push.stream import MAX_STREAM_CODES, Asked, StreamLink, begin_stream
from quotepush.push.subscriptions import Subscriptions
from quotepush.push.websocket import WebSocketLink, upgrade
from quotepush.settings import Settings
from quotepush.wire import messages
from quotepush.wire.events import EVENTS
from quotepush.wire.formats import CODECS, JSON

__all__ = ["FeedState", "Outside", "PushWorker", "clock_ms"]

log = logging.getLogger("quotepush.session")

_SLOT_S = 0.1
_CLOSE_BATCH = 200
# They are told to come back one behind the other, at a rate that a starting worker takes beside its other work.
_RETURNS_PER_S = 2000


def clock_ms() -> int:
    """Return now as epoch milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class FeedState:
    """What main last said of the feed.

    Attributes:
        state: ``ok``, ``stale`` or ``down``.
        last_tick_ms: arrival of the newest tick of any code; 0: none yet.
        stale_ms: without a tick for so long it is stale, whether main has said so yet or not.
    """

    state: str = "down"
    last_tick_ms: int = 0
    stale_ms: int = 10_000

    def state_at(self, now_ms: int) -> str:
        """Return the state that fits the age."""
        if self.state == "ok" and now_ms - self.last_tick_ms >= self.stale_ms:
            return "stale"
        return self.state

    def age_ms(self, now_ms: int) -> int | None:
        """Return how long ago the newest tick arrived, None when there was none."""
        return max(0, now_ms - self.last_tick_ms) if self.last_tick_ms else None


@dataclass(slots=True)
class Outside:
    """What a worker is handed of the world: the registry's side of sessions, and main's count.

    Attributes:
        opened: a session is there, with the live collection of its codes.
        closed: it is gone; with the address of its peer.
        changed: its user, its groups or its session data have changed, or it has got the first of them.
        came: the same as ``opened``, for those who want to know who comes and goes.
        left: and for the same, that it is gone: whose it was, who ended it, and why.
    """

    opened: Callable[[str, Collection[str]], None]
    closed: Callable[[str, str], None]
    changed: Callable[[Session], None] = lambda session: None
    came: Callable[[Session], None] = lambda session: None
    left: Callable[[Session, str | None, str, str], None] = lambda session, user, by, reason: None


class PushWorker:
    """The sessions of one worker.

    Attributes:
        links: by fd.
        desk: what its sessions are offered.
        members: its sessions by user and group.
        orders: carries out what the cluster wants done with them.
        refusals: who never became one.
    """

    def __init__(self, settings: Settings, fd_prefix: str, first_fd: int, desk: Desk, outside: Outside) -> None:
        self._settings = settings
        self._fd_prefix = fd_prefix
        self._next_fd = first_fd
        self.desk = desk
        self._outside = outside
        self.feed = FeedState()
        self.links: dict[str, SocketLink] = {}
        self.is_draining = False
        self.opened_total = 0
        self.closed_total: dict[str, int] = {}
        self.refusals = Refusals()
        self.subscriptions: Subscriptions = desk.subscriptions
        self.hub = Hub(
            desk.subscriptions,
            max_delay_s=settings.max_flush_delay_ms / 1000,
            max_rows=settings.merge_above_rows,
            max_bytes=settings.merge_above_bytes,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=self._end_failed,
            clock_ms=desk.clock_ms,
        )
        self.freshness = Freshness(desk.subscriptions)
        self.members = Members(outside.changed)
        self.orders = Orders(
            self.links, self.members, desk, needs_key=settings.require_conn_key, delays=settings.delays
        )
        desk.identified = self.members.identify
        desk.deliver = self.hub.deliver
        desk.replay = self.hub.replay
        self._left = asyncio.Event()
        slots = max(1, round(settings.heartbeat_ms / 1000 / _SLOT_S))
        self._wheel: list[set[SocketLink]] = [set() for _ in range(slots)]
        self._slot_s = settings.heartbeat_ms / 1000 / slots

    # The life of a session

    def accept(
        self,
        request: web.Request,
        subprotocol: str | None,
        identity: Identity | None = None,
        data: Mapping[str, str] | None = None,
    ) -> Detached:
        """Turn a checked upgrade request into a session that speaks ``subprotocol`` (None: the usual one, unsaid).

        Args:
            identity: whom the token of the request names, if it brought one.
            data: the first session data.
        """
        codec = next((codec for codec in CODECS if codec.subprotocol == subprotocol), JSON)
        link = WebSocketLink(self, request.remote or UNKNOWN)
        fd = f"{self._fd_prefix}{self._next_fd}"
        link.session = Session(fd, link, self.desk, codec, identity)
        response = upgrade(request, link, subprotocol, self._settings.message_bytes, lambda: self.opened(link, data))
        self._next_fd += 1
        return response

    def accept_stream(
        self,
        request: web.Request,
        asked: Asked,
        identity: Identity | None,
        headers: Mapping[str, str],
        data: Mapping[str, str] | None = None,
    ) -> Detached:
        """Turn a checked request into a session that is sent events.

        Args:
            data: the first session data.
            headers: of the response, besides those that every stream has.
        """
        link = StreamLink(self, request.remote or UNKNOWN, self.hub, self.desk.life, asked.selection)
        fd = f"{self._fd_prefix}{self._next_fd}"
        limits = replace(self.desk.limits, codes=min(MAX_STREAM_CODES, self.desk.limits.codes))
        link.session = Session(fd, link, self.desk, EVENTS, identity, limits)

        def start() -> None:
            self.opened(link, data)
            try:
                link.session.carry_out(asked.request)
            except Exception:
                # A bug in one session is that session's end and nobody else's.
                log.exception("%s: a stream could not begin", fd)
                link.close(messages.CLOSE_CODES["internal"], "internal")

        response = begin_stream(request, link, headers, start)
        self._next_fd += 1
        return response

    def opened(self, link: SocketLink, data: Mapping[str, str] | None = None) -> None:
        """A link is ready: greet it."""
        session = link.session
        self.links[session.fd] = link
        self._wheel[hash(session.fd) % len(self._wheel)].add(link)
        self.opened_total += 1
        self._outside.opened(session.fd, session.watchlist.subscriptions.keys())
        if data or session.identity is not None:
            self.members.identify(session, None, data)
        self._outside.came(session)
        session.greet()
        log.debug("%s: open from %s", session.fd, link.peer)

    def unblocked(self, outbox: Outbox) -> None:
        """A socket has taken everything."""
        self.freshness.unblock(outbox)
        self.hub.unblock(outbox)

    def closed(self, link: SocketLink) -> None:
        """A link is gone: leave no trace of it."""
        session = link.session
        fd = session.fd
        if self.links.pop(fd, None) is None:
            return
        user = None if session.member is None else session.member.user
        for leave in (
            session.close,
            lambda: self.members.forget(session),
            lambda: self.hub.forget([session.outbox]),
            lambda: self.freshness.forget(session),
            lambda: self._wheel[hash(fd) % len(self._wheel)].discard(link),
            lambda: self._outside.closed(fd, link.peer),
            lambda: self._outside.left(session, user, link.closed_by, link.reason),
        ):
            try:
                leave()
            except Exception:
                log.exception("%s: a step of its clean-up failed", fd)
        self.closed_total[link.reason] = self.closed_total.get(link.reason, 0) + 1
        self._left.set()
        outbox = session.outbox
        log.info(
            "%s: closed by %s: %s after %.1f s, %d rows sent, %d merged",
            fd, link.closed_by, link.reason, (self.desk.clock_ms() - session.opened_ms) / 1000, outbox.sent,
            outbox.merged,
        )  # fmt: skip

    def _end_failed(self, outbox: Outbox) -> None:
        link = self.links.get(outbox.session.fd)
        if link is not None:
            link.abort("internal")

    # The wheel

    async def turn_wheel(self) -> None:
        """Send heartbeats and pings and look after dead peers, until cancelled; a slot of sessions at a time."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            for slot in self._wheel:
                due += self._slot_s
                await asyncio.sleep(max(0.0, due - loop.time()))
                if loop.time() - due > 1:  # we were stopped, or starved: do not catch up in a rush
                    due = loop.time()
                try:
                    self._look_after(slot, loop.time())
                except Exception:
                    log.exception("a turn of the wheel failed")

    def _look_after(self, slot: set[SocketLink], now_s: float) -> None:
        s = self._settings
        now_ms = self.desk.clock_ms()
        heartbeat = messages.heartbeat(now_ms, self.feed.state_at(now_ms), self.feed.age_ms(now_ms))
        beats = {codec: codec.frame(heartbeat) for codec in (*CODECS, EVENTS)}
        for link in list(slot):
            try:
                link.session.check_identity(now_ms)
                ping = link.check(now_s, s.stall_timeout_s, s.ping_interval_s, s.ping_timeout_s)
                beat = beats[link.session.codec]
                link.write(beat + ping if ping else beat)
            except Exception:
                log.exception("%s: could not be looked after", link.session.fd)

    # The end

    async def drain(self, timeout_s: float, retry_after_ms: int) -> None:
        """Close every session, a batch at a time; cut off who has not gone after ``timeout_s``.

        Args:
            retry_after_ms: the least time that a client is told to stay away; each is told a little more than the
                one before it, for a browser's stream comes back at that very moment.
        """
        self.is_draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        leaving = list(self.links.values())
        said = 0
        for start in range(0, len(leaving), _CLOSE_BATCH):
            for link in leaving[start : start + _CLOSE_BATCH]:
                if not link.session.is_closed:
                    link.session.say_closing(retry_after_ms + said * 1000 // _RETURNS_PER_S)
                    said += 1
                    link.close(messages.CLOSE_CODES["restart"], "restart")
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout_at(deadline):
                while self.links:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            pass
        for link in list(self.links.values()):
            link.abort("drain_timeout")
        await asyncio.sleep(0)
