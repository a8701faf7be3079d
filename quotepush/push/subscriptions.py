"""Who watches what in this worker, and in which shape.

Invariant: an outbox stands in exactly one lane of a channel when its session is subscribed to
the channel's code, and in none otherwise, in both directions; a channel lives as long as
somebody stands in it or claims it. Only then main is told that the code is not wanted, so
an answer of main that is still under way is never about a code it has stopped sending.

A *channel* is one code here and knows its newest row. A *lane* of it is everybody who gets the
same rows of it: same view, same format, same rate. It counts the rows it has handed out, so
that a subscription knows how many were merged for it without counting per row.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from quotepush.quote.tick import BOOK_FIELDS
from quotepush.wire.formats import DEFAULT_VIEW, JSON, Format, View

if TYPE_CHECKING:
    from quotepush.push.outbox import Outbox

__all__ = ["PLAIN", "Channel", "Lane", "MissedRow", "Row", "Shape", "Subscription", "Subscriptions"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What somebody wants of a code.

    Attributes:
        max_rate: most rows per second; None: every row.
    """

    view: View
    format: Format
    max_rate: float | None = None


# What nearly everybody wants, and main has encoded already.
PLAIN = Shape(DEFAULT_VIEW, JSON.objects)


# What the default view does not show, or what is no news.
_NO_NEWS = frozenset((*BOOK_FIELDS, "seq", "ts"))
# Equal to no values of any view.
_UNKNOWN = object()


class Row:
    """One row on its way to everybody in a lane.

    Attributes:
        seq: number of this row.
        prev: number of the row before it in this lane; None for an outbox's first row without a snapshot.
        text: encoded with ``prev``; the same bytes for all, and the only copy while it waits.
        restated: not 0 for a row that goes out in a snapshot message, because what was sent before does not lead
            to it: the reason, of :mod:`quotepush.quote.board`.
        epoch: in which the number of such a row counts.
    """

    __slots__ = ("epoch", "lane", "prev", "restated", "seq", "text")

    def __init__(
        self, lane: "Lane", seq: int, prev: int | None, bare: bytes, restated: int = 0, epoch: str = ""
    ) -> None:
        self.lane = lane
        self.seq = seq
        self.prev = prev
        self.text = bare if prev is None else lane.format.with_prev(bare, prev)
        self.restated = restated
        self.epoch = epoch

    def text_after(self, prev: int | None) -> bytes:
        """Return the row for somebody who was last sent the row ``prev`` (None: no row)."""
        if prev == self.prev:
            return self.text
        spelled = self.lane.format
        bare = self.text if self.prev is None else spelled.without_prev(self.text)
        return bare if prev is None else spelled.with_prev(bare, prev)


class MissedRow(Row):
    """A row that is replayed; ``ordinal`` is its place among the rows of all codes."""

    __slots__ = ("ordinal",)

    def __init__(self, lane: "Lane", seq: int, prev: int | None, bare: bytes, ordinal: int) -> None:
        super().__init__(lane, seq, prev, bare)
        self.ordinal = ordinal


class Lane:
    """Those who get the same rows of one code.

    Attributes:
        seq: of the row that was handed out last.
        rows: how many rows were handed out.
        audience: who gets the next row with the common ``prev``.
        newcomers: who gets it with another ``prev``: the seq of the snapshot he was sent (None: he was sent none).
        next_s: no row before this time, for a lane with a rate; loop time.
        is_due: a row waits for that time.
        framed: the row that was last sent alone in a message, at ``frame_ms``; ``frame`` is the whole WebSocket
            frame. Here and not in the row: rows wait for slow clients, frames must not.
    """

    __slots__ = (
        "_shown", "audience", "channel", "format", "frame", "frame_ms", "framed", "is_due", "newcomers", "next_s",
        "rows", "seq", "shape", "view",
    )  # fmt: skip

    def __init__(self, channel: "Channel", shape: Shape) -> None:
        self.channel = channel
        self.shape = shape
        self.view = shape.view
        self.format = shape.format
        self.seq = channel.seq
        self.rows = 0
        self.audience: set[Outbox] = set()
        self.newcomers: dict[Outbox, int | None] = {}
        self.next_s = -math.inf
        self.is_due = False
        self.framed: Row | None = None
        self.frame_ms = 0
        self.frame = b""
        self._shown = channel.values(shape.view)

    @property
    def is_watched(self) -> bool:
        return bool(self.audience or self.newcomers)

    def has_news(self) -> bool:
        """Say whether the channel's newest row shows these people something that they have not seen."""
        return bool(self.channel.values(self.view) != self._shown)

    def note_shown(self) -> None:
        """They are being sent the channel's newest row, or know what it says."""
        self._shown = self.channel.values(self.view)

    def forget_shown(self) -> None:
        """They have not all seen the same: whatever comes next is news to one of them."""
        self._shown = _UNKNOWN


