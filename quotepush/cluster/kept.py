"""Messages that wait for users who are away: a list per user in Redis, ``<p>kept:<uid>``, oldest first.

Laws: at most ``most`` newest messages wait for a user, none longer than it says itself (by the clock of Redis); a
message is taken in one atomic step, so that no two nodes ever have the same one.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from quotepush.cluster.commands import ClusterKeys, Kept, decode_kept, encode
from quotepush.cluster.presence import redis_us

__all__ = ["keep", "take"]


async def keep(
    redis: Any, keys: ClusterKeys, user: str, messages: Sequence[Kept], most: int, *, are_older: bool = False
) -> None:
    """Let messages wait for a user, behind those that do; with ``are_older`` before them.

    Raises:
        RedisError, OSError: Redis does not take them.
    """
    if not messages:
        return
    key = keys.kept(user)
    texts = [encode(message) for message in messages]
    pipeline = redis.pipeline(transaction=False)
    if are_older:
        pipeline.lpush(key, *reversed(texts))
    else:
        pipeline.rpush(key, *texts)
    pipeline.ltrim(key, -most, -1)
    pipeline.pttl(key)
    *_, left_ms = await pipeline.execute()
    needed_ms = max(message.until for message in messages) - await redis_us(redis) // 1000
    if needed_ms > left_ms:  # below 0: the list has no end yet
        await redis.pexpire(key, needed_ms)
    elif left_ms < 0:  # they have waited too long already
        await redis.pexpire(key, 1)


async def take(redis: Any, keys: ClusterKeys, users: Sequence[str], most: int) -> Mapping[str, list[Kept]]:
    """Take what waits for these users out of their lists; messages that nobody wants any more are left out.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    pipeline = redis.pipeline(transaction=False)
    for user in users:
        pipeline.lpop(keys.kept(user), most)
    now_ms = await redis_us(redis) // 1000
    found: dict[str, list[Kept]] = {}
    for count, (user, texts) in enumerate(zip(users, await pipeline.execute(), strict=True), 1):
        messages = [decode_kept(text.encode() if isinstance(text, str) else text) for text in texts or ()]
        # Who put one there and did not hear that it was done may have put it there again.
        wanted = {m.id or index: m for index, m in enumerate(messages) if m is not None and m.until > now_ms}
        if wanted:
            found[user] = list(wanted.values())
        if count % 50 == 0:
            await asyncio.sleep(0)
    return found
