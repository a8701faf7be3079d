"""How a feed publishes: into the log that loses nothing, or plainly, one ``PUBLISH`` per tick.

`TickPublisher` is what a feed needs of a publisher, whatever it does with the ticks. `LoggedPublisher` and
`PlainPublisher` hold one batch and nothing else, so their memory is bounded by their caller's batches. While Redis is
away they drop ticks or wait, as they were told, and come back by themselves.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from quotepush.errors import RedisUnavailable, SettingsError, reason_of
from quotepush.feed.replay import CodedTick
from quotepush.publisher import Publisher
from quotepush.quote.tick import BadTick
from quotepush.store.address import shown_address
from quotepush.store.clients import Store

__all__ = ["CODE_PLACE", "LoggedPublisher", "PlainPublisher", "TickPublisher"]

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

    async def publish(self, ticks: Sequence[CodedTick]) -> list[int]:
        """Publish a batch in its order; return when it was taken, with a number for each tick, or when it was dropped.

        The number is what this way of publishing has to say of a tick: its ``seq``, or how many subscribers it had.
        """

    async def aclose(self) -> None:
        """Let go of the connection."""


class LoggedPublisher:
    """Publishes through a `Publisher`: numbered, kept, logged, and once.

    Args:
        url: in any form of docs/operations.md ("Which Redis"); its password is never shown.
        prefix: the server's ``redis_prefix``.
        waits: what happens while Redis is away. True: `publish` waits. False: ticks are dropped and counted; only the
            batch that was under way waits by itself.
        warn: takes one line when Redis goes away and one when it is back.
        give_up_s: raise after so long without Redis; None: never.

    Raises:
        SettingsError: the URL is none, or has options that Redis connections do not have.
    """

    def __init__(
        self, url: str, prefix: str, *, waits: bool, warn: Callable[[str], None], give_up_s: float | None = None
    ) -> None:
        self.sent = 0
        self.dropped = 0
        self.outages = 0
        self._where = shown_address(url)
        self._waits = waits
        self._warn = warn
        self._under_way: asyncio.Task[list[int]] | None = None
        self._left: asyncio.Future[None] | None = None  # done: `publish` does not wait for its batch any longer
        self._is_away = False
        try:
            self._publisher = Publisher(url, prefix=prefix, give_up_s=give_up_s, on_link=self._note_link)
        except SettingsError as e:
            raise _of_flag(e) from None

    async def connect(self) -> None:
        """Reach Redis for the first time.

        Raises:
            RedisUnavailable: it does not answer, or refuses us.
        """
        await self._publisher.connect()

    async def publish(self, ticks: Sequence[CodedTick]) -> list[int]:
        """Publish a batch in its order; return the ``seq`` of each tick, or nothing when it was dropped.

        Raises:
            RedisUnavailable: Redis refuses for good, or ``give_up_s`` is over.
        """
        if self._under_way is not None:
            if not self._under_way.done():
                self.dropped += len(ticks)
                return []
            self._under_way.result()
            self._under_way = None
        sending = asyncio.create_task(self._send(ticks))
        self._left = asyncio.get_running_loop().create_future()
        ends: set[asyncio.Future[Any]] = {sending, self._left}
        try:
            # No timeout: it is tried for ever, and the caller can cancel.
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=0 if self._is_away else _LAST_EXCHANGE_S)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            raise
        if sending.done():
            return sending.result()
        self._under_way = sending
        return []

    async def aclose(self) -> None:
        """Give up the batch that is under way, and let go of the connection."""
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.gather(self._under_way, return_exceptions=True)
        await self._publisher.aclose()

    async def _send(self, ticks: Sequence[CodedTick]) -> list[int]:
        batch = [{**tick, "code": code} for code, tick in ticks]
        try:
            seqs = await self._publisher.publish(batch)
        except BadTick:  # one of them, or all together are too large: the others must not suffer
            seqs = []
            for tick in batch:
                try:
                    seqs += await self._publisher.publish([tick])
                except BadTick as e:
                    self._warn(f"a tick of {tick['code']} is refused: {e.message}")
        self.sent += len(seqs)
        return seqs

    def _note_link(self, reason: str) -> None:
        self._is_away = bool(reason)
        if not reason:
            self._warn(_back_line(self._where, self._waits, self.dropped))
            return
        self.outages += 1
        self._warn(_away_line(self._where, self._waits, reason))
        if not self._waits and self._left is not None and not self._left.done():
            self._left.set_result(None)


class PlainPublisher:
    """Publishes each tick as one JSON message on the channel of its code.

    Args:
        url: in any form of docs/operations.md ("Which Redis"); its password is never shown.
        channel: template with `CODE_PLACE`; without it every tick goes to the one channel and carries its ``code``.
        waits: what happens while Redis is away. True: `publish` waits and sends the batch that was under way again,
            so a tick can arrive twice but none is lost that Redis had not taken. False: ticks are dropped and counted.
        warn: takes one line when Redis goes away and one when it is back.

    Raises:
        SettingsError: the URL is none, or has options that Redis connections do not have.
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
            # The timeout is one per batch, in `_exchange`: with one per answer a tick cost 17 µs on uvloop, not 11.
            store = Store(url, timeout_s=_TIMEOUT_S)
            self._redis = store.client()
            self.counts_hearers = not store.is_cluster  # where each node counts its own
        except SettingsError as e:
            raise _of_flag(e) from None

    async def connect(self) -> None:
        """Reach Redis for the first time.

        Raises:
            RedisUnavailable: it does not answer, or refuses us.
        """
        try:
            await self._ping()
        except (*_LINK_FAULTS, RedisError) as e:
            raise RedisUnavailable("feed_redis", self._where, reason_of(e, _TIMEOUT_S)) from None

    async def publish(self, ticks: Sequence[CodedTick]) -> list[int]:
        """Publish a batch in its order; return how many subscribers each tick had, or nothing when it was dropped.

        Raises:
            RedisUnavailable: Redis is there and refuses to publish for us.
        """
        messages = self._messages_of(ticks)
        while True:
            if self._reconnecting is not None:
                if not self._waits and not self._reconnecting.done():
                    self.dropped += len(messages)
                    return []
                # No timeout: it is tried for ever, and the caller can cancel.
                await asyncio.shield(self._reconnecting)
                self._reconnecting = None
            try:
                return await self._exchange_whole(messages)
            except _LINK_FAULTS as e:
                self._lost(e)

    async def aclose(self) -> None:
        """Stop reconnecting and close the connection."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait({self._reconnecting})
        try:
            await asyncio.wait_for(self._redis.aclose(), _LAST_EXCHANGE_S)
        except (RedisError, OSError):
            pass

    def channel_of(self, code: str) -> str:
        """Return the channel that ticks of a code go to."""
        return self._channel.replace(CODE_PLACE, code)

    def _messages_of(self, ticks: Sequence[CodedTick]) -> list[tuple[str, bytes]]:
        before, place, after = self._channel.partition(CODE_PLACE)
        if place:
            return [(before + code + after, orjson.dumps(tick)) for code, tick in ticks]
        return [(before, orjson.dumps({"code": code, **tick})) for code, tick in ticks]

    async def _exchange_whole(self, messages: list[tuple[str, bytes]]) -> list[int]:
        """Send a batch and have it answered, also when we are cancelled meanwhile: what went out is counted."""
        exchange = asyncio.ensure_future(self._exchange(messages))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            await asyncio.wait({exchange}, timeout=_LAST_EXCHANGE_S)
            exchange.cancel()
            await asyncio.gather(exchange, return_exceptions=True)
            raise

    async def _exchange(self, messages: list[tuple[str, bytes]]) -> list[int]:
        pipeline = self._redis.pipeline(transaction=False)
        for channel, payload in messages:
            pipeline.publish(channel, payload)
        async with asyncio.timeout(_TIMEOUT_S):
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise RedisUnavailable("feed_redis", self._where, reason_of(answer, _TIMEOUT_S))
        self.sent += len(messages)
        return answers

    def _lost(self, reason: Exception) -> None:
        self.outages += 1
        self._warn(_away_line(self._where, self._waits, reason_of(reason, _TIMEOUT_S)))
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
            self._warn(_back_line(self._where, self._waits, self.dropped))
            return

    async def _ping(self) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            await self._redis.ping()


def _of_flag(error: SettingsError) -> SettingsError:
    return SettingsError([f"--redis: {fault}" for fault in error.faults])


def _away_line(where: str, waits: bool, reason: str) -> str:
    return f"Redis at {where} went away ({reason}); {'waiting for it' if waits else 'dropping ticks until it is back'}"


def _back_line(where: str, waits: bool, dropped: int) -> str:
    return f"Redis at {where} is back" + ("" if waits else f"; {dropped:,} ticks dropped so far")
