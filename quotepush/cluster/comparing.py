"""Which entries in the sets of codes differ from what this worker wrote.

Law: what a round reads depends on this worker's own connections and a constant, never on the size of the cluster.

The set of a code has the fds of all nodes. A small one is read whole. A large one is not: of our own fds it is asked
whether they are there, which finds what is missing, and a cursor goes through it page by page, round by round, which
finds what is stale. The cursor is in one set at a time, so that sets take their share of the pages by their size.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from redis.asyncio import Redis

from quotepush.cluster.sets import SLICE_COMMANDS, SLICE_MEMBERS, Codes, RegistryKeys, execute, raw, scan_page, text

__all__ = ["CodeComparison", "Differences"]

# A set that one page of this size does not end is large.
SMALL_SET = 100
# Of small sets, and of our own fds in large ones, in a round.
CHECKED_MEMBERS = 20_000
# Of large sets, in search of what is stale: 5 s apart, a million connections with twenty codes take six hours.
SWEPT_MEMBERS = 5_000


@dataclass(slots=True)
class Differences:
    """What a round found.

    Attributes:
        stale: code to fds of ours that its set has and that, as it was written, do not have the code.
        short: codes whose sets lack fds of ours.
        lacking: those fds.
    """

    stale: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    short: set[str] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)


class CodeComparison:
    """Compares the sets of this worker's codes with what it wrote, some of them in each round.

    Args:
        written: what Redis holds of each fd, as far as that is known. It must stand still during a round.
        audience: each code of ``written`` and how many fds have it.
        is_ours: did this worker, in this life, give out that fd?
    """

    def __init__(
        self,
        redis: Redis,
        keys: RegistryKeys,
        *,
        written: Mapping[str, Codes],
        audience: Mapping[str, int],
        is_ours: Callable[[str], bool],
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._written = written
        self._audience = audience
        self._is_ours = is_ours

        self._queue: list[str] = []  # codes to be compared, the next one last
        self._to_ask: list[str] = []  # of them, those with large sets
        self._unasked: dict[str, list[str]] = {}  # large sets, and our fds that each is still to be asked for
        self._large: dict[str, None] = {}  # sets that the cursor has not gone through; it is in the first one
        self._cursor = 0

    def begin_anew(self) -> None:
        """Redis may be another one, where cursors mean something else and every set may have another size."""
        self._queue.clear()
        self._to_ask.clear()
        self._unasked.clear()
        self._large.clear()
        self._cursor = 0

    async def compare(self, most: int) -> Differences:
        """Do a round; at most so many codes begin to be compared in it.

        Raises:
            RedisError, TimeoutError: Redis did not answer; begin anew.
        """
        found = Differences()
        if not self._queue:
            self._queue.extend(self._audience)
        left = CHECKED_MEMBERS - sum(map(len, self._unasked.values()))
        small: dict[str, set[str]] = {}  # short ones, and who is in them
        large: set[str] = set()
        turn = self._turn(most)
        while left > 0:
            if self._to_ask:
                code = self._to_ask.pop()
                if code in self._audience and code not in self._unasked:
                    large.add(code)
                    left -= self._audience[code]
                continue
            some = list(islice(turn, min(SLICE_COMMANDS, math.ceil(left / SMALL_SET))))
            if not some:
                break
            self._to_ask.extend(code for code in some if code in self._large)
            left -= await self._read_small([code for code in some if code not in self._large], small, found)
        if small or large:
            own = await self._own_fds(large | small.keys())
            for code, held in small.items():
                found.lacking.update(fd for fd in own[code] if fd not in held)
            found.short.update(small)
            self._unasked.update((code, own[code]) for code in large)
        await self._ask_large(found)
        await self._sweep(found)
        return found

    def _turn(self, most: int) -> Iterator[str]:
        for _ in range(most):
            if not self._queue:
                return
            code = self._queue.pop()
            if code in self._audience and code not in self._unasked:
                yield code

    async def _read_small(self, codes: Sequence[str], short: dict[str, set[str]], found: Differences) -> int:
        """Read sets that may be small, and put off those that are not; return how many members were read."""
        # Half a page each: most sets are small indeed.
        scans = ((SMALL_SET // 2, ("SSCAN", self._keys.code(code), 0, "COUNT", SMALL_SET)) for code in codes)
        members = 0
        for count, (code, (cursor, page)) in enumerate(zip(codes, await execute(self._redis, scans), strict=True), 1):
            members += len(page)
            held = self._sort(code, map(text, page), found)
            if int(cursor):
                self._large[code] = None
                self._to_ask.append(code)
            elif len(held) < self._audience[code]:
                short[code] = held
            if count % 20 == 0:
                await asyncio.sleep(0)
        return members

    def _sort(self, code: str, fds: Iterable[str], found: Differences) -> set[str]:
        """Note which of these members of a set are stale; return those of ours that are right."""
        ours = {fd for fd in fds if self._is_ours(fd)}
        right = {fd for fd in ours if code in self._written.get(fd, ())}
        if len(right) < len(ours):
            found.stale[code].extend(ours - right)
        return right

    async def _own_fds(self, codes: set[str]) -> dict[str, list[str]]:
        """One pass over all our fds, for those of each of these codes."""
        own: dict[str, list[str]] = {code: [] for code in codes}
        for count, (fd, its_codes) in enumerate(self._written.items(), 1):
            for code in codes.intersection(its_codes):
                own[code].append(fd)
            if count % 500 == 0:
                await asyncio.sleep(0)
        return own

    async def _ask_large(self, found: Differences) -> None:
        """Ask large sets for our own fds; what is beyond the measure of a round is for the next one."""
        asked: list[tuple[str, list[str]]] = []
        left = CHECKED_MEMBERS
        while self._unasked and left > 0:
            code = next(iter(self._unasked))
            fds = self._unasked[code]
            some = fds[-min(left, SLICE_MEMBERS) :]
            del fds[-len(some) :]
            if not fds:
                del self._unasked[code]
            left -= len(some)
            still = [fd for fd in some if code in self._written.get(fd, ())]  # what waited may have changed
            if still:
                asked.append((code, still))
        commands = ((len(fds), ("SMISMEMBER", self._keys.code(code), *map(raw, fds))) for code, fds in asked)
        for (code, fds), flags in zip(asked, await execute(self._redis, commands), strict=True):
            lacking = [fd for fd, flag in zip(fds, flags, strict=True) if not flag]
            if lacking:
                found.short.add(code)
                found.lacking.update(lacking)

    async def _sweep(self, found: Differences) -> None:
        """Go through large sets, one after the other, from where the last round stopped."""
        left = SWEPT_MEMBERS
        while self._large and left > 0:
            code = next(iter(self._large))
            if code in self._audience:
                self._cursor, page = await scan_page(self._redis, self._keys.code(code), self._cursor, 1_000)
                self._sort(code, page, found)
                left -= max(SMALL_SET, len(page))  # an empty page is a command, too
            else:
                self._cursor = 0
            if not self._cursor:
                del self._large[code]  # when it is its turn again it is looked at whether it still is large
