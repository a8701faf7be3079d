"""Messages that wait for users who are away: a list per user in Redis, ``<p>kept:<uid>``, oldest first.

Laws: at most ``most`` newest messages wait for a user, none longer than it says itself (by the clock of Redis); a
message is taken in one atomic step, so that no two nodes ever have the same one. Whoever does not hear whether he has
taken it puts it back.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from quotepush.cluster.commands import ClusterKeys, Kept, decode_kept, encode
from quotepush.cluster.presence import redis_us

__all__ = ["give_back", "keep", "take"]


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


async def take(
    redis: Any, keys: ClusterKeys, users: Sequence[str], most: int, seen: dict[str, list[bytes]] | None = None
) -> Mapping[str, list[Kept]]:
    """Take what waits for these users out of their lists; messages that nobody wants any more are left out.

    Args:
        seen: has, where this fails, what may have been taken; for :func:`give_back`.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    seen = {} if seen is None else seen
    pipeline = redis.pipeline(transaction=False)
    for user in users:
        pipeline.lrange(keys.kept(user), 0, most - 1)
    now_ms = await redis_us(redis) // 1000
    seen.update({user: _texts(found) for user, found in zip(users, await pipeline.execute(), strict=True) if found})
    if not seen:
        return {}
    waited_for = list(seen)
    pipeline = redis.pipeline(transaction=False)
    for user in waited_for:
        pipeline.lpop(keys.kept(user), len(seen[user]))
    answers = await pipeline.execute()
    seen.clear()
    found: dict[str, list[Kept]] = {}
    for count, (user, texts) in enumerate(zip(waited_for, answers, strict=True), 1):
        messages = [decode_kept(text) for text in _texts(texts or ())]
        # Who put one there and did not hear that it was done may have put it there again.
        wanted = {m.id or index: m for index, m in enumerate(messages) if m is not None and m.until > now_ms}
        if wanted:
            found[user] = list(wanted.values())
        if count % 50 == 0:
            await asyncio.sleep(0)
    return found


async def give_back(redis: Any, keys: ClusterKeys, seen: dict[str, list[bytes]], most: int) -> None:
    """Put back what a :func:`take` took whose answer was lost; ``seen`` is empty then.

    Another node may have taken it at that very moment; a connection that had it does not get it again.

    Raises:
        RedisError, OSError: Redis does not answer; ``seen`` has what is left.
    """
    while seen:
        user = next(iter(seen))
        there = set(_texts(await redis.lrange(keys.kept(user), 0, -1)))
        taken = [decode_kept(text) for text in seen[user] if text not in there]
        await keep(redis, keys, user, [m for m in taken if m is not None], most, are_older=True)
        del seen[user]


def _texts(found: Sequence[Any]) -> list[bytes]:
    return [text.encode() if isinstance(text, str) else text for text in found]
