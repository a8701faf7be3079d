"""The registry's sets: what they are called, and how they are read and written.

Both who writes them (:mod:`quotepush.cluster.registry`) and who clears up after the dead
(:mod:`quotepush.cluster.nodes`) go through here. Invariant: whatever is asked, no pipeline is longer than
``SLICE_COMMANDS`` or ``SLICE_MEMBERS``, the loop turns between two of them, and each has ``SLICE_TIMEOUT_S``.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from redis.asyncio import Redis

__all__ = [
    "BATCH_FDS",
    "SLICE_COMMANDS",
    "SLICE_MEMBERS",
    "SLICE_TIMEOUT_S",
    "Codes",
    "Command",
    "MemberKeys",
    "RegistryKeys",
    "codes_of_fds",
    "connection_name",
    "enlist",
    "execute",
    "raw",
    "remove_fds",
    "scan_page",
    "settle",
    "text",
    "with_members",
    "withdraw",
]

# redis-py packs and parses on the loop: about 10 µs a command with its reply and 0.6 µs a further member.
SLICE_COMMANDS = 200
SLICE_MEMBERS = 2_000
SLICE_TIMEOUT_S = 10.0
# A longer batch puts more fds into one command per code; a shorter one bounds what is held twice while it is written.
BATCH_FDS = 10_000


# How many members it carries or brings back, and its arguments.
Command = tuple[int, tuple[Any, ...]]
Codes = tuple[str, ...]


class RegistryKeys:
    """The names of all keys of one worker life.

    Attributes:
        told: called with each code that has come into the set of all codes (True) or has left it (False).
    """

    def __init__(self, prefix: str, node: str, life: str) -> None:
        self.life_name = life
        self.codes = f"{prefix}codes"
        self.demanded = f"{prefix}demanded:{{{self.codes}}}"
        self.node = f"{prefix}node:{node}"
        self.life = f"{prefix}node:{node}:{life}"
        self._code = f"{prefix}code:"
        self._fd = f"{prefix}fd:"
        self.told: Callable[[str, bool], None] | None = None

    def code(self, code: str) -> bytes:
        """Return the set of the fds of a code."""
        return raw(self._code + code)

    def fd(self, fd: str) -> bytes:
        """Return the set of the codes of an fd."""
        return raw(self._fd + fd)

    def all_of_fd(self, fd: str) -> tuple[bytes, ...]:
        """Return every key that goes with an fd."""
        return (self.fd(fd),)


class MemberKeys(RegistryKeys):
    """The same for users and groups, which are written as codes: ``u:<uid>`` and ``g:<group>``.

    ::

        <p>members                                    set     every user and group with a connection anywhere
        <p>user:<uid>  <p>group:<group>               set     its fds
        <p>member:<fd>                                set     the user and the groups of one fd
        <p>conn:<fd>                                  string  user, groups and session data as JSON
        <p>node:<node>                                set     has also <worker>.<start_us>:members
        <p>node:<node>:<worker>.<start_us>:members    set     the fds that have a user, a group or session data
    """

    SUFFIX = ":members"

    def __init__(self, prefix: str, node: str, life: str) -> None:
        super().__init__(prefix, node, life + self.SUFFIX)
        self.codes = f"{prefix}members"
        self._sets = {"u": f"{prefix}user:", "g": f"{prefix}group:"}
        self._fd = f"{prefix}member:"
        self._conn = f"{prefix}conn:"

    def code(self, code: str) -> bytes:
        # What somebody else has put there names no set of ours, nor may it lead to one.
        return raw(self._sets.get(code[:1], self._sets["g"]) + code[2:])

    def conn(self, fd: str) -> bytes:
        """Return the text about an fd."""
        return raw(self._conn + fd)

    def all_of_fd(self, fd: str) -> tuple[bytes, ...]:
        return (self.fd(fd), self.conn(fd))


async def remove_fds(redis: Redis, keys: RegistryKeys, fds: Sequence[str]) -> dict[str, Codes]:
    """Remove these fds wherever their own sets lead; return what those held."""
    lost: defaultdict[str, list[str]] = defaultdict(list)
    # 50: unknown here; few sessions have more codes, and those that do have a thousand at most by default.
    found = await codes_of_fds(redis, keys, [(fd, 50) for fd in fds])
    for count, (fd, codes) in enumerate(found.items(), 1):
        for code in codes:
            lost[code].append(fd)
        if count % 200 == 0:
            await asyncio.sleep(0)
    gone = ((1, ("UNLINK", key)) for fd in fds for key in keys.all_of_fd(fd))
    await withdraw(redis, keys, lost, gone, fds)
    return found


async def withdraw(
    redis: Redis,
    keys: RegistryKeys,
    lost: Mapping[str, Sequence[str]],
    shrunk: Iterable[Command],
    left: Sequence[str],
    *,
    watched: Container[str] = (),
) -> None:
    """Remove, from the found to the finder; each step is in Redis before the next is sent.

    Args:
        lost: the fds to take out of the set of each code.
        shrunk: commands that take codes out of the sets of fds.
        left: fds to take out of the life.
        watched: codes that surely keep a subscriber, so that it need not be asked.
    """
    await execute(
        redis, (command for code, fds in lost.items() for command in with_members("SREM", keys.code(code), fds))
    )
    await settle(redis, keys, [code for code in lost if code not in watched])
    await execute(redis, shrunk)
    await execute(redis, with_members("SREM", keys.life, left))


async def settle(redis: Redis, keys: RegistryKeys, codes: Sequence[str]) -> None:
    """Unlist those of these listed codes that have no fd.

    Another node may do the opposite at the same time: who wrote looks again, until what it wrote is what it sees.
    """
    is_listed = True
    while codes:
        counts = await execute(redis, ((1, ("SCARD", keys.code(code))) for code in codes))
        codes = [code for code, fds in zip(codes, counts, strict=True) if (fds > 0) is not is_listed]
        is_listed = not is_listed
        await enlist(redis, keys, codes, is_listed=is_listed)


async def enlist(redis: Redis, keys: RegistryKeys, codes: Sequence[str], *, is_listed: bool) -> None:
    """Put codes into the set of all codes, or take them out."""
    verb = "SADD" if is_listed else "SREM"
    if keys.told is None:
        await execute(redis, with_members(verb, keys.codes, codes))
        return
    rest = iter(codes)
    while some := list(islice(rest, SLICE_MEMBERS)):
        # Who has changed it has to be known for each, and a command for each costs ten times as much as a question
        # about all: 10,000 connections with 3,000 codes between them are written as fast as without being told, with
        # 100,000 codes it takes a third more CPU. Whoever unlists what is listed now looks again whether it has an fd.
        (flags,) = await execute(redis, with_members("SMISMEMBER", keys.codes, some))
        some = [code for code, flag in zip(some, flags, strict=True) if bool(flag) is not is_listed]
        replies = await execute(redis, ((1, (verb, keys.codes, raw(code))) for code in some))
        for code, has_changed in zip(some, replies, strict=True):
            if has_changed:
                keys.told(code, is_listed)


async def codes_of_fds(redis: Redis, keys: RegistryKeys, fds: Sequence[tuple[str, int]]) -> dict[str, Codes]:
    """What the set of each fd holds; with each goes how many codes it may have."""
    reads = ((1 + expected, ("SMEMBERS", keys.fd(fd))) for fd, expected in fds)
    replies = await execute(redis, reads)
    found: dict[str, Codes] = {}
    for (fd, _), codes in zip(fds, replies, strict=True):
        found[fd] = tuple(map(text, codes))
        if len(found) % 200 == 0:
            await asyncio.sleep(0)
    return found


async def scan_page(redis: Redis, key: str | bytes, cursor: int, count: int) -> tuple[int, list[str]]:
    ((after, members),) = await execute(redis, [(count, ("SSCAN", key, cursor, "COUNT", count))])
    return int(after), [text(member) for member in members]


async def execute(redis: Redis, commands: Iterable[Command]) -> list[Any]:
    """Send the commands in slices of bounded size, with a turn of the loop between them; return all replies.

    Raises:
        RedisError, TimeoutError: at the first slice that failed or was refused; later ones were not sent.
    """
    replies: list[Any] = []
    batch: list[tuple[Any, ...]] = []
    members = 0
    for weight, command in commands:
        if batch and (len(batch) >= SLICE_COMMANDS or members + weight > SLICE_MEMBERS):
            replies += await _execute_slice(redis, batch)
            batch, members = [], 0
            await asyncio.sleep(0)
        batch.append(command)
        members += weight
    if batch:
        replies += await _execute_slice(redis, batch)
        await asyncio.sleep(0)
    return replies


async def _execute_slice(redis: Redis, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    pipeline = redis.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    async with asyncio.timeout(SLICE_TIMEOUT_S):
        replies: list[Any] = await pipeline.execute()
    if task.cancelling() > cancels:
        # With a socket timeout redis-py writes under wait_for; in Python 3.11 that can lose a cancellation (bpo-37658).
        raise asyncio.CancelledError
    return replies


def with_members(verb: str, key: str | bytes, members: Iterable[str]) -> Iterator[Command]:
    """One command for many members, or a few if it would be too long."""
    rest = iter(members)
    while chunk := [raw(member) for member in islice(rest, SLICE_MEMBERS)]:
        yield (len(chunk), (verb, key, *chunk))


def connection_name(node: str, life: str) -> str:
    return f"quotepush:{node}:{life}"


def raw(name: str) -> bytes:
    # The sets may hold what others put there: bytes that are no UTF-8 go through a str unharmed.
    return name.encode("utf-8", "surrogateescape")


def text(name: bytes | str) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
