"""Who is where, as the registry says: connections, users, groups, codes, nodes. It only reads.

Invariant: what belongs to a node that is not alive is not there, and nothing is read in one piece that may be large.
The registry follows the connections within ``registry_interval_s``, and so does what is found here.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import orjson

from quotepush.cluster.commands import ClusterKeys, decode_node, node_of
from quotepush.cluster.line import Line, Words
from quotepush.cluster.pages import Listing, Page, next_cursor, no_cursor, set_cursor
from quotepush.cluster.sets import RegistryKeys, text

__all__ = ["Census", "Node", "Session"]

_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.01, 0.2
_FD = re.compile(r"([A-Za-z0-9-]{1,32})\.(\d{1,6})\.(\d{1,20})\Z")
_LIFE = re.compile(r"(\d+)\.(\d+)\Z")
_LIFE_CURSOR = re.compile(r"([A-Za-z0-9-]{1,32})/(\d+\.\d+)/(\d{1,20})\Z")


class Session(TypedDict):
    """A connection as the registry knows it.

    ``opened`` is in milliseconds, None for a connection without user, group and session data, of which nothing else is
    kept.
    """

    conn: str
    user: str | None
    opened: int | None
    groups: list[str]
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Node:
    """A server that is alive.

    Attributes:
        started: milliseconds.
        version: of its quotepush.
    """

    name: str
    started: int
    version: str
    workers: int


class Census:
    """Reads the registry.

    Every method raises ``BackendUnavailable`` when Redis does not answer in time.
    """

    def __init__(self, line: Line, prefix: str) -> None:
        self._line = line
        self._prefix = prefix
        self._keys = ClusterKeys(prefix)

    # Nodes

    async def nodes(self) -> dict[str, Node]:
        """Return the nodes that are alive, by name."""
        return _alive(*await self._line.ask(*self._ask_nodes()))

    async def conn_counts(self) -> dict[str, int]:
        """Return how many connections each node has."""
        nodes = await self.nodes()
        lives = await self._lives(nodes)
        sizes = await self._line.ask(*(("SCARD", self._registry(*life).life) for life in lives))
        counts = dict.fromkeys(nodes, 0)
        for (node, _), size in zip(lives, sizes, strict=True):
            counts[node] += size
        return counts

    async def code_count(self) -> int:
        """Return how many codes are watched."""
        (count,) = await self._line.ask(("SCARD", self._registry().codes))
        return int(count)

    # One connection

    async def is_online(self, conn: str) -> bool:
        """Say whether a connection is there."""
        match = _FD.match(conn)
        if match is None:
            return False
        node, worker, number = match.groups()
        listed, now, lives = await self._line.ask(*self._ask_nodes(), ("SMEMBERS", self._registry(node).node))
        if node not in _alive(listed, now):
            return False
        # A worker's fds begin with the microsecond of its start.
        mine = [found for found in map(_LIFE.match, map(text, lives)) if found]
        names = [life[0] for life in mine if life[1] == worker and int(life[2]) <= int(number)]
        found = await self._line.ask(*(("SISMEMBER", self._registry(node, name).life, conn) for name in names))
        return any(found)

    async def session(self, conn: str) -> Session:
        """Return what is kept of a connection, without asking whether it is there."""
        (found,) = await self._line.ask(("GET", self._keys.conn(conn)))
        return _session(conn, found)

    async def conn_codes(self, conn: str) -> list[str]:
        """Return the codes that a connection watches."""
        (codes,) = await self._line.ask(("SMEMBERS", self._registry().fd(conn)))
        return sorted(map(text, codes))

    async def wait_for_user(self, conn: str, user: str, timeout_s: float) -> None:
        """Return when the registry has a connection as the user's, or the time is over."""
        await self._wait_for(self._keys.user(user), conn, timeout_s)

    async def wait_for_group(self, conn: str, group: str, timeout_s: float) -> None:
        """Return when the registry has a connection in a group, or the time is over."""
        await self._wait_for(self._keys.group(group), conn, timeout_s)

    # Many connections

    def user_conns(self, user: str) -> Listing[str]:
        """Find the connections of a user."""
        return self._conns(self._keys.user(user))

    def group_conns(self, group: str) -> Listing[str]:
        """Find the connections in a group."""
        return self._conns(self._keys.group(group))

    def code_conns(self, code: str) -> Listing[str]:
        """Find the connections that watch a code, by its canonical spelling."""
        return self._conns(self._registry().code(code))

    async def user_count(self, user: str) -> int:
        """Return how many connections a user has."""
        return await self._count(self._keys.user(user))

    async def group_count(self, group: str) -> int:
        """Return how many connections are in a group."""
        return await self._count(self._keys.group(group))

    async def code_audience(self, code: str) -> int:
        """Return how many connections watch a code, by its canonical spelling."""
        return await self._count(self._registry().code(code))

    def group_sessions(self, group: str) -> Listing[Session]:
        """Find the sessions in a group."""
        conns = self.group_conns(group)

        async def fetch(cursor: str, count: int) -> Page[Session]:
            page = await conns.page(cursor, count)
            return Page(await self._sessions_of(page.items), page.cursor)

        return Listing(fetch, _name_of)

    def sessions(self) -> Listing[Session]:
        """Find the sessions of all nodes."""
        return Listing(self._page_of_sessions, _name_of)

    # Names

    def codes(self) -> Listing[str]:
        """Find the codes that somebody watches."""
        return self._members(self._registry().codes, "")

    def users(self) -> Listing[str]:
        """Find the users who have a connection."""
        return self._members(self._keys.members, "u:")

    def groups(self) -> Listing[str]:
        """Find the groups that have a connection."""
        return self._members(self._keys.members, "g:")

    # Redis

    def _registry(self, node: str = "", life: str = "") -> RegistryKeys:
        return RegistryKeys(self._prefix, node, life)

    def _ask_nodes(self) -> tuple[Words, Words]:
        return ("HGETALL", self._keys.nodes), ("TIME",)

    async def _lives(self, nodes: Iterable[str]) -> list[tuple[str, str]]:
        """The lives of these nodes' workers, in order."""
        names = sorted(nodes)
        found = await self._line.ask(*(("SMEMBERS", self._registry(node).node) for node in names))
        lives = zip(names, found, strict=True)
        return sorted((node, life) for node, some in lives for life in map(text, some) if _LIFE.match(life))

    async def _wait_for(self, key: str, conn: str, timeout_s: float) -> None:
        pause_s = _FIRST_LOOK_S
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    (is_there,) = await self._line.ask(("SISMEMBER", key, conn))
                    if is_there:
                        return
                    await asyncio.sleep(pause_s)
                    pause_s = min(_SLOWEST_LOOK_S, pause_s * 1.5)
        except TimeoutError:  # it lags, or the connection has gone
            return

    def _conns(self, key: str | bytes) -> Listing[str]:
        async def fetch(cursor: str, count: int) -> Page[str]:
            at = set_cursor(cursor)
            nodes, now, page = await self._line.ask(*self._ask_nodes(), ("SSCAN", key, at, "COUNT", count))
            after, members = page
            alive = _alive(nodes, now)
            conns = tuple(conn for conn in map(text, members) if node_of(conn) in alive)
            return Page(conns, next_cursor(after))

        return Listing(fetch, str)

    async def _count(self, key: str | bytes) -> int:
        nodes, now, size = await self._line.ask(*self._ask_nodes(), ("SCARD", key))
        if len(nodes) == len(_alive(nodes, now)) or not size:
            return int(size)
        return len(await self._conns(key))  # connections of a dead node are none

    def _members(self, key: str, kind: str) -> Listing[str]:
        async def fetch(cursor: str, count: int) -> Page[str]:
            at = set_cursor(cursor)
            match = ("MATCH", f"{kind}*") if kind else ()
            ((after, members),) = await self._line.ask(("SSCAN", key, at, *match, "COUNT", count))
            return Page(tuple(text(member).removeprefix(kind) for member in members), next_cursor(after))

        return Listing(fetch, str)

    async def _page_of_sessions(self, cursor: str, count: int) -> Page[Session]:
        """A page of as many lives as it takes; its cursor is ``node/life/cursor of the set``."""
        match = _LIFE_CURSOR.match(cursor)
        if cursor and match is None:
            raise no_cursor(cursor)
        here, at = ((match[1], match[2]), match[3]) if match else (("", ""), "0")
        conns: list[str] = []
        following = ""
        for life in await self._lives(await self.nodes()):
            if life < here:
                continue
            if len(conns) >= count:
                following = f"{life[0]}/{life[1]}/0"
                break
            ((after, members),) = await self._line.ask(
                ("SSCAN", self._registry(*life).life, at if life == here else "0", "COUNT", count - len(conns))
            )
            conns += map(text, members)
            if after := next_cursor(after):
                following = f"{life[0]}/{life[1]}/{after}"
                break
        return Page(await self._sessions_of(conns), following)

    async def _sessions_of(self, conns: Iterable[str]) -> tuple[Session, ...]:
        names = list(conns)
        found = await self._line.ask(*(("GET", self._keys.conn(conn)) for conn in names))
        return tuple(_session(conn, kept) for conn, kept in zip(names, found, strict=True))


def _alive(listed: Mapping[bytes, bytes], now: tuple[int, int]) -> dict[str, Node]:
    """Those of the listed nodes that have renewed their entry of late, by the clock of Redis."""
    now_ms = now[0] * 1000 + now[1] // 1000
    found = {}
    for name, said in listed.items():
        record = decode_node(said)
        if record is not None and record.is_alive(now_ms):
            node = text(name)
            found[node] = Node(node, record.started, record.version, record.workers)
    return found


def _session(conn: str, kept: bytes | None) -> Session:
    found = _object(kept)
    return {
        "conn": conn,
        "user": found.get("user"),
        "opened": found.get("opened"),
        "groups": sorted(found.get("groups", ())),
        "data": found.get("data", {}),
    }


def _object(said: bytes | None) -> dict[str, Any]:
    """What a key holds as a JSON object; what others have put there is none."""
    try:
        found = orjson.loads(said or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _name_of(session: Session) -> str:
    return session["conn"]