class Channel:
    """One code in this worker.

    Attributes:
        name: under which main sends it: the code, with its delay behind it where it has one.
        seq: of the newest row, 0 before the first.
        row: the newest row, whole but without the book, as JSON; None before the first.
        epoch: in which ``seq`` counts; empty before the first row.
        book: its ``bids`` and ``asks`` as a JSON object; None when nobody here has asked for it.
        plain: the lane of :data:`PLAIN`, when somebody is in it.
        lanes: the others.
        is_stale: main says that its newest tick arrived too long ago.
    """

    __slots__ = (
        "_fields", "_texts", "_values", "book", "code", "epoch", "is_stale", "lanes", "name", "plain", "row", "seq",
    )  # fmt: skip

    def __init__(
        self, code: str, seq: int, row: bytes | None, book: bytes | None = None, epoch: str = "", name: str = ""
    ) -> None:
        self.code = code
        self.name = name or code
        self.epoch = epoch
        self.is_stale = False
        self.plain: Lane | None = None
        self.lanes: dict[Shape, Lane] = {}
        self.renew(seq, row, book)

    def renew(self, seq: int, row: bytes | None, book: bytes | None) -> None:
        """Hold a newer row."""
        self.seq = seq
        self.row = row
        self.book = book
        self._fields: Mapping[str, Any] | None = None
        self._texts: dict[tuple[View, Format], bytes] | None = None
        self._values: dict[View, Any] | None = None

    def begin_book(self, book: bytes) -> None:
        """Hold the book too from now on, for it was not wanted here before; nobody is in a lane that shows it."""
        # A plain lane has always been shown everything, and need not have noted it.
        known = [lane for lane in self.all_lanes() if lane is self.plain or not lane.has_news()]
        self.renew(self.seq, self.row, book)
        for lane in known:
            lane.note_shown()

    @property
    def is_watched(self) -> bool:
        return self.plain is not None or bool(self.lanes)

    def all_lanes(self) -> list[Lane]:
        """Return every lane."""
        return [*([self.plain] if self.plain is not None else ()), *self.lanes.values()]

    def fields(self) -> Mapping[str, Any]:
        """Return the newest row, its book included as far as it is here."""
        if self._fields is None:
            fields: dict[str, Any] = (
                {"code": self.code, "seq": self.seq} if self.row is None else orjson.loads(self.row)
            )
            if self.book:
                fields |= orjson.loads(self.book)
            self._fields = fields
        return self._fields

    def text(self, view: View, spelled: Format) -> bytes:
        """Return the newest row in a view and format, without ``prev``; made once for all."""
        if self.row is not None and view is DEFAULT_VIEW and spelled.is_mains:
            return self.row
        if self._texts is None:
            self._texts = {}
        text = self._texts.get((view, spelled))
        if text is None:
            text = self._texts[view, spelled] = spelled.encode(self.fields(), view)
        return text

    def values(self, view: View) -> Any:
        """Return what a view shows of the newest row, but for its time; equal to the last when nothing is new.

        The default view shows every field but the book, and main sends nothing else that shows nothing new.
        """
        if view is DEFAULT_VIEW and self.book is None:
            return self.seq
        if self._values is None:
            self._values = {}
        values = self._values.get(view)
        if values is None:
            fields = self.fields()
            if view is DEFAULT_VIEW:
                values = {name: value for name, value in fields.items() if name not in _NO_NEWS}
            else:
                values = tuple(map(fields.get, view.columns[4:]))
            self._values[view] = values
        return values


class Subscription:
    """One session's subscription to one code.

    Attributes:
        merged: rows merged for this session alone, because it was slow.
        is_stale: the client was told that the code is stale, and not yet that it is fresh again.
    """

    __slots__ = ("_rows_before", "_seq_before", "is_stale", "lane", "merged")

    def __init__(self, lane: Lane, seq: int | None) -> None:
        self.lane = lane
        self.merged = 0
        self.is_stale = False
        self._seq_before = -1 if seq is None else seq
        self._rows_before = lane.rows

    def start(self, seq: int) -> None:
        """Begin to count at the first row, for a subscription without a snapshot."""
        if self._seq_before < 0:
            self._seq_before = seq
            self._rows_before = self.lane.rows

    def merged_until(self, seq: int, rows_waiting: int) -> int:
        """Return how many rows were merged for this subscription up to ``seq``, here and upstream.

        Args:
            seq: of the last row that was sent.
            rows_waiting: rows of the lane that are still in the session's outbox.
        """
        if self._seq_before < 0:
            return 0
        handed_out = self.lane.rows - self._rows_before - rows_waiting
        if handed_out < 0:  # the row that it was restated by waits, and those before it are counted
            return self.merged
        return max(0, seq - self._seq_before - handed_out) + self.merged

    def skip(self) -> None:
        """The lane has handed out a row that this session had been sent already."""
        self._rows_before += 1

    def restate(self, seq: int, new_seq: int) -> None:
        """The row ``new_seq`` comes, and what was sent up to ``seq`` does not lead to it: what lies between is lost.

        Keeps the count of what was merged until now.
        """
        if self._seq_before >= 0:
            self.merged = self.merged_until(seq, 0)
        self._seq_before = new_seq
        self._rows_before = self.lane.rows

    def add_own(self) -> None:
        """The session was handed a row that the rest of the lane was not."""
        self._rows_before -= 1

    def go_on(self, lane: Lane, base: int | None, seq: int | None, rows_waiting: int) -> "Subscription":
        """Return this subscription as it goes on in ``lane`` behind the row ``base``, keeping its count.

        Args:
            base: sent as a snapshot just now, or sent last (None: nothing was).
            seq: of the last row that was sent before (None: none was).
            rows_waiting: rows that were waiting for the session and are not sent any more.
        """
        after = Subscription(lane, base)
        after.is_stale = self.is_stale
        sent = seq or 0
        after.merged = self.merged_until(sent, rows_waiting)
        if base is None:
            after._seq_before = self._seq_before  # its first row has been handed out, but is not sent as it was
        elif self._seq_before >= 0:
            # A snapshot stands for all rows since the last one: sent as they were, or nothing new in their view.
            after.merged += max(0, base - max(sent, self._seq_before - 1) - 1)
        return after


