"""The lives of a node: finding what a dead one left in the registry, and removing exactly that."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol

from redis.asyncio import Redis

from quotepush.cluster.sets import (
    BATCH_FDS,
    MemberKeys,
    RegistryKeys,
    connection_name,
    execute,
    remove_fds,
    scan_page,
    text,
)
from quotepush.store.cluster import ClusterClient

__all__ = ["Told", "cut_connection", "lives_of", "purge", "purge_life", "purge_node"]


async def purge_life(redis: Redis, prefix: str, node: str, life: str, told: "Told | None" = None) -> int:
    """Remove one dead life of one node: its fds, their place in the sets of codes, codes that nobody watches now.

    The same for their users and groups, before that. It works from the sets alone, and can be cut off anywhere, run
    again, and run by two at a time. Cut the dead worker's connections first (:func:`cut_connection`): Redis may still
    hold commands of it.

    Args:
        told: hears what it finds.

    Returns:
        how many fds were removed, this time.

    Raises:
        RedisError, TimeoutError: Redis did not do it; run it again.
    """
    members = MemberKeys(prefix, node, life)
    keys = RegistryKeys(prefix, node, life)
    if told is None:
        await purge(redis, members)
        return await purge(redis, keys)
    members.told = told.listed
    keys.told = told.wanted
    users: dict[str, str] = {}
    await purge(redis, members, lambda found: users.update(_users_of(found)))
    return await purge(redis, keys, lambda found: told.closed({fd: users.get(fd) for fd in found}))


async def purge_node(
    redis: Redis, prefix: str, node: str, *, keep: Container[str] = (), told: "Told | None" = None
) -> int:
    """Remove all lives of ``node`` but those in ``keep``; otherwise as :func:`purge_life`."""
    lives = await lives_of(redis, prefix, node)
    return sum([await purge_life(redis, prefix, node, life, told) for life in lives if life not in keep])


async def lives_of(redis: Redis, prefix: str, node: str) -> list[str]:
    """Return the lives of a node that have something in the registry.

    Raises:
        RedisError, TimeoutError: Redis does not answer.
    """
    (found,) = await execute(redis, [(1, ("SMEMBERS", RegistryKeys(prefix, node, "").node))])
    return list(dict.fromkeys(text(life).removesuffix(MemberKeys.SUFFIX) for life in found))


class Told(Protocol):
    """Hears of the connections of a dead life, of its users and of its codes."""

    def wanted(self, code: str, is_wanted: bool) -> None:
        """A code has a subscriber somewhere, or has none any more."""

    def listed(self, tag: str, is_listed: bool) -> None:
        """A user or a group (``u:<uid>``, ``g:<group>``) has a connection somewhere, or has none any more."""

    def closed(self, users: Mapping[str, str | None]) -> None:
        """These connections are gone; with each goes its user, as far as that can still be told."""


def _users_of(found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {fd: tag[2:] for fd, tags in found.items() for tag in tags if tag.startswith("u:")}


async def cut_connection(redis: Any, node: str, life: str, client_id: int) -> bool:
    """Close the Redis connection of a dead worker's mirror, with every command of it that Redis has not read yet.

    True if it was still there. An id alone does not name a connection, as Redis counts from 1 again when it restarts;
    the mirror gave its connection a name. A Redis without ``CLIENT LIST ID`` (before 6.2) raises ``ResponseError``.
    In a Redis Cluster the worker has a connection to each node: there they are found by this name alone.
    """
    if isinstance(redis, ClusterClient):
        return await redis.cut(connection_name(node, life))
    entries = await redis.client_list(client_id=[str(client_id)])
    if not any(entry.get("name") == connection_name(node, life) for entry in entries):
        return False
    return bool(await redis.client_kill_filter(_id=str(client_id)))


async def purge(
    redis: Redis, keys: RegistryKeys, removed_with: Callable[[Mapping[str, Sequence[str]]], None] | None = None
) -> int:
    """Remove the life that ``keys`` are of; as :func:`purge_life`.

    Args:
        removed_with: called with fds that were removed and the codes that each had.
    """
    removed = 0
    found = True
    while found:  # a second pass sees what was added while the first went round
        found = False
        cursor = 0
        while True:
            fds: list[str] = []
            while len(fds) < BATCH_FDS:
                cursor, page = await scan_page(redis, keys.life, cursor, 1_000)
                fds.extend(page)
                if not cursor:
                    break
            if fds:
                found = True
                fds = list(dict.fromkeys(fds))  # SSCAN may name one twice
                removed += len(fds)
                codes = await remove_fds(redis, keys, fds)
                if removed_with is not None:
                    removed_with(codes)
            if not cursor:
                break
    await execute(redis, [(1, ("SREM", keys.node, keys.life_name))])
    return removed
