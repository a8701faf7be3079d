"""Ticks in from Redis: one subscription per machine.

Laws:

1. The listener never waits for anything but Redis: a subscriber that lags is cut off by
   Redis (32 MB, or 8 MB for 60 s) without a word.
2. Whatever happens to the link, the listener makes a new one, for ever.
3. A message that several patterns match counts once.

redis-py makes the connection (address, AUTH, TLS); what comes in on it is read by us: its pub/sub
costs 6 µs a message, ``hiredis.Reader`` in the transport's callback less than one.
"""

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import Callable
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from quotepush.ingest.probe import LinkProbe
from quotepush.quote.code import BadCode, parse_code
from quotepush.store.clients import Links
from quotepush.together import together

__all__ = ["ChannelTable", "FeedListener"]

log = logging.getLogger("quotepush.feed")

_MAX_CHANNELS = 400_000

# No pattern is called so: of our own channels nothing is taken through a pattern, nor counted as ignored.
_OWN_ROUTE: tuple[bytes, str | None] = (b"\0", None)

# Between two reads when they come faster than that: every read wakes main, and through it the workers. At 8,000 ticks/s
# a tick cost main 19 µs without this rest and 13 µs with it (docs/performance.md). At a low rate nothing waits.
_REST_S = 0.001
_LOOK_S = 0.01
# A server that is cut off from the others answers each probe and hears no tick any more.
_LOOK_AROUND_S = 2.0


class ChannelTable:
    """Which code a channel speaks of, by templates like ``quote.{code}``.

    Args:
        templates: each with at most one ``{code}``; ``*`` stands for anything. Of several that
            match a channel the first one counts.
        own: begin of the names of our own channels, which are never the feed's; empty: there are none.
    """

    def __init__(self, templates: list[str], own: str = "") -> None:
        self._own = own.encode()
        self._templates = [(self._glob(t).encode(), self._regex(t)) for t in templates]
        # Channel to (the pattern that counts, code); the pattern is empty for a channel that is ignored.
        self.routes: dict[bytes, tuple[bytes, str | None]] = {}

    @property
    def patterns(self) -> list[bytes]:
        """What to ``PSUBSCRIBE``."""
        return list(dict.fromkeys(glob for glob, _ in self._templates))

    @staticmethod
    def _glob(template: str) -> str:
        return template.replace("{code}", "*")

    @staticmethod
    def _regex(template: str) -> "re.Pattern[str]":
        parts = re.split(r"(\*|\{code\})", template)
        # * takes as little as it can: of pub.*.{code} and pub.a.600519.SH the code is 600519.SH, not SH.
        meaning = {"*": ".*?", "{code}": "(?P<code>.*)"}
        return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts), re.DOTALL)

    def look_up(self, channel: bytes) -> tuple[bytes, str | None]:
        """Return which pattern counts for ``channel``, and its code (None: the tick names it)."""
        route: tuple[bytes, str | None] = b"", None
        if self._own and channel.startswith(self._own):
            return _OWN_ROUTE
        text = channel.decode("utf-8", "replace")
        for glob, regex in self._templates:
            if match := regex.fullmatch(text):
                try:
                    route = glob, parse_code(match["code"]) if "code" in regex.groupindex else None
                except BadCode:
                    pass
                break
        if len(self.routes) >= _MAX_CHANNELS:
            self.routes.clear()
        self.routes[channel] = route
        return route

    def is_first(self, pattern: bytes, channel: bytes) -> bool:
        """Say whether ``pattern`` is the first one that matches: an ignored message counts once, too."""
        text = channel.decode("utf-8", "replace")
        return pattern == next((glob for glob, regex in self._templates if regex.fullmatch(text)), pattern)


async def _send(connection: AbstractConnection, *command: "str | bytes") -> None:
    try:
        await connection.send_command(*command)
    except RuntimeError as e:
        # uvloop's word for a transport that was lost in this very turn, before anybody could hear of it.
        raise EOFError("closed by Redis") from e


