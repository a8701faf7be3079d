"""The registry in Redis against the connections that there truly are."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.support.waiting import wait_until

# What publishers and main keep beside the registry: the log of ticks, rows, the nodes, what waits for them, and what
# was told of demand.
_OF_TICKS = ("epoch", "seq", "log", "publisher:", "row:", "rows", "nodes", "inbox:", "kept:", "demanded:")
_MEMBERS = ":members"

__all__ = ["registry_equals", "registry_faults"]


async def registry_faults(
    redis: Redis,
    connections: Mapping[str, Set[str]],
    members: Mapping[str, Set[str]] | None = None,
    *,
    nodes: Sequence[str] = ("test",),
    prefix: str = "qp:",
) -> list[str]:
    """Return every difference between the registry and ``connections`` (fd to its codes), one line each.

    Args:
        redis: a client that answers with ``str``.
        members: the fds with a user, a group or session data, and the first two as ``u:<uid>`` and ``g:<group>``.
        nodes: whose connections they are; nobody else's may be there.
    """
    faults: list[str] = []
    of_ticks = tuple(prefix + name for name in _OF_TICKS)
    keys = {key async for key in redis.scan_iter(f"{prefix}*", count=1000) if not key.startswith(of_ticks)}
    audience: defaultdict[str, set[str]] = defaultdict(set)
    for fd, codes in connections.items():
        for code in codes:
            audience[code].add(fd)

    async def held(key: str) -> set[str]:
        keys.discard(key)
        return set(await redis.smembers(key))

    def compare(what: str, found: Set[str], true: Set[str]) -> None:
        if stale := sorted(found - true):
            faults.append(f"{what}: {len(stale)} too many: {' '.join(stale[:3])}")
        if lacking := sorted(true - found):
            faults.append(f"{what}: {len(lacking)} missing: {' '.join(lacking[:3])}")

    compare("codes", await held(f"{prefix}codes"), audience.keys())
    for code, fds in audience.items():
        compare(f"code:{code}", await held(f"{prefix}code:{code}"), fds)
    for fd, codes in connections.items():
        compare(f"fd:{fd}", await held(f"{prefix}fd:{fd}"), codes)
    of_tag: defaultdict[str, set[str]] = defaultdict(set)
    for fd, tags in (members or {}).items():
        for tag in tags:
            of_tag[tag].add(fd)
        compare(f"member:{fd}", await held(f"{prefix}member:{fd}"), tags)
        if f"{prefix}conn:{fd}" not in keys:
            faults.append(f"conn:{fd} is missing")
        keys.discard(f"{prefix}conn:{fd}")
    compare("members", await held(f"{prefix}members"), of_tag.keys())
    for tag, fds in of_tag.items():
        name = f"{'user' if tag[0] == 'u' else 'group'}:{tag[2:]}"
        compare(name, await held(f"{prefix}{name}"), fds)
    for node in nodes:
        of_node = {fd for fd in connections if fd.startswith(f"{node}.")}
        lives = await held(f"{prefix}node:{node}")
        followed: set[str] = set()
        for life in {life for life in lives if life.endswith(_MEMBERS)}:
            lives.discard(life)
            followed |= await held(f"{prefix}node:{node}:{life}")
        compare(f"the members of {node}", followed, of_node & (members or {}).keys())
        workers = [life.partition(".")[0] for life in lives]
        if len(workers) != len(set(workers)):
            faults.append(f"node:{node}: two lives of one worker: {' '.join(sorted(lives))}")
        found: set[str] = set()
        for life in lives:
            found |= await held(f"{prefix}node:{node}:{life}")
        compare(f"the lives of {node}", found, of_node)
    if keys:
        faults.append(f"{len(keys)} keys too many: {' '.join(sorted(keys)[:3])}")
    return faults


async def registry_equals(
    redis: Redis,
    connections: Mapping[str, Set[str]],
    members: Mapping[str, Set[str]] | None = None,
    *,
    nodes: Sequence[str] = ("test",),
    prefix: str = "qp:",
    timeout_s: float = 15.0,
) -> None:
    """Wait until the registry equals ``connections``; say how it differs when it does not."""
    faults: list[str] = []

    async def is_equal() -> bool:
        try:
            faults[:] = await registry_faults(redis, connections, members, nodes=nodes, prefix=prefix)
        except RedisError as e:  # it has just come back
            faults[:] = [f"Redis: {e}"]
        return not faults

    try:
        await wait_until(is_equal, timeout_s)
    except AssertionError:
        raise AssertionError("the registry differs from the connections:\n" + "\n".join(faults)) from None
