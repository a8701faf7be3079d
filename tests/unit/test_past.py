"""Rows as they were."""

import orjson

from quotepush.quote.board import Board, Quote, TradingDays
from quotepush.quote.past import PastRow


def quote_of(**tick: object) -> Quote:
    board = Board(days=TradingDays({}))
    board.apply("AAPL", orjson.dumps(tick), 5_000)
    return board.quotes["AAPL"]


def test_a_field_that_only_later_ticks_speak_of_is_not_in_the_row() -> None:
    quote = quote_of(last=12.0, prev_close=10.0, volume=70, name="Apple")
    row = PastRow(quote, {"last", "volume"})

    assert row.merge(7, {"last": 11.0}, 1_000)

    assert orjson.loads(row.encoded()) == {
        "code": "AAPL", "seq": 7, "ts": 1_000, "prev_close": 10.0, "name": "Apple", "last": 11.0, "change": 1.0,
        "change_pct": 10.0,
    }  # fmt: skip


def test_a_book_is_made_again_too() -> None:
    quote = quote_of(last=12.0, bids=[[11.9, 5]], asks=[[12.1, 5]])
    row = PastRow(quote, {"bids"})

    assert orjson.loads(row.encoded_book()) == {"asks": [[12.1, 5]]}
    assert row.merge(2, {"bids": [[11.0, 1]]}, 1_000)
    assert orjson.loads(row.encoded_book()) == {"asks": [[12.1, 5]], "bids": [[11.0, 1]]}


def test_a_bad_tick_changes_nothing() -> None:
    row = PastRow(quote_of(last=12.0), {"last"})
    assert row.merge(1, {"last": 11.0}, 1_000)
    before = row.encoded()

    assert not row.merge(2, {"last": -1.0}, 2_000)

    assert row.encoded() == before


def test_a_reset_empties_the_row() -> None:
    row = PastRow(quote_of(last=12.0, high=13.0), {"last"})

    assert row.merge(3, {"last": 9.0, "reset": True}, 2_000)

    assert orjson.loads(row.encoded()) == {"code": "AAPL", "seq": 3, "ts": 2_000, "last": 9.0}
