"""A clock that moves when a test says so."""

import asyncio

from quotepush.feed.sources import Clock

__all__ = ["ManualClock"]


class ManualClock:
    """Monotonic seconds that stand still until `advance`; whoever sleeps is woken when his time has come."""

    def __init__(self, epoch_ms: int = 1_800_000_000_000) -> None:
        self.at_s = 0.0
        self._epoch_ms = epoch_ms
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    @property
    def clock(self) -> Clock:
        return Clock(now_s=lambda: self.at_s, now_ms=self.now_ms, sleep=self._sleep)

    @property
    def is_slept_on(self) -> bool:
        """Whether somebody waits for the time to go on."""
        return any(not sleeper.done() for _, sleeper in self._sleepers)

    def now_ms(self) -> int:
        return self._epoch_ms + round(self.at_s * 1000)

    def advance(self, seconds: float) -> None:
        self.at_s += seconds
        for due_s, sleeper in self._sleepers:
            if due_s <= self.at_s and not sleeper.done():
                sleeper.set_result(None)
        self._sleepers = [(due_s, sleeper) for due_s, sleeper in self._sleepers if not sleeper.done()]

    async def _sleep(self, seconds: float) -> None:
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.at_s + seconds, sleeper))
        await sleeper
