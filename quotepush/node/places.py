"""A worker's share of the machine's connections; main's side is :mod:`quotepush.node.allotment`.

Main counts the places of the whole machine. Asking it about each connection would cost more than
the rest of a handshake (two switches between processes), so a worker holds a few spare places and
asks for more before they are used up. Spare places that nobody needs go back within a second, and
main gives fewer the fuller the machine is: near the limit none, is asked about every connection, and
gets each place back at once, so that another worker can give it away.

Where main counts the connections of each address too, it has to be asked about every one of them: that is
:class:`PlacesByAddress`, and nobody else pays for it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["SPARE_PLACES", "Places", "PlacesByAddress"]

SPARE_PLACES = 64


class Places:
    """The places that this worker has and does not use.

    Args:
        ask: asks main for places: how many are needed now, and how many more are welcome; main
            answers each question once, in order, through :meth:`granted`.
        give_back: gives places back to main.
    """

    def __init__(self, ask: Callable[[int, int], None], give_back: Callable[[int], None]) -> None:
        self._ask = ask
        self._give_back = give_back
        self._spare = 0
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._is_asking = False  # one question at a time, for all who wait: each answer may bring spare places
        self._needed = 0  # how many waited when it was put
        self._taken_lately = 0
        self._is_scarce = False  # main has none to spare

    async def take(self, address: str = "") -> str:
        """Take a place for a connection, of whatever address.

        Returns:
            ``overloaded`` when the machine is full, else nothing.

        Waits for main only when nothing is spare; main answers within a turn of its loop.
        """
        self._taken_lately += 1
        if self._spare:
            self._spare -= 1
            if self._spare < SPARE_PLACES // 2:
                self._put_question()
            return ""
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._put_question()
        try:
            return "" if await place else "overloaded"
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.result():
                self.leave()
            raise

    def _put_question(self) -> None:
        if not self._is_asking:
            self._is_asking = True
            self._needed = len(self._waiting)
            self._ask(self._needed, SPARE_PLACES)

    def granted(self, places: int, words: Sequence[str] = ()) -> None:
        """Main answers: it refuses those for whom we asked and found no place, in the order in which they came."""
        self._is_asking = False
        self._is_scarce = places <= self._needed
        for number in range(len(self._waiting)):
            if not places and number >= self._needed:
                break  # came after the question
            place = self._waiting.popleft()
            if not place.done():  # else the client went away meanwhile
                place.set_result(places > 0)
                places -= places > 0
        self._spare += places
        if self._waiting:
            self._put_question()

    def leave(self, address: str = "") -> None:
        """A connection is gone."""
        self._spare += 1
        if self._is_scarce:
            self._return(self._spare)
        elif self._spare > 2 * SPARE_PLACES:
            self._return(self._spare - SPARE_PLACES)

    def settle(self) -> int:
        """Give back what was not needed since the last time; called every second. Return what is spare now."""
        idle = self._spare - min(SPARE_PLACES, self._taken_lately)
        self._taken_lately = 0
        if idle > 0:
            self._return(idle)
        return self._spare

    def _return(self, places: int) -> None:
        self._spare -= places
        self._give_back(places)


class PlacesByAddress:
    """The same where connections are counted by their addresses: each place is asked for, and given back at once.

    Args:
        ask: asks main for a place for a connection of each of these addresses; main answers each question once, in
            order, through :meth:`granted`.
        give_back: gives places of these addresses back to main.
    """

    def __init__(self, ask: Callable[[list[str]], None], give_back: Callable[[list[str]], None]) -> None:
        self._ask = ask
        self._give_back = give_back
        self._waiting: deque[tuple[str, asyncio.Future[str]]] = deque()
        self._is_asking = False  # one question at a time

    async def take(self, address: str) -> str:
        """Take a place for a connection of an address.

        Returns:
            why there is none, as a word of the protocol; empty: there is one.

        Waits for main, which answers within a turn of its loop.
        """
        place: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((address, place))
        if not self._is_asking:
            self._put_question()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and not place.result():
                self.leave(address)
            raise

    def _put_question(self) -> None:
        """Ask once for all who wait: a storm costs no more questions than main has turns."""
        self._is_asking = True
        self._ask([address for address, _ in self._waiting])

    def granted(self, places: int, words: Sequence[str]) -> None:
        """Main answers, in the order of the question."""
        self._is_asking = False
        for word in words:
            address, place = self._waiting.popleft()
            if not place.done():
                place.set_result(word)
            elif not word:  # the client went away meanwhile
                self.leave(address)
        if self._waiting:
            self._put_question()

    def leave(self, address: str) -> None:
        """A connection of this address is gone."""
        self._give_back([address])

    def settle(self) -> int:
        """Return what is spare: nothing ever is."""
        return 0
