"""What one client watches, and how far it has been told each code.

Invariant: whatever a client does, resume, change its options, ask for a snapshot, the next row of a code continues
from the row that it was sent last, or from the snapshot that it is being sent; and what was merged for it in between
is counted.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from quotepush.entitlement import Entitlement
from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Channel, Lane, MissedRow, Row, Shape, Subscription, Subscriptions

__all__ = ["Watchlist"]


class Watchlist:
    """One session's subscriptions.

    Attributes:
        subscriptions: canonical code to subscription, in the order of subscribing.
    """

    __slots__ = ("_asked", "_index", "_outbox", "subscriptions")

    def __init__(self, index: Subscriptions, outbox: Outbox) -> None:
        self._index = index
        self._outbox = outbox
        self.subscriptions: dict[str, Subscription] = {}
        self._asked: dict[str, float | None] = {}  # the rate that was asked for, of codes that are held down to another

    def begin(self, channel: Channel, shape: Shape, base: int | None) -> None:
        """Subscribe to a code.

        Args:
            base: seq of the row that the client is being sent as a snapshot; None: it is sent none.
        """
        lane = self._index.add(channel, self._outbox, shape, base=base)
        self.subscriptions[channel.code] = Subscription(lane, base)

    def resume(
        self, channel: Channel, shape: Shape, since: int, missed: Sequence[tuple[int, bytes]], most_bytes: int
    ) -> str:
        """Subscribe behind ``since`` with the rows that were missed.

        Args:
            most_bytes: of rows that wait to be replayed; a code with more gets its newest row instead.

        Returns:
            What the ack calls that.
        """
        outbox = self._outbox
        texts = [Channel(channel.code, seq, bare).text(shape.view, shape.format) for seq, bare in missed]
        if outbox.replay_bytes + sum(map(len, texts)) > most_bytes:
            self.begin(channel, shape, channel.seq)
            return "snapshot"
        base = missed[-1][0] if missed else since
        lane = self._index.add(channel, outbox, shape, base=base)
        subscription = self.subscriptions[channel.code] = Subscription(lane, since)
        if not missed:
            return "current"
        if outbox.replay is None:
            outbox.replay = deque()
        prev = since
        for (seq, _), text in zip(missed, texts, strict=True):
            row = Row(lane, seq, prev, text)
            outbox.replay.append(row)
            outbox.replay_bytes += len(row.text)
            subscription.add_own()
            prev = seq
        return "replay"

    def resume_behind(
        self,
        channel: Channel,
        shape: Shape,
        prev: int | None,
        missed: Sequence[tuple[int, bytes, int]],
        most_bytes: int,
    ) -> str:
        """Subscribe behind a position; as :meth:`resume`, but ``prev`` may be unknown, and rows have ordinals."""
        outbox = self._outbox
        texts = [Channel(channel.code, seq, bare).text(shape.view, shape.format) for seq, bare, _ in missed]
        if outbox.replay_bytes + sum(map(len, texts)) > most_bytes:
            self.begin(channel, shape, channel.seq)
            return "snapshot"
        if not missed:
            self.begin(channel, shape, prev)
            return "current"
        lane = self._index.add(channel, outbox, shape, base=missed[-1][0])
        subscription = self.subscriptions[channel.code] = Subscription(lane, missed[0][0] - 1 if prev is None else prev)
        if outbox.replay is None:
            outbox.replay = deque()
        for (seq, _, ordinal), text in zip(missed, texts, strict=True):
            row = MissedRow(lane, seq, prev, text, ordinal)
            outbox.replay.append(row)
            outbox.replay_bytes += len(row.text)
            subscription.add_own()
            prev = seq
        return "replay"

    def change(self, channel: Channel, shape: Shape, *, is_sent: bool) -> tuple[Lane, int] | None:
        """Give a subscription other options without a hole; what waits in its old shape goes.

        Args:
            is_sent: the client is being sent the newest row as a snapshot.

        Returns:
            The lane where the newest row has to be delivered instead, and why it is restated (0: it is not); None:
            nothing has to be.
        """
        before = self.subscriptions[channel.code]
        seq, waiting = self._outbox.last_sent(before.lane)
        restated = 0 if is_sent else self._outbox.restating(before.lane)
        self._outbox.drop([before.lane])
        base = channel.seq if is_sent or restated else seq
        if shape != before.lane.shape:  # else the lane stays, even if nobody else is in it, and with it its rate
            self._index.leave(before.lane, self._outbox)
        lane = self._index.add(channel, self._outbox, shape, base=base)
        after = self.subscriptions[channel.code] = before.go_on(lane, base, seq, waiting)
        if is_sent:
            return None
        if restated:
            return lane, restated
        if base is None:
            return (lane, 0) if waiting else None
        if base < channel.seq:
            after.add_own()
            return lane, 0
        return None

    def drop(self, codes: Iterable[str]) -> list[str]:
        """Give up these codes and what waits of them; return those that nobody here wants any more."""
        lanes = []
        for code in codes:
            lanes.append(self.subscriptions.pop(code).lane)
            self._asked.pop(code, None)
        self._outbox.drop(lanes)
        return self._index.discard(lanes, self._outbox)

    def move(self, index: Subscriptions) -> list[str]:
        """Give up everything, and watch in another index from now on; return as :meth:`drop`.

        The rates that were asked for are kept: the same codes are to be watched there.
        """
        asked = dict(self._asked)
        left = self.drop(list(self.subscriptions))
        self._index, self._asked = index, asked
        return left

    # What may be watched

    def refused(self, codes: Collection[str], entitlement: Entitlement, most: int | None) -> dict[str, str]:
        """Return which of these codes may not be watched, with the word that says why.

        Args:
            codes: new ones, or those that are watched.
            most: how many may be watched; None: does not matter.
        """
        refused: dict[str, str] = {}
        kept = 0 if codes is self.subscriptions else sum(code not in codes for code in self.subscriptions)
        # Those that are watched already come first.
        for code in sorted(codes, key=lambda code: code not in self.subscriptions):
            if code not in entitlement.codes:
                refused[code] = "not_entitled"
            elif most is not None and kept >= most:
                refused[code] = "code_limit"
            else:
                kept += 1
        return refused

    def note_asked(self, code: str, asked: float | None, served: float | None) -> None:
        """The client has asked for another rate of ``code`` than it may have, or for the one that it is served."""
        if asked != served:
            self._asked[code] = asked
        else:
            self._asked.pop(code, None)

    def hold_down(self, entitlement: Entitlement) -> list[tuple[Lane, int]]:
        """Give each subscription the rate that it may have now; return where rows have to be delivered, and why.

        As :meth:`change` says it.
        """
        undelivered = []
        for code, subscription in list(self.subscriptions.items()):
            lane = subscription.lane
            asked = self._asked.get(code, lane.shape.max_rate)
            served = entitlement.capped(asked)
            if served != lane.shape.max_rate:
                newest = self.change(lane.channel, replace(lane.shape, max_rate=served), is_sent=False)
                if newest is not None:
                    undelivered.append(newest)
            self.note_asked(code, asked, served)
        return undelivered

    def listed(self) -> list[dict[str, Any]]:
        """Return each subscription as ``list`` says it."""
        listed = []
        for code, subscription in self.subscriptions.items():
            lane = subscription.lane
            seq, waiting = self._outbox.last_sent(lane)
            listed.append(
                {
                    "code": code,
                    "fields": lane.view.fields,
                    "max_rate": lane.shape.max_rate,
                    "format": "rows" if lane.format.is_array else "objects",
                    "seq": seq or 0,
                    "merged": subscription.merged_until(seq or 0, waiting),
                }
            )
        return listed

    def stale(self, codes: Iterable[str]) -> list[str]:
        """Return which of these codes are stale, also where the client knows; it is told now."""
        stale = [code for code in codes if self.subscriptions[code].lane.channel.is_stale]
        for code in stale:
            self.subscriptions[code].is_stale = True
        return stale

    def news_of_freshness(self, codes: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return which of these codes are stale and which are fresh, where the client does not know; it is told now."""
        stale: list[str] = []
        fresh: list[str] = []
        for code in sorted(codes):
            subscription = self.subscriptions.get(code)
            if subscription is not None:
                is_stale = subscription.lane.channel.is_stale
                if subscription.is_stale is not is_stale:
                    subscription.is_stale = is_stale
                    (stale if is_stale else fresh).append(code)
        return stale, fresh

    # What the hub and the outbox do with the rows of a code

    def note_merged(self, code: str, rows: int) -> None:
        """Count rows that this session got merged."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.merged += rows

    def note_first_row(self, code: str, seq: int) -> None:
        """Begin to count at the first row of a subscription without a snapshot."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.start(seq)

    def note_skipped_row(self, code: str) -> None:
        """A row was handed out that this session had been sent in a snapshot."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.skip()

    def note_restated(self, code: str, seq: int, new_seq: int) -> None:
        """What was sent of ``code`` up to ``seq`` does not lead to the row ``new_seq`` that comes."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.restate(seq, new_seq)
