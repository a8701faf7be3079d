"""Who watches what in this worker.

Invariant: an outbox stands in a channel's audience exactly when its session is
subscribed to the channel's code, in both directions, and a channel lives as long as
it has an audience or a claim. Only then main is told that the code is not wanted, so
an answer of main that is still under way is never about a code it has stopped sending.

A *channel* is one code here; it counts the rows it has handed out, so that a
subscription knows how many were merged for it without counting per row.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quotepush.wire.messages import row_with_prev, row_without_prev

if TYPE_CHECKING:
    from quotepush.push.outbox import Outbox

__all__ = ["Channel", "Row", "Subscription", "Subscriptions"]


class Row:
    """One row on its way to everybody who watches its code.

    Attributes:
        seq: number of this row.
        prev: number of the row before it in this channel; None for an outbox's first row without a snapshot.
        text: JSON with ``prev``; the same bytes for all, and the only copy while it waits.
    """

    __slots__ = ("channel", "prev", "seq", "text")

    def __init__(self, channel: "Channel", seq: int, prev: int | None, bare: bytes) -> None:
        self.channel = channel
        self.seq = seq
        self.prev = prev
        self.text = bare if prev is None else row_with_prev(bare, prev)

    def text_after(self, prev: int | None) -> bytes:
        """Return the row as JSON for somebody who was last sent the row ``prev`` (None: no row)."""
        if prev == self.prev:
            return self.text
        bare = self.text if self.prev is None else row_without_prev(self.text)
        return bare if prev is None else row_with_prev(bare, prev)


class Channel:
    """One code in this worker.

    Attributes:
        seq: of the newest row, 0 before the first.
        row: the newest row as JSON text without ``prev``; None before the first.
        rows: how many rows were handed out here.
        audience: who gets the next row with the common ``prev``.
        newcomers: who gets the next row without ``prev``: subscribed without a snapshot.
        framed: the row that was last sent alone in a message, at ``frame_ms``; ``frame`` is the whole WebSocket
            frame. Here and not in the row: rows wait for slow clients, frames must not.
    """

    __slots__ = ("audience", "code", "frame", "frame_ms", "framed", "newcomers", "row", "rows", "seq")

    def __init__(self, code: str, seq: int, row: bytes | None) -> None:
        self.code = code
        self.seq = seq
        self.row = row
        self.rows = 0
        self.audience: set[Outbox] = set()
        self.newcomers: set[Outbox] = set()
        self.framed: Row | None = None
        self.frame_ms = 0
        self.frame = b""

    @property
    def is_watched(self) -> bool:
        return bool(self.audience or self.newcomers)


class Subscription:
    """One session's subscription to one code.

    Attributes:
        merged: rows merged for this session alone, because it was slow.
    """

    __slots__ = ("_rows_before", "_seq_before", "channel", "merged")

    def __init__(self, channel: Channel, *, has_base: bool) -> None:
        self.channel = channel
        self.merged = 0
        self._seq_before = channel.seq if has_base else -1
        self._rows_before = channel.rows

    def start(self, seq: int) -> None:
        """Begin to count at the first row, for a subscription without a snapshot."""
        if self._seq_before < 0:
            self._seq_before = seq
            self._rows_before = self.channel.rows

    def merged_until(self, seq: int, rows_waiting: int) -> int:
        """Return how many rows were merged for this subscription up to ``seq``, here and upstream.

        Args:
            seq: of the last row that was sent.
            rows_waiting: rows of the channel that are still in the session's outbox.
        """
        if self._seq_before < 0:
            return 0
        handed_out = self.channel.rows - self._rows_before - rows_waiting
        return max(0, seq - self._seq_before - handed_out) + self.merged

    def restart(self, seq: int, rows_waiting: int) -> "Subscription":
        """Return this subscription as it is after a snapshot that stands for what waited.

        Args:
            seq: of the last row that was sent.
            rows_waiting: rows that the snapshot replaced.
        """
        after = Subscription(self.channel, has_base=True)
        after.merged = self.merged_until(seq, rows_waiting)
        if rows_waiting:
            # All but the newest, also the ones that were merged upstream.
            after.merged += self.channel.seq - max(seq, self._seq_before - 1) - 1
        return after


class Subscriptions:
    """The channels of this worker."""

    def __init__(self) -> None:
        self.channels: dict[str, Channel] = {}
        self.count = 0
        self._claims: Counter[str] = Counter()

    def open(self, code: str, seq: int, row: bytes | None) -> Channel:
        """Return the channel of ``code``, made from its newest row if it is new here."""
        channel = self.channels.get(code)
        if channel is None:
            channel = self.channels[code] = Channel(code, seq, row)
        return channel

    def add(self, channel: Channel, outbox: "Outbox", *, with_prev: bool) -> Subscription:
        """Put ``outbox`` into the audience; subscribing again starts anew, without a hole.

        Args:
            with_prev: the session has been sent the channel's newest row as a snapshot.
        """
        if outbox not in channel.audience and outbox not in channel.newcomers:
            self.count += 1
        channel.audience.discard(outbox)
        channel.newcomers.discard(outbox)
        (channel.audience if with_prev else channel.newcomers).add(outbox)
        return Subscription(channel, has_base=with_prev)

    def discard(self, channels: Iterable[Channel], outbox: "Outbox") -> list[str]:
        """Take ``outbox`` out of these audiences; return the codes that are not wanted here any more."""
        left = []
        for channel in channels:
            if outbox in channel.audience or outbox in channel.newcomers:
                self.count -= 1
                channel.audience.discard(outbox)
                channel.newcomers.discard(outbox)
            left += self._close(channel.code)
        return left

    def claim(self, codes: Iterable[str]) -> None:
        """Keep these codes until :meth:`release`: main is being asked about them."""
        self._claims.update(list(codes))  # a list: a mapping would be taken for counts

    def release(self, codes: Iterable[str]) -> list[str]:
        """Give up the claims; return the codes that are not wanted here any more."""
        left = []
        for code in codes:
            self._claims[code] -= 1
            if self._claims[code] <= 0:
                del self._claims[code]
                left += self._close(code)
        return left

    def _close(self, code: str) -> list[str]:
        channel = self.channels.get(code)
        if code in self._claims or (channel is not None and channel.is_watched):
            return []
        self.channels.pop(code, None)
        return [code]
