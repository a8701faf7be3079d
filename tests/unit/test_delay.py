"""Delayed quotes: never too young, in order, complete in the end, bounded."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.quote.board import GAP, NEW_EPOCH, Board, TradingDays
from quotepush.quote.delay import DelayedQuote, DelayLine, Sample, delayed_name, plain_code, suffix_of


class Bench:
    """A board, the line behind it, and a clock."""

    def __init__(self, *delays_s: int, max_bytes: int = 1 << 20, books: frozenset[str] = frozenset()) -> None:
        self.board = Board(epoch="e", days=TradingDays({}), watched=())
        self.line = DelayLine(delays_s or (10,), epoch="e", max_bytes=max_bytes)
        self.line.books_watched = books
        self.now_ms = 1_000_000
        self.seen: list[tuple[str, int, int]] = []  # name, seq, when it was shown
        self.restated: list[int] = []  # of the same rows

    def tick(self, code: str = "AAPL", **fields: Any) -> int:
        self.board.apply(code, orjson.dumps(fields), self.now_ms)
        return self.board.quotes[code].seq

    def numbered(self, code: str, seq: int, **fields: Any) -> None:
        self.board.apply_numbered(code, seq, fields, self.now_ms)

    def look(self) -> list[DelayedQuote]:
        """One interval goes by."""
        self.now_ms += round(self.line.interval_s * 1000)
        for quote in self.board.quotes.values():
            self.line.take(quote)
        self.line.end_round(self.now_ms)
        shown = [quote for quote in self.line.release(self.now_ms) if quote is not None]
        for quote in shown:
            self.seen.append((quote.code, quote.seq, self.now_ms))
            self.restated.append(quote.restated)
            quote.restated = 0  # as the relay does when it has passed it on
        return shown

    def rest(self, seconds: float) -> list[DelayedQuote]:
        shown = []
        until_ms = self.now_ms + seconds * 1000
        while self.now_ms < until_ms:
            shown += self.look()
        return shown


def test_a_delayed_name_is_no_code_and_leads_back_to_it() -> None:
    assert delayed_name("600519.SH", 900) == "600519.SH~900"
    assert plain_code("600519.SH~900") == plain_code("600519.SH") == "600519.SH"
    assert suffix_of(0) == ""


def test_a_row_is_shown_when_it_is_old_enough_and_not_before() -> None:
    bench = Bench(10)
    bench.tick(last=1.5)
    assert bench.rest(9) == []
    assert bench.line.get("AAPL~10") is None

    (quote,) = bench.rest(3)

    assert quote.code == "AAPL~10"
    assert orjson.loads(quote.encoded())["last"] == 1.5
    assert orjson.loads(quote.encoded())["code"] == "AAPL"
    assert bench.line.get("AAPL~10") is quote
    assert bench.line.get("AAPL~11") is None


def test_each_delay_shows_the_same_rows_in_its_own_time() -> None:
    bench = Bench(5, 20)
    for price in range(1, 4):
        bench.tick(last=price)
        bench.look()
    bench.rest(30)

    times = {name: [at for other, _, at in bench.seen if other == name] for name in ("AAPL~5", "AAPL~20")}

    assert [at - 15_000 for at in times["AAPL~20"]] == times["AAPL~5"]
    assert len(times["AAPL~5"]) == 3
    assert bench.line.bytes == 0


def test_there_is_at_most_one_row_an_interval_and_the_newest_of_it() -> None:
    bench = Bench(5)
    for price in range(1, 6):
        bench.tick(last=price)
    bench.rest(10)

    assert [(name, seq) for name, seq, _ in bench.seen] == [("AAPL~5", 5)]


def test_a_tick_that_changes_only_the_time_is_no_news() -> None:
    bench = Bench(5)
    bench.tick(last=1.0, ts=1)
    bench.look()
    bench.tick(last=1.0, ts=2)
    bench.rest(10)

    assert [seq for _, seq, _ in bench.seen] == [1]
    quote = bench.line.get("AAPL~5")
    assert quote is not None
    assert quote.seq == 2


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_change_of_the_book_alone_is_news_where_somebody_watches_the_book(is_watched: bool) -> None:
    bench = Bench(5, books=frozenset({"AAPL~5"} if is_watched else ()))
    bench.tick(last=1.0, bids=[[0.9, 5]])
    bench.look()
    bench.tick(bids=[[0.8, 5]])
    bench.rest(10)

    assert [seq for _, seq, _ in bench.seen] == ([1, 2] if is_watched else [1])
    quote = bench.line.get("AAPL~5")
    assert quote is not None
    assert orjson.loads(quote.encoded_book()) == {"bids": [[0.8, 5]]}
    assert quote.book == {"bids": [[0.8, 5]]}


def test_the_first_row_of_another_epoch_is_restated() -> None:
    bench = Bench(5)
    bench.tick(last=1.0)
    (quote,) = bench.rest(10)
    assert quote.epoch == "e~5"

    bench.board.log_epoch = "log"
    bench.numbered("AAPL", 1, last=2.0)
    (quote,) = bench.rest(10)

    assert (quote.epoch, quote.seq) == ("log~5", 1)
    assert bench.restated == [0, NEW_EPOCH]


def test_rows_that_were_lost_are_a_gap_here_too() -> None:
    bench = Bench(5)
    bench.board.log_epoch = "log"
    for seq in (1, 2, 9):
        bench.numbered("AAPL", seq, last=seq)
        bench.rest(10)

    assert [seq for _, seq, _ in bench.seen] == [1, 2, 9]
    assert bench.restated == [NEW_EPOCH, 0, GAP]


def test_what_was_on_the_board_longer_than_the_delay_is_shown_at_once() -> None:
    bench = Bench(10)
    bench.tick("OLD", last=1.0)
    bench.now_ms += 60_000
    bench.tick("NEW", last=2.0)
    for quote in bench.board.quotes.values():
        bench.line.note_past(quote.code, Sample.of(quote), quote.arrived_ms)
    bench.line.begin(bench.now_ms)

    assert [quote.code for quote in bench.look()] == ["OLD~10"]
    assert [quote.code for quote in bench.rest(12)] == ["NEW~10"]


def test_the_past_is_shown_in_its_time_in_whatever_order_it_was_noted() -> None:
    bench = Bench(10)
    began_ms = bench.now_ms
    for seq, ago_s in ((3, 1), (1, 8), (2, 4)):
        sample = Sample(seq, "e", b'{"code":"AAPL","seq":%d,"ts":1,"last":%d}' % (seq, seq), b"{}", 0)
        bench.line.note_past("AAPL", sample, began_ms - ago_s * 1000)
    bench.line.begin(began_ms)

    bench.rest(12)

    assert [seq for _, seq, _ in bench.seen] == [1, 2, 3]
    for (_, _, at_ms), ago_s in zip(bench.seen, (8, 4, 1), strict=True):
        assert at_ms - (began_ms - ago_s * 1000) >= 10_000


def test_when_too_much_waits_rows_stand_for_longer_times() -> None:
    bench = Bench(60, max_bytes=20_000)
    for price in range(1, 61):
        for code in ("A", "B", "C"):
            bench.tick(code, last=price)
        bench.look()
        assert bench.line.bytes <= 20_000
    assert bench.line.interval_s > 1

    bench.rest(120)

    assert bench.line.bytes == 0
    assert {name: seq for name, seq, _ in bench.seen} == {"A~60": 60, "B~60": 60, "C~60": 60}
    assert bench.line.interval_s < 8  # it has room again


def test_the_newest_row_comes_in_the_end_however_little_may_wait() -> None:
    bench = Bench(60, max_bytes=1)
    for price in range(1, 200):
        for code in ("A", "B", "C"):
            bench.tick(code, last=price)
        bench.look()
    waiting = bench.line.bytes
    one_of_each = sum(Sample.of(quote).bytes for quote in bench.board.quotes.values())
    assert waiting <= 10 * one_of_each
    assert bench.seen, "something is shown also while ticks go on"

    bench.rest(300)

    assert {name: seq for name, seq, _ in bench.seen} == {"A~60": 199, "B~60": 199, "C~60": 199}


def test_a_code_that_has_left_the_board_goes_when_it_has_been_shown_and_nobody_watches_it() -> None:
    bench = Bench(5)
    for code in ("A", "B", "C"):
        bench.tick(code, last=1.0)
    bench.rest(10)
    bench.tick("C", last=2.0)
    bench.look()
    bench.board.quotes.clear()

    bench.line.expire(bench.board.quotes, {"B~5"})

    assert set(bench.line.quotes(5)) == {"B", "C"}
    bench.rest(10)
    bench.line.expire(bench.board.quotes, ())
    assert not bench.line.quotes(5)


_STEPS = st.lists(
    st.tuples(st.sampled_from(["A", "B", "C~D".partition("~")[0]]), st.integers(1, 3), st.booleans()), max_size=60
)


@settings(deadline=None, max_examples=60)
@given(_STEPS, st.sampled_from([(3,), (3, 7), (2, 20)]), st.sampled_from([400, 2_000, 1 << 20]))
def test_no_row_is_young_none_is_late_for_ever_and_all_come_in_order(
    steps: list[tuple[str, int, bool]], delays_s: tuple[int, ...], max_bytes: int
) -> None:
    bench = Bench(*delays_s, max_bytes=max_bytes)
    ticked: dict[tuple[str, int], int] = {}
    for code, price, rests in steps:
        ticked[code, bench.tick(code, last=price)] = bench.now_ms
        if rests:
            bench.look()
    bench.rest(3 * max(delays_s) + 20)

    shown: dict[str, int] = {}
    for name, seq, at_ms in bench.seen:
        code, _, delay_s = name.partition("~")
        assert at_ms - ticked[code, seq] >= int(delay_s) * 1000
        assert seq > shown.get(name, 0)
        shown[name] = seq
    for code in {code for code, _ in ticked}:
        for delay_s in delays_s:
            quote = bench.line.quotes(delay_s)[code]
            newest = bench.board.quotes[code]
            assert quote.row | {"seq": 0, "ts": 0} == newest.row | {"seq": 0, "ts": 0}
    assert bench.line.bytes == 0
