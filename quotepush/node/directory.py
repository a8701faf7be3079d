"""The codes on the board, for people who look for one, and those that have moved most.

Law: main is never held up. The board is read a few codes at a time with rests between, at most once a second and only
while somebody asks; a search goes through what was read then, some thousands of codes a turn of the loop, one search
after the other, and only so many may wait.
"""

import asyncio
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from quotepush.entitlement import EVERY_CODE, Codes, codes_of
from quotepush.quote.board import Quote
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.delay import plain_code

__all__ = ["MOST_FOUND", "Directory"]

log = logging.getLogger("quotepush.main")

MOST_FOUND = 50
# Searches that may wait; at their worst, in 200,000 codes, they take 20 ms each.
_MOST_WAITING = 64
# A code whose rows nobody watches has a tick to be merged first: some microseconds each.
_READ_PER_SLICE = 200
_READ_REST_S = 0.002
_READ_EVERY_S = 1.0
_SEARCHED_PER_SLICE = 5_000
# Where it has to be looked up for each code whether somebody may see it: 1 µs, with the worst of patterns 60.
_FILTERED_PER_SLICE = 100

_SHOWN = ("code", "name", "last", "prev_close", "change", "change_pct")

Then = Callable[[bytes | None], None]
_Moved = tuple[float, str, Quote]  # change_pct, code, quote


class Directory:
    """Answers what codes there are.

    Args:
        quotes: those of the board, or delayed ones, alive.
        is_known: whether a code may be subscribed to; others are not shown.
    """

    def __init__(self, quotes: Mapping[str, Quote], is_known: Callable[[str], bool]) -> None:
        self._quotes = quotes
        self._is_known = is_known
        self._waiting: deque[tuple[str | None, int, Then, Codes]] = deque()
        self._has_waiting = asyncio.Event()
        self._entries: list[tuple[str, str, Quote, float]] = []  # code, name as it is compared, quote, change_pct
        self._up: list[_Moved] = []
        self._down: list[_Moved] = []
        self._read_again_s = float("-inf")

    def ask(self, text: str | None, limit: int, then: Then, allowed: tuple[str, ...] | None = None) -> None:
        """Find what somebody looks for.

        Args:
            text: how a code begins, or a part of its name; None: the biggest movers up and down are asked for.
            limit: how many, at most :data:`MOST_FOUND`.
            then: gets the answer as JSON text; None: too many ask.
            allowed: patterns of the codes that he may know of; None: all.
        """
        if len(self._waiting) >= _MOST_WAITING:
            then(None)
            return
        codes = EVERY_CODE if allowed is None else codes_of(allowed)
        self._waiting.append((text, min(limit, MOST_FOUND), then, codes))
        self._has_waiting.set()

    async def run(self) -> None:
        """Answer what is asked, until cancelled."""
        while True:
            await self._has_waiting.wait()
            while self._waiting:
                text, limit, then, codes = self._waiting[0]
                try:
                    found = await self._answer(text, limit, codes)
                except Exception:
                    # A bug met in one search is that search's end and nobody else's.
                    log.exception("a search has failed")
                    found = None
                self._waiting.popleft()
                then(found)
                await asyncio.sleep(0)
            self._has_waiting.clear()

    async def _answer(self, text: str | None, limit: int, codes: Codes) -> bytes:
        if time.monotonic() >= self._read_again_s:
            await self._read()
        if text is None:
            up, down = (self._up, self._down) if codes.has_all else await self._movers(limit, codes)
            return orjson.dumps({"up": self._shown(up[:limit]), "down": self._shown(down[:limit])})
        return orjson.dumps(self._shown(await self._search(text, limit, codes)))

    async def _read(self) -> None:
        """Read the board anew."""
        began_s = time.monotonic()
        entries: list[tuple[str, str, Quote, float]] = []
        moved: list[_Moved] = []
        up: list[_Moved] = []
        down: list[_Moved] = []
        quotes = list(self._quotes.values())
        for start in range(0, len(quotes), _READ_PER_SLICE):
            moved.clear()
            for quote in quotes[start : start + _READ_PER_SLICE]:
                code = plain_code(quote.code)
                if not self._is_known(code):
                    continue
                row = quote.row
                percent = row.get("change_pct") or 0.0
                entries.append((code, str(row.get("name", "")).casefold(), quote, percent))
                if percent:
                    moved.append((percent, code, quote))
            up, down = _most_moved(up, down, moved, MOST_FOUND)
            await asyncio.sleep(_READ_REST_S)
        self._entries, self._up, self._down = entries, up, down
        now_s = time.monotonic()
        # Long reads, of many codes, are made less often.
        self._read_again_s = now_s + max(_READ_EVERY_S, 3 * (now_s - began_s))

    async def _movers(self, limit: int, codes: Codes) -> tuple[list[_Moved], list[_Moved]]:
        """Return those that have moved most up and down, of these codes only."""
        up: list[_Moved] = []
        down: list[_Moved] = []
        entries = self._entries
        for start in range(0, len(entries), _FILTERED_PER_SLICE):
            moved = [
                (percent, code, quote)
                for code, _, quote, percent in entries[start : start + _FILTERED_PER_SLICE]
                if percent and code in codes
            ]
            up, down = _most_moved(up, down, moved, limit)
            await asyncio.sleep(0)
        return up, down

    async def _search(self, text: str, limit: int, codes: Codes) -> list[tuple[int, str, Quote]]:
        """Return the best matches: codes that begin so, then names that contain it."""
        wanted = text.casefold()
        beginnings = [text.upper()]
        try:
            beginnings.append(parse_code(text))  # another spelling of a whole code
        except BadCode:
            pass
        prefixes = tuple(beginnings)
        best: list[tuple[int, str, Quote]] = []
        entries = self._entries
        size = _SEARCHED_PER_SLICE if codes.has_all else _FILTERED_PER_SLICE
        for start in range(0, len(entries), size):
            found = [
                (0 if code.startswith(prefixes) else 1, code, quote)
                for code, name, quote, _ in entries[start : start + size]
                if (wanted in name or code.startswith(prefixes)) and code in codes
            ]
            best = heapq.nsmallest(limit, [*best, *found], key=lambda match: match[:2])
            await asyncio.sleep(0)
        return best

    def _shown(self, found: "list[tuple[float, str, Quote]] | list[tuple[int, str, Quote]]") -> list[dict[str, Any]]:
        return [{name: quote.row[name] for name in _SHOWN if name in quote.row} for _, _, quote in found]


def _most_moved(
    up: list[_Moved], down: list[_Moved], moved: list[_Moved], most: int
) -> tuple[list[_Moved], list[_Moved]]:
    """Return ``up`` and ``down``, the most moved first, with what more has moved."""
    return (
        heapq.nsmallest(most, [*up, *(m for m in moved if m[0] > 0)], key=lambda m: (-m[0], m[1])),
        heapq.nsmallest(most, [*down, *(m for m in moved if m[0] < 0)], key=lambda m: m[:2]),
    )
