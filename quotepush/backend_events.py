"""Events of the cluster for a backend: who comes and goes.

Invariant: between two events without a ``gap`` before the second nothing is lost that Redis has handed out; a link
that is lost is made anew until :meth:`Events.aclose`, and that events may be missing is said.
"""

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import orjson
from redis.exceptions import RedisError

from quotepush.backend_hearing import Hearing, pause_s
from quotepush.cluster.hearing import hear
from quotepush.errors import reason_of
from quotepush.store.clients import Links

__all__ = ["Events"]

# Of a slow reader. Then it is Redis that holds more, until it cuts the link off.
_MOST_WAITING = 1_000


class Events(Hearing):
    """What happens, as it happens: ``async for event in backend.events()``.

    Each event is a dictionary as it was published, see docs/backends.md. ``{"event": "gap", "reason": …, "time": …}``
    says that the link to Redis was lost and that events may be missing before the next. With ``async with`` whatever
    happens after its beginning is heard; else whatever happens after the first event was asked for.

    Args:
        timeout_s: the longest wait for the link.
    """

    def __init__(self, links: Links, channel: str, timeout_s: float) -> None:
        super().__init__("events", timeout_s)
        self._links = links
        self._channel = channel
        self._events: deque[dict[str, Any]] = deque()
        self._room = asyncio.Event()

    async def aclose(self) -> None:
        """Hear no more; who iterates comes to the end. Harmless twice."""
        self._events.clear()
        await super().aclose()

    async def __anext__(self) -> dict[str, Any]:
        self._start()
        while not self._events:
            await self._wait()
        self._room.set()
        return self._events.popleft()

    async def _run(self, first: "asyncio.Future[None]") -> None:
        attempt = 0
        while True:
            try:
                async with contextlib.aclosing(hear(self._links, self._channel, timeout_s=self._timeout_s)) as heard:
                    async for said in heard:
                        if said is None:
                            attempt = 0
                            await self._tell_link(first)
                        else:
                            await self._tell(said)
            except (RedisError, OSError) as e:
                self._reason = reason_of(e, self._timeout_s)
            attempt += 1
            await asyncio.sleep(pause_s(attempt - 1))

    async def _tell_link(self, first: "asyncio.Future[None]") -> None:
        if not first.done():
            first.set_result(None)
            return
        await self._put({"event": "gap", "reason": self._reason, "time": time.time_ns() // 1_000_000})

    async def _tell(self, said: bytes) -> None:
        try:
            event = orjson.loads(said)
        except orjson.JSONDecodeError:
            return  # whoever says that on this channel is no node
        if isinstance(event, dict):
            await self._put(event)

    async def _put(self, event: dict[str, Any]) -> None:
        while len(self._events) >= _MOST_WAITING:
            self._room.clear()
            await self._room.wait()
        self._events.append(event)
        self._arrived.set()
