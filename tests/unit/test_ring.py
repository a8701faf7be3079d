"""Rows for clients that come back: without a hole, or not at all; in bounded memory."""

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote, TradingDays
from quotepush.quote.ring import Ring

NOW_MS = 1_800_000_000_000


class Bench:
    """A board of codes that come by the log, and a ring behind it."""

    def __init__(self, **bounds: int) -> None:
        self.ring = Ring(**{"max_bytes": 10**6, "max_code_bytes": 10**5, "max_age_ms": 60_000, **bounds})
        self.board = Board(epoch="main", days=TradingDays({}))
        self.board.log_epoch = "E"
        self.now_ms = NOW_MS

    def tick(self, code: str, seq: int, /, **fields: Any) -> Quote:
        """Take a tick of the log as the relay does."""
        quote = self.board.apply_numbered(code, seq, {"last": seq, **fields}, self.now_ms)
        assert quote is not None
        self.ring.add(quote)
        quote.restated = 0
        return quote

    def since(self, code: str, seq: int, epoch: str = "E") -> list[int] | None:
        """The numbers of the rows behind ``seq``."""
        found = self.ring.since(self.board.quotes[code], epoch, seq)
        if found is None:
            return None
        assert [orjson.loads(text)["seq"] for _, text in found] == [number for number, _ in found]
        return [number for number, _ in found]


def test_what_was_missed_comes_oldest_first() -> None:
    bench = Bench()
    for seq in range(1, 5):
        bench.tick("A", seq)
    assert [bench.since("A", seq) for seq in range(1, 6)] == [[2, 3, 4], [3, 4], [4], [], []]


def test_a_row_is_kept_as_it_was_sent() -> None:
    bench = Bench()
    bench.tick("A", 1, name="Ay")
    text = bench.tick("A", 2).encoded()
    bench.tick("A", 3, name=None)
    found = bench.ring.since(bench.board.quotes["A"], "E", 1)
    assert found is not None
    assert found[0] == (2, text)
    assert orjson.loads(text) == {"code": "A", "seq": 2, "ts": NOW_MS, "last": 2, "name": "Ay"}


def test_whoever_was_there_before_the_ring_began_is_not_served() -> None:
    bench = Bench()
    for seq in range(1, 4):
        quote = bench.board.apply_numbered("A", seq, {"last": seq}, NOW_MS)
        assert quote is not None
        quote.restated = 0  # nobody watches
    assert bench.since("A", 2) is None
    assert bench.since("A", 3) == []
    bench.tick("A", 4)
    assert bench.since("A", 3) == [4]
    assert bench.since("A", 2) is None


def test_another_epoch_is_not_served() -> None:
    bench = Bench()
    bench.tick("A", 1)
    assert bench.since("A", 1, "F") is None
    assert bench.since("A", 99, "") is None


def test_somebody_who_is_ahead_of_us_has_missed_nothing() -> None:
    bench = Bench()
    bench.tick("A", 1)
    assert bench.since("A", 7) == []


def test_a_number_without_a_row_is_no_hole() -> None:
    bench = Bench()
    bench.tick("A", 1)
    assert bench.board.apply_numbered("A", 2, {"last": 1}, NOW_MS) is None  # says nothing new
    bench.tick("A", 3)
    assert bench.since("A", 1) == [3]
    assert bench.since("A", 2) == [3]


def test_a_gap_begins_a_new_ring() -> None:
    bench = Bench()
    bench.tick("A", 1)
    bench.tick("A", 2)
    bench.tick("A", 4)
    assert bench.since("A", 1) is None
    assert bench.since("A", 3) is None  # row 4 is behind it, but with what was lost in it
    assert bench.since("A", 4) == []
    bench.tick("A", 5)
    assert bench.since("A", 4) == [5]
    assert bench.ring.bytes == bench.board.quotes["A"].recent_bytes == len(bench.board.quotes["A"].encoded())


