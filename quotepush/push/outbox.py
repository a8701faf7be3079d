"""What one session still has to be sent, in bounded memory.

Laws:

1. A session that keeps up gets every row, in order.
2. Above ``max_rows`` rows or ``max_bytes`` bytes the outbox holds one newest row per
   code and nothing else; each knows the ``prev`` of the first row merged into it, so
   that ``seq - prev - 1`` is always the number of rows the client was not sent.
3. A row never leaves while a newer one of its code waits here.

The hub appends to ``rows`` itself (one list append per row and subscriber is what the
fan-out costs); everything else happens here. No clock, no socket.
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any

from quotepush.push.subscriptions import Lane, MissedRow, Row
from quotepush.quote.board import GAP
from quotepush.wire.formats import JSON, Codec

__all__ = ["Held", "Outbox"]

# One write to a session that catches up: small enough that a newer row soon replaces the rest.
_CATCH_UP_BYTES = 65_536


class Held:
    """The newest row of one code for a session that was too slow for every row."""

    __slots__ = ("merged", "prev", "restated", "row")

    def __init__(self, row: Row) -> None:
        self.prev = row.prev
        self.row = row
        self.restated = row.restated
        self.merged = 0

    def text(self) -> bytes:
        if not self.restated:
            return self.row.text_after(self.prev)
        if self.row.restated:
            return self.row.text
        lane = self.row.lane
        return lane.format.with_epoch(self.row.text_after(None), lane.channel.epoch)


class Outbox:
    """The rows that wait for one session.

    Attributes:
        session: whose it is; the hub never looks at it.
        write: hands bytes to the socket at once.
        codec: the language of the connection.
        has_arrays: some of its rows may be arrays, whose messages name their columns.
        has_restated: some of what waits goes out in snapshot messages.
        rows: in order, all of them; the hub appends.
        replay: rows that were missed while the client was away; they go before all others, as the socket takes them.
        replay_bytes: how long they are together.
        replayed: ordinal of the last of them that :meth:`take_replay` has returned, where they have ordinals; for who
            writes it, to be read and cleared.
        held: newest row per lane while merging, else None.
        is_blocked: the socket has not taken all of the last write; nothing is written meanwhile.
        sent: rows handed to the socket.
        merged: rows that were merged into a newer one.
    """

    __slots__ = (
        "_counted", "codec", "has_arrays", "has_restated", "held", "is_blocked", "merged", "replay",
        "replay_bytes", "replayed", "rows", "sent", "session", "waiting_bytes", "write",
    )  # fmt: skip

    def __init__(self, session: Any, write: Callable[[bytes], None], codec: Codec = JSON) -> None:
        self.session = session
        self.write = write
        self.codec = codec
        self.has_arrays = False
        self.has_restated = False
        self.rows: list[Row] = []
        self.replay: deque[Row] | None = None
        self.replay_bytes = 0
        self.replayed = 0
        self.held: dict[Lane, Held] | None = None
        self.is_blocked = False
        self.sent = 0
        self.merged = 0
        self.waiting_bytes = 0
        self._counted = 0  # how many of ``rows`` are in ``waiting_bytes``

    @property
    def pending(self) -> int:
        """Rows that wait, merged ones counted once."""
        return len(self.rows) + len(self.held or ()) + len(self.replay or ())

    def is_above(self, max_rows: int, max_bytes: int) -> bool:
        """Say whether so much waits that rows have to be merged."""
        rows = self.rows
        for row in rows[self._counted :]:
            self.waiting_bytes += len(row.text)
        self._counted = len(rows)
        return len(rows) > max_rows or self.waiting_bytes > max_bytes

    def merge(self) -> None:
        """Keep the newest row per code and nothing else; from now on until the outbox is empty."""
        held = self.held
        if held is None:
            held = self.held = {}
        for row in self.rows:
            slot = held.get(row.lane)
            if slot is None:
                held[row.lane] = Held(row)
            else:
                slot.row = row
                slot.restated = max(slot.restated, row.restated)
                slot.merged += 1
                self.merged += 1
        self._forget_rows()
        self.waiting_bytes = sum(len(slot.row.text) for slot in held.values())

    def take(self, now_ms: int) -> bytes:  # hot
        """Return what waits as one frame (several, when rows differ in their columns) and forget it.

        While catching up it is some of what waits.
        """
        if self.held is not None:
            return self._take_held(now_ms)
        rows = self.rows
        self.sent += len(rows)
        if len(rows) == 1 and not self.has_restated:
            # Busiest shape: one row, the same frame for the whole audience.
            row = rows[0]
            rows.clear()
            if self._counted:
                self._counted = self.waiting_bytes = 0
            lane = row.lane
            if lane.framed is not row or lane.frame_ms != now_ms:
                lane.framed = row
                lane.frame_ms = now_ms
                cols = lane.view.cols if lane.format.is_array else None
                lane.frame = self.codec.rows_frame("tick", now_ms, (row.text,), cols)
            return lane.frame
        if self.has_arrays or self.has_restated:
            frames = self._frames(now_ms, [(row.lane, row.restated, row.epoch, row.text) for row in rows])
            self.has_restated = False
        else:
            frames = self.codec.rows_frame("tick", now_ms, [row.text for row in rows])
        rows.clear()
        if self._counted:
            self._counted = self.waiting_bytes = 0
        return frames

    def order_replay(self) -> None:
        """Put missed rows of all codes in the order of their ordinals: one of them then says how far they have gone."""
        if self.replay is not None:
            self.replay = deque(sorted(self.replay, key=lambda row: row.ordinal if isinstance(row, MissedRow) else 0))

    def take_replay(self, now_ms: int) -> bytes:
        """Return some of the rows that were missed, as frames, and forget them."""
        assert self.replay
        rows: list[tuple[Lane, int, str, bytes]] = []
        size = 0
        while self.replay and size < _CATCH_UP_BYTES:
            row = self.replay.popleft()
            rows.append((row.lane, 0, "", row.text))
            size += len(row.text)
            self.replayed = row.ordinal if isinstance(row, MissedRow) else 0
        self.replay_bytes -= size
        if not self.replay:
            self.replay = None
        self.sent += len(rows)
        return self._frames(now_ms, rows, replay=True)

    def _frames(self, now_ms: int, rows: Iterable[tuple[Lane, int, str, bytes]], **also: Any) -> bytes:
        """Return a message per list of columns, and others for rows that are restated; a code's rows stay in order."""
        frames = []
        for (restated, epoch), run in groupby(rows, key=itemgetter(1, 2)):
            groups: dict[int | None, list[tuple[Lane, bytes]]] = {}
            for lane, _, _, text in run:
                groups.setdefault(lane.view.cols if lane.format.is_array else None, []).append((lane, text))
            for cols, group in groups.items():
                facts = dict(also)
                if restated == GAP:
                    facts["gap"] = True
                if restated and cols is not None:
                    facts["epochs"] = {lane.channel.code: epoch for lane, _ in group}
                kind = "snapshot" if restated else "tick"
                frames.append(self.codec.rows_frame(kind, now_ms, [text for _, text in group], cols, **facts))
        return b"".join(frames)

    def _take_held(self, now_ms: int) -> bytes:
        if self.rows:
            self.merge()
        held = self.held
        assert held
        texts: list[tuple[Lane, int, str, bytes]] = []
        size = 0
        for lane in list(held):
            slot = held.pop(lane)
            text = slot.text()
            texts.append((lane, slot.restated, lane.channel.epoch if slot.restated else "", text))
            size += len(text)
            if slot.merged:
                self.session.watchlist.note_merged(lane.channel.code, slot.merged)
            if size >= _CATCH_UP_BYTES:
                break
        self.sent += len(texts)
        self.waiting_bytes = max(0, self.waiting_bytes - size)
        if not held:
            self.held = None
            self.has_restated = False
            self.waiting_bytes = 0
        return self._frames(now_ms, texts)

    def drop(self, lanes: Iterable[Lane]) -> None:
        """Forget what waits of these lanes: the session no longer wants it, or has just been sent newer."""
        gone = set(lanes)
        if self.replay:
            self.replay = deque(row for row in self.replay if row.lane not in gone) or None
            self.replay_bytes = sum(len(row.text) for row in self.replay or ())
        if self.rows:
            kept = [row for row in self.rows if row.lane not in gone]
            self._forget_rows()
            self.rows.extend(kept)
            self.waiting_bytes = 0
        if self.held:
            # Even when nothing is left it stays a dict: the hub has yet to say that we have caught up.
            for lane in gone:
                self.held.pop(lane, None)

    def restating(self, lane: Lane) -> int:
        """Return why a row of ``lane`` that waits is restated; 0: none is."""
        slot = self.held.get(lane) if self.held else None
        waiting = [row.restated for row in self.rows if row.lane is lane]
        return max(0 if slot is None else slot.restated, *waiting, 0)

    def last_sent(self, lane: Lane) -> tuple[int | None, int]:
        """Return the seq of the last row that was sent of ``lane`` (None: none), and how many of its rows wait."""
        replayed = [row for row in self.replay or () if row.lane is lane]
        slot = self.held.get(lane) if self.held else None
        waiting = [row for row in self.rows if row.lane is lane]
        count = len(replayed) + (1 + slot.merged if slot is not None else 0) + len(waiting)
        if replayed:
            return replayed[0].prev, count
        if slot is not None:
            return slot.prev, count
        if waiting:
            return waiting[0].prev, count
        return lane.newcomers.get(self, lane.seq), 0

    def clear(self) -> None:
        """Forget everything that waits."""
        self._forget_rows()
        self.held = self.replay = None
        self.replay_bytes = 0
        self.has_restated = False
        self.waiting_bytes = 0

    def _forget_rows(self) -> None:
        # In place: the hub may be appending to this very list's owner in the same turn.
        self.rows.clear()
        self._counted = 0
