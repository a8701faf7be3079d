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

from collections.abc import Callable, Iterable
from typing import Any

from quotepush.push.subscriptions import Lane, Row
from quotepush.wire.formats import JSON, Codec

__all__ = ["Held", "Outbox"]

# One write to a session that catches up: small enough that a newer row soon replaces the rest.
_CATCH_UP_BYTES = 65_536


class Held:
    """The newest row of one code for a session that was too slow for every row."""

    __slots__ = ("merged", "prev", "row")

    def __init__(self, row: Row) -> None:
        self.prev = row.prev
        self.row = row
        self.merged = 0

    def text(self) -> bytes:
        return self.row.text_after(self.prev)


class Outbox:
    """The rows that wait for one session.

    Attributes:
        session: whose it is; the hub never looks at it.
        write: hands bytes to the socket at once.
        codec: the language of the connection.
        has_arrays: some of its rows may be arrays, whose messages name their columns.
        rows: in order, all of them; the hub appends.
        held: newest row per lane while merging, else None.
        is_blocked: the socket has not taken all of the last write; nothing is written meanwhile.
        sent: rows handed to the socket.
        merged: rows that were merged into a newer one.
    """

    __slots__ = (
        "_counted", "codec", "has_arrays", "held", "is_blocked", "merged", "rows", "sent", "session", "waiting_bytes",
        "write",
    )  # fmt: skip

    def __init__(self, session: Any, write: Callable[[bytes], None], codec: Codec = JSON) -> None:
        self.session = session
        self.write = write
        self.codec = codec
        self.has_arrays = False
        self.rows: list[Row] = []
        self.held: dict[Lane, Held] | None = None
        self.is_blocked = False
        self.sent = 0
        self.merged = 0
        self.waiting_bytes = 0
        self._counted = 0  # how many of ``rows`` are in ``waiting_bytes``

    @property
    def pending(self) -> int:
        """Rows that wait, merged ones counted once."""
        return len(self.rows) + len(self.held or ())

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
        if len(rows) == 1:
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
        if self.has_arrays:
            frames = self._frames(now_ms, ((row.lane, row.text) for row in rows))
        else:
            frames = self.codec.rows_frame("tick", now_ms, [row.text for row in rows])
        rows.clear()
        if self._counted:
            self._counted = self.waiting_bytes = 0
        return frames

    def _frames(self, now_ms: int, texts: Iterable[tuple[Lane, bytes]]) -> bytes:
        """Return one message per list of columns; rows of one lane stay in order, for they share theirs."""
        groups: dict[int | None, list[bytes]] = {}
        for lane, text in texts:
            groups.setdefault(lane.view.cols if lane.format.is_array else None, []).append(text)
        return b"".join([self.codec.rows_frame("tick", now_ms, group, cols) for cols, group in groups.items()])

    def _take_held(self, now_ms: int) -> bytes:
        if self.rows:
            self.merge()
        held = self.held
        assert held
        texts: list[tuple[Lane, bytes]] = []
        size = 0
        for lane in list(held):
            slot = held.pop(lane)
            text = slot.text()
            texts.append((lane, text))
            size += len(text)
            if slot.merged:
                self.session.note_merged(lane.channel.code, slot.merged)
            if size >= _CATCH_UP_BYTES:
                break
        self.sent += len(texts)
        self.waiting_bytes = max(0, self.waiting_bytes - size)
        if not held:
            self.held = None
            self.waiting_bytes = 0
        return self._frames(now_ms, texts)

    def drop(self, lanes: Iterable[Lane]) -> None:
        """Forget what waits of these lanes: the session no longer wants it, or has just been sent newer."""
        gone = set(lanes)
        if self.rows:
            kept = [row for row in self.rows if row.lane not in gone]
            self._forget_rows()
            self.rows.extend(kept)
            self.waiting_bytes = 0
        if self.held:
            # Even when nothing is left it stays a dict: the hub has yet to say that we have caught up.
            for lane in gone:
                self.held.pop(lane, None)

    def last_sent(self, lane: Lane) -> tuple[int | None, int]:
        """Return the seq of the last row that was sent of ``lane`` (None: none), and how many of its rows wait."""
        waiting = [row for row in self.rows if row.lane is lane]
        slot = self.held.get(lane) if self.held else None
        if slot is not None:
            return slot.prev, 1 + slot.merged + len(waiting)
        if waiting:
            return waiting[0].prev, len(waiting)
        return lane.newcomers.get(self, lane.seq), 0

    def clear(self) -> None:
        """Forget everything that waits."""
        self._forget_rows()
        self.held = None
        self.waiting_bytes = 0

    def _forget_rows(self) -> None:
        # In place: the hub may be appending to this very list's owner in the same turn.
        self.rows.clear()
        self._counted = 0