@pytest.mark.parametrize("reason", [GAP, NEW_EPOCH])
def test_a_restated_row_begins_a_new_ring(reason: int) -> None:
    bench = Bench()
    bench.tick("A", 1)
    bench.tick("A", 2)
    bench.board.log_epoch = "F"
    quote = bench.board.restate("A", "F", 9, {"last": 9}, NOW_MS, reason)
    assert quote is not None
    bench.ring.add(quote)
    quote.restated = 0
    assert bench.since("A", 1) is None
    assert bench.since("A", 1, "F") is None
    assert bench.since("A", 9, "F") == []
    bench.tick("A", 10)
    assert bench.since("A", 9, "F") == [10]


def test_a_code_keeps_no_more_than_its_bytes() -> None:
    bench = Bench(max_code_bytes=200)
    for seq in range(10, 30):
        quote = bench.tick("A", seq)
        bench.tick("B", seq)
        assert quote.recent_bytes <= 200
    size = len(quote.encoded())
    kept = 200 // size
    assert bench.since("A", 29 - kept) == list(range(30 - kept, 30))
    assert bench.since("A", 28 - kept) is None
    assert bench.ring.bytes == 2 * kept * size


def test_a_row_longer_than_all_that_a_code_may_keep_is_not_kept() -> None:
    bench = Bench(max_code_bytes=200)
    bench.tick("A", 1)
    bench.tick("A", 2, name="x" * 300)
    assert bench.since("A", 1) is None
    assert bench.since("A", 2) == []
    assert bench.ring.bytes == 0


def test_all_codes_together_keep_no_more_than_their_bytes() -> None:
    bench = Bench(max_bytes=1000)
    for seq in range(1, 50):
        for code in "ABCDE":
            bench.tick(code, seq, name="x" * (seq % 7) * 20)
            assert bench.ring.bytes <= 1000
            assert bench.ring.bytes == sum(quote.recent_bytes for quote in bench.board.quotes.values())


def test_old_rows_go_when_new_ones_come() -> None:
    bench = Bench(max_age_ms=1000)
    for seq in range(1, 6):
        bench.tick("A", seq)
        bench.now_ms += 400
    assert bench.since("A", 2) == [3, 4, 5]
    assert bench.since("A", 1) is None
    bench.now_ms += 5000
    bench.tick("A", 6)
    assert bench.since("A", 5) == [6]
    assert bench.since("A", 4) is None


def test_a_code_that_is_forgotten_costs_nothing_and_begins_anew() -> None:
    bench = Bench()
    bench.tick("A", 1)
    bench.tick("A", 2)
    bench.ring.forget([bench.board.quotes["A"]])
    assert bench.ring.bytes == 0
    assert bench.since("A", 1) is None
    bench.tick("A", 3)
    assert bench.since("A", 2) == [3]
    assert bench.since("A", 1) is None


# From before our time


def filled(bench: Bench, ticks: list[tuple[int, dict[str, Any]]], before: dict[str, Any] | None = None) -> bool:
    """Apply ticks to a board on which nobody watches, and fill the ring with them afterwards."""
    if before is not None:
        bench.board.apply_numbered("A", ticks[0][0] - 1, before, NOW_MS)
    for seq, tick in ticks:
        bench.board.apply_numbered("A", seq, dict(tick), NOW_MS + seq)
    quote = bench.board.quotes["A"]
    quote.restated = 0
    return bench.ring.fill(quote, [(seq, dict(tick), NOW_MS + seq) for seq, tick in ticks])


def rows_since(bench: Bench, seq: int) -> list[dict[str, Any]]:
    found = bench.ring.since(bench.board.quotes["A"], "E", seq)
    assert found is not None
    return [orjson.loads(text) for _, text in found]


