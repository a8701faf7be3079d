"""What a tick may say, and how it merges: against a plain model with decimal arithmetic."""

from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quotepush.quote.tick import (
    BOOK_FIELDS,
    KNOWN_FIELDS,
    MAX_TS_MS,
    BadTick,
    check_tick,
    clear_nulls,
    decode_tick,
    derive_change,
    has_news,
    merge_fields,
    shape_of,
    written_size,
)

PRICES = ("last", "prev_close", "open", "high", "low", "amount", "bid", "ask", "limit_up", "limit_down")
SIZES = ("volume", "last_size", "bid_size", "ask_size")
TEXTS = ("name", "phase", "status")
BOOKS = ("bids", "asks")
IGNORED = ("code", "seq", "prev", "epoch", "change", "change_pct", "reset")


def decimals_of(number: float) -> int:
    exponent = Decimal(repr(number)).normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def model_change(last: float, prev_close: float) -> tuple[float, float] | None:
    """``change`` and ``change_pct`` as the protocol words them, in decimals."""
    if not (last > 0 and prev_close > 0):
        return None
    with localcontext(prec=80):
        change = Decimal(repr(last)) - Decimal(repr(prev_close))
        pct = (change / Decimal(repr(prev_close)) * 100).quantize(Decimal("0.01"), ROUND_HALF_UP)
        return float(change), float(pct)


# Prices as exchanges make them: up to four decimals.
prices = st.builds(
    lambda units, decimals: float(Decimal(units).scaleb(-decimals)), st.integers(0, 10**9), st.integers(0, 4)
)


@given(prices, prices)
@example(10.05, 10.0)
@example(10.0, 10.05)
@example(0.285, 0.1)
@example(2.675, 1.0)
@example(100.005, 100.0)  # 0.005 %: a tie goes away from zero, up ...
@example(99.995, 100.0)  # ... and down
@example(1.0, 3.0)
@example(0.0001, 100000.0)
@example(123456.7891, 0.0001)
@example(0.0, 10.0)
@example(10.0, 0.0)
@settings(deadline=None, derandomize=True, max_examples=1000)
def test_change_is_exact_in_decimals(last: float, prev_close: float) -> None:
    assert derive_change(last, prev_close) == model_change(last, prev_close)


@given(prices, prices)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_change_has_no_more_decimals_than_the_prices(last: float, prev_close: float) -> None:
    derived = derive_change(last, prev_close)
    if derived is not None:
        assert decimals_of(derived[0]) <= max(decimals_of(last), decimals_of(prev_close))
        assert decimals_of(derived[1]) <= 2


@pytest.mark.parametrize(
    ("last", "prev_close", "expected"),
    [
        (10.5, 10.0, (0.5, 5.0)), (9.5, 10.0, (-0.5, -5.0)), (10.0, 10.0, (0.0, 0.0)), (11, 10, (1.0, 10.0)),
        (1688.0, 1675.5, (12.5, 0.75)), (1.2345, 1.2344, (0.0001, 0.01)), (0.00000003, 0.00000002, (0.00000001, 50.0)),
        (1.0001, 1.0, (0.0001, 0.01)), (200.01, 200.0, (0.01, 0.01)), (199.99, 200.0, (-0.01, -0.01)),
    ],
)  # fmt: skip
def test_change_of_known_prices(last: float, prev_close: float, expected: tuple[float, float]) -> None:
    assert derive_change(last, prev_close) == expected


@pytest.mark.parametrize(
    ("last", "prev_close"), [(None, 10.0), (10.0, None), (None, None), (0, 10.0), (10.0, 0), (0.0, 0.0), (1e-9, 1e-9)]
)
def test_without_two_prices_there_is_no_change(last: float | None, prev_close: float | None) -> None:
    assert derive_change(last, prev_close) is None


finite = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@given(st.one_of(finite, st.integers(0, 2**64 - 1)), st.one_of(finite, st.integers(0, 2**64 - 1)))
@example(1e307, 1)
@example(1e300, 1e-8)
@example(1e308, 1e-308)
@example(5e-324, 5e-324)
@settings(deadline=None, derandomize=True, max_examples=1000)
def test_no_two_prices_can_break_the_derivation(last: float, prev_close: float) -> None:
    derived = derive_change(last, prev_close)
    if derived is not None:
        orjson.dumps(derived)
        assert all(abs(number) < float("inf") for number in derived)


@pytest.mark.parametrize("payload", [b"", b" ", b"{", b"nonsense", b'{"last":NaN}', b'{"last":1e999}',
b'{"last":-1e999}',
    b'{"last":Infinity}', b'{"last":1,}', b"{'last':1}", b'{"name":"\xff"}', b'{"name":"\\ud800"}',
    b"[" * 2000])  # fmt: skip
def test_what_is_not_json_is_refused(payload: bytes) -> None:
    with pytest.raises(BadTick) as fault:
        decode_tick(payload)
    assert fault.value.reason == "bad_json"


