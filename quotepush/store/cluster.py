"""A Redis Cluster: commands to the node that holds their key, whoever that is now.

Laws:

1. A command or pipeline that has lost a node raises, as on one server, and so does one that was given up, or whose
   slot is just being moved; the next one looks for the nodes anew.
2. No node that is silent, or has lost its cluster, is asked where the others are.
3. A command without a key (``TIME``, ``PING``) is answered by the master of the first slot, so that all who ask mean
   the same clock.
4. The nodes of the address stay known for ever, whichever others were found through them.

No command of ours names keys of several slots, nor do commands whose order matters go to several in one pipeline.
"""

import asyncio
import logging
from typing import Any

from redis.asyncio.cluster import ClusterNode, ClusterPipeline, RedisCluster
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from quotepush.store.address import Address, Place

__all__ = ["NOWHERE", "ClusterClient", "is_well", "nodes_through", "passing"]

log = logging.getLogger("quotepush.redis")

_MOST_WAIT_S = 1.0  # for a node that is to say where the others are
_LOST = (RedisConnectionError, RedisTimeoutError, ClusterDownError)
NOWHERE = (RedisClusterException, ClusterError)
"""What redis-py raises of a slot that nobody has, or that is just being moved; the first it calls no RedisError."""


def passing(error: Exception) -> RedisConnectionError:
    """Return one of :data:`NOWHERE`, or a cluster that cannot be found, as what it is: to be tried again."""
    is_moving = isinstance(error, ClusterError)  # redis-py has asked again and again
    return RedisConnectionError("its keys are being moved to another node" if is_moving else str(error).rstrip("."))


class _NoParser:
    """Where the keys of a command are we know without asking each node for the list of all its commands."""

    async def initialize(self, node: Any) -> None:
        pass


