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

from quotepush.push.subscriptions import Channel, Row
from quotepush.wire.frames import frame_header, text_frame
from quotepush.wire.messages import TICK_TAIL

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
        rows: in order, all of them; the hub appends.
        held: newest row per channel while merging, else None.
        is_blocked: the socket has not taken all of the last write; nothing is written meanwhile.
        sent: rows handed to the socket.
        merged: rows that were merged into a newer one.
    """

    __slots__ = ("_counted", "held", "is_blocked", "merged", "rows", "sent", "session", "waiting_bytes", "write")

    def __init__(self, session: Any, write: Callable[[bytes], None]) -> None:
        self.session = session
        self.write = write
        self.rows: list[Row] = []
        self.held: dict[Channel, Held] | None = None
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
            slot = held.get(row.channel)
            if slot is None:
                held[row.channel] = Held(row)
            else:
                slot.row = row
                slot.merged += 1
                self.merged += 1
        self._forget_rows()
        self.waiting_bytes = sum(len(slot.row.text) for slot in held.values())

    def take(self, head: bytes, now_ms: int) -> bytes:  # hot
        """Return what waits as one frame and forget it; some of it while catching up.

        Args:
            head: of a tick message at ``now_ms``.
        """
        if self.held is not None:
            return self._take_held(head)
        rows = self.rows
        self.sent += len(rows)
        if len(rows) == 1:
            # Busiest shape: one row, the same frame for the whole audience.
            row = rows[0]
            rows.clear()
            if self._counted:
                self._counted = self.waiting_bytes = 0
            channel = row.channel
            if channel.framed is not row or channel.frame_ms != now_ms:
                channel.framed = row
                channel.frame_ms = now_ms
                channel.frame = text_frame(head + row.text + TICK_TAIL)
            return channel.frame
        body = b",".join([row.text for row in rows])
        rows.clear()
        if self._counted:
            self._counted = self.waiting_bytes = 0
        return b"".join((frame_header(len(head) + len(body) + 2), head, body, TICK_TAIL))

    def _take_held(self, head: bytes) -> bytes:
        if self.rows:
            self.merge()
        held = self.held
        assert held
        texts: list[bytes] = []
        size = 0
        for channel in list(held):
            slot = held.pop(channel)
            text = slot.text()
            texts.append(text)
            size += len(text)
            if slot.merged:
                self.session.note_merged(channel.code, slot.merged)
            if size >= _CATCH_UP_BYTES:
                break
        self.sent += len(texts)
        self.waiting_bytes = max(0, self.waiting_bytes - size)
        if not held:
            self.held = None
            self.waiting_bytes = 0
        return text_frame(head + b",".join(texts) + TICK_TAIL)

    def drop(self, channels: Iterable[Channel]) -> None:
        """Forget what waits of these channels: the session no longer wants it, or has just been sent newer."""
        gone = set(channels)
        if self.rows:
            kept = [row for row in self.rows if row.channel not in gone]
            self._forget_rows()
            self.rows.extend(kept)
            self.waiting_bytes = 0
        if self.held:
            # Even when nothing is left it stays a dict: the hub has yet to say that we have caught up.
            for channel in gone:
                self.held.pop(channel, None)

    def last_sent(self, channel: Channel) -> tuple[int, int]:
        """Return the seq of the last row that was sent of ``channel`` (0: none), and how many of its rows wait."""
        first: int | None = None
        waiting = 0
        if self.held and (slot := self.held.get(channel)):
            first, waiting = slot.prev or 0, 1 + slot.merged
        for row in self.rows:
            if row.channel is channel:
                waiting += 1
                if first is None:
                    first = row.prev or 0
        if first is None:
            first = 0 if self in channel.newcomers else channel.seq
        return first, waiting

    def clear(self) -> None:
        """Forget everything that waits."""
        self._forget_rows()
        self.held = None
        self.waiting_bytes = 0

    def _forget_rows(self) -> None:
        # In place: the hub may be appending to this very list's owner in the same turn.
        self.rows.clear()
        self._counted = 0