class _Link(asyncio.Protocol):
    """The receiving side of one connection: what comes in is handed on within the callback of the loop.

    A stream's reader would cost a future and a turn of the loop per chunk, at 500 ticks/s a sixth of main.
    Under load ticks gather in the kernel for a millisecond and are read together.
    """

    def __init__(self, transport: asyncio.Transport, take: Callable[[bytes], None]) -> None:
        self._transport = transport
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._lost.add_done_callback(lambda lost: lost.cancelled() or lost.exception())  # perhaps nobody waits for it
        self._ready_s = -math.inf  # when the last read was, or the end of the rest after it

    def data_received(self, data: bytes) -> None:  # hot
        begin_s = time.monotonic()
        try:
            self._take(data)
        except Exception as e:
            self._end(e)
        if self._transport.is_closing():
            return
        if begin_s - self._ready_s < _REST_S:
            self._transport.pause_reading()
            self._loop.call_later(_REST_S, self._go_on)
        elif time.monotonic() - begin_s > _REST_S:
            # libuv reads on for up to 32 chunks of 256 kB; workers and timers get their turn between two.
            self._transport.pause_reading()
            self._loop.call_soon(self._go_on)
        self._ready_s = begin_s

    def _go_on(self) -> None:
        if not self._lost.done() and not self._transport.is_closing():
            self._ready_s = time.monotonic()
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or EOFError("closed by Redis"))

    def _end(self, reason: Exception) -> None:
        if not self._lost.done():
            self._lost.set_exception(reason)

    async def wait_until_lost(self) -> None:
        """Raise what ended the link. No timeout: the probe ends a link that says nothing."""
        await self._lost