def test_rows_are_made_of_the_ticks_that_led_to_the_newest_one() -> None:
    bench = Bench()
    assert filled(bench, [(5, {"last": 1}), (6, {"volume": 3}), (7, {"last": 2, "ts": 9})], {"name": "Ay"})
    assert rows_since(bench, 4) == [
        {"code": "A", "seq": 5, "ts": NOW_MS + 5, "name": "Ay", "last": 1},
        {"code": "A", "seq": 6, "ts": NOW_MS + 6, "name": "Ay", "last": 1, "volume": 3},
        {"code": "A", "seq": 7, "ts": 9, "name": "Ay", "last": 2, "volume": 3},
    ]
    assert bench.since("A", 5) == [6, 7]
    assert bench.since("A", 3) is None
    bench.tick("A", 8)
    assert bench.since("A", 4) == [5, 6, 7, 8]


def test_the_last_row_of_them_is_the_row_itself() -> None:
    bench = Bench()
    ticks = [(2, {"volume": 1}), (3, {"volume": 2, "bids": [[1, 1]]})]
    assert filled(bench, ticks, {"last": 3.0, "prev_close": 2.0})
    first, last = rows_since(bench, 1)
    assert (first["change"], first["change_pct"], first["volume"]) == (1, 50, 1)
    assert last == orjson.loads(bench.board.quotes["A"].encoded())


def test_a_field_that_a_later_tick_set_or_cleared_is_not_in_an_earlier_row() -> None:
    bench = Bench()
    assert filled(bench, [(2, {"last": 1}), (3, {"high": 5}), (4, {"last": None})], {"high": 4})
    assert [(row.get("last"), row.get("high")) for row in rows_since(bench, 1)] == [(1, None), (1, 5), (None, 5)]


def test_a_reset_among_them_begins_the_row_anew() -> None:
    bench = Bench()
    assert filled(bench, [(2, {"last": 1, "high": 2}), (3, {"reset": True, "last": 4})], {"name": "Ay"})
    assert [row.get("high") for row in rows_since(bench, 1)] == [2, None]
    assert "reset" not in rows_since(bench, 2)[0]


def test_a_bad_tick_among_them_is_passed_over() -> None:
    bench = Bench()
    assert filled(bench, [(2, {"last": 1}), (3, {"last": -1}), (4, {"last": 4})])
    assert bench.since("A", 1) == [2, 4]
    assert bench.since("A", 3) == [4]


def test_ticks_that_do_not_lead_to_the_newest_row_are_not_kept() -> None:
    bench = Bench()
    bench.tick("A", 3)
    bench.ring.forget(bench.board.quotes.values())
    assert not bench.ring.fill(bench.board.quotes["A"], [(1, {"last": 1}, NOW_MS), (2, {"last": 2}, NOW_MS)])
    assert not bench.ring.fill(bench.board.quotes["A"], [])
    assert bench.ring.bytes == 0


def test_a_ring_that_holds_rows_already_is_not_filled() -> None:
    bench = Bench()
    bench.tick("A", 2)
    bench.tick("A", 3)
    assert not bench.ring.fill(bench.board.quotes["A"], [(3, {"last": 3}, NOW_MS)])
    assert bench.since("A", 2) == [3]


@pytest.mark.parametrize("bounds", [{"max_code_bytes": 300}, {"max_bytes": 300}])
def test_rows_from_before_are_bounded_as_others_are(bounds: dict[str, int]) -> None:
    bench = Bench(**bounds)
    assert filled(bench, [(seq, {"last": seq}) for seq in range(10, 60)], {"name": "x" * 50})
    assert 0 < bench.ring.bytes <= 300
    (last,) = bench.since("A", 58) or ()
    assert last == 59
    assert bench.since("A", 10) is None


# Beside a list of everything


# Behind an ordinal


def behind(bench: Bench, code: str, ordinal: int, life: str = "") -> tuple[int | None, list[int]] | None:
    """The row that was sent last, and the numbers of those behind the ordinal."""
    found = bench.ring.behind(code, bench.board.quotes.get(code), life, ordinal)
    return None if found is None else (found[0], [seq for seq, _, _ in found[1]])


