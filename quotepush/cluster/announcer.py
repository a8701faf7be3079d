"""Who comes and goes, told on a channel of Redis to whoever wants to know.

Law: nothing waits for who hears it, or for Redis. What it does not take in time is dropped and counted: these are
news, and the sets say what is true.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from redis.exceptions import RedisError

__all__ = ["Announcer", "event_text"]

log = logging.getLogger("quotepush.main")

_MAX_WAITING = 20_000
_PER_SLICE = 200


def event_text(
    event: str, time_ms: int, *, fd: str | None = None, uid: str | None = None, by: str = "", reason: str = ""
) -> bytes:
    """Return an event as its hearers get it.

    Args:
        event: ``open``, ``close``, ``user_online`` or ``user_offline``.
        by: of ``close``: ``client``, ``server`` or ``network``.
    """
    said: dict[str, Any] = {"event": event}
    if fd is not None:
        said["fd"] = fd
    said["uid"] = uid
    if by:
        said |= {"by": by, "reason": reason}
    said["time"] = time_ms
    return orjson.dumps(said)


class Announcer:
    """Publishes events.

    Args:
        clock_ms: epoch milliseconds.

    Attributes:
        told: events that Redis has taken.
        dropped: events that it has not.
    """

    def __init__(self, redis: Any, channel: str, *, clock_ms: Any, timeout_s: float) -> None:
        self._redis = redis
        self._channel = channel
        self._clock_ms = clock_ms
        self._timeout_s = timeout_s
        self._waiting: deque[bytes] = deque()
        self._has_waiting = asyncio.Event()
        self.told = 0
        self.dropped = 0

    def happened(self, events: Iterable[bytes]) -> None:
        """Tell these, soon."""
        for event in events:
            if len(self._waiting) >= _MAX_WAITING:
                self.dropped += 1
            else:
                self._waiting.append(event)
        self._has_waiting.set()

    # What a purge finds (``cluster.nodes.Told``)

    def listed(self, tag: str, is_listed: bool) -> None:
        """Tell that a user has come or gone; of groups nobody wants to know."""
        if tag.startswith("u:"):
            event = "user_online" if is_listed else "user_offline"
            self.happened([event_text(event, self._clock_ms(), uid=tag[2:])])

    def closed(self, users: Mapping[str, str | None]) -> None:
        """Tell that connections of a dead life are gone."""
        now_ms = self._clock_ms()
        self.happened(
            event_text("close", now_ms, fd=fd, uid=user, by="server", reason="died") for fd, user in users.items()
        )

    async def run(self) -> None:
        """Publish until cancelled."""
        is_well = True
        while True:
            await self._has_waiting.wait()
            self._has_waiting.clear()
            try:
                await self.flush()
                is_well = True
            except (RedisError, OSError, TimeoutError) as e:
                if is_well:
                    log.warning("events are not told: %s", str(e) or type(e).__name__)
                is_well = False

    async def flush(self) -> None:
        """Publish what waits.

        Raises:
            RedisError, OSError, TimeoutError: some of it is dropped.
        """
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(_PER_SLICE, len(self._waiting)))]
            pipeline = self._redis.pipeline(transaction=False)
            for text in some:
                pipeline.publish(self._channel, text)
            try:
                async with asyncio.timeout(self._timeout_s):
                    await pipeline.execute()
            except (RedisError, OSError, TimeoutError):
                self.dropped += len(some)
                raise
            self.told += len(some)
