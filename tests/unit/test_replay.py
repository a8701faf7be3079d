"""Lines become ticks or are refused with a reason; recorded times become times of the replay."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.errors import SettingsError
from quotepush.feed.replay import (
    MAX_LINE_BYTES,
    CsvLines,
    LineFault,
    LineSplitter,
    Pacer,
    parse_json_line,
    parse_lines,
)

HEADER = b"ts,code,last,last_size,bid,bid_size,ask,ask_size,volume"

prices = st.one_of(st.none(), st.integers(0, 10**9).map(lambda cents: cents / 100))
sizes = st.one_of(st.none(), st.integers(0, 2**53))


def csv_lines(header: bytes = HEADER) -> CsvLines:
    lines = CsvLines(pytest.fail)
    assert lines.parse(header) is None
    return lines


@settings(deadline=None)
@given(
    code=st.from_regex(r"[A-Za-z0-9._:=^-]{1,32}", fullmatch=True),
    ts=st.one_of(st.none(), st.integers(0, 10**14 - 1)),
    last=prices,
    bid=prices,
    volume=sizes,
)
def test_what_is_written_to_csv_is_read_back(
    code: str, ts: int | None, last: float | None, bid: float | None, volume: int | None
):
    fields = {"ts": ts, "last": last, "bid": bid, "volume": volume}
    tick = {name: value for name, value in fields.items() if value is not None}
    line = ",".join(str(tick.get(name, code if name == "code" else "")) for name in HEADER.decode().split(","))

    if tick:
        parsed = csv_lines().parse(line.encode())
        assert parsed == (code, tick)
        assert parsed is not None
        assert all(type(parsed[1][name]) is type(value) for name, value in tick.items())
    else:
        with pytest.raises(LineFault, match="nothing but a code"):
            csv_lines().parse(line.encode())


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_tick_or_a_line_fault(line: bytes):
    for parse in (csv_lines().parse, parse_json_line):
        try:
            parsed = parse(line)
        except LineFault as e:
            assert str(e)
        else:
            assert parsed is None or json.dumps(parsed, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,AAPL,1,,,,,", "8 cells where the header has 9"),
        (b"1,,1,,,,,,", "is no code"),
        (b"1,A B,1,,,,,,", "is no code"),
        (b"1," + b"A" * 33 + b",1,,,,,,", "is no code"),
        (b"1,AAPL,-1,,,,,,", "last must be a number and not negative"),
        (b"1,AAPL,nan,,,,,,", "last must be a number"),
        (b"1,AAPL,inf,,,,,,", "last must be a number"),
        (b"1,AAPL,1_0,,,,,,", "last must be a number"),
        (b"1,AAPL,x,,,,,,", "last must be a number, not 'x'"),
        (b"1,AAPL,,1.5,,,,,", "last_size must be a whole number"),
        (b"1,AAPL,,-1,,,,,", "last_size must be a whole number"),
        (b"1,AAPL,,9223372036854775808,,,,,", "last_size must be a whole number"),
        (b"100000000000000,AAPL,1,,,,,,", "ts must be epoch milliseconds"),
        (b"noon,AAPL,1,,,,,,", "ts must be epoch milliseconds"),
        (b"1,AAPL,\xff,,,,,,", "not UTF-8"),
        (b'1,AAPL,"1,,,,,,', "not CSV"),
        (b"1," + b"A" * MAX_LINE_BYTES + b",1,,,,,,", "longer than"),
    ],
)
def test_bad_csv_line_is_refused_with_its_reason(line: bytes, reason: str):
    with pytest.raises(LineFault, match=reason):
        csv_lines().parse(line)


def test_columns_stand_in_any_order_and_every_kind_of_field_is_read():
    lines = csv_lines("\ufeffname,bids,code,amount,status\r".encode())

    assert lines.parse(b'"A, Inc.","[[1.5,200],[1.4,100]]",A,12.5,trading\r') == (
        "A",
        {"name": "A, Inc.", "bids": [[1.5, 200], [1.4, 100]], "amount": 12.5, "status": "trading"},
    )
    with pytest.raises(LineFault, match="bids must be"):
        lines.parse(b',"[[1.5]]",A,,')


def test_unknown_columns_are_named_once_and_derived_ones_ignored():
    warnings: list[str] = []
    lines = CsvLines(warnings.append)

    lines.parse(b"code,last,seq,change,colour")

    assert lines.parse(b"A,1,7,0.5,red") == ("A", {"last": 1.0})
    assert warnings == ["columns that are no tick fields are ignored: colour"]


@pytest.mark.parametrize("header", [b"ts,last", b"code", b"code,colour", b"", b"code,last,last", b"code,code,last"])
def test_header_that_ticks_cannot_be_read_by_is_a_wrong_setting(header: bytes):
    with pytest.raises(SettingsError, match="--csv"):
        CsvLines(lambda warning: None).parse(header)


def test_json_line_passes_unknown_fields_and_clears_with_null():
    assert parse_json_line(b' {"last":null,"code":"A","mood":[1],"reset":true}\r') == (
        "A",
        {"last": None, "mood": [1], "reset": True},
    )
    assert parse_json_line(b"  ") is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nope", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no code"),
        (b'{"code":1}', "no code"),
        (b'{"code":"a b"}', "is no code"),
        (b'{"code":"A","last":"1"}', "last must be a number"),
        (b'{"code":"A","last":true}', "last must be a number"),
        (b'{"code":"A","volume":1.5}', "volume must be a whole number"),
        (b'{"code":"A","name":1}', "name must be a text"),
        (b'{"code":"A","asks":[[1,-1]]}', "asks must be"),
        (b'{"code":"A","ts":1.0}', "ts must be epoch milliseconds"),
        (b'{"code":"A","x":"' + b"x" * MAX_LINE_BYTES + b'"}', "longer than"),
    ],
)
def test_bad_json_line_is_refused_with_its_reason(line: bytes, reason: str):
    with pytest.raises(LineFault, match=reason):
        parse_json_line(line)


def test_bad_lines_are_reported_by_number_and_harm_no_other():
    rejected: list[tuple[int, str]] = []
    lines = [b'{"code":"A","last":1}', b"?", b"", b'{"code":"B","last":-1}', b'{"code":"C","last":2}']

    ticks = parse_lines(lines, 10, parse_json_line, lambda number, reason: rejected.append((number, reason)))

    assert ticks == [("A", {"last": 1}), ("C", {"last": 2})]
    assert [number for number, _ in rejected] == [11, 13]


@settings(deadline=None)
@given(text=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300)))
def test_lines_are_the_same_however_the_bytes_are_chunked(text: bytes, cuts: list[int]):
    splitter, lines, begin = LineSplitter(), [], 0
    for end in [*sorted(cuts), len(text)]:
        lines += splitter.feed(text[begin:end])
        begin = max(begin, end)
    lines += splitter.end()

    assert lines == (text.removesuffix(b"\n").split(b"\n") if text else [])


def test_endless_line_is_not_kept():
    splitter = LineSplitter()
    for _ in range(100):
        assert splitter.feed(b"x" * 10_000) == []

    (line,) = splitter.end()

    assert len(line) == MAX_LINE_BYTES + 1


@settings(deadline=None)
@given(
    speed=st.floats(0.01, 1000),
    recorded=st.lists(st.integers(0, 10**13), min_size=1, max_size=20),
    started_at_s=st.floats(0, 10**6),
)
def test_ticks_are_due_as_far_apart_as_recorded_divided_by_the_speed(
    speed: float, recorded: list[int], started_at_s: float
):
    pacer = Pacer(speed, started_at_s, 1_800_000_000_000)

    assert pacer.due_at_s(recorded[0]) == started_at_s
    for ts in recorded:
        apart_ms = (ts - recorded[0]) / speed
        assert pacer.due_at_s(ts) == pytest.approx(started_at_s + apart_ms / 1000)
        assert pacer.moved_ts(ts, now_ms=5) == 1_800_000_000_000 + round(apart_ms)


def test_at_full_speed_everything_is_due_at_once_and_happens_now():
    pacer = Pacer(math.inf, 3.0, 1000)

    assert [pacer.due_at_s(ts) for ts in (5, 5_000_000)] == [3.0, 3.0]
    assert pacer.moved_ts(5_000_000, now_ms=1234) == 1234
