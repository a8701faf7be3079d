"""What a stream of rows means: which row is new, which were merged on the way, and which are lost.

Laws:

1. Within an epoch a code's ``seq`` only rises on its way out of here, whatever connection a row came by.
2. Every number between two rows of a code is accounted for: it was merged into the later row, or it is in a gap that
   is told before that row.
3. A queue that is full merges, newest row per code; no code loses its last row.

No asyncio, no socket, no clock. The rules are those of docs/delivery.md.
"""

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass

from quotepush.client_messages import Message, Row, rows_in

__all__ = ["Gap", "RowQueue", "RowStream"]


@dataclass(frozen=True, slots=True)
class Gap:
    """Rows of a code that will not come.

    Attributes:
        code: canonical.
        reason: ``lost`` (the server itself never got them), ``away`` (we were, for longer than rows are kept, or with
            a ``max_rate``), ``epoch`` (the code is numbered anew; nobody can say what is missing of the former
            epoch) or ``chain`` (the server left them out without a word, which is a bug).
        epoch: in which the rows behind the gap are numbered.
        first: number of the first row that is missing in this epoch.
        last: number of the last one; below ``first`` if none is.
    """

    code: str
    reason: str
    epoch: str
    first: int
    last: int

    @property
    def missing(self) -> int:
        """How many rows of this epoch are missing."""
        return max(0, self.last - self.first + 1)

    def __str__(self) -> str:
        if self.reason == "epoch":
            return f"{self.code}: numbered anew, from {self.last + 1} on; rows before it may be missing"
        return f"{self.code}: {self.missing} rows are missing before {self.last + 1} ({self.reason})"


