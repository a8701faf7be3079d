"""What a backend hears for as long as it likes, and iterates over: the way in, and the way out.

Invariant: who waits is told of the end, be it :meth:`Hearing.aclose` or a bug of the task that hears.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from quotepush.errors import BackendUnavailable

__all__ = ["Hearing", "pause_s"]

_FIRST_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0


def pause_s(attempt: int) -> float:
    """Return how long to wait before a link is made anew; ``attempt``: how many have failed in a row."""
    return random.uniform(0.5, 1.0) * min(_MOST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))


class Hearing(ABC):
    """A task that hears (:meth:`_run`), begun by ``async with`` or by who asks first.

    Args:
        what: it hears, for an error.
        timeout_s: the longest wait until it does.
    """

    def __init__(self, what: str, timeout_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._reason = ""
        self._is_closed = False

    @abstractmethod
    async def _run(self, first: "asyncio.Future[None]") -> None:
        """Hear until cancelled; ``first`` is done as soon as that has begun."""

    async def __aenter__(self) -> Self:
        """Return when it is heard.

        Raises:
            BackendUnavailable: Redis does not answer in time.
        """
        first = self._start()
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(first)
        except TimeoutError:
            await self.aclose()
            reason = self._reason or f"no answer within {self._timeout_s:g} s"
            raise BackendUnavailable(f"cannot hear {self._what}: {reason}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hear no more; who iterates comes to the end. Harmless twice."""
        self._is_closed = True
        self._arrived.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def __aiter__(self) -> Self:
        return self

    def _start(self) -> "asyncio.Future[None]":
        if self._first is None:
            self._first = asyncio.get_running_loop().create_future()
        if self._task is None and not self._is_closed:
            self._task = asyncio.create_task(self._run(self._first), name=self._what)
            self._task.add_done_callback(lambda task: self._arrived.set())
        return self._first

    async def _wait(self) -> None:
        """Return when something may have arrived, for as long as that takes.

        Raises:
            StopAsyncIteration: it is closed.
        """
        if self._is_closed:
            raise StopAsyncIteration
        if self._task is not None and self._task.done():
            self._task.result()  # a bug: it says so to whoever waits
        self._arrived.clear()
        await self._arrived.wait()
