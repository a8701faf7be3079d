"""Shows the board with its delays: looks at it every interval, and passes on what is old enough.

Laws: main is never held up, some codes are looked at a turn of its loop; after a restart what the publishers' log still
holds of the time before is shown as if there had been none.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from redis.exceptions import RedisError

from quotepush.errors import reason_of
from quotepush.ingest.log import LogFollower
from quotepush.quote.board import Board, Quote
from quotepush.quote.delay import DelayLine, Sample
from quotepush.quote.past import PastRow

__all__ = ["Delaying"]

log = logging.getLogger("quotepush.main")

# A code whose rows nobody watches has a tick to be merged, and is encoded: some microseconds each.
_PER_SLICE = 100
_REST_S = 0.001


class Delaying:
    """Keeps a :class:`~quotepush.quote.delay.DelayLine` moving.

    Args:
        publish: takes a quote that has news.
        on_batch: called when some have been published.
    """

    def __init__(
        self,
        line: DelayLine,
        board: Board,
        follower: LogFollower,
        *,
        publish: Callable[[Quote], None],
        on_batch: Callable[[], None],
    ) -> None:
        self._line = line
        self._board = board
        self._follower = follower
        self._publish = publish
        self._on_batch = on_batch

    async def begin(self) -> None:
        """Note what is known of the time before, on the board and in the publishers' log."""
        line = self._line
        for number, quote in enumerate(list(self._board.quotes.values()), 1):
            line.note_past(quote.code, Sample.of(quote), quote.arrived_ms)
            if not number % _PER_SLICE:
                await asyncio.sleep(0)
        try:
            await self._read_log()
        except (RedisError, OSError, TimeoutError) as e:
            log.warning("delayed quotes begin anew: the log cannot be read: %s", reason_of(e, 0))
        line.begin(_now_ms())

    async def _read_log(self) -> None:
        """Note the rows that the ticks of the log made, one an interval and code."""
        told: dict[str, set[str]] = {}
        rows: dict[str, PastRow] = {}
        quotes, line = self._board.quotes, self._line
        shown: dict[str, tuple[int, int]] = {}  # code to the seq of its newest tick, and when it came
        ended_ms = 0

        def note(code: str, tick: Mapping[str, Any]) -> None:
            told.setdefault(code, set()).update(tick)

        def end_interval() -> None:
            for code, (seq, arrived_ms) in shown.items():
                row, quote = rows[code], quotes[code]
                line.note_past(
                    code, Sample(seq, quote.epoch, row.encoded(), row.encoded_book(), quote.gaps), arrived_ms
                )
            shown.clear()

        def take(code: str, seq: int, tick: dict[str, Any], arrived_ms: int) -> None:
            nonlocal ended_ms
            quote = quotes.get(code)
            if quote is None or quote.epoch != self._follower.epoch or seq >= quote.seq:
                return  # the newest one is on the board
            row = rows.get(code)
            if row is None:
                row = rows[code] = PastRow(quote, told[code])
            if arrived_ms >= ended_ms:
                end_interval()
                ended_ms = arrived_ms + round(line.interval_s * 1000)
            if row.merge(seq, tick, arrived_ms):
                shown[code] = seq, arrived_ms

        await self._follower.read_past(_now_ms() - line.longest_ms, note, take)
        end_interval()

    async def run(self) -> None:
        """Look and show, until cancelled."""
        line = self._line
        due_s = time.monotonic()
        while True:
            due_s = max(due_s + line.interval_s, time.monotonic() + line.interval_s / 2)
            await asyncio.sleep(due_s - time.monotonic())
            quotes = list(self._board.quotes.values())
            for start in range(0, len(quotes), _PER_SLICE):
                for quote in quotes[start : start + _PER_SLICE]:
                    line.take(quote)
                await asyncio.sleep(_REST_S)
            line.end_round(_now_ms())
            await self._show(line.release(_now_ms()))

    async def _show(self, released: Iterator[Quote | None]) -> None:
        for quote in released:
            if quote is not None:
                self._publish(quote)
            else:
                self._on_batch()
                await asyncio.sleep(0)
        self._on_batch()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
