"""Only what is wanted: ticks of other codes are held back, and come as one tick when somebody wants the code.

Law: whoever watches a code has all of its fields, as if every tick had been published: what was held back of it comes
before, or with, its next tick. Pure: no loop, no Redis.
"""

from collections.abc import Callable, Iterable, Sequence

from quotepush.feed.replay import CodedTick, Tick
from quotepush.quote.code import BadCode, parse_code

__all__ = ["Sieve"]

_MOST_HELD = 200_000  # codes; of further ones the ticks are gone until somebody wants them


class Sieve:
    """Lets ticks through.

    Args:
        is_wanted: says whether somebody wants a code, in its canonical spelling.

    Attributes:
        withheld: ticks that nobody wanted.
    """

    def __init__(self, is_wanted: Callable[[str], bool]) -> None:
        self._is_wanted = is_wanted
        self._held: dict[str, Tick] = {}
        self.withheld = 0

    def sift(self, batch: Sequence[CodedTick]) -> list[CodedTick]:
        """Return what of a batch is to be published now."""
        passed: list[CodedTick] = []
        held = self._held
        for code, tick in batch:
            name = _canonical(code)
            if self._is_wanted(name):
                passed.append((code, _merged(held.pop(name), tick) if name in held else tick))
                continue
            self.withheld += 1
            if name in held:
                held[name] = _merged(held[name], tick)
            elif len(held) < _MOST_HELD:
                held[name] = tick
        return passed

    def release(self, codes: Iterable[str]) -> list[CodedTick]:
        """Return what was held back of codes that are wanted now, a tick for each."""
        return [(code, self._held.pop(code)) for code in codes if code in self._held and self._is_wanted(code)]


def _merged(older: Tick, newer: Tick) -> Tick:
    return newer if newer.get("reset") else {**older, **newer}


def _canonical(code: str) -> str:
    try:
        return parse_code(code)
    except BadCode:
        return code  # whoever takes ticks refuses it
