"""The board against a plain model, and what it refuses."""

from copy import deepcopy
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotepush.quote.board import Board, TradingDays

ZONES = {"SH": "Asia/Shanghai", "SZ": "Asia/Shanghai", "HK": "Asia/Hong_Kong"}
IGNORED = ("code", "seq", "prev", "epoch", "change", "change_pct", "reset")
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
NOON_MS = int(datetime(2026, 3, 10, 12, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp() * 1000)


def make_board(**options: Any) -> Board:
    return Board(days=TradingDays(ZONES), **options)


def take(board: Board, code: str | None, tick: Any, now_ms: int = NOON_MS) -> Any:
    return board.apply(code, orjson.dumps(tick), now_ms)


def row_of(board: Board, code: str) -> dict[str, Any]:
    row: dict[str, Any] = orjson.loads(board.quotes[code].encoded())
    return row


def state_of(board: Board) -> dict[str, Any]:
    """Everything that a refused tick must leave alone."""
    return {
        code: (quote.seq, deepcopy(quote.row), deepcopy(quote.book), quote.arrived_ms, quote.encoded())
        for code, quote in board.quotes.items()
    }


# What is accepted


def test_a_first_tick_makes_a_complete_row() -> None:
    board = make_board()
    quote = take(board, "600519.SH", {"ts": NOON_MS - 5, "last": 1688.0, "prev_close": 1675.5, "name": "贵州茅台"})
    assert quote is board.quotes["600519.SH"]
    assert row_of(board, "600519.SH") == {
        "code": "600519.SH", "seq": 1, "ts": NOON_MS - 5, "last": 1688.0, "prev_close": 1675.5, "name": "贵州茅台",
        "change": 12.5, "change_pct": 0.75,
    }  # fmt: skip


def test_code_seq_and_ts_stand_first() -> None:
    board = make_board()
    for tick in ({"last": 1, "ts": 7, "code": "AAPL"}, {"ts": None, "last": 2}, {"volume": 3}, {"ts": 9}):
        take(board, "AAPL", tick)
        assert list(row_of(board, "AAPL"))[:3] == ["code", "seq", "ts"]


def test_ts_is_filled_in_on_arrival() -> None:
    board = make_board()
    take(board, "AAPL", {"last": 1}, now_ms=1000)
    assert row_of(board, "AAPL")["ts"] == 1000
    take(board, "AAPL", {"last": 2, "ts": 5}, now_ms=2000)
    assert row_of(board, "AAPL")["ts"] == 5
    take(board, "AAPL", {"last": 3, "ts": None}, now_ms=3000)
    assert row_of(board, "AAPL")["ts"] == 3000
    take(board, "AAPL", {"last": 4}, now_ms=4000)
    assert row_of(board, "AAPL")["ts"] == 4000


def test_null_clears_a_field_and_absence_keeps_it() -> None:
    board = make_board()
    take(board, "AAPL", {"last": 1, "bid": 2, "vendor": "x"})
    take(board, "AAPL", {"bid": None, "vendor": None, "never_there": None})
    row = row_of(board, "AAPL")
    assert row["last"] == 1
    assert not {"bid", "vendor", "never_there"} & set(row)


def test_a_null_inside_a_vendor_field_stays() -> None:
    board = make_board()
    take(board, "AAPL", {"vendor": [None, {"a": None}], "name": "null"})
    take(board, "AAPL", {"last": 1})
    assert row_of(board, "AAPL")["vendor"] == [None, {"a": None}]
    assert row_of(board, "AAPL")["name"] == "null"


def test_what_the_server_sets_itself_cannot_be_set_by_a_tick() -> None:
    board = make_board()
    tick = {
        "code": "aapl",
        "seq": 99,
        "prev": 98,
        "epoch": "e",
        "change": 5,
        "change_pct": 5,
        "reset": False,
        "last": 1,
    }
    take(board, "AAPL", tick, now_ms=7)
    assert row_of(board, "AAPL") == {"code": "AAPL", "seq": 1, "ts": 7, "last": 1}


def test_book_is_kept_apart_and_cut_at_five_levels() -> None:
    board = make_board()
    take(board, "AAPL", {"last": 1, "bids": [[10 - i, i] for i in range(8)], "asks": [[11, 1]]})
    quote = board.quotes["AAPL"]
    assert quote.book == {"bids": [[10, 0], [9, 1], [8, 2], [7, 3], [6, 4]], "asks": [[11, 1]]}
    assert not {"bids", "asks"} & set(row_of(board, "AAPL"))
    take(board, "AAPL", {"bids": None, "asks": []})
    assert quote.book == {"asks": []}


def test_code_comes_from_the_tick_where_the_channel_names_none() -> None:
    board = make_board()
    quote = take(board, None, {"code": "sh600519", "last": 1})
    assert quote is not None and quote.code == "600519.SH"


@pytest.mark.parametrize("spelling", ["600519.SH", "sh600519", "600519", "600519.XSHG", "SSE.600519"])
def test_a_tick_may_spell_the_code_of_its_channel_in_any_way(spelling: str) -> None:
    board = make_board()
    assert take(board, "600519.SH", {"code": spelling, "last": 1}) is not None


def test_a_code_of_null_in_a_tick_says_nothing() -> None:
    board = make_board()
    assert take(board, "AAPL", {"code": None, "last": 1}) is not None
    assert row_of(board, "AAPL")["code"] == "AAPL"


def test_seq_rises_by_one_per_accepted_tick_and_code() -> None:
    board = make_board()
    for n in range(1, 5):
        take(board, "AAPL", {"last": n})
        take(board, "MSFT", {"last": -n})
        assert board.seq("AAPL") == n
        assert board.seq("MSFT") == 0


def test_a_tick_that_changes_nothing_but_ts_has_nothing_new_to_show_and_counts() -> None:
    board = make_board()
    assert take(board, "AAPL", {"last": 1.5, "volume": 10, "ts": 1}) is not None
    assert take(board, "AAPL", {"last": 1.5, "ts": 2}) is None
    assert take(board, "AAPL", {"ts": 3}) is None
    assert take(board, "AAPL", {"bid": None}) is None
    assert take(board, "AAPL", {"bids": [[1.4, 5]]}) is None  # heavy: in no default view
    assert board.seq("AAPL") == 5
    assert board.accepted == 5
    assert not board.refused
    assert take(board, "AAPL", {"volume": 11}) is not None


def test_ticks_that_nobody_has_looked_at_are_all_in_the_row_that_somebody_looks_at() -> None:
    board = make_board(watched=set())
    take(board, "AAPL", {"last": 1, "bid": 2, "prev_close": 4})
    take(board, "AAPL", {"last": 2, "bid": None, "prev_close": 4})
    take(board, "AAPL", {"volume": 7})
    take(board, "AAPL", {"volume": 8, "ts": 5})
    take(board, "AAPL", {"volume": None, "ts": 6})
    take(board, "AAPL", {"bids": [[1, 1]] * 7})
    assert row_of(board, "AAPL") == {
        "code": "AAPL", "seq": 6, "ts": NOON_MS, "last": 2, "prev_close": 4, "change": -2.0, "change_pct": -50.0,
    }  # fmt: skip
    assert board.quotes["AAPL"].book == {"bids": [[1, 1]] * 5}


def test_nothing_is_new_to_nobody() -> None:
    watched: set[str] = set()
    board = make_board(watched=watched)
    assert take(board, "AAPL", {"last": 1}) is None
    watched.add("AAPL")
    assert take(board, "AAPL", {"last": 2}) is not None
    assert take(board, "MSFT", {"last": 2}) is None
    assert (board.seq("AAPL"), board.seq("MSFT")) == (2, 1)


def test_a_change_of_the_book_alone_is_news_where_the_book_is_watched() -> None:
    books: set[str] = set()
    board = make_board(watched={"AAPL"}, books_watched=books)
    assert take(board, "AAPL", {"last": 5, "bids": [[1, 2]]})
    assert take(board, "AAPL", {"bids": [[1, 3]]}) is None
    books.add("AAPL")
    assert take(board, "AAPL", {"bids": [[1, 3]]}) is None
    quote = take(board, "AAPL", {"bids": [[1, 4]]})
    assert orjson.loads(quote.encoded_book()) == {"bids": [[1, 4]]}


def test_a_book_that_changed_while_nobody_watched_is_encoded_anew() -> None:
    watched = {"AAPL"}
    board = make_board(watched=watched)
    take(board, "AAPL", {"bids": [[1, 2]]})
    quote = board.quotes["AAPL"]
    assert orjson.loads(quote.encoded_book()) == {"bids": [[1, 2]]}
    watched.clear()
    take(board, "AAPL", {"bids": [[1, 3]]})
    assert orjson.loads(quote.encoded_book()) == {"bids": [[1, 3]]}


# Reset and trading days


def test_reset_replaces_the_row() -> None:
    board = make_board()
    take(board, "AAPL", {"last": 5, "high": 9, "bids": [[5, 1]]})
    assert take(board, "AAPL", {"reset": True, "last": 6}, now_ms=8) is not None
    assert row_of(board, "AAPL") == {"code": "AAPL", "seq": 2, "ts": 8, "last": 6}
    assert board.quotes["AAPL"].book == {}


@pytest.mark.parametrize("value", [False, None, 0, 1, "true", "yes", [], {}])
def test_only_true_resets(value: Any) -> None:
    board = make_board()
    take(board, "AAPL", {"last": 5, "high": 9})
    take(board, "AAPL", {"reset": value, "last": 6})
    assert row_of(board, "AAPL")["high"] == 9


def shanghai_ms(day: int, hour: int, minute: int = 0) -> int:
    return int(datetime(2026, 3, day, hour, minute, tzinfo=ZoneInfo("Asia/Shanghai")).timestamp() * 1000)


def test_the_first_tick_of_a_later_trading_day_replaces_the_row() -> None:
    board = make_board()
    take(board, "600519.SH", {"ts": shanghai_ms(10, 14, 59), "last": 5, "high": 9})
    take(board, "600519.SH", {"ts": shanghai_ms(10, 23, 59), "last": 6})
    assert row_of(board, "600519.SH")["high"] == 9
    take(board, "600519.SH", {"ts": shanghai_ms(11, 0), "last": 7})
    assert "high" not in row_of(board, "600519.SH")
    assert board.seq("600519.SH") == 3


def test_the_day_is_that_of_shanghai_and_not_of_utc() -> None:
    board = make_board()
    # 07:59 and 08:01 in Shanghai lie on two days of UTC, 23:59 and 00:01 on one.
    take(board, "600519.SH", {"ts": shanghai_ms(10, 7, 59), "last": 5, "high": 9})
    take(board, "600519.SH", {"ts": shanghai_ms(10, 8, 1), "last": 6})
    assert row_of(board, "600519.SH")["high"] == 9
    take(board, "600519.SH", {"ts": shanghai_ms(11, 0, 1), "low": 1})
    assert "high" not in row_of(board, "600519.SH")


def test_a_straggler_of_yesterday_does_not_bring_yesterday_back() -> None:
    board = make_board()
    take(board, "600519.SH", {"ts": shanghai_ms(10, 14), "last": 5, "high": 9})
    take(board, "600519.SH", {"ts": shanghai_ms(11, 9, 30), "last": 7, "high": 7})
    take(board, "600519.SH", {"ts": shanghai_ms(10, 15), "volume": 3})
    take(board, "600519.SH", {"ts": shanghai_ms(11, 9, 31), "last": 8})
    row = row_of(board, "600519.SH")
    assert (row["high"], row["volume"], row["last"]) == (7, 3, 8)


def test_the_day_of_an_unlisted_market_never_ends() -> None:
    board = make_board()
    for code in ("AAPL", "BRK.B", "VOD.L"):
        take(board, code, {"ts": shanghai_ms(10, 14), "last": 5, "high": 9})
        take(board, code, {"ts": shanghai_ms(20, 14), "last": 6})
        assert row_of(board, code)["high"] == 9


def test_codes_without_a_market_have_the_zone_of_the_empty_key() -> None:
    board = Board(days=TradingDays({"": "America/New_York"}))
    ms = int(datetime(2026, 3, 10, 23, 59, tzinfo=ZoneInfo("America/New_York")).timestamp() * 1000)
    take(board, "AAPL", {"ts": ms, "high": 9})
    take(board, "AAPL", {"ts": ms + 30_000, "last": 1})
    assert "high" in row_of(board, "AAPL")
    take(board, "AAPL", {"ts": ms + 60_000, "last": 1})
    assert "high" not in row_of(board, "AAPL")


@given(
    st.sampled_from(["Asia/Shanghai", "America/New_York", "Europe/London", "Asia/Kathmandu"]),
    st.lists(st.integers(0, 2_000_000_000_000), min_size=1, max_size=6),
)
@settings(deadline=None, derandomize=True)
def test_a_day_ends_at_the_next_local_midnight(zone: str, moments: list[int]) -> None:
    days = TradingDays({"X": zone})
    for ts in moments:
        end = days.end_ms("A.X", ts)
        local = datetime.fromtimestamp(end / 1000, ZoneInfo(zone))
        assert (local.hour, local.minute, local.second) == (0, 0, 0)
        assert 0 < end - ts <= 25 * HOUR_MS
        day = datetime.fromtimestamp(ts / 1000, UTC).astimezone(ZoneInfo(zone)).date()
        assert (local.date() - day).days == 1


# What is refused

BAD: list[tuple[bytes, str]] = [
    (b"", "bad_json"), (b"nonsense", "bad_json"), (b'{"last":NaN}', "bad_json"), (b'{"last":1e999}', "bad_json"),
    (b'{"last":Infinity}', "bad_json"), (b'{"name":"\xff\xfe"}', "bad_json"), (b'{"last":1', "bad_json"),
    (b"[]", "not_an_object"), (b"null", "not_an_object"), (b"5", "not_an_object"), (b'"x"', "not_an_object"),
    (b'{"last":"5"}', "wrong_type"), (b'{"last":true}', "wrong_type"), (b'{"volume":1.5}', "wrong_type"),
    (b'{"volume":1e300}', "wrong_type"), (b'{"volume":false}', "wrong_type"), (b'{"name":5}', "wrong_type"),
    (b'{"bids":[[1]]}', "wrong_type"), (b'{"bids":[["1",2]]}', "wrong_type"), (b'{"ts":1.5}', "wrong_type"),
    (b'{"ts":"now"}', "wrong_type"), (b'{"ts":1721872800123456789}', "wrong_type"), (b'{"code":5}', "wrong_type"),
    (b'{"last":-0.01}', "negative"), (b'{"volume":-1}', "negative"), (b'{"asks":[[1,-2]]}', "negative"),
    (b'{"last":7,"high":8,"bid_size":-1}', "negative"),
    (b'{"code":"MSFT","last":1}', "wrong_channel"), (b'{"code":"sh600519"}', "wrong_channel"),
    (b'{"code":"no such"}', "bad_code"), (b'{"code":""}', "bad_code"),
    (b'{"x":' + b"[" * 600 + b"]" * 600 + b"}", "too_deep"),
    (b'{"x":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", "too_deep"),
    (b'{"x":"' + b"a" * 9000 + b'"}', "too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "reason"), BAD, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(BAD)])
def test_a_bad_tick_is_refused_counted_by_reason_and_changes_nothing(payload: bytes, reason: str) -> None:
    board = make_board()
    take(board, "AAPL", {"last": 5.0, "prev_close": 4.0, "bids": [[4.9, 100]], "volume": 9})
    before = state_of(board)
    for code in ("AAPL", "NEW"):  # a code that has a row, and one that has not
        assert board.apply(code, payload, NOON_MS + 1) is None
    assert state_of(board) == before
    assert board.refused == {reason: 2}
    assert board.accepted == 1
    assert reason in board.last_fault
    # ... and the next one is as good as ever.
    assert take(board, "AAPL", {"last": 6.0}) is not None
    assert (board.seq("AAPL"), row_of(board, "AAPL")["change"]) == (2, 2.0)
    assert take(board, "NEW", {"last": 1}) is not None
    assert board.seq("NEW") == 1


def test_without_a_code_anywhere_a_tick_is_refused() -> None:
    board = make_board()
    for payload in (b'{"last":1}', b'{"last":1,"code":null}', b'{"code":7}'):
        assert board.apply(None, payload, 1) is None
    assert board.refused == {"wrong_type": 3}
    assert board.quotes == {}


@pytest.mark.parametrize(
    "payload",
    [b'{"last":1e307,"prev_close":1}', b'{"last":1e300,"prev_close":1e-8}', b'{"volume":18446744073709551616}',
     b'{"volume":18446744073709551615}', b'{"last":1e308}', b'{"bids":[[1e300,18446744073709551616]]}',
     b'{"x":18446744073709551616}', b'{"x":[1e308,-0.0]}', b'{"last":5e-324,"prev_close":5e-324}'],
)  # fmt: skip
def test_an_extreme_number_is_refused_or_can_be_sent_on(payload: bytes) -> None:
    board = make_board()
    take(board, "AAPL", {"last": 5.0})
    accepted = board.accepted
    board.apply("AAPL", payload, NOON_MS)
    orjson.loads(board.quotes["AAPL"].encoded())
    assert board.accepted + board.refused.total() == accepted + 1
    assert take(board, "AAPL", {"last": 6.0, "reset": True}) is not None
    assert row_of(board, "AAPL")["last"] == 6.0


def test_a_tick_of_exactly_the_limit_is_accepted() -> None:
    board = make_board(max_tick_bytes=100)
    payload = b'{"x":"' + b"a" * 92 + b'"}'
    assert len(payload) == 100
    assert board.apply("AAPL", payload, 1) is not None
    assert board.apply("AAPL", payload.replace(b"aa", b"aaa", 1), 1) is None
    assert board.refused == {"too_large": 1}


def test_a_full_board_refuses_new_codes_only() -> None:
    board = make_board(max_codes=2)
    assert take(board, "A", {"last": 1}) and take(board, "B", {"last": 1})
    assert take(board, "C", {"last": 1}) is None
    assert board.refused == {"board_full": 1}
    assert take(board, "A", {"last": 2}) is not None
    assert set(board.quotes) == {"A", "B"}


def test_a_row_cannot_grow_beyond_its_limit() -> None:
    board = make_board(max_row_bytes=1000)
    accepted = 0
    for n in range(200):
        before = state_of(board)
        if take(board, "AAPL", {f"field_{n}": "x" * 20}) is None:
            assert state_of(board) == before
        else:
            accepted += 1
        assert len(board.quotes["AAPL"].encoded()) <= 1000
    assert accepted >= 20
    assert board.refused == {"row_too_large": 200 - accepted}
    assert take(board, "AAPL", {"reset": True, "last": 1}) is not None
    assert take(board, "AAPL", {"field": "x" * 20}) is not None


def test_a_row_near_its_limit_still_takes_ticks_that_do_not_make_it_larger() -> None:
    board = make_board(max_row_bytes=1000)
    big = {"a": "x" * 300, "b": "y" * 300, "c": "z" * 150, "last": 1}
    assert take(board, "AAPL", big) is not None
    for n in range(2, 50):
        assert take(board, "AAPL", {**big, "last": n}) is not None, board.last_fault
    assert take(board, "AAPL", {"a": None}) is not None
    assert take(board, "AAPL", {"d": "w" * 290}) is not None


def test_a_first_tick_that_is_too_large_for_a_row_leaves_no_row() -> None:
    board = make_board(max_row_bytes=500)
    assert take(board, "AAPL", {"x": "y" * 600}) is None
    assert board.refused == {"row_too_large": 1}
    assert board.quotes == {}


@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.one_of(
    st.none(), st.text(max_size=60), st.floats(allow_nan=False, allow_infinity=False)), max_size=4),
    max_size=30))  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_bound_of_a_row_holds_its_book_too(ticks: list[dict[str, Any]]) -> None:
    board = make_board(max_row_bytes=400)
    for tick in ticks:
        take(board, "AAPL", {**tick, "bids": [[1.5, n] for n in range(len(tick))]})
        for quote in board.quotes.values():
            assert len(quote.encoded()) + len(orjson.dumps(quote.book)) <= 400


def test_drop_older_refuses_what_is_older_by_ts_only() -> None:
    board = make_board(drop_older=True)
    assert take(board, "AAPL", {"ts": 100, "last": 1})
    assert take(board, "AAPL", {"ts": 99, "last": 2}) is None
    assert board.refused == {"older": 1}
    assert take(board, "AAPL", {"ts": 100, "last": 3})
    assert take(board, "AAPL", {"ts": 101, "last": 4})
    assert take(board, "MSFT", {"ts": 50, "last": 4})
    assert row_of(board, "AAPL")["last"] == 4


def test_without_drop_older_ticks_merge_in_the_order_of_arrival() -> None:
    board = make_board()
    take(board, "AAPL", {"ts": 100, "last": 1})
    take(board, "AAPL", {"ts": 99, "last": 2})
    assert row_of(board, "AAPL") == {"code": "AAPL", "seq": 2, "ts": 99, "last": 2}


# Expiry


def test_rows_without_a_tick_for_long_leave() -> None:
    board = make_board()
    take(board, "OLD", {"last": 1}, now_ms=1000)
    take(board, "NEW", {"last": 1}, now_ms=2000)
    take(board, "KEPT", {"last": 1}, now_ms=500)
    assert board.expire(2000, keep=["KEPT"]) == 1
    assert set(board.quotes) == {"NEW", "KEPT"}
    assert board.seq("OLD") == 0


def test_a_code_that_returns_goes_on_above_its_old_seq() -> None:
    board = make_board()
    for n in range(7):
        take(board, "OLD", {"last": n}, now_ms=1000)
    board.expire(2000)
    quote = take(board, "OLD", {"last": 1}, now_ms=3000)
    assert quote is not None and quote.seq > 7
    assert row_of(board, "OLD") == {"code": "OLD", "seq": quote.seq, "ts": 3000, "last": 1}


# All of it at once, against a model

PRICES = ("last", "prev_close", "high")
prices = st.builds(lambda n, d: float(Decimal(n).scaleb(-d)), st.integers(0, 100_000), st.integers(0, 4))
ticks = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.one_of(st.none(), prices) for name in PRICES},
        "volume": st.one_of(st.none(), st.integers(0, 10**12)),
        "name": st.one_of(st.none(), st.sampled_from(["甲", "乙", "null"])),
        "vendor": st.one_of(st.none(), st.text(max_size=3), st.lists(st.none(), max_size=2)),
        "bids": st.one_of(st.none(), st.lists(st.lists(prices, min_size=2, max_size=2), max_size=7)),
        "ts": st.one_of(st.none(), st.integers(NOON_MS - 2 * DAY_MS, NOON_MS + 3 * DAY_MS)),
        "reset": st.booleans(),
        "seq": st.integers(0, 100),
        "change": prices,
        "prev": st.integers(0, 100),
    },
)
CODES = ("600519.SH", "000001.SZ", "AAPL", "MSFT")


