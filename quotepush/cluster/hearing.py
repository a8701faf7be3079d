"""Hearing one channel of Redis until the link is lost."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from redis.asyncio import Redis
from redis.exceptions import RedisError

__all__ = ["hear"]

_GOODBYE_S = 1.0


async def hear(redis: Redis, channel: str) -> AsyncIterator[bytes | None]:
    """Yield None as soon as the channel is heard, and then each message; whoever iterates bounds the first wait.

    Raises:
        RedisError, OSError: the link cannot be made, or is lost.
    """
    pubsub = redis.pubsub()
    is_heard = False
    try:
        await pubsub.subscribe(channel)
        async for message in pubsub.listen():
            if message["type"] == "subscribe":
                if is_heard:  # redis-py has made the link anew by itself; what was said meanwhile is lost
                    raise ConnectionError("the link was lost")
                is_heard = True
                yield None
            elif message["type"] == "message":
                yield message["data"]
    finally:
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(_GOODBYE_S):
                await pubsub.aclose()  # type: ignore[no-untyped-call]