class RowStream:
    """The rows of all subscribed codes, over all connections.

    Attributes:
        rows: newest row per code.
        merged: per code how many rows the server merged into newer ones.
        gaps: per code how many gaps there were.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.merged: Counter[str] = Counter()
        self.gaps: Counter[str] = Counter()
        self._places: dict[str, tuple[str, int]] = {}  # code: epoch and number of the newest row
        self._flowing: set[str] = set()  # codes whose rows come on this connection
        self._away: set[str] = set()  # of these, those whose next snapshot ends an absence

    def place(self, code: str) -> tuple[str, int] | None:
        """Return epoch and number of the newest row that we have of a code; number 0: the epoch alone is known."""
        return self._places.get(code)

    def is_flowing(self, code: str) -> bool:
        """Say whether the rows of a code come on this connection."""
        return code in self._flowing

    def begin(self, code: str, resume: str | None) -> None:
        """The rows of a code come from now on; ``resume`` is the word of the ack. Harmless twice."""
        if code in self._flowing:
            return
        self._flowing.add(code)
        if code in self._places and resume not in ("current", "replay"):
            self._away.add(code)

    def cut(self) -> None:
        """The connection is gone: no rows come, and all places stay."""
        self._flowing.clear()
        self._away.clear()

    def forget(self, code: str) -> None:
        """A code is not wanted any more."""
        self._flowing.discard(code)
        self._away.discard(code)
        self._places.pop(code, None)
        self.rows.pop(code, None)
        self.merged.pop(code, None)
        self.gaps.pop(code, None)

    def take(self, message: Message, epoch: str) -> tuple[list[Row], list[Gap]]:  # hot
        """Return the rows of a ``snapshot`` or ``tick`` message that are new, in order, and the gaps before them.

        Left out are codes that are not subscribed, rows that are not newer than what is known in the same epoch, and
        snapshot rows without a value (``seq`` 0). ``epoch`` is that of ``hello``.
        """
        is_snapshot = message["type"] == "snapshot"
        fresh: list[Row] = []
        gaps: list[Gap] = []
        for row in rows_in(message):
            code, seq = row["code"], row["seq"]
            if code not in self._flowing:
                continue
            if is_snapshot:
                is_new = self._take_snapshot(row, epoch, message.get("gap") is True, gaps)
            else:
                place = self._places.get(code)
                prev: int | None = row.get("prev")
                if place is None:
                    place = (epoch, seq - 1 if prev is None else prev)  # a chain begins
                elif seq <= place[1]:
                    continue
                if prev is None:
                    prev = seq - 1  # a chain begins anew: nothing was merged into its first row
                if prev > place[1]:
                    gaps.append(Gap(code, "chain", place[0], place[1] + 1, prev))
                passed = seq - max(prev, place[1]) - 1
                if passed > 0:
                    self.merged[code] += passed
                self._places[code] = (place[0], seq)
                is_new = True
            if is_new:
                self.rows[code] = row
                fresh.append(row)
        self.gaps.update(gap.code for gap in gaps)
        return fresh, gaps

    def _take_snapshot(self, row: Row, epoch: str, is_gap: bool, gaps: list[Gap]) -> bool:
        """Take a row of a snapshot; return True when it is a new one with a value."""
        code, seq = row["code"], row["seq"]
        # A code with an epoch of its own says so in each snapshot row, and nowhere else.
        row_epoch = row.get("epoch") or epoch
        place = self._places.get(code)
        was_away = code in self._away
        self._away.discard(code)
        if place is not None and place[0] == row_epoch:
            if seq <= place[1]:
                if seq and seq == place[1]:
                    self.rows[code] = row  # the same row, perhaps in another view
                return False
            passed = seq - place[1] - 1
            if passed and (was_away or is_gap):
                gaps.append(Gap(code, "lost" if is_gap else "away", row_epoch, place[1] + 1, seq - 1))
            elif passed:
                self.merged[code] += passed  # it stands for the rows that still waited for us
        elif place is not None and (place[1] or seq > 1):
            gaps.append(Gap(code, "epoch", row_epoch, 1, seq - 1))
        self._places[code] = (row_epoch, seq)
        return bool(seq)


class RowQueue:
    """Rows that the caller has not taken, in order and in bounded memory.

    It holds every row until there are ``max_rows``. Then, and only then, it is merged: one newest
    row per code stays, in its place, with the ``prev`` of the first row merged into it, so that
    ``seq - prev - 1`` still counts all rows that the caller did not get. With so many codes that
    merging does not halve it, it may grow to twice the number of codes.

    Attributes:
        merged: rows that were merged into newer ones here.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"a queue holds at least one row, not {max_rows}")
        self.merged = 0
        self._max_rows = max_rows
        self._limit = max_rows
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: Row) -> None:  # hot
        """Add the newest row of a code."""
        if len(self._rows) >= self._limit:
            self._merge()
        self._rows.append(row)

    def take(self) -> Row:
        """Return the oldest row and forget it."""
        return self._rows.popleft()

    def drop(self, codes: Collection[str]) -> None:
        """Forget the rows of these codes."""
        if codes:
            self._rows = deque(row for row in self._rows if row["code"] not in codes)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()

    def _merge(self) -> None:
        newest: dict[str, Row] = {}
        prevs: dict[str, int | None] = {}
        for row in self._rows:
            code = row["code"]
            prev = row.get("prev")
            # A row without prev begins a new chain: nothing before it can be counted.
            if prev is None or code not in prevs:
                prevs[code] = prev
            newest.pop(code, None)
            newest[code] = row
        self.merged += len(self._rows) - len(newest)
        self._rows = deque(_with_prev(row, prevs[code]) for code, row in newest.items())
        # Half of it must be free again, or a merge would be due at almost every row.
        self._limit = max(self._max_rows, 2 * len(newest))


def _with_prev(row: Row, prev: int | None) -> Row:
    """Return ``row`` with this ``prev``; a copy when it differs, because others hold the row too."""
    if row.get("prev") == prev:
        return row
    bare = {name: value for name, value in row.items() if name != "prev"}
    return bare if prev is None else {"prev": prev, **bare}