@pytest.mark.parametrize("payload", [b"[]", b"1", b'"AAPL"', b"null", b"true", b'[{"last":1}]'])
def test_json_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(BadTick) as fault:
        decode_tick(payload)
    assert fault.value.reason == "not_an_object"


def refusal(tick: dict[str, Any]) -> str | None:
    try:
        check_tick(tick, shape_of(tick))
        written_size(tick)
    except BadTick as e:
        assert e.reason in str(e)
        return e.reason
    return None


@pytest.mark.parametrize("name", PRICES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1, None), (1.5, None), (0, None), (0.0, None), (None, None), (2**64 - 1, None), (1e300, None),
        (True, "wrong_type"), (False, "wrong_type"), ("1.5", "wrong_type"), ("", "wrong_type"), ([], "wrong_type"),
        ({}, "wrong_type"), ([1.5], "wrong_type"), (-1, "negative"), (-0.01, "negative"),
    ],
)  # fmt: skip
def test_a_price_is_a_number_that_is_not_negative(name: str, value: Any, reason: str | None) -> None:
    assert refusal({name: value}) == reason


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1, None), (0, None), (None, None), (100.0, None), (2**64 - 1, None), (9007199254740992.0, None),
        (1.5, "wrong_type"), (True, "wrong_type"), ("1", "wrong_type"), ([], "wrong_type"), ({}, "wrong_type"),
        (1e300, "wrong_type"), (18446744073709551616.0, "wrong_type"), (-1, "negative"), (-1.0, "negative"),
    ],
)  # fmt: skip
def test_a_size_is_a_whole_number_that_is_not_negative(name: str, value: Any, reason: str | None) -> None:
    assert refusal({name: value}) == reason


def test_a_size_written_as_a_float_becomes_an_integer() -> None:
    tick = {"volume": 1200.0, "last_size": 3, "bid_size": 5.0, "last": 2.0}
    check_tick(tick, shape_of(tick))
    assert tick == {"volume": 1200, "last_size": 3, "bid_size": 5, "last": 2.0}
    assert [type(tick[name]) for name in ("volume", "last_size", "bid_size", "last")] == [int, int, int, float]


@given(st.sampled_from(SIZES), st.one_of(finite, st.integers(0, 2**64 - 1)))
@settings(deadline=None, derandomize=True, max_examples=500)
def test_an_accepted_size_can_be_written_again(name: str, value: float) -> None:
    tick = decode_tick(orjson.dumps({name: value}))
    if refusal(tick) is None:
        orjson.dumps(tick)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [("regular", None), ("", None), ("贵州茅台", None), (None, None), (1, "wrong_type"), (True, "wrong_type"),
     ([], "wrong_type"), ({}, "wrong_type")],
)  # fmt: skip
def test_a_name_is_a_text(name: str, value: Any, reason: str | None) -> None:
    assert refusal({name: value}) == reason


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], None), (None, None), ([[1.5, 100]], None), ([[1.5, 100.5]], None), ([[1, 2]] * 10, None),
        ({}, "wrong_type"), (1, "wrong_type"), ("x", "wrong_type"), ([1.5, 100], "wrong_type"), ([[1.5]], "wrong_type"),
        ([[1.5, 100, 3]], "wrong_type"), ([[]], "wrong_type"), ([["1.5", 100]], "wrong_type"),
        ([[1.5, True]], "wrong_type"), ([[None, 1]], "wrong_type"), ([{"price": 1, "size": 2}], "wrong_type"),
        ([[1.5, 100], [1.5, -1]], "negative"), ([[-1.5, 100]], "negative"),
    ],
)  # fmt: skip
def test_a_book_is_a_list_of_price_and_size(name: str, value: Any, reason: str | None) -> None:
    assert refusal({name: value}) == reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, None), (1_721_872_800_123, None), (MAX_TS_MS - 1, None), (None, None), (MAX_TS_MS, "wrong_type"),
        (-1, "wrong_type"), (1_721_872_800.5, "wrong_type"), (1_721_872_800_123.0, "wrong_type"), (True, "wrong_type"),
        ("2024-07-25", "wrong_type"), (1_721_872_800_123_000, "wrong_type"),
    ],
)  # fmt: skip
def test_ts_is_epoch_milliseconds(value: Any, reason: str | None) -> None:
    assert refusal({"ts": value}) == reason


@pytest.mark.parametrize("name", [name for name in IGNORED if name != "reset"])
@pytest.mark.parametrize("value", [1, -1, "x", None, True, [], {"a": 1}])
def test_what_the_server_sets_itself_may_hold_anything(name: str, value: Any) -> None:
    assert refusal({name: value}) is None


@pytest.mark.parametrize("value", [True, False, -1, "x", "", None, [], {}, [[[]]], {"a": {"b": [-1]}}])
def test_an_unknown_field_may_hold_anything(value: Any) -> None:
    assert refusal({"vendor_field": value}) is None


