"""What can happen to the connections through a door, at random, and the same again for the same seed."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.support.door import Door
from tests.support.waiting import wait_until

__all__ = ["Mishaps"]


class Mishaps:
    """Cuts, stalls and trickles, one after the other.

    Args:
        door: that the clients go through.
        seed: of what happens and when.
        losses: returns how many connections the clients have given up until now.
        go_on: returns when every client has rows that were published after the call.

    Attributes:
        happened: how often each kind of them did.
    """

    def __init__(self, door: Door, seed: int, losses: Callable[[], int], go_on: Callable[[], Awaitable[None]]) -> None:
        self._door = door
        self._chance = random.Random(seed)
        self._losses = losses
        self._go_on = go_on
        self.happened: Counter[str] = Counter()

    async def happen(self, rounds: int) -> None:
        """Let each kind happen so many times; wait after each, or at times only a moment, until the clients go on."""
        kinds = [self.cut, self.reset, self.stall, self.stall_answers, self.hiccup, self.trickle]
        for _ in range(rounds):
            self._chance.shuffle(kinds)
            for kind in kinds:
                await kind()
                self.happened[kind.__name__] += 1
                # The next one may hit those who are still coming back, at whatever they are about to do.
                if self._chance.random() < 0.3:
                    await asyncio.sleep(self._chance.random() * 0.3)
                else:
                    await self._go_on()
        await self._go_on()

    async def cut(self) -> None:
        """Both ends see the end of the stream."""
        self._door.cut()

    async def reset(self) -> None:
        """The client's end sees a reset."""
        self._door.cut(reset=True)

    async def stall(self) -> None:
        """Nothing comes through, either way, until the clients have noticed."""
        await self._stall("both")

    async def stall_answers(self) -> None:
        """The server hears the clients, and they do not hear it."""
        await self._stall("answers")

    async def hiccup(self) -> None:
        """A stall that ends before anybody need notice, at times with a cut."""
        self._door.stall(self._chance.choice(["both", "requests", "answers"]))
        await asyncio.sleep(self._chance.random() * 0.3)
        if self._chance.random() < 0.3:
            self._door.cut()
        self._door.flow()

    async def trickle(self) -> None:
        """A few bytes come through at a time, then there is a cut within a message, or all goes on."""
        self._door.piece_bytes = self._chance.randint(1, 40)
        await asyncio.sleep(self._chance.random() * 0.5)
        if self._chance.random() < 0.5:
            self._door.cut(reset=self._chance.random() < 0.5)
        self._door.piece_bytes = 0

    async def _stall(self, way: str) -> None:
        await self._go_on()
        before = self._losses()
        self._door.stall(way)
        await wait_until(lambda: self._losses() > before, 60, f"somebody notices a stall of {way}")
        if self._chance.random() < 0.5:
            self._door.cut()
        self._door.flow()
