"""How ticks are published: plainly, one ``PUBLISH`` per tick, many in one round trip.

`TickPublisher` is what a feed needs of a publisher, whatever it does with the ticks. `PlainPublisher` holds one batch
and nothing else, so its memory is bounded by its caller's batches. While Redis is away it drops ticks or waits, as it
was told, and comes back by itself.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import orjson
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.feed.replay import CodedTick

__all__ = ["CODE_PLACE", "PlainPublisher", "TickPublisher", "shown_address"]

CODE_PLACE = "{code}"
"""Stands in a channel template where the code goes."""

_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 2.0
_LAST_EXCHANGE_S = 1.0  # a batch on its way when we are cancelled gets so long to be answered
_LINK_FAULTS = (RedisConnectionError, RedisTimeoutError, OSError)


class TickPublisher(Protocol):
    """What a feed needs of whoever publishes its ticks."""

    sent: int
    """Ticks that Redis has taken."""
    dropped: int
    """Ticks that fell into a time without Redis."""
    outages: int
    """How often Redis went away."""

    async def connect(self) -> None:
        """Reach Redis for the first time, or raise `RedisUnavailable`."""

    async def publish(self, ticks: Sequence[CodedTick]) -> None:
        """Publish a batch in its order; return when it was taken or dropped."""

    async def aclose(self) -> None:
        """Let go of the connection."""


class PlainPublisher:
    """Publishes each tick as one JSON message on the channel of its code.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``; its password is never shown.
        channel: template with `CODE_PLACE`; without it every tick goes to the one channel and carries its ``code``.
        waits: what happens while Redis is away. True: `publish` waits and sends the batch that was under way again,
            so a tick can arrive twice but none is lost that Redis had not taken. False: ticks are dropped and counted.
        warn: takes one line when Redis goes away and one when it is back.

    Raises:
        SettingsError: the URL is none.
    """

    def __init__(self, url: str, channel: str, *, waits: bool, warn: Callable[[str], None]) -> None:
        self.sent = 0
        self.dropped = 0
        self.outages = 0
        self._where = shown_address(url)
        self._channel = channel
        self._waits = waits
        self._warn = warn
        self._reconnecting: asyncio.Task[None] | None = None
        try:
            # One attempt per call: what happens between attempts is decided here, not inside the client.
            self._redis = aioredis.Redis.from_url(
                url,
                retry=Retry(NoBackoff(), 0),
                # The timeout is one per batch, in `_exchange`: with one per answer a tick cost 17 µs on uvloop, not 11.
                socket_timeout=None,
                socket_connect_timeout=_TIMEOUT_S,
            )
        except ValueError:  # its text can hold the password
            raise SettingsError(["--redis: not a Redis address; write redis://[:password@]host:port/0"]) from None

    async def connect(self) -> None:
        """Reach Redis for the first time.

        Raises:
            RedisUnavailable: it does not answer, or refuses us.
            SettingsError: the URL has options that Redis connections do not have.
        """
        try:
            await self._ping()
        except (*_LINK_FAULTS, RedisError) as e:
            raise RedisUnavailable("feed_redis", self._where, _reason_of(e)) from None
        except TypeError:
            raise SettingsError(
                ["--redis: the address has an option that is unknown; leave out what follows its ?"]
            ) from None

    async def publish(self, ticks: Sequence[CodedTick]) -> None:
        """Publish a batch in its order; return when Redis has taken it, or when it was dropped.

        Raises:
            RedisUnavailable: Redis is there and refuses to publish for us.
        """
        messages = self._messages_of(ticks)
        while True:
            if self._reconnecting is not None:
                if not self._waits and not self._reconnecting.done():
                    self.dropped += len(messages)
                    return
                # No timeout: it is tried for ever, and the caller can cancel.
                await asyncio.shield(self._reconnecting)
                self._reconnecting = None
            try:
                await self._exchange_whole(messages)
            except _LINK_FAULTS as e:
                self._lost(e)
            else:
                return

    async def aclose(self) -> None:
        """Stop reconnecting and close the connection."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait({self._reconnecting})
        try:
            await asyncio.wait_for(self._redis.aclose(), _LAST_EXCHANGE_S)
        except (RedisError, OSError):
            pass

    def _messages_of(self, ticks: Sequence[CodedTick]) -> list[tuple[str, bytes]]:
        before, place, after = self._channel.partition(CODE_PLACE)
        if place:
            return [(before + code + after, orjson.dumps(tick)) for code, tick in ticks]
        return [(before, orjson.dumps({"code": code, **tick})) for code, tick in ticks]

    async def _exchange_whole(self, messages: list[tuple[str, bytes]]) -> None:
        """Send a batch and have it answered, also when we are cancelled meanwhile: what went out is counted."""
        exchange = asyncio.ensure_future(self._exchange(messages))
        try:
            await asyncio.shield(exchange)
        except asyncio.CancelledError:
            await asyncio.wait({exchange}, timeout=_LAST_EXCHANGE_S)
            exchange.cancel()
            await asyncio.gather(exchange, return_exceptions=True)
            raise

    async def _exchange(self, messages: list[tuple[str, bytes]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for channel, payload in messages:
            pipeline.publish(channel, payload)
        async with asyncio.timeout(_TIMEOUT_S):
            answers = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise RedisUnavailable("feed_redis", self._where, _reason_of(answer))
        self.sent += len(messages)

    def _lost(self, reason: Exception) -> None:
        self.outages += 1
        consequence = "waiting for it" if self._waits else "dropping ticks until it is back"
        self._warn(f"Redis at {self._where} went away ({_reason_of(reason)}); {consequence}")
        self._reconnecting = asyncio.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            # Half of it by chance, so that many feeds do not come back in one moment.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            try:
                await self._ping()
            except (*_LINK_FAULTS, RedisError):
                continue
            dropped = "" if self._waits else f"; {self.dropped:,} ticks dropped so far"
            self._warn(f"Redis at {self._where} is back{dropped}")
            return

    async def _ping(self) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            await self._redis.ping()


def shown_address(url: str) -> str:
    """Return where a Redis URL points to, without user, password and options."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return f"unix:{parts.path}"
        return f"{parts.hostname or '127.0.0.1'}:{parts.port or 6379}"
    except ValueError:
        return "an address that is none"


def _reason_of(error: Exception) -> str:
    """Return what an error says in one line."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {_TIMEOUT_S:g} s"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
