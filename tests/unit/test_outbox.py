"""What waits for one session: every row, or the newest per code; never more, and never out of order."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import PLAIN, Channel, Lane, Row


class RecordingSession:
    """Remembers what it is told about merged rows."""

    def __init__(self) -> None:
        self.watchlist = self
        self.merged: dict[str, int] = {}

    def note_merged(self, code: str, rows: int) -> None:
        self.merged[code] = self.merged.get(code, 0) + rows


def make_outbox() -> Outbox:
    return Outbox(RecordingSession(), write=lambda data: None)


def make_lane(code: str, seq: int) -> Lane:
    return Lane(Channel(code, seq, None), PLAIN)


def row(lane: Lane, seq: int, *, first: bool = False, size: int = 0) -> Row:
    """The next row of a lane, as the hub makes it."""
    bare = orjson.dumps({"code": lane.channel.code, "seq": seq, "x": "y" * size})
    made = Row(lane, seq, None if first else lane.seq, bare)
    lane.seq = seq
    lane.rows += 1
    return made


def rows_in(frame: bytes) -> list[dict[str, Any]]:
    length = frame[1]
    at = 2 if length < 126 else 4 if length == 126 else 10
    message = orjson.loads(frame[at:])
    assert message["type"] == "tick"
    assert message["time"] == 5
    rows: list[dict[str, Any]] = message["data"]
    return rows


def seqs(frame: bytes) -> list[tuple[str, int | None, int]]:
    return [(r["code"], r.get("prev"), r["seq"]) for r in rows_in(frame)]


def drain(outbox: Outbox) -> list[tuple[str, int | None, int]]:
    found = []
    while outbox.pending:
        found += seqs(outbox.take(5))
    return found


def test_rows_leave_in_the_order_in_which_they_came() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 0), make_lane("B", 7)
    outbox.rows += [row(a, 1), row(b, 8), row(a, 2)]
    assert outbox.pending == 3
    assert seqs(outbox.take(5)) == [("A", 0, 1), ("B", 7, 8), ("A", 1, 2)]
    assert (outbox.pending, outbox.sent, outbox.merged) == (0, 3, 0)


def test_prev_is_the_first_field_and_absent_in_a_first_row() -> None:
    outbox, a = make_outbox(), make_lane("A", 4)
    outbox.rows += [row(a, 5, first=True), row(a, 6)]
    first, second = rows_in(outbox.take(5))
    assert list(first)[:2] == ["code", "seq"]
    assert list(second)[:3] == ["prev", "code", "seq"]


def test_everybody_gets_the_same_frame_of_a_single_row() -> None:
    a = make_lane("A", 0)
    shared = row(a, 1)
    first, second = make_outbox(), make_outbox()
    first.rows.append(shared)
    second.rows.append(shared)
    assert first.take(5) is second.take(5)


def test_a_frame_of_another_moment_is_made_anew() -> None:
    a = make_lane("A", 0)
    shared = row(a, 1)
    first, second = make_outbox(), make_outbox()
    first.rows.append(shared)
    second.rows.append(shared)
    assert b'"time":5' in first.take(5)
    assert b'"time":6' in second.take(6)


def test_an_outbox_is_above_its_bounds_by_rows_or_by_bytes() -> None:
    outbox, a = make_outbox(), make_lane("A", 0)
    outbox.rows += [row(a, n) for n in range(1, 4)]
    size = sum(len(r.text) for r in outbox.rows)
    assert not outbox.is_above(3, size)
    assert outbox.is_above(2, size)
    assert outbox.is_above(3, size - 1)
    outbox.rows.append(row(a, 4))
    assert outbox.is_above(3, 10**6)
    assert not outbox.is_above(4, 10**6)


def test_bytes_are_counted_anew_after_everything_has_left() -> None:
    outbox, a = make_outbox(), make_lane("A", 0)
    outbox.rows += [row(a, 1, size=500), row(a, 2, size=500)]
    assert outbox.is_above(10, 900)
    outbox.take(5)
    outbox.rows.append(row(a, 3, size=500))
    assert not outbox.is_above(10, 900)
    outbox.drop([a])
    outbox.rows.append(row(a, 4, size=500))
    assert not outbox.is_above(10, 900)


def test_merging_keeps_the_newest_row_per_code_and_the_prev_of_the_oldest() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 10), make_lane("B", 20)
    outbox.rows += [row(a, 11), row(b, 21), row(a, 12), row(a, 15)]
    outbox.merge()
    assert (outbox.rows, outbox.pending, outbox.merged) == ([], 2, 2)
    assert seqs(outbox.take(5)) == [("A", 10, 15), ("B", 20, 21)]
    assert outbox.session.merged == {"A": 2}
    assert outbox.held is None


def test_rows_that_come_while_merging_replace_what_waits() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 10), make_lane("B", 20)
    outbox.rows += [row(a, 11), row(a, 12)]
    outbox.merge()
    outbox.rows += [row(a, 13), row(b, 21)]
    # Not merged again by anybody before it is taken: still no old row leaves.
    assert seqs(outbox.take(5)) == [("A", 10, 13), ("B", 20, 21)]
    assert outbox.merged == 2


def test_a_first_row_that_is_merged_still_has_no_prev() -> None:
    outbox, a = make_outbox(), make_lane("A", 10)
    outbox.rows += [row(a, 11, first=True), row(a, 12), row(a, 13)]
    outbox.merge()
    (sent,) = rows_in(outbox.take(5))
    assert "prev" not in sent
    assert sent["seq"] == 13


def test_catching_up_comes_in_pieces_and_newer_rows_replace_the_rest() -> None:
    outbox = make_outbox()
    lanes = [make_lane(f"C{n}", 0) for n in range(10)]
    outbox.rows += [row(lane, 1, size=20_000) for lane in lanes]
    outbox.merge()
    first = seqs(outbox.take(5))
    assert 0 < len(first) < 10
    assert outbox.held is not None
    waiting = [lane for lane in lanes if lane.channel.code not in {code for code, _, _ in first}]
    outbox.rows.append(row(waiting[-1], 2, size=20_000))
    rest = drain(outbox)
    assert sorted(code for code, _, _ in first + rest) == sorted(lane.channel.code for lane in lanes)
    assert (waiting[-1].channel.code, 0, 2) in rest
    assert outbox.held is None


def test_the_waiting_bytes_of_held_rows_never_fall_below_zero() -> None:
    outbox, a = make_outbox(), make_lane("A", 10**9)
    outbox.rows += [row(a, 10**9 + n) for n in range(1, 10)]
    outbox.merge()
    outbox.take(5)
    assert outbox.waiting_bytes == 0


def test_dropping_a_code_forgets_what_waits_of_it_alone() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 0), make_lane("B", 0)
    outbox.rows += [row(a, 1), row(b, 1), row(a, 2)]
    outbox.drop([a])
    assert seqs(outbox.take(5)) == [("B", 0, 1)]


def test_dropping_a_code_while_merging_forgets_the_held_row() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 0), make_lane("B", 0)
    outbox.rows += [row(a, 1), row(b, 1)]
    outbox.merge()
    outbox.rows += [row(a, 2), row(b, 2)]
    outbox.drop([a])
    assert drain(outbox) == [("B", 0, 2)]


def test_dropping_what_does_not_wait_is_harmless() -> None:
    outbox, a = make_outbox(), make_lane("A", 0)
    outbox.drop([a])
    outbox.drop([])
    assert outbox.pending == 0


def test_the_last_row_that_was_sent_is_the_one_before_the_first_that_waits() -> None:
    outbox, a, b = make_outbox(), make_lane("A", 10), make_lane("B", 5)
    assert outbox.last_sent(a) == (10, 0)
    outbox.rows += [row(a, 11), row(b, 6), row(a, 14)]
    assert outbox.last_sent(a) == (10, 2)
    assert outbox.last_sent(b) == (5, 1)
    outbox.merge()
    outbox.rows.append(row(a, 15))
    assert outbox.last_sent(a) == (10, 3)
    drain(outbox)
    assert outbox.last_sent(a) == (15, 0)


def test_a_newcomer_has_been_sent_nothing() -> None:
    outbox, a = make_outbox(), make_lane("A", 10)
    a.newcomers[outbox] = None
    assert outbox.last_sent(a) == (None, 0)
    outbox.rows.append(row(a, 11, first=True))
    a.newcomers.clear()
    a.audience.add(outbox)
    assert outbox.last_sent(a) == (None, 1)


def test_clearing_forgets_everything() -> None:
    outbox, a = make_outbox(), make_lane("A", 0)
    outbox.rows += [row(a, 1), row(a, 2)]
    outbox.merge()
    outbox.rows.append(row(a, 3))
    outbox.clear()
    assert (outbox.pending, outbox.held, outbox.waiting_bytes) == (0, None, 0)


@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 4), st.integers(0, 3)), max_size=60),
    st.sampled_from([0, 200, 70_000]),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_whatever_is_merged_and_taken_when_the_chain_of_prev_holds(
    steps: list[tuple[str, int, int]], size: int
) -> None:
    outbox = make_outbox()
    lanes = {code: make_lane(code, 0) for code in "ABC"}
    last = dict.fromkeys("ABC", 0)
    wire: list[tuple[str, int | None, int]] = []
    offered = 0
    for code, skip, what in steps:
        outbox.rows.append(row(lanes[code], lanes[code].seq + skip, size=size))
        offered += 1
        if what == 1:
            outbox.merge()
        elif what == 2 and outbox.pending:
            wire += seqs(outbox.take(5))
    wire += drain(outbox)
    for code, prev, seq in wire:
        assert prev == last[code] < seq
        last[code] = seq
    assert last == {code: lane.seq for code, lane in lanes.items()}
    assert outbox.sent == len(wire)
    assert outbox.sent + outbox.merged == offered
    assert sum(outbox.session.merged.values()) == outbox.merged


@pytest.mark.parametrize("size", [0, 60, 120, 65_000, 66_000])
def test_a_message_of_any_length_has_the_right_header(size: int) -> None:
    outbox, a = make_outbox(), make_lane("A", 0)
    outbox.rows.append(row(a, 1, size=size))
    single = outbox.take(5)
    outbox.rows += [row(a, 2, size=size), row(a, 3)]
    several = outbox.take(5)
    assert [len(rows_in(frame)) for frame in (single, several)] == [1, 2]
