"""Messages that wait for users who are away: a list per user in Redis, ``<p>kept:<uid>``, oldest first.

Laws:

1. At most ``most`` newest messages wait for a user, none longer than it says itself (by the clock of Redis).
2. Whoever removes a message from its user's list has it, so no two nodes deliver the same one.
3. Before that he writes it into his node's own list, ``<p>taken:<node>``, and it stays there until it was delivered or
   waits again: should the node die meanwhile, it waits again. (The lists may lie in different slots of a Redis Cluster,
   so nothing here asks for one atomic step.)
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from redis.exceptions import ResponseError

from quotepush.cluster.commands import (
    ClusterKeys,
    Command,
    Kept,
    Taken,
    decode_kept,
    decode_taken,
    encode,
    node_of,
)
from quotepush.cluster.presence import redis_us

__all__ = ["InHand", "Taker", "keep", "offer"]

_PER_SLICE = 500  # messages that are looked at in one turn of the loop


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


async def offer(
    redis: Any, keys: ClusterKeys, user: str, messages: Sequence[Kept], most: int, *, are_older: bool = False
) -> set[str]:
    """Let messages wait as :func:`keep` does, and tell the nodes where their user is by now; return those nodes.

    Raises:
        RedisError, OSError: Redis does not answer; they wait or not.
    """
    await keep(redis, keys, user, messages, most, are_older=are_older)
    # He may have come while they were on their way.
    nodes = {node_of(fd.decode("utf-8", "replace")) for fd in await redis.smembers(keys.user(user))} - {""}
    for node in nodes:
        await redis.publish(keys.to_node(node), encode(Command(op="collect", user=user)))
    return nodes


class InHand(NamedTuple):
    """A message that this node has to deliver, and its entry in the node's list."""

    message: Kept
    entry: bytes


class Taker:
    """Takes messages out of their users' lists, for a node that delivers them.

    Args:
        redis: a client that answers with bytes.
        most: messages that wait for one user.
        timeout_s: for each answer of Redis.

    Attributes:
        refused: why Redis would not let some messages wait again, which stay in hand; empty: there are none.
    """

    def __init__(self, redis: Any, keys: ClusterKeys, node: str, *, most: int, timeout_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._key = keys.taken(node)
        self._most = most
        self._timeout_s = timeout_s
        self._done: list[bytes] = []  # entries that Redis has yet to remove
        self.refused = ""

    async def take(self, users: Sequence[str]) -> dict[str, list[InHand]]:
        """Take what waits for these users, but for messages that nobody wants any more; :meth:`drop` each in the end.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer; what was taken unheard :meth:`restore` finds.
        """
        async with asyncio.timeout(self._timeout_s):
            now_ms = await redis_us(self._redis) // 1000
            pipeline = self._redis.pipeline(transaction=False)
            for user in users:
                pipeline.lrange(self._keys.kept(user), 0, self._most - 1)
            lists = await pipeline.execute(raise_on_error=False)
        waiting: dict[tuple[str, bytes], InHand | None] = {}
        for user, texts in zip(users, lists, strict=True):
            if isinstance(texts, Exception):
                if str(texts).startswith("WRONGTYPE"):  # it is about this user, and holds no other up
                    continue
                raise texts
            for text in texts:
                message = decode_kept(text)
                waiting[user, text] = (
                    InHand(message, _entry(user, text)) if message is not None and message.until > now_ms else None
                )
                if len(waiting) % _PER_SLICE == 0:
                    await asyncio.sleep(0)
        if not waiting:
            return {}
        async with asyncio.timeout(self._timeout_s):
            pipeline = self._redis.pipeline(transaction=False)
            for each in waiting.values():
                if each is not None:
                    pipeline.rpush(self._key, each.entry)
            await pipeline.execute()  # and then only the other: Redis may refuse these
            pipeline = self._redis.pipeline(transaction=False)
            for user, text in waiting:
                pipeline.lrem(self._keys.kept(user), 0, text)
            removed = await pipeline.execute()
        ours: defaultdict[str, dict[str, InHand]] = defaultdict(dict)
        for ((user, _), each), is_ours in zip(waiting.items(), removed, strict=True):
            if each is None:
                continue
            # Who put one there and did not hear that it was done may have put it there again.
            if is_ours and each.message.id not in ours[user]:
                ours[user][each.message.id or each.entry.hex()] = each
            else:
                self._done.append(each.entry)
        return {user: list(found.values()) for user, found in ours.items() if found}

    def drop(self, entries: Iterable[bytes]) -> None:
        """Messages were delivered, or wait again; :meth:`settle` tells Redis."""
        self._done.extend(entries)

    async def settle(self) -> None:
        """Remove what was dropped.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer; the next call does it.
        """
        done = self._done[:]
        if not done:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for entry in done:
            pipeline.lrem(self._key, 0, entry)
        async with asyncio.timeout(self._timeout_s):
            await pipeline.execute()
        del self._done[: len(done)]

    async def restore(self) -> dict[str, set[str]]:
        """Let wait again what was taken and not dropped; return its users, and the nodes where each is by now.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer; call again.
        """
        await self.settle()
        async with asyncio.timeout(self._timeout_s):
            entries = await self._redis.lrange(self._key, 0, -1)
        messages: defaultdict[str, dict[bytes, bytes]] = defaultdict(dict)  # user to entry to message
        for entry in entries:
            taken = decode_taken(entry)
            if taken is None:
                self.drop([entry])
            else:
                messages[taken.user][entry] = bytes(taken.message)
        nodes = {}
        self.refused = ""
        for user, texts in messages.items():
            try:
                async with asyncio.timeout(self._timeout_s):
                    there = set(await self._redis.lrange(self._keys.kept(user), 0, -1))
                    lost = [decode_kept(text) for text in texts.values() if text not in there]
                    older = [message for message in lost if message is not None]
                    nodes[user] = await offer(self._redis, self._keys, user, older, self._most, are_older=True)
            except ResponseError as e:
                self.refused = str(e)
                continue
            self.drop(texts)
            await self.settle()  # should we be broken off, nobody lets it wait again
        await self.settle()
        return nodes


def _entry(user: str, text: bytes) -> bytes:
    return encode(Taken(user, msgspec.Raw(text)))
