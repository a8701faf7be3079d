"""Events of the cluster for a backend: who comes and goes.

Invariant: between two events without a ``gap`` before the second nothing is lost that Redis has handed out; a link
that is lost is made anew until :meth:`Events.aclose`, and that events may be missing is said.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

import orjson
from redis.exceptions import RedisError

from quotepush.cluster.hearing import hear
from quotepush.errors import BackendUnavailable, reason_of
from quotepush.store.clients import Links

__all__ = ["Events"]

_FIRST_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0
# Of a slow reader. Then it is Redis that holds more, until it cuts the link off.
_MOST_WAITING = 1_000


class Events:
    """What happens, as it happens: ``async for event in backend.events()``.

    Each event is a dictionary as it was published, see docs/backends.md. ``{"event": "gap", "reason": …, "time": …}``
    says that the link to Redis was lost and that events may be missing before the next. With ``async with`` whatever
    happens after its beginning is heard; else whatever happens after the first event was asked for.

    Args:
        timeout_s: the longest wait for the link.
    """

    def __init__(self, links: Links, channel: str, timeout_s: float) -> None:
        self._links = links
        self._channel = channel
        self._timeout_s = timeout_s
        self._events: deque[dict[str, Any]] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._reason = ""
        self._is_closed = False

    async def __aenter__(self) -> Self:
        """Return when events are heard.

        Raises:
            BackendUnavailable: Redis does not answer in time; it goes on trying.
        """
        self._start()
        assert self._first is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(self._first)
        except TimeoutError:
            await self.aclose()
            reason = self._reason or f"no answer within {self._timeout_s:g} s"
            raise BackendUnavailable(f"cannot hear events: {reason}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hear no more; who iterates comes to the end. Harmless twice."""
        self._is_closed = True
        self._events.clear()
        self._arrived.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        self._start()
        while not self._events:
            if self._is_closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        self._room.set()
        return self._events.popleft()

    def _start(self) -> None:
        if self._task is None and not self._is_closed:
            self._first = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._first), name="events")

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
            backoff_s = min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
            attempt += 1
            await asyncio.sleep(random.uniform(0.5, 1.0) * backoff_s)

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
