"""Whoever the sentinels call the master now.

Laws:

1. Each connection asks the sentinels anew, by whichever way redis-py makes it, and is with a server that says itself
   that it is what was looked for.
2. No sentinel is trusted for being the first: all are asked at once, and what more than half of them say counts, or
   else the newest of their answers.
3. An answer "read-only" of a master ends the connection: it is none any more.

Of redis-py's own Sentinel support nothing is used: it asks one after another, where one that hangs holds all up, it
takes the first answer, and a command on a lost connection goes to the old address without asking.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import Connection as BlockingConnection
from redis.connection import SSLConnection as BlockingSSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.retry import Retry as BlockingRetry

from quotepush.store.address import Address, Place

__all__ = [
    "BlockingFoundConnection",
    "BlockingFoundSSLConnection",
    "Finder",
    "FoundConnection",
    "FoundSSLConnection",
    "WatchfulPool",
    "log_in",
]

_MOST_WAIT_S = 1.0  # for the answers of all sentinels together
_LOOK_S = 10.0  # how often a pool in use asks whether the master is still the same
_DOWN = ("s_down", "o_down", "disconnected")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one sentinel says."""

    epoch: int
    master: Place | None  # None: it is down
    replicas: tuple[Place, ...]  # those that follow the master


class Finder:
    """Finds the servers of a service.

    Args:
        address: of the kind ``sentinel``.
        timeout_s: the longest wait for one sentinel.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = min(timeout_s, _MOST_WAIT_S)

    async def master(self) -> Place:
        """Return where the master is.

        Raises:
            RedisConnectionError: no sentinel knows of one now.
        """
        return self._master_of(await self._ask_all(with_replicas=False))

    async def replicas(self) -> tuple[Place, ...]:
        """Return the replicas that follow the master now."""
        seen = [s for s in await self._ask_all(with_replicas=True) if isinstance(s, _Seen)]
        newest = max((s.epoch for s in seen), default=0)
        views = [set(s.replicas) for s in seen if s.epoch == newest]
        return tuple(sorted(set.union(*views))) if views else ()

    def master_blocking(self) -> Place:
        """Do as :meth:`master`, without a loop."""
        seen: list[_Seen | Exception] = []
        kind = BlockingConnection if self._address.tls is None else BlockingSSLConnection
        for place in self._address.places:
            asking: Any = kind(retry=BlockingRetry(NoBackoff(), 0), socket_timeout=self._timeout_s, **self._link(place))
            try:
                asking.connect()
                asking.send_command("SENTINEL", "MASTER", self._address.service)
                seen.append(_seen(asking.read_response(), []))
            except (RedisError, OSError) as e:
                seen.append(e)
            finally:
                asking.disconnect()
        return self._master_of(seen)

    async def _ask_all(self, *, with_replicas: bool) -> "list[_Seen | Exception]":
        """Return what they say, as soon as more than half of them say the same of the master."""
        asked = {asyncio.create_task(self._ask(place, with_replicas)) for place in self._address.places}
        answered: set[asyncio.Task[_Seen | Exception]] = set()
        waiting = asked
        try:
            while waiting:
                # Each of them is bounded.
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answered |= done
                views = [(s.epoch, s.master) for s in (task.result() for task in answered) if isinstance(s, _Seen)]
                if any(views.count(view) > len(asked) / 2 for view in views if view[1] is not None):
                    break
        finally:
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)
        return [task.result() for task in answered]

    async def _ask(self, place: Place, with_replicas: bool) -> "_Seen | Exception":
        # One connection for one question: a sentinel that has come back, or moved, is a new one each time.
        kind = Connection if self._address.tls is None else SSLConnection
        asking: Any = kind(retry=Retry(NoBackoff(), 0), socket_timeout=None, **self._link(place))
        try:
            async with asyncio.timeout(self._timeout_s):
                await asking.connect()
                await asking.send_command("SENTINEL", "MASTER", self._address.service)
                master = await asking.read_response()
                replicas = []
                if with_replicas:
                    await asking.send_command("SENTINEL", "REPLICAS", self._address.service)
                    replicas = await asking.read_response()
            return _seen(master, replicas)
        except (RedisError, OSError) as e:
            return e
        finally:
            await asking.disconnect(nowait=True)

    def _link(self, place: Place) -> dict[str, Any]:
        """Return what a connection to a sentinel is made with."""
        host, port = place
        return {
            "host": host, "port": port, "socket_connect_timeout": self._timeout_s, "protocol": 2,
            **self._address.sentinel_credentials, **(self._address.tls or {}),
        }  # fmt: skip

    def _master_of(self, seen: "list[_Seen | Exception]") -> Place:
        known = [s for s in seen if isinstance(s, _Seen)]
        newest = max((s.epoch for s in known), default=0)
        for found in known:
            if found.epoch == newest and found.master is not None:
                return found.master
        if known:
            raise RedisConnectionError(f"the sentinels know of no master of {self._address.service} that is up")
        reasons = {" ".join(str(e).split()) or "no answer" for e in seen if isinstance(e, Exception)}
        said = "; ".join(sorted(reasons))
        raise RedisConnectionError(f"no sentinel can say where {self._address.service} is: {said}")


def _seen(master: Any, replicas: Any) -> _Seen:
    facts = _facts(master)
    flags = facts.get("flags", "").split(",")
    is_up = "master" in flags and not any(flag in _DOWN for flag in flags)
    return _Seen(
        epoch=int(facts.get("config-epoch", 0)),
        master=(facts["ip"], int(facts["port"])) if is_up else None,
        replicas=tuple(
            (one["ip"], int(one["port"]))
            for one in map(_facts, replicas)
            if one.get("master-link-status") == "ok" and not any(flag in _DOWN for flag in one["flags"].split(","))
        ),
    )


def _facts(said: Any) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in zip(said[::2], said[1::2], strict=False)}


def _text(said: Any) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)


Find = Callable[[], Coroutine[Any, Any, "tuple[Place, str]"]]


class _Found(Connection):
    """A connection that looks for its server whenever it is made.

    Args:
        find: returns where the server is and what it has to say of its role: ``master``, ``slave`` or nothing.
    """

    def __init__(self, *, find: Find, **options: Any) -> None:
        self._find = find
        self._wanted = ""
        options.setdefault("redis_connect_func", log_in)
        super().__init__(**options)

    async def _connect(self) -> None:
        (self.host, self.port), self._wanted = await self._find()
        await super()._connect()  # type: ignore[no-untyped-call]

    async def check_role(self) -> None:
        """Raise unless the server is what was looked for; one that may not say is believed."""
        await self.send_command("ROLE")
        try:
            role, *_ = await self.read_response()
        except ResponseError:
            return
        if self._wanted and _text(role) != self._wanted:
            raise RedisConnectionError(f"{self.host}:{self.port} is not the {self._wanted} that the sentinels say")

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)
        except ReadOnlyError:
            await self.disconnect(nowait=True)
            raise RedisConnectionError("the master has become a replica") from None


async def log_in(connection: AbstractConnection) -> None:
    """Log in on a new connection, and see that it is with the right server."""
    await connection.on_connect()
    if isinstance(connection, _Found):
        await connection.check_role()


class FoundConnection(_Found):
    """See :class:`_Found`."""


class FoundSSLConnection(_Found, SSLConnection):
    """The same with TLS."""


class WatchfulPool(ConnectionPool):
    """A pool that looks now and then, while it is used, whether the master is another one by now.

    A master that is cut off from its sentinels but not from us would take what we write, and lose it when it is back.
    """

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        super().__init__(**options)
        self._finder = finder
        self._looked_s = time.monotonic() - random.uniform(0, _LOOK_S / 2)  # not all processes at once
        self._looking: asyncio.Task[None] | None = None

    async def get_connection(self, *arguments: Any, **options: Any) -> Any:
        now_s = time.monotonic()
        if now_s - self._looked_s > _LOOK_S and (self._looking is None or self._looking.done()):
            self._looked_s = now_s
            self._looking = asyncio.create_task(self._look(), name="look for the master")
        return await super().get_connection(*arguments, **options)  # type: ignore[no-untyped-call]

    async def _look(self) -> None:
        try:
            master = await self._finder.master()
        except RedisError:
            return  # what there is goes on until it is known to be wrong
        wrong: list[Any] = [
            connection
            for connection in [*self._available_connections, *self._in_use_connections]
            if isinstance(connection, Connection) and (connection.host, connection.port) != master
        ]
        for connection in wrong:
            if connection in self._available_connections:
                await connection.disconnect()
            else:
                connection.mark_for_reconnect()  # when it is given back

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await super().aclose()


class _BlockingFound(BlockingConnection):
    """The same for programs without a loop; always with the master."""

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        self._finder = finder
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        self.host, self.port = self._finder.master_blocking()
        return super()._connect()  # type: ignore[no-untyped-call]


class BlockingFoundConnection(_BlockingFound):
    """See :class:`_BlockingFound`."""


class BlockingFoundSSLConnection(_BlockingFound, BlockingSSLConnection):
    """The same with TLS."""
