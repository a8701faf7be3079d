"""Hearing channels of Redis until the link is lost."""

import asyncio
from collections.abc import AsyncGenerator

from redis.asyncio.connection import AbstractConnection

from quotepush.store.clients import Links

__all__ = ["hear"]

_PROBE_S = 1.0  # a link that says nothing for so long is asked for a sign of life
_LOOK_S = 2.0  # how often it is looked whether the link is still with the right server


async def hear(links: Links, *channels: str, timeout_s: float = 5.0) -> AsyncGenerator[bytes | None, None]:
    """Yield None as soon as all channels are heard, and then each message; the caller closes it.

    Args:
        timeout_s: the longest wait for a connection.

    Raises:
        RedisError, OSError, TimeoutError: the link cannot be made, or is lost, or leads to what is no longer the right
            server.
    """
    async with asyncio.timeout(timeout_s):
        connection = await links.connect()
    looking = asyncio.create_task(_look(links, connection), name="look after a link")
    try:
        async with asyncio.timeout(timeout_s):
            await connection.send_command("SUBSCRIBE", *channels)
        is_asked = False
        while True:
            try:
                async with asyncio.timeout(_PROBE_S):
                    said = await connection.read_response(disconnect_on_error=False)
            except TimeoutError:
                said = None
            if looking.done():
                raise ConnectionError("it led to a server that is no longer the right one")
            if said is None:
                if is_asked:
                    raise TimeoutError("no answer of Redis")
                async with asyncio.timeout(_PROBE_S):
                    await connection.send_command("PING")
                is_asked = True
                continue
            is_asked = False
            if said[0] == b"message":
                yield said[2]
            elif said[0] == b"subscribe" and said[2] == len(channels):
                yield None
    finally:
        looking.cancel()
        await connection.disconnect(nowait=True)


async def _look(links: Links, connection: AbstractConnection) -> None:
    """Return when a connection is no longer with the right server."""
    while True:
        if not await links.is_current(connection):
            return
        await asyncio.sleep(_LOOK_S)
