"""Who watches what, and how often it ticks: Zipf's law, in closed form.

The code of rank ``i`` is drawn with a weight of ``1 / i ** exponent``, and each viewer draws so many different ones.
Law: chances add up to the codes that a viewer watches, rates to the ticks of the feed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Audience", "Code", "Market", "chances_of", "limited"]

_EXACT = 500
_GROWTH = 1.02


@dataclass(frozen=True, slots=True)
class Code:
    """A code, or ``count`` of nearly the same rank.

    Attributes:
        chance: that a viewer watches it.
        rate: its ticks a second.
    """

    count: int
    chance: float
    rate: float


@dataclass(frozen=True, slots=True)
class Audience:
    """Who watches some codes that are much alike.

    Attributes:
        codes: how many they are.
        watchers: of each, of all viewers.
        own: of each, of those among whom at least one watches it.
    """

    codes: float
    watchers: float
    own: float


def chances_of(weights: Sequence[tuple[int, float]], draws: float) -> list[float]:
    """The chance of each item to be among ``draws`` different ones.

    Drawing different items one after the other by weight is the same as letting each come after an exponential time
    with its weight as rate, and taking the first ones (Efraimidis and Spirakis, 2006). The time of the last one hardly
    varies once there are many items, so an item is among them with ``1 - exp(-weight * time)``.

    Args:
        weights: how many items there are of each weight.
    """
    items = sum(count for count, _ in weights)
    if draws >= items:
        return [1.0] * len(weights)

    def drawn(time: float) -> float:
        return sum(-count * math.expm1(-weight * time) for count, weight in weights)

    low, high = 0.0, 1.0
    while drawn(high) < draws:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drawn(middle) < draws else (low, middle)
    return [-math.expm1(-weight * high) for _, weight in weights]


def limited(rate: float, max_rate: float) -> float:
    """Rows a second of a code with ``rate`` ticks a second, at random times, under ``max_rate``; 0: no limit.

    After a row the next one comes when ``1 / max_rate`` is over, or with the first tick after that.
    """
    if not max_rate or not rate:
        return rate
    return 1 / (1 / max_rate + math.exp(-rate / max_rate) / rate)


def _ranks(codes: int) -> Iterator[tuple[int, float]]:
    """How many codes there are of each rank: one of the first ones, then more and more that are much alike."""
    first = 1
    while first <= codes:
        last = first if first <= _EXACT else min(codes, int(first * _GROWTH))
        yield last - first + 1, math.sqrt(first * last)
        first = last + 1


class Market:
    """All codes of a feed.

    Args:
        codes: that tick.
        each: that a viewer watches.
        watch_zipf: exponent of who watches what; 0: every code as much.
        tick_zipf: exponent of how often codes tick; the ranks are the same, so what many watch ticks often.
        ticks_per_s: of all codes.
    """

    def __init__(self, codes: int, each: float, watch_zipf: float, tick_zipf: float, ticks_per_s: float) -> None:
        ranks = list(_ranks(codes))
        chances = chances_of([(count, rank**-watch_zipf) for count, rank in ranks], each)
        activity = sum(count * rank**-tick_zipf for count, rank in ranks)
        self.codes = [
            Code(count, chance, ticks_per_s * rank**-tick_zipf / activity)
            for (count, rank), chance in zip(ranks, chances, strict=True)
        ]

    def demand(self, viewers: float) -> float:
        """How many codes are watched by at least one of so many viewers."""
        return sum(code.count * _any_of(code, viewers) for code in self.codes)

    def wanted(self, viewers: float) -> float:
        """How many ticks a second are of a code that at least one of so many viewers watches."""
        return sum(code.count * code.rate * _any_of(code, viewers) for code in self.codes)

    def rows_per_viewer(self, max_rate: float = 0.0) -> float:
        """How many rows a second a viewer is due, on average."""
        return sum(code.count * code.chance * limited(code.rate, max_rate) for code in self.codes)

    def audiences(self, viewers: float, among: float) -> Iterator[Audience]:
        """Who watches the codes that at least one of ``among`` of the viewers watches."""
        for code in self.codes:
            chance = _any_of(code, among)
            if chance:
                own = among * code.chance / chance
                yield Audience(code.count * chance, own + (viewers - among) * code.chance, own)

    def most_watched(self, viewers: float) -> float:
        """How many of them watch the first code."""
        return self.codes[0].chance * viewers


def _any_of(code: Code, viewers: float) -> float:
    if code.chance >= 1:
        return 1.0 if viewers else 0.0
    return -math.expm1(viewers * math.log1p(-code.chance))