def test_what_is_nested_too_deep_to_be_sent_on_is_refused() -> None:
    def nested(levels: int) -> dict[str, Any]:
        return decode_tick(b'{"vendor_field":' + b"[" * levels + b"]" * levels + b"}")

    shallow = nested(100)
    assert refusal(shallow) is None
    orjson.dumps(shallow)
    assert refusal(nested(1000)) == "too_deep"
    # Wherever exactly the limit lies, whatever is accepted can be written.
    for levels in range(240, 270):
        tick = nested(levels)
        if refusal(tick) is None:
            orjson.dumps(tick)


def test_known_fields_are_those_of_the_protocol() -> None:
    assert set(KNOWN_FIELDS) == {*PRICES, *SIZES, *TEXTS, *BOOKS, "change", "change_pct"}
    assert len(KNOWN_FIELDS) == len(set(KNOWN_FIELDS))
    assert set(BOOK_FIELDS) == set(BOOKS)


# Merging

sizes = st.integers(0, 2**53)
plain_values: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(PRICES, prices),
    **dict.fromkeys(SIZES, sizes),
    **dict.fromkeys(TEXTS, st.text(max_size=8)),
    **dict.fromkeys(("vendor_field", "iopv", "x"), st.one_of(st.text(max_size=4), st.booleans(), sizes, prices,
                                                             st.lists(st.text(max_size=2), max_size=2))),
    **dict.fromkeys(IGNORED, st.one_of(st.booleans(), sizes, st.text(max_size=3))),
    **dict.fromkeys(BOOKS, st.lists(st.lists(prices, min_size=2, max_size=2), max_size=8)),
}  # fmt: skip
ticks = st.fixed_dictionaries({}, optional={name: st.one_of(st.none(), value) for name, value in plain_values.items()})


def merge(row: dict[str, Any], book: dict[str, Any], tick: dict[str, Any]) -> bool:
    """Take in one tick as the board does; say whether the row has something new to show."""
    tick = dict(tick)
    shape = shape_of(tick)
    check_tick(tick, shape)
    is_news = has_news(row, tick, shape)
    ts = row["ts"]
    merge_fields(row, book, tick, shape)
    row["ts"] = ts
    clear_nulls(row)
    return is_news


class ModelRow:
    """Fields as they must be after a series of ticks."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.book: dict[str, Any] = {}

    def take(self, tick: dict[str, Any]) -> None:
        for name, value in tick.items():
            if name in IGNORED or name == "ts":
                continue
            place = self.book if name in BOOKS else self.fields
            if value is None:
                place.pop(name, None)
            else:
                place[name] = value[:5] if name in BOOKS else value

    @property
    def shown(self) -> dict[str, Any]:
        last, prev_close = self.fields.get("last"), self.fields.get("prev_close")
        derived = model_change(last, prev_close) if last is not None and prev_close is not None else None
        if derived is None:
            return self.fields
        return {**self.fields, "change": derived[0], "change_pct": derived[1]}


@given(st.lists(ticks, max_size=8))
@settings(deadline=None, derandomize=True, max_examples=250)
def test_rows_merge_as_the_model_says(series: list[dict[str, Any]]) -> None:
    row: dict[str, Any] = {"code": "AAPL", "seq": 7, "ts": 1}
    book: dict[str, Any] = {}
    model = ModelRow()
    for tick in series:
        before = orjson.dumps(model.shown, option=orjson.OPT_SORT_KEYS)
        model.take(tick)
        changed = merge(row, book, tick)
        assert row == {"code": "AAPL", "seq": 7, "ts": 1, **model.shown}
        assert list(row)[:3] == ["code", "seq", "ts"]
        assert book == model.book
        assert changed == (orjson.dumps(model.shown, option=orjson.OPT_SORT_KEYS) != before)


def test_a_ts_of_null_leaves_the_place_of_ts_alone() -> None:
    row: dict[str, Any] = {"code": "AAPL", "seq": 1, "ts": 5, "last": 1.0}
    merge(row, {}, {"ts": None, "last": 2.0})
    assert list(row.items()) == [("code", "AAPL"), ("seq", 1), ("ts", 5), ("last", 2.0)]


def test_a_price_that_is_cleared_takes_the_change_with_it() -> None:
    row: dict[str, Any] = {"ts": 1}
    merge(row, {}, {"last": 11.0, "prev_close": 10.0})
    assert (row["change"], row["change_pct"]) == (1.0, 10.0)
    merge(row, {}, {"last": None})
    assert row == {"ts": 1, "prev_close": 10.0}
    merge(row, {}, {"last": 0})
    assert row == {"ts": 1, "prev_close": 10.0, "last": 0}


def test_inventing_field_names_does_not_fill_memory() -> None:
    shapes = {id(shape_of({f"invented_{i}": 1})) for i in range(20_000)}
    assert len(shapes) < 20_000  # the forgotten ones made room for others
    assert shape_of({"last": 1}) is shape_of({"last": 2})


def test_ticks_with_the_same_fields_in_another_order_are_checked_alike() -> None:
    assert refusal({"last": 1.0, "volume": -1}) == refusal({"volume": -1, "last": 1.0}) == "negative"
