"""A publisher that goes on whatever happens to its Redis, and knows the newest tick of each code."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tests.support.waiting import wait_until

__all__ = ["SteadyFeed", "publish", "steady_feed"]

_TURN_S = 0.02


class SteadyFeed:
    """Publishes ticks of its codes in turn; the price of each differs from the one before.

    Args:
        rate_per_s: ticks a second in all.
        padding: more fields of each tick, to make rows longer.

    Each tick says in ``sent_us`` when it was published, by :func:`time.time_ns`.

    Attributes:
        codes: may grow meanwhile.
        published: ticks that Redis has taken.
        published_of: the same by code.
        newest: code to the price last published.
    """

    def __init__(
        self, redis_url: str, codes: Sequence[str], rate_per_s: float = 500.0, padding: dict[str, Any] | None = None
    ) -> None:
        self._redis = Redis.from_url(
            redis_url, socket_timeout=20, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
        )
        self.codes = list(codes)
        self._rate_per_s = rate_per_s
        self._padding = padding or {}
        self._count = 0
        self._is_stopped = False
        self._ended = asyncio.Event()
        self.published = 0
        self.published_of: Counter[str] = Counter()
        self.newest: dict[str, float] = {}

    async def run(self) -> None:
        """Publish until :meth:`stop`."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        owed = 0.0
        while not self._is_stopped:
            owed += self._rate_per_s * _TURN_S
            batch, owed = int(owed), owed % 1
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self._publish([self.codes[(self._count + n) % len(self.codes)] for n in range(batch)])
            due = max(due + _TURN_S, loop.time() - 0.1)
            await asyncio.sleep(max(0.0, due - loop.time()))
        self._ended.set()

    async def stop(self) -> None:
        """End :meth:`run`; from now on ``newest`` stands still."""
        self._is_stopped = True
        await self._ended.wait()

    async def finish(self) -> dict[str, float]:
        """Stop, and publish one more tick of every code, until a subscriber is there for each; return the prices."""
        await self.stop()

        async def is_heard() -> bool:
            try:
                return all(await self._publish(self.codes))
            except (RedisError, OSError):
                return False

        await wait_until(is_heard, what="somebody has subscribed")
        return self.newest

    async def _publish(self, codes: Sequence[str]) -> list[int]:
        """Return how many subscribers Redis gave each tick to."""
        if not codes:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        said: dict[str, float] = {}
        sent_us = time.time_ns() // 1000
        for code in codes:
            self._count += 1
            said[code] = self._count / 100
            tick = {"last": said[code], "volume": self._count, "sent_us": sent_us, **self._padding}
            pipeline.publish(f"quote.{code}", orjson.dumps(tick))
        subscribers: list[int] = await pipeline.execute()
        self.newest |= said
        self.published += len(codes)
        self.published_of.update(codes)
        return subscribers

    async def aclose(self) -> None:
        await self._redis.aclose()


@contextlib.asynccontextmanager
async def steady_feed(
    redis_url: str, codes: Sequence[str], rate_per_s: float = 500.0, padding: dict[str, Any] | None = None
) -> AsyncIterator[SteadyFeed]:
    """Publish in the background."""
    feed = SteadyFeed(redis_url, codes, rate_per_s, padding)
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        await feed.stop()
        await task
        await feed.aclose()


async def publish(redis: Redis, code: str, **fields: Any) -> int:
    """Publish one plain tick; return how many subscribers Redis gave it to."""
    return int(await redis.publish(f"quote.{code}", orjson.dumps(fields)))
