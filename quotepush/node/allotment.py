"""The places of the machine: how many connections each worker may have, and how many each address has.

Law: all workers together never hold more places than the machine has, nor one address more than it may have; a worker
that is gone holds nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["Allotment"]


class Allotment:
    """Main's count.

    Args:
        workers: how many there are.
        most: places of the machine.
        most_per_address: of them for one address; 0: as many as there are.
    """

    def __init__(self, workers: int, most: int, most_per_address: int = 0) -> None:
        self.most = most
        self._most_per_address = most_per_address
        self._held = [0] * workers
        self._addresses: list[Counter[str]] = [Counter() for _ in range(workers)]
        self._by_address: Counter[str] = Counter()

    def held(self, worker: int) -> int:
        """Return how many places a worker has: for its connections, and a few to spare."""
        return self._held[worker]

    @property
    def addresses(self) -> int:
        """How many addresses have a connection, where they are counted."""
        return len(self._by_address)

    def grant(self, worker: int, needed: int, spare: int) -> int:
        """Give a worker what it needs, and spare places as long as all workers together can hardly fill the machine."""
        free = self.most - sum(self._held)
        granted = max(0, min(needed, free))
        granted += max(0, min(spare, (free - granted) // (4 * len(self._held))))
        self._held[worker] += granted
        return granted

    def seat(self, worker: int, addresses: Iterable[str]) -> list[str]:
        """Give a worker a place for a connection of each of these addresses; an empty one is not counted.

        Returns:
            for each why it has none, as a word of the protocol; empty: it has one.
        """
        words: list[str] = []
        for address in addresses:
            if address and 0 < self._most_per_address <= self._by_address[address]:
                words.append("too_many_connections")
            elif sum(self._held) >= self.most:
                words.append("overloaded")
            else:
                words.append("")
                self._held[worker] += 1
                if address:
                    self._by_address[address] += 1
                    self._addresses[worker][address] += 1
        return words

    def give_back(self, worker: int, count: int, addresses: Sequence[str] = ()) -> None:
        """So many places of a worker are free again, and one of each of these addresses besides."""
        self._held[worker] -= count + len(addresses)
        for address in addresses:
            if address:
                self._subtract(self._addresses[worker], address, 1)
                self._subtract(self._by_address, address, 1)

    def forget(self, worker: int) -> None:
        """The worker in this slot is gone, and its connections with it."""
        self._held[worker] = 0
        for address, count in self._addresses[worker].items():
            self._subtract(self._by_address, address, count)
        self._addresses[worker].clear()

    @staticmethod
    def _subtract(counts: "Counter[str]", address: str, count: int) -> None:
        counts[address] -= count
        if counts[address] <= 0:
            del counts[address]  # or every address that was ever here would stay