class ModelQuote:
    def __init__(self, floor: int) -> None:
        self.seq = floor
        self.ts = 0
        self.day: int | None = None
        self.fields: dict[str, Any] = {}
        self.book: dict[str, Any] = {}
        self.arrived_ms = 0

    def row(self, code: str) -> dict[str, Any]:
        row = {"code": code, "seq": self.seq, "ts": self.ts, **self.fields}
        last, prev_close = (Decimal(repr(self.fields.get(name, 0))) for name in ("last", "prev_close"))
        if last > 0 and prev_close > 0:
            row["change"] = float(last - prev_close)
            pct = (last - prev_close) * 100 / prev_close
            row["change_pct"] = float(pct.quantize(Decimal("0.01"), ROUND_HALF_UP)) + 0.0
        return row


class BoardMachine(RuleBasedStateMachine):
    """The board beside a model that does the same in the plainest way."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOON_MS
        self.model: dict[str, ModelQuote] = {}
        self.highest: dict[str, int] = {}
        self.accepted = 0
        self.refused: dict[str, int] = {}

    @initialize(drop_older=st.booleans(), watched=st.none() | st.sets(st.sampled_from(CODES)))
    def start(self, drop_older: bool, watched: set[str] | None) -> None:
        self.drop_older = drop_older
        self.watched = watched
        self.board = make_board(max_codes=3, drop_older=drop_older, watched=watched)

    @precondition(lambda self: self.watched is not None)
    @rule(code=st.sampled_from(CODES))
    def watch_or_leave(self, code: str) -> None:
        self.watched ^= {code}

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    @rule(code=st.sampled_from(CODES), tick=ticks, later_ms=st.integers(0, 1000), names_itself=st.booleans())
    def take(self, code: str, tick: dict[str, Any], later_ms: int, names_itself: bool) -> None:
        self.now_ms += later_ms
        payload = orjson.dumps({**tick, "code": code.lower()} if names_itself else tick)
        returned = self.board.apply(None if names_itself else code, payload, self.now_ms)

        ts = self.now_ms if tick.get("ts") is None else tick["ts"]
        known = self.model.get(code)
        if known is None and len(self.model) == 3:
            assert returned is None
            return self.refuse("board_full")
        if known is not None and self.drop_older and ts < known.ts:
            assert returned is None
            return self.refuse("older")
        quote = known or ModelQuote(self.highest.get("", 0))
        self.model[code] = quote
        before = {k: v for k, v in quote.row(code).items() if k not in ("seq", "ts")}
        day = (ts + 8 * HOUR_MS) // DAY_MS if code.endswith((".SH", ".SZ")) else 0  # Shanghai keeps one time all year
        is_fresh = quote.day is None or day > quote.day or tick.get("reset") is True
        if is_fresh:
            quote.fields, quote.book, quote.day = {}, {}, day
        for name, value in tick.items():
            if name in IGNORED or name == "ts":
                continue
            place = quote.book if name == "bids" else quote.fields
            if value is None:
                place.pop(name, None)
            else:
                place[name] = value[:5] if name == "bids" else value
        quote.seq += 1
        quote.ts, quote.arrived_ms = ts, self.now_ms
        self.accepted += 1
        after = {k: v for k, v in quote.row(code).items() if k not in ("seq", "ts")}
        shown = orjson.dumps(before, option=orjson.OPT_SORT_KEYS) != orjson.dumps(after, option=orjson.OPT_SORT_KEYS)
        is_watched = self.watched is None or code in self.watched
        assert (returned is not None) == (is_watched and (is_fresh or shown))
        assert returned in (None, self.board.quotes[code])
        return None

    @rule(bad=st.sampled_from(BAD), code=st.sampled_from(["AAPL", "000001.SZ"]))
    def refuse_a_bad_one(self, bad: tuple[bytes, str], code: str) -> None:
        assert self.board.apply(code, bad[0], self.now_ms) is None
        self.refuse(bad[1])

    @precondition(lambda self: self.model)
    @rule(age_ms=st.integers(0, 5000), keep=st.sets(st.sampled_from(CODES)))
    def expire(self, age_ms: int, keep: set[str]) -> None:
        gone = [c for c, q in self.model.items() if q.arrived_ms < self.now_ms - age_ms and c not in keep]
        assert self.board.expire(self.now_ms - age_ms, keep) == len(gone)
        for code in gone:
            # New codes are numbered above every row that has left, so that no seq ever comes twice.
            self.highest[""] = max(self.highest.get("", 0), self.model.pop(code).seq)

    @rule(code=st.sampled_from(CODES))
    def look(self, code: str) -> None:
        # Not after every step: what nobody has looked at may be merged later than what somebody has.
        model = self.model.get(code)
        if model is None:
            assert code not in self.board.quotes
            return
        quote = self.board.quotes[code]
        encoded = quote.encoded()
        assert orjson.loads(encoded) == quote.row == model.row(code)
        assert quote.book == model.book
        assert encoded == quote.encoded() == orjson.dumps(quote.row)
        assert list(quote.row)[:3] == ["code", "seq", "ts"]

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "board"):
            return
        assert set(self.board.quotes) == set(self.model)
        for code, model in self.model.items():
            assert self.board.quotes[code].seq == model.seq == self.board.seq(code)
        assert self.board.accepted == self.accepted
        assert dict(self.board.refused) == self.refused

    def teardown(self) -> None:
        for code in self.model:
            self.look(code)


TestBoardAgainstItsModel = BoardMachine.TestCase
TestBoardAgainstItsModel.settings = settings(deadline=None, derandomize=True, max_examples=100, stateful_step_count=40)
