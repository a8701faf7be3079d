"""Which rows are new, merged or lost; and the queue that merges when it is full."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quotepush.client_rows import Gap, RowQueue, RowStream


def tick(*rows: tuple[int, str, int]) -> dict[str, Any]:
    return {"type": "tick", "data": [{"prev": prev, "code": code, "seq": seq} for prev, code, seq in rows]}


def snapshot(*rows: tuple[str, int], epoch: str | None = None, **more: Any) -> dict[str, Any]:
    own = {} if epoch is None else {"epoch": epoch}
    return {"type": "snapshot", "data": [{"code": code, "seq": seq, **own} for code, seq in rows], **more}


class Taker:
    """A stream, and what came out of it."""

    def __init__(self, *codes: str) -> None:
        self.stream = RowStream()
        for code in codes:
            self.stream.begin(code, None)
        self.gaps: list[Gap] = []

    def take(self, message: dict[str, Any], epoch: str = "e") -> list[int]:
        rows, gaps = self.stream.take(message, epoch)
        self.gaps += gaps
        return [row["seq"] for row in rows]

    def resume(self, code: str, resume: str | None) -> None:
        self.stream.cut()
        self.stream.begin(code, resume)


def test_a_row_is_new_once_within_an_epoch_whatever_connection_it_comes_by() -> None:
    taker = Taker("A")
    assert taker.take(snapshot(("A", 5))) == [5]
    assert taker.take(tick((5, "A", 6), (6, "A", 7))) == [6, 7]
    taker.resume("A", "snapshot")
    assert taker.take(snapshot(("A", 7))) == []
    assert taker.take(snapshot(("A", 6))) == []
    assert taker.take(tick((7, "A", 8), (7, "A", 8))) == [8]
    assert taker.gaps == []


def test_replayed_rows_go_on_behind_the_last_one() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    taker.resume("A", "replay")
    assert taker.take({**tick((5, "A", 6), (6, "A", 8)), "replay": True}) == [6, 8]
    assert taker.take(tick((8, "A", 9))) == [9]
    assert (taker.gaps, taker.stream.merged) == ([], {"A": 1})


@pytest.mark.parametrize("resume", ["snapshot", None])
def test_a_snapshot_after_an_absence_is_a_gap_if_it_is_not_the_next_row(resume: str | None) -> None:
    taker = Taker("A", "B")
    taker.take(snapshot(("A", 5), ("B", 5)))
    taker.stream.cut()
    taker.stream.begin("A", resume)
    taker.stream.begin("B", resume)
    assert taker.take(snapshot(("A", 9), ("B", 6))) == [9, 6]
    (gap,) = taker.gaps
    assert gap == Gap("A", "away", "e", 6, 8)
    assert (gap.missing, taker.stream.gaps, taker.stream.merged) == (3, {"A": 1}, {})
    assert str(gap) == "A: 3 rows are missing before 9 (away)"


def test_rows_that_the_server_never_got_are_a_gap() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    assert taker.take(snapshot(("A", 8), gap=True)) == [8]
    assert taker.gaps == [Gap("A", "lost", "e", 6, 7)]


def test_a_snapshot_on_a_connection_that_stood_merges_what_waited() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    assert taker.take(snapshot(("A", 8))) == [8]
    assert (taker.gaps, taker.stream.merged) == ([], {"A": 2})


def test_the_same_row_in_another_view_is_not_told_again_but_known() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    assert taker.take({"type": "snapshot", "data": [{"code": "A", "seq": 5, "bids": []}]}) == []
    assert taker.stream.rows["A"] == {"code": "A", "seq": 5, "bids": []}


def test_numbering_starts_anew_with_another_epoch_and_that_is_told() -> None:
    taker = Taker("A", "B")
    taker.take(snapshot(("A", 5)))
    taker.take(snapshot(("B", 9), epoch="own"))
    taker.stream.cut()
    taker.stream.begin("A", "snapshot")
    taker.stream.begin("B", "current")
    assert taker.take(snapshot(("A", 2)), "e2") == [2]
    assert taker.gaps == [Gap("A", "epoch", "e2", 1, 1)]
    assert taker.take(tick((9, "B", 10)), "e2") == [10]
    assert taker.take(snapshot(("B", 1), epoch="other"), "e2") == [1]
    assert taker.gaps[1:] == [Gap("B", "epoch", "other", 1, 0)]
    assert taker.gaps[1].missing == 0
    assert str(taker.gaps[1]) == "B: numbered anew, from 1 on; rows before it may be missing"


def test_a_code_without_a_value_is_no_row_and_its_first_one_no_gap() -> None:
    taker = Taker("A", "B")
    assert taker.take(snapshot(("A", 0), ("B", 0))) == []
    assert taker.stream.rows == {}
    assert taker.take(tick((0, "A", 1))) == [1]
    assert taker.take(snapshot(("B", 1), epoch="log")) == [1]
    assert taker.gaps == []


def test_rows_merged_by_the_server_are_counted_per_code() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    taker.take(tick((5, "A", 9), (9, "A", 10)))
    assert taker.stream.merged == {"A": 3}


def test_a_broken_chain_is_a_gap_too() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    assert taker.take(tick((7, "A", 9))) == [9]
    assert (taker.gaps, taker.stream.merged) == ([Gap("A", "chain", "e", 6, 7)], {"A": 1})
    assert taker.take({"type": "tick", "data": [{"code": "A", "seq": 12}]}) == [12]
    assert taker.gaps[1:] == [Gap("A", "chain", "e", 10, 11)]


def test_what_is_not_wanted_does_not_come_and_leaves_nothing() -> None:
    taker = Taker("A")
    taker.take(snapshot(("A", 5)))
    taker.take(tick((7, "A", 9)))
    taker.stream.forget("A")
    assert taker.take(tick((9, "A", 10))) == []
    assert (taker.stream.rows, taker.stream.merged, taker.stream.gaps) == ({}, {}, {})
    assert taker.stream.place("A") is None


class Market(RuleBasedStateMachine):
    """One code on a server that keeps some rows, and a client whose connection comes and goes.

    The model knows which numbers lie between two rows that the server says, and why they are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stream = RowStream()
        self.epoch = 1
        self.seq = 0  # the newest row there is
        self.base = 0  # the server keeps the rows behind this one
        self.sent: int | None = None  # the last one on this connection; None: there is none
        self.place: tuple[int, int] | None = None  # epoch and number of the last one on any connection
        self.delivered: list[tuple[int, int]] = []
        self.gaps: list[Gap] = []
        self.merged = self.missing = 0  # as they must be

    def say(self, seq: int, prev: int | None = None, *, is_lost: bool = False, is_gap: bool = False) -> None:
        """Say a row, ``is_lost``: what lies before it cannot come any more."""
        row: dict[str, Any] = {"code": "A", "seq": seq} if prev is None else {"prev": prev, "code": "A", "seq": seq}
        if prev is None and self.epoch != 1:
            row["epoch"] = f"e{self.epoch}"
        more = {"gap": True} if is_gap else {}
        if self.place is not None:
            is_other = self.place[0] != self.epoch
            between = max(0, seq - (0 if is_other else self.place[1]) - 1)
            if is_lost or is_other:
                self.missing += between
            else:
                self.merged += between
        is_new = bool(seq) and self.place != (self.epoch, seq)
        rows, gaps = self.stream.take({"type": "snapshot" if prev is None else "tick", "data": [row], **more}, "e1")
        assert rows == [row] * is_new
        assert all(gap.last == seq - 1 for gap in gaps)
        self.gaps += gaps
        self.delivered += [(self.epoch, seq)] * is_new
        self.place = self.epoch, seq
        self.sent = seq

    @rule(ticks=st.integers(1, 4))
    def ticks_come(self, ticks: int) -> None:
        self.seq += ticks

    @rule()
    def the_server_forgets_what_it_kept(self) -> None:
        self.base = self.seq

    @precondition(lambda self: self.sent is None)
    @rule(is_old_server=st.booleans())
    def connect(self, is_old_server: bool) -> None:
        seen = self.place[1] if self.place is not None and self.place[0] == self.epoch else -1
        if is_old_server or seen < self.base:
            self.stream.begin("A", None if is_old_server or self.place is None else "snapshot")
            self.say(self.seq, is_lost=True)
            return
        self.stream.begin("A", "current" if seen == self.seq else "replay")
        self.sent = seen
        for seq in range(seen + 1, self.seq + 1):
            self.say(seq, seq - 1)

    @precondition(lambda self: self.sent is not None)
    @rule()
    def cut(self) -> None:
        self.stream.cut()
        self.sent = None

    @precondition(lambda self: self.sent is not None and self.sent < self.seq)
    @rule(data=st.data())
    def the_server_sends(self, data: st.DataObject) -> None:
        assert self.sent is not None
        self.say(data.draw(st.integers(self.sent + 1, self.seq)), self.sent)

    @precondition(lambda self: self.sent is not None and self.sent < self.seq)
    @rule()
    def the_server_has_lost_rows(self) -> None:
        self.say(self.seq, is_lost=True, is_gap=True)

    @precondition(lambda self: self.sent is not None)
    @rule()
    def the_client_asks_for_a_snapshot(self) -> None:
        self.say(self.seq)

    @rule(seq=st.integers(0, 3))
    def a_new_epoch_begins(self, seq: int) -> None:
        self.epoch += 1
        self.seq = self.base = seq
        if self.sent is not None:
            self.say(seq)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def an_old_row_comes_again(self, data: st.DataObject) -> None:
        assert self.sent is not None
        old = data.draw(st.integers(1, self.sent))
        message = {"type": "tick", "data": [{"prev": old - 1, "code": "A", "seq": old}]}
        assert self.stream.take(message, "e1") == ([], [])

    @precondition(lambda self: self.sent is None)
    @rule()
    def a_row_comes_without_a_subscription(self) -> None:
        assert self.stream.take(tick((self.seq, "A", self.seq + 1)), "e1") == ([], [])

    @invariant()
    def no_row_comes_twice_or_out_of_order(self) -> None:
        assert self.delivered == sorted(set(self.delivered))

    @invariant()
    def every_number_left_out_is_merged_or_in_a_gap(self) -> None:
        assert (self.stream.merged["A"], sum(gap.missing for gap in self.gaps)) == (self.merged, self.missing)
        assert self.stream.gaps["A"] == len(self.gaps)


