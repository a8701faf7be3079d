"""The lives of a node: finding what a dead one left in the registry, and removing exactly that."""

from collections.abc import Container

from redis.asyncio import Redis

from quotepush.cluster.sets import BATCH_FDS, RegistryKeys, connection_name, execute, remove_fds, scan_page, text

__all__ = ["cut_connection", "purge", "purge_life", "purge_node"]


async def purge_life(redis: Redis, prefix: str, node: str, life: str) -> int:
    """Remove one dead life of one node: its fds, their place in the sets of codes, codes that nobody watches now.

    It works from the sets alone, and can be cut off anywhere, run again, and run by two at a time. Cut the dead
    worker's connection first (:func:`cut_connection`): Redis may still hold commands of it.

    Returns:
        how many fds were removed, this time.

    Raises:
        RedisError, TimeoutError: Redis did not do it; run it again.
    """
    return await purge(redis, RegistryKeys(prefix, node, life))


async def purge_node(redis: Redis, prefix: str, node: str, *, keep: Container[str] = ()) -> int:
    """Remove all lives of ``node`` but those in ``keep``; otherwise as :func:`purge_life`."""
    (lives,) = await execute(redis, [(1, ("SMEMBERS", RegistryKeys(prefix, node, "").node))])
    return sum([await purge_life(redis, prefix, node, life) for life in map(text, lives) if life not in keep])


async def cut_connection(redis: Redis, node: str, life: str, client_id: int) -> bool:
    """Close the Redis connection of a dead worker's mirror, with every command of it that Redis has not read yet.

    True if it was still there. An id alone does not name a connection, as Redis counts from 1 again when it restarts;
    the mirror gave its connection a name. A Redis without ``CLIENT LIST ID`` (before 6.2) raises ``ResponseError``.
    """
    entries = await redis.client_list(client_id=[str(client_id)])
    if not any(entry.get("name") == connection_name(node, life) for entry in entries):
        return False
    return bool(await redis.client_kill_filter(_id=str(client_id)))


async def purge(redis: Redis, keys: RegistryKeys) -> int:
    """Remove the life that ``keys`` are of; as :func:`purge_life`."""
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
                await remove_fds(redis, keys, fds)
            if not cursor:
                break
    await execute(redis, [(1, ("SREM", keys.node, keys.life_name))])
    return removed