def watched(*codes: str, **bounds: int) -> Bench:
    bench = Bench(**bounds)
    for code in codes:
        bench.tick(code, 1)
        bench.ring.forget([bench.board.quotes[code]])
        bench.ring.watch(code, 1)
    return bench


def test_one_ordinal_says_of_each_code_what_was_missed() -> None:
    bench = watched("A", "B")
    begin = bench.ring.ordinal
    for code, seq in (("A", 2), ("B", 2), ("A", 3), ("A", 4), ("B", 3)):
        bench.tick(code, seq)
    assert [behind(bench, "A", begin + n) for n in range(6)] == [
        (1, [2, 3, 4]), (2, [3, 4]), (2, [3, 4]), (3, [4]), (4, []), (4, []),
    ]  # fmt: skip
    assert behind(bench, "B", begin) == (1, [2, 3])
    assert behind(bench, "B", begin + 4) == (2, [3])
    found = bench.ring.behind("B", bench.board.quotes["B"], "", begin)
    assert found is not None and [ordinal - begin for _, _, ordinal in found[1]] == [2, 5]


def test_an_ordinal_of_another_life_or_of_the_future_is_not_served() -> None:
    bench = watched("A")
    assert behind(bench, "A", bench.ring.ordinal) == (1, [])
    assert behind(bench, "A", bench.ring.ordinal + 1) is None
    assert behind(bench, "A", bench.ring.ordinal, "another") is None


def test_an_ordinal_from_before_a_code_was_watched_is_not_served() -> None:
    bench = watched("A")
    before = bench.ring.ordinal
    bench.ring.forget([bench.board.quotes["A"]])
    assert behind(bench, "A", before) is None
    bench.ring.watch("A", 1)
    bench.tick("A", 2)
    assert behind(bench, "A", before) is None
    assert behind(bench, "A", before + 1) == (1, [2])


def test_a_code_without_any_tick_can_be_gone_on_with() -> None:
    bench = Bench()
    bench.ring.watch("A", 0)
    assert behind(bench, "A", 1) == (0, [])
    assert behind(bench, "B", 1) is None


def test_what_has_gone_from_the_ring_is_not_served_behind_an_ordinal_either() -> None:
    bench = watched("A", max_code_bytes=100)
    begin = bench.ring.ordinal
    for seq in range(2, 9):
        bench.tick("A", seq)
    kept = len(bench.board.quotes["A"].recent or ())
    assert 0 < kept < 7
    assert [behind(bench, "A", begin + n) is not None for n in range(8)] == [False] * (7 - kept) + [True] * (kept + 1)
    assert behind(bench, "A", begin + 7 - kept) == (8 - kept, list(range(9 - kept, 9)))


def test_behind_a_gap_and_not_before_it() -> None:
    bench = watched("A")
    bench.tick("A", 2)
    before = bench.ring.ordinal
    bench.tick("A", 5)
    assert behind(bench, "A", before) is None
    assert behind(bench, "A", before + 1) == (5, [])
    bench.tick("A", 6)
    assert behind(bench, "A", before + 1) == (5, [6])


def test_rows_from_before_our_time_are_behind_nobody() -> None:
    bench = Bench()
    bench.tick("A", 1)
    bench.ring.forget([bench.board.quotes["A"]])
    assert bench.ring.fill(bench.board.quotes["A"], [(1, {"last": 1}, NOW_MS)])
    bench.ring.watch("A", 1)
    bench.tick("A", 2)
    assert behind(bench, "A", bench.ring.ordinal - 1) == (1, [2])
    assert behind(bench, "A", bench.ring.ordinal - 2) is None