class Subscriptions:
    """The channels of this worker, by name.

    Args:
        behind: where the channels are, of which this is a view.
        suffix: what stands behind the codes of this view in the names of its channels: their delay.
    """

    def __init__(self, behind: "Subscriptions | None" = None, suffix: str = "") -> None:
        self.channels: dict[str, Channel] = {} if behind is None else behind.channels
        self.count = 0
        self._claims: Counter[str] = Counter() if behind is None else behind._claims
        self._all = self if behind is None else behind
        self._suffix = suffix

    def delayed(self, suffix: str) -> "Subscriptions":
        """Return a view of the same channels, in which each code stands for the one with ``suffix`` behind it."""
        return Subscriptions(self, suffix)

    def get(self, code: str) -> Channel | None:
        """Return the channel of ``code``; None: nobody here watches or claims it."""
        return self.channels.get(code + self._suffix)

    def open(
        self,
        code: str,
        seq: int,
        row: bytes | None,
        book: bytes | None = None,
        epoch: str = "",
        *,
        is_stale: bool = False,
    ) -> Channel:
        """Return the channel of ``code``, made from its newest row and its staleness if it is new here."""
        name = code + self._suffix
        channel = self.channels.get(name)
        if channel is None:
            channel = self.channels[name] = Channel(code, seq, row, book, epoch, name)
            channel.is_stale = is_stale
        elif book is not None and channel.book is None:
            channel.begin_book(book)
        return channel

    def add(self, channel: Channel, outbox: "Outbox", shape: Shape = PLAIN, *, base: int | None) -> Lane:
        """Put ``outbox`` into the lane of ``shape``, where it may be already; the caller takes it out of any other.

        Args:
            base: seq of the row that the session was sent last; None: it was sent none.
        """
        lane = channel.plain if shape == PLAIN else channel.lanes.get(shape)
        if lane is None:
            lane = Lane(channel, shape)
            if shape == PLAIN:
                channel.plain = lane
            else:
                channel.lanes[shape] = lane
        if outbox not in lane.audience and outbox not in lane.newcomers:
            self._all.count += 1
        lane.audience.discard(outbox)
        lane.newcomers.pop(outbox, None)
        if base is not None and base == lane.seq:
            lane.audience.add(outbox)
        else:
            lane.newcomers[outbox] = base
        if lane.is_due:
            # He may be shown the row that waits, in a snapshot: should the next one say the same as the row before,
            # it is news to him.
            lane.forget_shown()
        return lane

    def leave(self, lane: Lane, outbox: "Outbox") -> None:
        """Take ``outbox`` out of a lane; the channel stays, for the caller goes on with it or gives it up."""
        if outbox in lane.audience or outbox in lane.newcomers:
            self._all.count -= 1
            lane.audience.discard(outbox)
            lane.newcomers.pop(outbox, None)
        if not lane.is_watched:
            channel = lane.channel
            if channel.plain is lane:
                channel.plain = None
            elif channel.lanes.get(lane.shape) is lane:
                del channel.lanes[lane.shape]

    def discard(self, lanes: Iterable[Lane], outbox: "Outbox") -> list[str]:
        """Take ``outbox`` out of these lanes; return the names of the channels that are not wanted here any more."""
        left = []
        for lane in lanes:
            self.leave(lane, outbox)
            left += self._close(lane.channel.name)
        return left

    def claim(self, codes: Iterable[str]) -> None:
        """Keep these codes until :meth:`release`: main is being asked about them."""
        self._claims.update([code + self._suffix for code in codes])

    def release(self, codes: Iterable[str]) -> list[str]:
        """Give up the claims; return the names of the channels that are not wanted here any more."""
        left = []
        for code in codes:
            name = code + self._suffix
            self._claims[name] -= 1
            if self._claims[name] <= 0:
                del self._claims[name]
                left += self._close(name)
        return left

    def _close(self, name: str) -> list[str]:
        channel = self.channels.get(name)
        if name in self._claims or (channel is not None and channel.is_watched):
            return []
        self.channels.pop(name, None)
        return [name]