class ClusterClient(RedisCluster):
    """A client of a cluster: all that we use of redis-py's ``Redis``, with the same answers and exceptions.

    Args:
        max_connections: to each node.
        options: of each connection.
    """

    def __init__(self, address: Address, *, max_connections: int = 100, **options: Any) -> None:
        super().__init__(
            startup_nodes=[ClusterNode(host, port) for host, port in address.places],
            retry=Retry(NoBackoff(), 0), max_connections=max_connections, ssl=address.tls is not None, protocol=2,
        )  # fmt: skip
        self.commands_parser = _NoParser()  # type: ignore[assignment]
        self._address = address
        self._options = {**address.credentials, **(address.tls or {}), **options}
        self.set_options(self._options)

    def set_options(self, options: "dict[str, Any]") -> None:
        """Let every connection that is made from now on have these options, too."""
        manager = self.nodes_manager
        self.connection_kwargs.update(options)  # the manager's own, for nodes that it finds
        for node in [*manager.startup_nodes.values(), *manager.nodes_cache.values()]:
            node.connection_kwargs.update(options)

    # ------------------------------------------------------------------ commands

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*arguments, **options)
        except (*_LOST, asyncio.CancelledError):
            self.doubt()
            raise
        except NOWHERE as e:
            self.doubt()
            raise passing(e) from None

    def publish(self, channel: Any, message: Any, **options: Any) -> Any:
        return self.execute_command("PUBLISH", channel, message)  # redis-py has it from 8.0 on

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> "ClusterPipeline":
        return _Pipeline(self)  # type: ignore[abstract]  # so says redis-py of its own class, too

    def get_default_node(self) -> Any:
        owners = self.nodes_manager.slots_cache.get(0)
        return owners[0] if owners else super().get_default_node()

    async def _determine_slot(self, command: str, *arguments: Any) -> int:
        # All that we send names its keys first, of one slot, and a channel is as good as a key: messages of one keep
        # their order.
        return self.keyslot(arguments[2 if command.upper() in ("EVAL", "EVALSHA") else 0])

    # ------------------------------------------------------------------ nodes

    async def initialize(self, *arguments: Any, **options: Any) -> "ClusterClient":
        if self._initialize:
            await self._leave_out_silent_nodes()
        try:
            await super().initialize(*arguments, **options)
        except RedisClusterException as e:
            raise passing(e) from None
        return self

    def doubt(self) -> None:
        """Have the next command look for the nodes anew; what is under way goes on."""
        self._initialize = True
        # Not only among those that were found: they may all have moved.
        known = self.nodes_manager.startup_nodes
        for host, port in self._address.places:
            node = ClusterNode(host, port, **self.connection_kwargs)
            known.setdefault(node.name, node)

    async def aclose(self) -> None:
        """Let go of all connections; the next command makes them anew."""
        self._initialize = True
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")

    async def hang_up(self) -> None:
        """Let go of all connections; the next command looks for the nodes anew."""
        await self.aclose()
        self.doubt()

    async def greet_all(self) -> None:
        """Connect to each master, once, with whatever its connections do when they are made."""
        await self.initialize()
        await self.execute_command("PING", target_nodes=RedisCluster.PRIMARIES)

    async def cut(self, name: str) -> bool:
        """Close the connections of this name to each master; say whether there was one."""
        found = False
        await self.initialize()
        for node in self.get_primaries():
            for entry in await self.client_list(target_nodes=node):
                if entry["name"] == name:
                    found = True
                    await self.client_kill_filter(_id=entry["id"], target_nodes=node)
        return found

    async def _leave_out_silent_nodes(self) -> None:
        """redis-py asks one node after another where the others are, waits for each, and believes the first."""
        nodes = self.nodes_manager.startup_nodes
        names = list(nodes)
        answers = await asyncio.gather(*(self._is_well((nodes[name].host, int(nodes[name].port))) for name in names))
        if not any(answers):
            return
        for name, is_well_now in zip(names, answers, strict=True):
            if not is_well_now and name in nodes:
                log.debug("%s is not asked where the nodes of the Redis Cluster are", name)
                await nodes.pop(name).disconnect()

    async def _is_well(self, place: Place) -> bool:
        kind = Connection if self._address.tls is None else SSLConnection
        asking: Any = kind(host=place[0], port=place[1], **self._options)
        try:
            async with asyncio.timeout(_MOST_WAIT_S):
                await asking.connect()
                return await is_well(asking)
        except (RedisError, OSError):
            return False
        finally:
            await asking.disconnect(nowait=True)


class _Pipeline(ClusterPipeline):
    """redis-py's, with ``publish``, and with lost connections told as such."""

    def __init__(self, owner: ClusterClient) -> None:
        super().__init__(owner)
        self._owner = owner

    def publish(self, channel: Any, message: Any, **options: Any) -> Any:
        return self.execute_command("PUBLISH", channel, message)

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        try:
            replies = await super().execute(raise_on_error, allow_redirections)
        except (*_LOST, asyncio.CancelledError):
            self._owner.doubt()
            raise
        except NOWHERE as e:
            self._owner.doubt()
            raise passing(e) from None
        for reply in replies:
            if isinstance(reply, (*_LOST, *NOWHERE)):
                self._owner.doubt()
                raise reply if isinstance(reply, _LOST) else passing(reply) from None
        return replies


async def is_well(connection: AbstractConnection) -> bool:
    """Say whether the node of a connection is in touch with its cluster; one that may not say is believed."""
    await connection.send_command("CLUSTER", "INFO")
    try:
        said = await connection.read_response(disable_decoding=True)
    except NoPermissionError:
        return True
    except ResponseError as e:
        raise RedisConnectionError(f"this is no Redis Cluster: {e}") from None
    return b"cluster_state:ok" in said


async def nodes_through(connection: AbstractConnection) -> set[Place]:
    """Return the nodes that the node of a connection knows to hold slots; none if it may not say."""
    await connection.send_command("CLUSTER", "SLOTS")
    try:
        ranges = await connection.read_response(disable_decoding=True)
    except NoPermissionError:
        return set()
    return {(host.decode(), int(port)) for _, _, *nodes in ranges for host, port, *_ in nodes if host}
