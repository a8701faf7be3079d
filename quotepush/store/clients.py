"""Clients and connections for an address of Redis.

Every client answers with bytes by redis-py's first protocol, tries nothing twice behind anybody's back, and has no
socket timeout: redis-py would set one up for each reply and wait under ``wait_for``, which can lose a cancellation in
Python 3.11 (bpo-37658). Whoever asks bounds his wait.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

import redis
import redis.asyncio
import redis.cluster
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool as BlockingPool
from redis.exceptions import ClusterDownError, RedisClusterException, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry as BlockingRetry

from quotepush.errors import SettingsError
from quotepush.store.address import Address, BadAddress, Place, parse_address
from quotepush.store.cluster import NOWHERE, ClusterClient, is_well, nodes_through, passing
from quotepush.store.sentinel import (
    BlockingFoundConnection,
    BlockingFoundSSLConnection,
    Finder,
    FoundConnection,
    FoundSSLConnection,
    WatchfulPool,
    log_in,
)

__all__ = ["Links", "Store", "greet_with", "hang_up", "log_in", "reach"]


class Store:
    """One address of Redis.

    Args:
        timeout_s: the longest wait for a connection.
        name: how connections are called in Redis (``CLIENT LIST``); empty: they have no name.

    Raises:
        SettingsError: it is no address.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, name: str = "") -> None:
        try:
            self.address = parse_address(url)
        except BadAddress as e:
            raise SettingsError([f"not a Redis address that can be used: it {e}"]) from None
        self._timeout_s = timeout_s
        self._name = name

    def __str__(self) -> str:
        """Where it is, without user, password and options."""
        return str(self.address)

    @property
    def is_cluster(self) -> bool:
        """It is a Redis Cluster: keys of one command need one slot, and nobody knows how many hear a message."""
        return self.address.kind == "cluster"

    def client(self, role: str = "", **options: Any) -> Any:
        """Return a client for commands and pipelines; it connects when it is first used, and the caller closes it.

        It is a ``redis.asyncio.Redis``, with a Redis Cluster a :class:`ClusterClient`; redis-py's annotations fit
        neither of its two protocols.

        Args:
            role: what the connection is for; part of its name.
            options: of redis-py's pool or of its connections, such as ``max_connections``.
        """
        options = {**self._options(role), **options}
        if self.is_cluster:
            return ClusterClient(self.address, **options)
        if self.address.kind == "sentinel":
            finder = Finder(self.address, self._timeout_s)
            pool: ConnectionPool = WatchfulPool(
                finder=finder, connection_class=self._found_class, find=_the_master(finder), **options
            )
        else:
            pool = ConnectionPool(**self._where, **options)
        return redis.asyncio.Redis.from_pool(pool)

    def links(self, role: str = "", *, may_be_replica: bool = False) -> "Links":
        """Return what makes connections to hear channels on.

        Args:
            may_be_replica: where the address says ``role=replica``, hear one.
        """
        options = {**self._options(role), "socket_keepalive": True}
        if self.is_cluster:
            return _ClusterLinks(self.address, options, self._timeout_s)
        if self.address.kind == "sentinel":
            return _SentinelLinks(
                Finder(self.address, self._timeout_s),
                self._found_class,
                options,
                may_be_replica and self.address.from_replica,
            )
        if self.address.path:
            del options["socket_keepalive"]
        return Links(ConnectionPool(**self._where, **options))

    def blocking_client(self, timeout_s: float) -> Any:
        """Return a client for programs without asyncio; it connects when it is first used."""
        options: dict[str, Any] = {
            **self._login, "protocol": 2, "retry": BlockingRetry(NoBackoff(), 0),
            "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
        }  # fmt: skip
        if self.is_cluster:
            return _BlockingCluster(self.address, options)
        if self.address.kind == "sentinel":
            kind: Any = BlockingFoundConnection if self.address.tls is None else BlockingFoundSSLConnection
            options |= {"finder": Finder(self.address, timeout_s), "db": self.address.db}
        elif self.address.path:
            kind = redis.connection.UnixDomainSocketConnection
            options |= {"path": self.address.path, "db": self.address.db}
        else:
            ((host, port),) = self.address.places
            kind = redis.connection.Connection if self.address.tls is None else redis.connection.SSLConnection
            options |= {"host": host, "port": port, "db": self.address.db}
        return redis.Redis.from_pool(BlockingPool(connection_class=kind, **options))

    @property
    def _login(self) -> dict[str, Any]:
        return {**self.address.credentials, **(self.address.tls or {})}

    @property
    def _where(self) -> dict[str, Any]:
        """Where the one server is, as a pool takes it."""
        address = self.address
        if address.path:
            return {"connection_class": UnixDomainSocketConnection, "path": address.path, "db": address.db}
        ((host, port),) = address.places
        kind = Connection if address.tls is None else SSLConnection
        return {"connection_class": kind, "host": host, "port": port, "db": address.db}

    @property
    def _found_class(self) -> Any:
        return FoundConnection if self.address.tls is None else FoundSSLConnection

    def _options(self, role: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            **self._login, "protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": None,
            "socket_connect_timeout": self._timeout_s,
        }  # fmt: skip
        if self.address.kind == "sentinel":
            options["db"] = self.address.db
        name = f"{self._name}-{role}" if role else self._name
        return {**options, "client_name": name} if name else options


async def hang_up(client: Any, *, in_use: bool = True) -> None:
    """Let go of a client's connections: what answers "read-only" is no longer what the address stands for.

    Args:
        in_use: also of those on which somebody waits.

    Raises:
        RedisError, OSError: they were broken already.
    """
    if not isinstance(client, ClusterClient):
        await client.connection_pool.disconnect(inuse_connections=in_use)
    elif in_use:
        await client.hang_up()
    else:
        client.doubt()


