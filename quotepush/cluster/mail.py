"""Kept commands for a node: a stream in Redis, ``<p>inbox:<node>``, and where those go that it cannot carry out.

Law: a message for users stays in the inbox until it was carried out or waits in their lists (:mod:`cluster.kept`);
whoever puts it there says so where they are by then. Ages are by the clock of Redis.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from quotepush.cluster.commands import (
    BadCommand,
    ClusterKeys,
    Command,
    Kept,
    To,
    encode,
    parse_command,
)
from quotepush.cluster.kept import Taker, offer
from quotepush.cluster.presence import redis_us

__all__ = ["Mail", "move_mail", "put_back"]

log = logging.getLogger("quotepush.main")

_PAGE = 100


class Mail:
    """The inbox of a node.

    Args:
        ttl_s: how long a command waits that says nothing itself.
    """

    def __init__(self, redis: Any, keys: ClusterKeys, node: str, *, ttl_s: int, timeout_s: float) -> None:
        self._redis = redis
        self._key = keys.inbox(node)
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._now_ms = 0
        self._done: list[bytes] = []  # entries that Redis has yet to remove

    async def page(self, after: bytes, count: int) -> list[tuple[bytes, bytes]]:
        """Return the next entries: id and text.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        async with asyncio.timeout(self._timeout_s):
            page = await self._redis.xrange(self._key, min=after, max="+", count=count)
            if page:
                self._now_ms = await redis_us(self._redis) // 1000
        return [(entry, fields.get(b"c", b"")) for entry, fields in page]

    def command(self, entry: bytes, text: bytes) -> Command | None:
        """Return the command of an entry of the last page; None: nobody wants it any more.

        Raises:
            BadCommand: it is none.
        """
        command = parse_command(text)
        sent = command.sent or int(entry.partition(b"-")[0])
        until = command.until or sent + 1000 * self._ttl_s
        if until <= self._now_ms:
            return None
        return msgspec.structs.replace(command, keep=True, id=command.id or entry.decode(), sent=sent, until=until)

    async def add(self, command: Command) -> None:
        """Put a command behind the others.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not take it.
        """
        async with asyncio.timeout(self._timeout_s):
            await self._redis.xadd(self._key, {"c": encode(command)})

    async def is_wanted(self, entry: bytes, command: Command) -> bool:
        """Say whether an entry is still there, and not too old.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer.
        """
        async with asyncio.timeout(self._timeout_s):
            is_there = bool(await self._redis.xrange(self._key, min=entry, max=entry))
            return is_there and command.until > await redis_us(self._redis) // 1000

    async def remove(self, entries: Sequence[bytes]) -> None:
        """Remove these, and those that Redis would not remove before.

        Raises:
            RedisError, OSError, TimeoutError: Redis does not answer; the next call does it.
        """
        self._done.extend(entries)
        if self._done:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.xdel(self._key, *self._done)
            self._done.clear()


async def put_back(
    redis: Any, keys: ClusterKeys, command: Command, users: Sequence[str], kept_max: int, timeout_s: float
) -> tuple[set[str], dict[str, str]]:
    """Let a message wait for these users.

    Args:
        timeout_s: for each user.

    Returns:
        the nodes where they are by now, and those of the users for whom Redis will not let it wait, with its reason.

    Raises:
        RedisError, OSError, TimeoutError: Redis does not answer; some of them may have it.
    """
    message = Kept(command.sent, command.until, command.data, command.encoding, command.raw, command.sender, command.id)
    nodes: set[str] = set()
    refused: dict[str, str] = {}
    for user in users:
        try:
            async with asyncio.timeout(timeout_s):
                nodes |= await offer(redis, keys, user, [message], kept_max)
        except ResponseError as e:  # it may be about this one only
            refused[user] = str(e)
    return nodes, refused


async def move_mail(
    redis: Any, keys: ClusterKeys, node: str, *, kept_max: int, kept_ttl_s: int, timeout_s: float
) -> int:
    """Empty what a life that is dead has left: messages for users wait for them, the rest is nobody's any more.

    Messages that Redis will not let wait stay, and hold no other up.

    Returns:
        how many messages of its inbox wait now.

    Raises:
        RedisError, OSError, TimeoutError: Redis does not answer; call again.
    """
    taker = Taker(redis, keys, node, most=kept_max, timeout_s=timeout_s)
    await taker.restore()  # these are older
    mail = Mail(redis, keys, node, ttl_s=kept_ttl_s, timeout_s=timeout_s)
    moved = 0
    stays: set[bytes] = set()
    after = b"-"
    while page := await mail.page(after, _PAGE):
        after = b"(" + page[-1][0]
        for entry, text in page:
            command = _wanted(mail, entry, text)
            if command is None or command.to is None or not command.to.users:
                continue
            _, refused = await put_back(redis, keys, command, command.to.users, kept_max, timeout_s)
            if refused.keys() == set(command.to.users):
                stays.add(entry)
                continue
            if refused:  # for them it stays, behind the others
                await mail.add(msgspec.structs.replace(command, to=To(users=list(refused))))
            await mail.remove([entry])  # should we be broken off, nobody puts it back again
            moved += 1
        await mail.remove([entry for entry, _ in page if entry not in stays])
    if stays or taker.refused:
        log.warning("inbox: Redis refuses to let some messages of %s wait for their users; they stay with it", node)
    return moved


def _wanted(mail: Mail, entry: bytes, text: bytes) -> Command | None:
    try:
        return mail.command(entry, text)
    except BadCommand:
        return None