class FeedListener:
    """Reads ticks for ever.

    Args:
        links: make the connection.
        merge: takes code (None: the tick names it), payload and arrival (epoch milliseconds); returns
            what it has made of them when there is news, else None.
        publish: takes the news.
        log_channel: of the publishers' log; its messages go to ``take_batch``.
        own_prefix: of our own channels.
        on_batch: called after the messages of one read.
        on_link: called with True when subscribed, with False when the link is lost.

    Attributes:
        is_up: subscribed, and the link has not been found dead.
        links: how many times a link was made.
        ignored: messages on channels that yield no code.
        bugs: messages that were lost to a bug of ours.
    """

    def __init__(
        self,
        links: Links,
        templates: list[str],
        *,
        merge: Callable[[str | None, bytes, int], Any],
        publish: Callable[[Any], None],
        on_batch: Callable[[], None],
        on_link: Callable[[bool], None],
        log_channel: str = "",
        own_prefix: str = "",
        take_batch: Callable[[bytes], None] = lambda message: None,
        probe_interval_s: float,
        probe_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._links = links
        self._channels = ChannelTable(templates, own_prefix)
        self._log_channel = log_channel
        self._take_batch = take_batch
        self._merge = merge
        self._publish = publish
        self._on_batch = on_batch
        self._on_link = on_link
        self._probe_interval_s = probe_interval_s
        self._probe_timeout_s = probe_timeout_s
        self._timeout_s = timeout_s
        self._probe = LinkProbe(probe_timeout_s)
        self._replies = hiredis.Reader()
        self.is_up = False
        self.links = 0
        self.ignored = 0
        self.bugs = 0

    @property
    def lag_s(self) -> float:
        """How far the newest tick that was taken is behind Redis."""
        if not self.is_up:
            return 0.0
        return max(self._probe.lag_s, self._probe.waiting_s(asyncio.get_running_loop().time()))

    async def run(self) -> None:
        """Listen until cancelled; make the link again whenever it is lost."""
        wait_s = 0.0
        while True:
            await asyncio.sleep(wait_s)
            try:
                await self._run_link()
            except (RedisError, OSError, EOFError, hiredis.HiredisError) as e:  # TimeoutError is an OSError
                if self.is_up or not wait_s:
                    log.warning("feed link lost: %s; trying again until it is back", e)
                # Full jitter, at most 2 s: a quote server has nothing better to do than to be back.
                wait_s = random.uniform(0.02, 0.1) if self.is_up else random.uniform(0.05, min(2.0, wait_s * 2 + 0.1))
            if self.is_up:
                self.is_up = False
                self._on_link(False)

    async def _run_link(self) -> None:
        async with asyncio.timeout(self._timeout_s):
            connection = await self._links.connect()
        try:
            async with asyncio.timeout(self._timeout_s):
                # New ones before the first byte: of the last link half a message may be left.
                self._replies = hiredis.Reader()
                self._probe = LinkProbe(self._probe_timeout_s)
                # Nothing is under way between connecting and subscribing, so no byte is read by the wrong side.
                # redis-py has no public way to its transport (5.0 to 8.1).
                transport: asyncio.Transport = connection._writer.transport  # type: ignore[union-attr, assignment]
                link = _Link(transport, self._take_chunk)
                transport.set_protocol(link)
                if self._log_channel:
                    await _send(connection, "SUBSCRIBE", self._log_channel)
                await _send(connection, "PSUBSCRIBE", *self._channels.patterns)
            await together(
                link.wait_until_lost(), self._keep_probing(connection), self._keep_looking(connection), name="feed link"
            )
        finally:
            await connection.disconnect(nowait=True)

    async def _keep_probing(self, connection: AbstractConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Bounded by the probe itself: a PING that cannot be sent is not answered either.
            async with asyncio.timeout(self._probe_timeout_s):
                await _send(connection, "PING", self._probe.next(loop.time()))
            await asyncio.sleep(self._probe_interval_s)
            if self._probe.is_dead(loop.time()):
                # Perhaps it was us who stood still: what has come meanwhile is looked at first.
                await asyncio.sleep(_LOOK_S)
            if self._probe.is_dead(loop.time()):
                raise TimeoutError(f"no answer for {self._probe.waiting_s(loop.time()):.1f} s")

    async def _keep_looking(self, connection: AbstractConnection) -> None:
        while True:
            if not await self._links.is_current(connection):
                raise ConnectionError("it led to a server that is no longer the right one")
            await asyncio.sleep(_LOOK_AROUND_S)

    def _take_chunk(self, chunk: bytes) -> None:  # hot
        self._probe.heard(time.monotonic())
        self._replies.feed(chunk)
        self._take_replies(self._replies)
        self._on_batch()

    def _take_replies(self, reader: "hiredis.Reader") -> None:  # hot
        now_ms = time.time_ns() // 1_000_000
        gets = reader.gets
        routes, look_up = self._channels.routes, self._channels.look_up
        merge, publish = self._merge, self._publish
        while (reply := gets()) is not False:
            try:
                _, pattern, channel, payload = reply  # pmessage: the only reply of four
            except (TypeError, ValueError):
                self._take_other(reply)
                continue
            counts, code = routes.get(channel) or look_up(channel)
            if counts != pattern:
                if not counts and self._channels.is_first(pattern, channel):
                    self.ignored += 1
                continue
            try:
                news = merge(code, payload, now_ms)
                if news is not None:
                    publish(news)
            except Exception:
                # A tick that hits a bug of ours is lost, the next one is not.
                self.bugs += 1
                if self.bugs == 1:
                    log.exception("a tick could not be taken; further ones of this kind are counted only")

    def _take_log(self, message: bytes) -> None:
        try:
            self._take_batch(message)
        except Exception:
            self.bugs += 1
            if self.bugs == 1:
                log.exception("a batch could not be taken; further ones of this kind are counted only")

    def _take_other(self, reply: Any) -> None:
        if isinstance(reply, hiredis.ReplyError):
            raise ConnectionError(str(reply))
        if type(reply) is not list:
            return
        if reply[0] == b"message":
            self._take_log(reply[2])
        elif reply[0] == b"pong":
            self._probe.answered(reply[1], asyncio.get_running_loop().time())
        elif reply[0] == b"psubscribe" and not self.is_up:
            self.is_up = True
            self.links += 1
            if self.links > 1:
                log.info("feed link is back")
            self._on_link(True)