async def reach(client: Any) -> None:
    """See that a client can be used, with a Redis Cluster each of its masters; nothing else is connected by it.

    Raises:
        RedisError, OSError: it cannot.
    """
    if isinstance(client, ClusterClient):
        await client.greet_all()
    else:
        await client.ping()


def greet_with(client: Any, greet: Callable[[AbstractConnection], Coroutine[Any, Any, None]]) -> None:
    """Have each connection that a client makes from now on handed over before its first command.

    Args:
        greet: has to :func:`log_in`; what it raises is raised to whoever wanted the connection.
    """
    if isinstance(client, ClusterClient):
        client.set_options({"redis_connect_func": greet})
    else:
        client.connection_pool.connection_kwargs["redis_connect_func"] = greet


class Links:
    """Makes connections on which channels are heard, and nothing else is done.

    Law: the caller disconnects what he gets, and asks now and then whether it still is what the address stands for: a
    server that is cut off from the others answers every ``PING`` and hears nothing any more.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def connect(self) -> AbstractConnection:
        """Return a new connection; the caller bounds the wait.

        Raises:
            RedisError, OSError: there is none to be had.
        """
        return await _connected(self._pool.make_connection())  # type: ignore[no-untyped-call]

    async def is_current(self, connection: AbstractConnection) -> bool:
        """Say whether a connection is still with the right server; also when nobody can tell."""
        return True


async def _connected(connection: AbstractConnection) -> AbstractConnection:
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


def _the_master(finder: Finder) -> Any:
    async def find() -> tuple[Place, str]:
        return await finder.master(), "master"

    return find


class _SentinelLinks(Links):
    """Connections to the master, or to a replica."""

    def __init__(self, finder: Finder, kind: Any, options: dict[str, Any], from_replica: bool) -> None:
        self._finder = finder
        self._from_replica = from_replica
        find = self._a_replica if from_replica else _the_master(finder)
        super().__init__(ConnectionPool(connection_class=kind, find=find, **options))

    async def _a_replica(self) -> tuple[Place, str]:
        replicas = await self._finder.replicas()
        if replicas:
            return random.choice(replicas), "slave"
        return await self._finder.master(), "master"

    async def is_current(self, connection: AbstractConnection) -> bool:
        assert isinstance(connection, Connection)
        here = (connection.host, connection.port)
        try:
            replicas = await self._finder.replicas() if self._from_replica else ()
            return here in replicas if replicas else here == await self._finder.master()
        except RedisError:
            return True


class _ClusterLinks(Links):
    """Connections to any node: a message goes to all of them."""

    def __init__(self, address: Address, options: dict[str, Any], timeout_s: float) -> None:
        self._options = options
        self._kind = Connection if address.tls is None else SSLConnection
        self._timeout_s = timeout_s
        self._first = address.places
        self._known: set[Place] = set(address.places)

    async def connect(self) -> AbstractConnection:
        places = list(self._known)
        random.shuffle(places)
        fault: Exception = RedisConnectionError("no node of the Redis Cluster answers")
        for place in places:
            try:
                # No node may use up the time of the others.
                async with asyncio.timeout(self._timeout_s / (len(places) + 1)):
                    connection = await self._connect_to(place)
                    if await self._is_well(connection):
                        return connection
                fault = RedisConnectionError(f"the Redis Cluster is down, says {place[0]}:{place[1]}")
            except (RedisError, OSError) as e:
                fault = e
        raise fault

    async def is_current(self, connection: AbstractConnection) -> bool:
        assert isinstance(connection, Connection)
        try:
            async with asyncio.timeout(self._timeout_s):
                asking = await self._connect_to((connection.host, connection.port))
                return await self._is_well(asking, keeps=False)
        except (RedisError, OSError):
            return True  # the probe of the link knows better

    async def _connect_to(self, place: Place) -> AbstractConnection:
        return await _connected(self._kind(host=place[0], port=place[1], **self._options))

    async def _is_well(self, connection: AbstractConnection, *, keeps: bool = True) -> bool:
        """Say whether a node has its cluster around it; if it has, learn who else is there."""
        well = False
        try:
            well = await is_well(connection)
            if well:
                self._known = {*self._first, *await nodes_through(connection)}
        finally:
            if not (well and keeps):
                await connection.disconnect(nowait=True)
        return well


class _BlockingCluster:
    """redis-py's client without asyncio, made when it is first used: it connects as it is made."""

    def __init__(self, address: Address, options: dict[str, Any]) -> None:
        self._address = address
        self._options = options
        self._client: Any = None
        self.connection_pool = self  # for whoever disconnects

    def _made(self) -> Any:
        if self._client is None:
            nodes = [
                redis.cluster.ClusterNode(host, port)  # type: ignore[no-untyped-call]
                for host, port in self._address.places
            ]
            try:
                self._client = redis.cluster.RedisCluster(
                    startup_nodes=nodes, ssl=self._address.tls is not None, **self._options
                )
            except RedisClusterException as e:
                raise passing(e) from None
        return self._client

    def ping(self) -> Any:
        return self._made().ping()

    def eval(self, *arguments: Any) -> Any:
        return self._call("EVAL", *arguments)

    def evalsha(self, *arguments: Any) -> Any:
        return self._call("EVALSHA", *arguments)

    def _call(self, *arguments: Any) -> Any:
        try:
            return self._made().execute_command(*arguments)
        except ClusterDownError:
            raise
        except NOWHERE as e:
            raise passing(e) from None

    def disconnect(self) -> None:
        """Let go of it; the next call looks for the nodes anew."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                client.close()

    def close(self) -> None:
        self.disconnect()