class RingMachine(RuleBasedStateMachine):
    """The ring beside a model that keeps every row for ever and knows where each chain began."""

    codes = ("A", "B", "C")

    @initialize(
        max_bytes=st.sampled_from([300, 2000, 10**6]),
        max_code_bytes=st.sampled_from([150, 700, 10**6]),
        max_age_ms=st.sampled_from([0, 500, 10**6]),
    )
    def begin(self, max_bytes: int, max_code_bytes: int, max_age_ms: int) -> None:
        self.bench = Bench(max_bytes=max_bytes, max_code_bytes=max_code_bytes, max_age_ms=max_age_ms)
        self.bounds = max_bytes, max_code_bytes, max_age_ms
        self.seqs = dict.fromkeys(self.codes, 0)
        self.sent: dict[str, list[tuple[int, bytes]]] = {code: [] for code in self.codes}
        self.base: dict[str, int] = {}  # nobody from before it can be served
        self.lives = 0

    @rule(code=st.sampled_from(codes), size=st.integers(0, 200), later_ms=st.integers(0, 300))
    def tick(self, code: str, size: int, later_ms: int) -> None:
        self.bench.now_ms += later_ms
        self.seqs[code] += 1
        is_first = code not in self.base
        quote = self.bench.tick(code, self.seqs[code], name="x" * size)
        if is_first:
            self.base[code] = quote.seq  # it is restated, for it has a new epoch
        self.sent[code].append((quote.seq, quote.encoded()))

    @rule(code=st.sampled_from(codes), lost=st.integers(1, 3))
    def gap(self, code: str, lost: int) -> None:
        self.seqs[code] += lost
        self.tick(code, 1, 0)
        self.base[code] = self.seqs[code]

    @rule()
    def new_epoch(self) -> None:
        self.lives += 1
        self.bench.board.log_epoch = f"E{self.lives}"
        for code in self.codes:
            self.seqs[code] = 0
            self.sent[code].clear()
            self.base.pop(code, None)
            self.tick(code, 1, 0)

    @rule(code=st.sampled_from(codes))
    def leave_it(self, code: str) -> None:
        """Nobody watches it any more, and somebody does again."""
        if (quote := self.bench.board.quotes.get(code)) is not None:
            self.bench.ring.forget([quote])
            self.base[code] = self.seqs[code]

    @invariant()
    def whoever_is_served_gets_everything(self) -> None:
        if not hasattr(self, "bench"):
            return
        for code, quote in self.bench.board.quotes.items():
            served = []
            for seq in range(max(0, quote.seq - 30), quote.seq + 2):
                found = self.bench.ring.since(quote, quote.epoch, seq)
                if found is not None:
                    assert seq >= self.base[code], "served, though rows were lost behind it"
                    assert found == [(n, text) for n, text in self.sent[code] if n > seq], "a hole"
                    served.append(seq)
            assert served == list(range(served[0], quote.seq + 2)), "served before, but not behind"

    @invariant()
    def memory_is_bounded(self) -> None:
        if not hasattr(self, "bench"):
            return
        ring, (max_bytes, max_code_bytes, max_age_ms) = self.bench.ring, self.bounds
        quotes = self.bench.board.quotes.values()
        for quote in quotes:
            kept = quote.recent or ()
            assert quote.recent_bytes == sum(len(text) for _, text, _, _ in kept) <= max_code_bytes
            assert not kept or kept[-1][2] - kept[0][2] <= max_age_ms
        assert ring.bytes == sum(quote.recent_bytes for quote in quotes) <= max_bytes

    @rule(code=st.sampled_from(codes))
    def roomy_rings_forget_nothing(self, code: str) -> None:
        if self.bounds == (10**6, 10**6, 10**6) and (quote := self.bench.board.quotes.get(code)) is not None:
            assert self.bench.ring.since(quote, quote.epoch, self.base[code]) is not None


TestRingBesideAList = RingMachine.TestCase
TestRingBesideAList.settings = settings(deadline=None, derandomize=True, max_examples=100, stateful_step_count=30)
