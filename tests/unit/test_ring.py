"""The recent rows: without a hole from their base on, in one epoch, in bounded memory."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote, TradingDays
from quotepush.quote.ring import Ring


class Bench:
    """A ring that is handed whatever the board finds new, as the relay does."""

    def __init__(self, **bounds: int) -> None:
        self.ring = Ring(**{"max_bytes": 1 << 20, "max_code_bytes": 1 << 16, "max_age_ms": 60_000, **bounds})
        self.board = Board(epoch="e", days=TradingDays({}))
        self.now_ms = 1_000

    def tick(self, code: str, **fields: Any) -> Quote:
        quote = self.board.apply(code, orjson.dumps(fields), self.now_ms)
        if quote is not None:
            self.ring.add(quote)
            quote.restated = 0
        return self.board.quotes[code]

    def since(self, code: str, seq: int, epoch: str = "e") -> list[int] | None:
        found = self.ring.since(self.board.quotes[code], epoch, seq)
        return None if found is None else [number for number, _ in found]


def test_what_was_missed_is_what_was_sent_oldest_first() -> None:
    bench = Bench()
    for price in (1, 2, 3):
        quote = bench.tick("A", last=price)
    found = bench.ring.since(quote, "e", 1)
    assert found is not None
    assert [(seq, orjson.loads(text)["last"]) for seq, text in found] == [(2, 2), (3, 3)]
    assert bench.since("A", 0) == [1, 2, 3]
    assert bench.since("A", 3) == []


def test_another_epoch_and_rows_before_the_first_one_are_not_known() -> None:
    bench = Bench()
    bench.board.apply("A", b'{"last":1}', 1_000)  # nobody watched
    bench.tick("A", last=2)
    assert bench.since("A", 1) == [2]
    assert bench.since("A", 0) is None
    assert bench.since("A", 2, epoch="before") is None


def test_a_tick_that_shows_nothing_new_makes_no_hole() -> None:
    bench = Bench()
    bench.tick("A", last=1)
    bench.tick("A", last=1)
    bench.tick("A", last=2)
    assert bench.since("A", 1) == [3]
    assert bench.since("A", 2) == [3]


@pytest.mark.parametrize("reason", [NEW_EPOCH, GAP])
def test_a_row_that_is_restated_begins_a_new_ring(reason: int) -> None:
    bench = Bench()
    bench.tick("A", last=1)
    quote = bench.board.restate("A", "log", 9, {"last": 2.0}, 1_000, reason)
    assert quote is not None
    bench.ring.add(quote)
    quote.restated = 0
    assert bench.since("A", 9, "log") == []
    assert bench.since("A", 8, "log") is None
    assert bench.ring.bytes == 0
    bench.board.log_epoch = "log"
    newer = bench.board.apply_numbered("A", 10, {"last": 3.0}, 1_000)
    assert newer is not None
    bench.ring.add(newer)
    assert bench.since("A", 9, "log") == [10]


def test_the_oldest_rows_of_a_code_go_first() -> None:
    bench = Bench(max_code_bytes=200)
    for price in range(1, 50):
        quote = bench.tick("A", last=price)
    assert quote.recent_bytes <= 200
    kept = len(quote.recent or ())
    assert kept > 1
    assert bench.since("A", 49 - kept) == list(range(50 - kept, 50))
    assert bench.since("A", 48 - kept) is None


def test_without_room_nothing_is_kept() -> None:
    bench = Bench(max_code_bytes=0)
    bench.tick("A", last=1)
    assert bench.ring.bytes == 0
    assert bench.since("A", 1) == []
    assert bench.since("A", 0) is None


def test_old_rows_go() -> None:
    bench = Bench(max_age_ms=1_000)
    bench.tick("A", last=1)
    bench.now_ms += 600
    bench.tick("A", last=2)
    bench.now_ms += 600
    bench.tick("A", last=3)
    assert bench.since("A", 0) is None
    assert bench.since("A", 1) == [2, 3]


def test_above_the_bound_of_all_every_code_gives_up_its_older_half() -> None:
    bench = Bench(max_bytes=1_000)
    codes = "ABCDE"
    for price in range(1, 20):
        for code in codes:
            bench.tick(code, last=price)
            assert bench.ring.bytes <= 1_000
    for code in codes:
        assert bench.board.quotes[code].recent
        assert bench.since(code, 18) == [19]


def test_a_code_that_is_forgotten_takes_no_room() -> None:
    bench = Bench()
    bench.tick("A", last=1)
    bench.tick("B", last=1)
    bench.ring.forget([bench.board.quotes["A"]])
    assert bench.since("A", 0) is None
    assert bench.ring.bytes == bench.board.quotes["B"].recent_bytes > 0


# Rows from before our time


def filled(quote: Quote | None, *ticks: tuple[int, dict[str, Any]]) -> tuple[Ring, bool]:
    assert quote is not None
    quote.restated = 0
    ring = Ring(max_bytes=1 << 20, max_code_bytes=1 << 16, max_age_ms=60_000)
    return ring, ring.fill(quote, [(seq, tick, 1_000) for seq, tick in ticks])


def test_a_ring_is_filled_with_what_the_ticks_made_of_the_row() -> None:
    board = Board(epoch="e", days=TradingDays({}))
    quote = board.restate("A", "log", 9, {"name": "a", "last": 3.0, "volume": 5}, 1_000, NEW_EPOCH)
    ring, is_filled = filled(quote, (7, {"last": 1.0}), (8, {"volume": 5}), (9, {"last": 3.0}))
    assert is_filled
    assert quote is not None
    found = ring.since(quote, "log", 6)
    assert found is not None
    rows = [orjson.loads(text) for _, text in found]
    assert [row["seq"] for row in rows] == [7, 8, 9]
    assert [(row["name"], row["last"], row.get("volume")) for row in rows] == [("a", 1, None), ("a", 1, 5), ("a", 3, 5)]
    assert ring.since(quote, "log", 5) is None
    assert ring.bytes == quote.recent_bytes == sum(len(text) for _, text in found)


def test_ticks_that_do_not_lead_to_the_newest_row_fill_nothing() -> None:
    board = Board(epoch="e", days=TradingDays({}))
    quote = board.restate("A", "log", 9, {"last": 3.0}, 1_000, NEW_EPOCH)
    for ticks in ([], [(7, {"last": 1.0}), (8, {"last": 2.0})]):
        ring, is_filled = filled(quote, *ticks)
        assert not is_filled
        assert ring.bytes == 0


def test_rows_that_were_sent_are_not_made_again() -> None:
    bench = Bench()
    quote = bench.tick("A", last=1)
    assert not bench.ring.fill(quote, [(1, {"last": 2}, 1_000)])
    assert bench.since("A", 0) == [1]


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 3), st.integers(0, 400), st.booleans()), max_size=60))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_whatever_happens_rows_are_known_without_a_hole_or_not_at_all(
    ticks: list[tuple[str, int, int, bool]],
) -> None:
    bench = Bench(max_bytes=900, max_code_bytes=400, max_age_ms=1_000)
    sent: dict[str, list[int]] = {code: [] for code in "ABC"}
    for code, price, wait_ms, is_forgotten in ticks:
        bench.now_ms += wait_ms
        before = bench.board.accepted
        if is_forgotten and code in bench.board.quotes:
            bench.ring.forget([bench.board.quotes[code]])
            sent[code].clear()
        quote = bench.tick(code, last=price)
        assert bench.board.accepted == before + 1
        if quote.recent and quote.recent[-1][0] == quote.seq:
            sent[code].append(quote.seq)
        for other in bench.board.quotes.values():
            for seq in range(other.seq + 1):
                found = bench.since(other.code, seq)
                assert found is None or found == [number for number in sent[other.code] if number > seq]
        assert bench.ring.bytes == sum(q.recent_bytes for q in bench.board.quotes.values()) <= 900
        for other in bench.board.quotes.values():
            assert other.recent_bytes == sum(len(text) for _, text, _ in other.recent or ()) <= 400
