"""The fan-out of one worker: a row comes in, everybody who watches its code gets it.

Laws:

1. Only the loop's thread touches the hub, and nothing between looking up an audience and
   queueing its rows awaits.
2. One write per session per flush, whatever came in between; no session is ever waited for.
   A socket that has not taken its last write is left alone until it says so.
3. A flush that took ``t`` is followed by a rest of ``min(max_delay, 3 t)``: under load rows
   share writes, at a low rate nothing waits. No flush holds the loop longer than its budget.
4. Nobody is closed inside the loop over an audience.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count

from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Channel, Lane, Row, Subscriptions

__all__ = ["Hub"]

log = logging.getLogger("quotepush.session")

# A flush goes on in the next turn after so long, so that the loop reads, pings and accepts.
_BUDGET_S = 0.002


class Hub:
    """Hands rows to outboxes and outboxes to their sockets.

    Args:
        max_delay_s: longest rest between two flushes.
        max_rows: rows an outbox holds before it merges.
        max_bytes: bytes an outbox holds before it merges.
        on_merging: called once when an outbox begins to merge.
        on_caught_up: called once when it has been emptied again.
        on_failed: called when an outbox cannot be flushed, which is a bug: its session has to end.
        clock_ms: epoch milliseconds.
    """

    def __init__(
        self,
        subscriptions: Subscriptions,
        *,
        max_delay_s: float,
        max_rows: int,
        max_bytes: int,
        on_merging: Callable[[Outbox], None],
        on_caught_up: Callable[[Outbox], None],
        on_failed: Callable[[Outbox], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self._channels = subscriptions.channels
        self._max_delay_s = max_delay_s
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._on_merging = on_merging
        self._on_caught_up = on_caught_up
        self._on_failed = on_failed
        self._clock_ms = clock_ms
        self.ordinal = 0  # up to here everything that this worker watches was offered (``quote.ring``); 0: nobody knows
        self._dirty: list[Outbox] = []  # have rows that wait for the next flush
        self._flushing: list[Outbox] = []  # those of the flush that is going on
        self._flushed = 0  # how many of them are done
        self._spent_s = 0.0  # what it has taken so far
        self._parked: set[Outbox] = set()  # have rows, but their socket is full
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._next_flush = 0.0
        self._due: list[tuple[float, int, Lane]] = []  # lanes with a rate that have something for later, a heap
        self._numbers = count()  # so that lanes need not be compared
        self._due_timer: asyncio.TimerHandle | None = None
        self.rows_in = 0
        self.rows_out = 0
        self.writes = 0
        self.rows_merged = 0

    def offer(  # hot
        self, code: str, seq: int, bare: bytes, book: bytes | None = None, epoch: str = "", restated: int = 0
    ) -> None:
        """Queue the newest row of ``code`` for everybody who watches it here.

        Args:
            bare: the row as JSON without ``prev``, whole but for the book.
            book: the book as a JSON object, when this worker has asked for it.
            epoch: of a row that is restated, and ``restated`` says why.
        """
        channel = self._channels.get(code)
        if channel is None:
            return
        if restated and (epoch != channel.epoch or seq > channel.seq):
            self._restate(channel, seq, bare, book, epoch, restated)
            return
        if seq <= channel.seq:
            return
        if book is not None and channel.book is None:
            channel.begin_book(book)
        channel.renew(seq, bare, book)
        self.rows_in += 1
        lane = channel.plain
        if lane is not None:
            if book is None:
                self._hand_out(lane, seq, bare)
            else:
                self._offer_to(lane)
        if channel.lanes:
            for lane in channel.lanes.values():
                self._offer_to(lane)

    def _restate(self, channel: Channel, seq: int, bare: bytes, book: bytes | None, epoch: str, restated: int) -> None:
        """Queue a row that what was sent before does not lead to: everybody starts anew from it."""
        is_same_life = channel.epoch == epoch
        channel.epoch = epoch
        channel.renew(seq, bare, book)
        self.rows_in += 1
        for lane in channel.all_lanes():
            lane.note_shown()
            text = lane.format.with_epoch(channel.text(lane.view, lane.format), epoch)
            row = Row(lane, seq, None, text, restated, epoch)
            # Another server has sent them newer ones.
            ahead: dict[Outbox, int | None] = {
                outbox: base for outbox, base in lane.newcomers.items() if is_same_life and base and base >= seq
            }
            lane.audience.update(outbox for outbox in lane.newcomers if outbox not in ahead)
            for outbox in lane.audience:
                outbox.session.watchlist.note_restated(channel.code, lane.seq, seq)
                if not outbox.rows:
                    self._dirty.append(outbox)
                outbox.rows.append(row)
                outbox.has_restated = True
            lane.newcomers = ahead
            lane.seq = seq

    def _hand_out(self, lane: Lane, seq: int, bare: bytes) -> None:  # hot
        row = Row(lane, seq, lane.seq, bare)
        lane.seq = seq
        lane.rows += 1
        dirty = self._dirty
        for outbox in lane.audience:
            rows = outbox.rows
            if not rows:
                dirty.append(outbox)
            rows.append(row)
        if lane.newcomers:
            self._welcome(lane, seq, bare)

    def _welcome(self, lane: Lane, seq: int, bare: bytes) -> None:
        """Hand the row to those who were sent something else before than the rest of the lane."""
        code = lane.channel.code
        ahead: dict[Outbox, int | None] = {}
        for outbox, base in lane.newcomers.items():
            if base is not None and base >= seq:
                outbox.session.watchlist.note_skipped_row(code)  # it was in the snapshot, or another server has sent it
                if base > seq:
                    ahead[outbox] = base
                continue
            if not outbox.rows:
                self._dirty.append(outbox)
            outbox.rows.append(Row(lane, seq, base, bare))
            if base is None:
                outbox.session.watchlist.note_first_row(code, seq)
        lane.audience.update(outbox for outbox in lane.newcomers if outbox not in ahead)
        lane.newcomers = ahead

    def _offer_to(self, lane: Lane) -> None:
        """Hand the channel's newest row to a lane with a view, a format or a rate of its own."""
        if lane.is_due or not lane.has_news():
            return  # it goes with the row that waits, or with the next one
        rate = lane.shape.max_rate
        if rate is not None:
            now_s = time.monotonic()
            if now_s < lane.next_s:
                self._hand_out_later(lane)
                return
            lane.next_s = now_s + 1 / rate
        self._hand_out_newest(lane)

    def _hand_out_newest(self, lane: Lane) -> None:
        lane.note_shown()
        self._hand_out(lane, lane.channel.seq, lane.channel.text(lane.view, lane.format))

    def deliver(self, lane: Lane, outbox: Outbox, restated: int = 0) -> None:
        """Queue the newest row for somebody who has come from another lane and has not been sent it there.

        He gets it at once, as he would a snapshot; with a rate, the next one comes a period later.

        Args:
            restated: why what he was sent before does not lead to it; 0: it does.
        """
        channel = lane.channel
        rate = lane.shape.max_rate
        if rate is not None and (now_s := time.monotonic()) >= lane.next_s:
            lane.next_s = now_s + 1 / rate
        base = lane.newcomers.pop(outbox, lane.seq)
        lane.audience.discard(outbox)
        text = channel.text(lane.view, lane.format)
        if restated:
            row = Row(lane, channel.seq, None, lane.format.with_epoch(text, channel.epoch), restated, channel.epoch)
            outbox.has_restated = True
        else:
            row = Row(lane, channel.seq, base, text)
        if not outbox.rows:
            self._dirty.append(outbox)
        outbox.rows.append(row)
        if lane.seq == channel.seq:
            lane.audience.add(outbox)
        else:
            lane.newcomers[outbox] = channel.seq
        self.flush_soon()

    def _hand_out_later(self, lane: Lane) -> None:
        """The lane has had its row for now: its newest one goes out when the next may, whatever comes until then."""
        lane.is_due = True
        heappush(self._due, (lane.next_s, next(self._numbers), lane))
        if self._due_timer is None or self._due[0][2] is lane:
            self._wake_for_due()

    def _wake_for_due(self) -> None:
        if self._due_timer is not None:
            self._due_timer.cancel()
            self._due_timer = None
        if self._due:
            wait_s = max(0.0, self._due[0][0] - time.monotonic())
            self._due_timer = asyncio.get_running_loop().call_later(wait_s, self._hand_out_due)

    def _hand_out_due(self) -> None:
        self._due_timer = None
        now_s = time.monotonic()
        # Timers have milliseconds; what is due within one goes now.
        while self._due and self._due[0][0] <= now_s + 0.001:
            lane = heappop(self._due)[2]
            lane.is_due = False
            if lane.is_watched and lane.has_news():
                assert lane.shape.max_rate is not None
                # Not from now: what goes a millisecond early must not make the next one earlier still.
                lane.next_s = max(now_s, lane.next_s) + 1 / lane.shape.max_rate
                self._hand_out_newest(lane)
        self._wake_for_due()
        self.flush_soon()

    def flush_soon(self) -> None:
        """Flush now, or when the rest after the last flush is over."""
        # Parked ones too: rows have come to them that may have to be merged, when nobody else watches the code.
        if self._timer is not None or not (self._dirty or self._parked):
            return
        wait_s = self._next_flush - time.monotonic()
        if wait_s <= 0:
            self._flush()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._flush)

    def _flush(self) -> None:
        """Begin a flush of everybody who has something now."""
        self._flushing, self._dirty = self._dirty, []
        self._flushed = 0
        self._spent_s = 0.0
        self._flush_slice()

    def _flush_slice(self) -> None:  # hot
        """Go on with the flush until it is done or its budget for this turn is spent.

        Rows that come in between two slices still join the writes of those whose turn has not come.
        """
        begin = time.monotonic()
        deadline = begin + _BUDGET_S
        now_ms = self._clock_ms()
        flushing = self._flushing
        done = self._flushed
        while done < len(flushing):
            outbox = flushing[done]
            done += 1
            try:
                if outbox.is_blocked:
                    if outbox.rows or outbox.held is not None or outbox.replay is not None:
                        self._parked.add(outbox)
                elif outbox.replay is not None:
                    self._replay_some(outbox, now_ms)
                elif outbox.held is not None:
                    self._catch_up(outbox, now_ms)
                elif outbox.rows:
                    self.rows_out += len(outbox.rows)
                    self.writes += 1
                    outbox.write(outbox.take(now_ms))
            except Exception:
                # A bug met in one session is that session's end and nobody else's.
                log.exception("a session could not be written to")
                outbox.clear()
                self._on_failed(outbox)
            if not done & 31 and time.monotonic() > deadline:
                break
        now_s = time.monotonic()
        self._spent_s += now_s - begin
        if done < len(flushing):
            self._flushed = done
            self._timer = asyncio.get_running_loop().call_soon(self._flush_slice)
            return
        self._flushing = []
        self._timer = None
        if self._parked:
            self._merge_parked()
        rest_s = min(self._max_delay_s, 3 * self._spent_s)
        self._next_flush = now_s + rest_s
        if self._dirty:
            # Never from here: a session that catches up in many pieces must not hold the loop.
            # uvloop's timers count from the begin of the turn, which is the slice's.
            self._timer = asyncio.get_running_loop().call_later(rest_s + now_s - begin, self._flush)

    def _catch_up(self, outbox: Outbox, now_ms: int) -> None:
        """Send a merging session its newest rows, as far as the socket takes them."""
        if outbox.pending:
            merged, sent = outbox.merged, outbox.sent
            outbox.write(outbox.take(now_ms))
            self.writes += 1
            self.rows_out += outbox.sent - sent
            self.rows_merged += outbox.merged - merged
        else:  # it no longer wants anything of what waited
            outbox.clear()
        if outbox.held is None:
            self._on_caught_up(outbox)
        elif outbox.is_blocked:
            self._parked.add(outbox)
        else:
            self._dirty.append(outbox)

    def _merge_parked(self) -> None:
        for outbox in list(self._parked):  # a copy: what is told below can unblock its socket at once
            if outbox.held is not None:
                if outbox.rows:
                    self._merge(outbox)
            elif outbox.rows and outbox.is_above(self._max_rows, self._max_bytes):
                self._merge(outbox)
                self._on_merging(outbox)

    def _merge(self, outbox: Outbox) -> None:
        before = outbox.merged
        outbox.merge()
        self.rows_merged += outbox.merged - before

    def unblock(self, outbox: Outbox) -> None:
        """The socket has taken everything: what waits may go."""
        self._parked.discard(outbox)
        if outbox.rows or outbox.held is not None or outbox.replay is not None:
            self._dirty.append(outbox)
            self.flush_soon()

    def replay(self, outbox: Outbox) -> None:
        """Begin to send what a client has missed while it was away."""
        self._dirty.append(outbox)
        self.flush_soon()

    def _replay_some(self, outbox: Outbox, now_ms: int) -> None:
        sent = outbox.sent
        outbox.write(outbox.take_replay(now_ms))
        self.writes += 1
        self.rows_out += outbox.sent - sent
        if outbox.is_blocked:
            self._parked.add(outbox)
        elif outbox.replay is not None or outbox.rows or outbox.held is not None:
            self._dirty.append(outbox)

    def forget(self, outboxes: Iterable[Outbox]) -> None:
        """These sessions are gone: drop what waits for them."""
        for outbox in outboxes:
            outbox.clear()
            self._parked.discard(outbox)