Market.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_a_market_is_told_whole_over_cuts_and_epochs = Market.TestCase


# The queue


def test_a_queue_that_is_not_full_keeps_every_row():
    queue = RowQueue(3)
    rows = [{"prev": n - 1, "code": "A", "seq": n} for n in (1, 2, 3)]
    for row in rows:
        queue.put(row)
    assert [queue.take() for _ in range(len(queue))] == rows
    assert queue.merged == 0


def test_a_full_queue_keeps_the_newest_row_per_code_with_the_prev_of_the_first():
    queue = RowQueue(4)
    rows = [(1, "A", 2), (4, "B", 6), (2, "A", 3), (3, "A", 5), (5, "A", 6)]
    for prev, code, seq in rows:
        queue.put({"prev": prev, "code": code, "seq": seq})
    assert [queue.take() for _ in range(len(queue))] == [
        {"prev": 4, "code": "B", "seq": 6},
        {"prev": 1, "code": "A", "seq": 5},
        {"prev": 5, "code": "A", "seq": 6},
    ]
    assert queue.merged == 2


def test_merging_leaves_the_rows_of_others_as_they_were():
    queue = RowQueue(2)
    newest = {"prev": 2, "code": "A", "seq": 3}
    for row in ({"prev": 1, "code": "A", "seq": 2}, newest, {"prev": 0, "code": "B", "seq": 1}):
        queue.put(row)
    assert newest["prev"] == 2


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.one_of(st.sampled_from("ABCDE"), st.just("take"), st.sampled_from(["+A", "+B"])), max_size=200),
)
def test_whatever_comes_and_goes_no_code_loses_its_last_row_and_every_row_is_accounted_for(
    max_rows: int, steps: list[str]
):
    queue = RowQueue(max_rows)
    newest: dict[str, int] = {}
    taken: dict[str, int] = {}
    put = 0

    def take() -> None:
        row = queue.take()
        code, before = row["code"], taken.get(row["code"], 0)
        assert row["seq"] > before
        if "prev" in row:
            assert row["prev"] == before  # the chain that the consumer sees has no hole
        taken[code] = row["seq"]

    took = 0
    for step in steps:
        if step == "take":
            if queue:
                take()
                took += 1
            continue
        code = step[-1]
        seq = newest.get(code, 0) + 1
        row = {"code": code, "seq": seq}
        queue.put(row if step[0] == "+" else {"prev": seq - 1, **row})
        newest[code] = seq
        put += 1
        assert len(queue) <= max(max_rows, 2 * len(newest))
        assert put == took + len(queue) + queue.merged
    while queue:
        take()
    assert taken == newest
