"""How rows are spelled: the same row in each language, as object and as array, with and without ``prev``."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.quote.tick import KNOWN_FIELDS
from quotepush.wire.formats import (
    CODECS,
    DEFAULT_FIELDS,
    DEFAULT_VIEW,
    JSON,
    MSGPACK,
    Codec,
    Format,
    View,
)
from quotepush.wire.frames import BINARY, TEXT

FORMATS = [spelled for codec in CODECS for spelled in (codec.objects, codec.arrays)]

names = pytest.mark.parametrize(
    "spelled", FORMATS, ids=[f"{f.codec.language} {'array' if f.is_array else 'object'}" for f in FORMATS]
)
languages = pytest.mark.parametrize("codec", CODECS, ids=[codec.language for codec in CODECS])

# Each on both sides of a change of size in MessagePack.
EDGES = sorted({max(0, edge + d) for edge in (0, 127, 255, 65_535, 2**32 - 1, 2**53, 2**63) for d in (-1, 0, 1)})
numbers = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)

texts = st.text(max_size=12) | st.sampled_from(['a,b"c', "},{", "[null,", '"prev":1,', "贵州茅台", ","])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
extra_names = st.sampled_from([f"x{n}" for n in range(40)])


@st.composite
def rows(draw: st.DrawFn, sizes: Sequence[int] = tuple(range(2, 24))) -> dict[str, Any]:
    """A row as main makes it: ``code`` and ``seq`` first, in all as many fields as one of ``sizes``."""
    row: dict[str, Any] = {"code": draw(st.sampled_from(["A", "600519.SH"])), "seq": draw(numbers)}
    size = draw(st.sampled_from(sizes))
    if size > 2:
        row["ts"] = draw(numbers)
    others = draw(st.permutations([*KNOWN_FIELDS, "x1", "x2"]))
    for name in others[: size - len(row)]:
        row[name] = draw(values)
    return row


views = st.builds(View.of, st.none() | st.lists(st.sampled_from([*KNOWN_FIELDS, "code", "seq", "ts", "prev", "x1"]),
                                                max_size=20))  # fmt: skip


def decoded(spelled: Format, text: bytes) -> Any:
    """Read it with the package and not with the codec."""
    return orjson.loads(text) if spelled.codec is JSON else msgspec.msgpack.decode(text)


def shown(row: Mapping[str, Any], view: View) -> dict[str, Any]:
    """What a view shows of a row, said in another way than the view says it."""
    if view.fields is None:
        return {name: value for name, value in row.items() if name not in ("bids", "asks")}
    return {name: row[name] for name in ("code", "seq", "ts", *view.fields) if name in row}


@given(row=rows(), view=views, prev=numbers, other=numbers)
@settings(deadline=None, derandomize=True, max_examples=400)
def test_a_row_is_what_its_view_shows_whoever_it_follows(
    row: dict[str, Any], view: View, prev: int, other: int
) -> None:
    for spelled in FORMATS:  # all with one row: making it takes much longer than writing it
        bare = spelled.encode(row, view)
        told = spelled.with_prev(bare, prev)
        if spelled.is_array:
            columns = [row.get(name) for name in view.columns[1:]]
            assert decoded(spelled, bare) == [None, *columns]
            assert decoded(spelled, told) == [prev, *columns]
        else:
            assert decoded(spelled, bare) == shown(row, view)
            assert list(decoded(spelled, told).items()) == [("prev", prev), *shown(row, view).items()]
        assert spelled.without_prev(told) == bare
        assert spelled.with_prev(spelled.without_prev(told), other) == spelled.with_prev(bare, other)


@names
@pytest.mark.parametrize("size", [2, 3, 13, 14, 15, 16, 17, 31, 32, 33, 300])
@pytest.mark.parametrize("prev", EDGES)
def test_a_row_of_any_size_takes_any_prev(spelled: Format, size: int, prev: int) -> None:
    row: dict[str, Any] = {"code": "A", "seq": 7, **{f"x{n}": f"{n},{n}" for n in range(size - 2)}}
    for view in (DEFAULT_VIEW, View.of(list(row))):
        bare = spelled.encode(row, view)
        told = decoded(spelled, spelled.with_prev(bare, prev))
        assert (told[0] if spelled.is_array else told["prev"]) == prev
        assert spelled.without_prev(spelled.with_prev(bare, prev)) == bare


def test_a_row_that_main_has_encoded_is_the_default_view_as_json() -> None:
    row = {"code": "A", "seq": 7, "ts": 5, "name": "a,b", "x1": [1]}
    assert JSON.objects.encode(row, DEFAULT_VIEW) == orjson.dumps(row)


# Messages


def payload_of(frame: bytes, first_byte: int) -> bytes:
    assert frame[0] == first_byte
    length = frame[1]
    at = 2 if length < 126 else 4 if length == 126 else 10
    if at > 2:
        length = int.from_bytes(frame[2:at], "big")
    assert len(frame) == at + length
    return frame[at:]


def message_of(codec: Codec, frame: bytes) -> Any:
    payload = payload_of(frame, BINARY if codec.is_binary else TEXT)
    return decoded(codec.objects, payload)


@given(data=st.lists(rows(sizes=(2, 15, 16)), max_size=4), view=views, time_ms=st.integers(1, 2**45),
       kind=st.sampled_from(["tick", "snapshot"]),
       facts=st.fixed_dictionaries({}, optional={"gap": st.just(True), "replay": st.just(True),
       "epochs": st.dictionaries(st.sampled_from(["A", "600519.SH"]), texts)}))  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_message_holds_its_rows_and_says_what_they_are(
    data: list[dict[str, Any]], view: View, time_ms: int, kind: str, facts: dict[str, Any]
) -> None:
    for spelled in FORMATS:
        encoded = [spelled.encode(row, view) for row in data]
        cols = view.cols if spelled.is_array else None
        message = message_of(spelled.codec, spelled.codec.rows_frame(kind, time_ms, encoded, cols, **facts))
        assert next(iter(message)) == "type"
        expected = {"type": kind, "time": time_ms, **facts}
        if cols is not None:
            expected["cols"] = cols
        assert message == {**expected, "data": [decoded(spelled, text) for text in encoded]}


@languages
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 65_535, 65_536])
def test_a_message_of_any_number_of_rows_can_be_read(codec: Codec, count: int) -> None:
    row = codec.objects.encode({"code": "A", "seq": 1}, DEFAULT_VIEW)
    message = message_of(codec, codec.rows_frame("tick", 5, [row] * count))
    assert len(message["data"]) == count


@languages
def test_the_head_that_is_kept_is_that_of_the_moment(codec: Codec) -> None:
    times = [message_of(codec, codec.rows_frame("tick", time_ms, []))["time"] for time_ms in (5, 5, 6, 5)]
    assert times == [5, 5, 6, 5]


@languages
@given(said=st.dictionaries(texts, values, max_size=5))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_any_other_message_is_one_frame(codec: Codec, said: dict[str, Any]) -> None:
    assert message_of(codec, codec.frame(said)) == said


def test_each_codec_has_a_name_of_its_own() -> None:
    assert [codec.subprotocol for codec in CODECS] == ["quotes.v1.json", "quotes.v1.msgpack"]
    assert CODECS == (JSON, MSGPACK)
    for codec in CODECS:
        assert codec.format("objects") is codec.objects
        assert codec.format("rows") is codec.arrays


# Views


def test_the_same_fields_are_the_same_view() -> None:
    view = View.of(["last", "bid"])
    assert View.of(("last", "bid")) is view
    assert View.of(["last", "bid", "last"]) is view
    assert View.of(["code", "last", "seq", "bid", "ts", "prev"]) is view
    assert View.of(None) is DEFAULT_VIEW


def test_another_order_is_another_view() -> None:
    one, other = View.of(["last", "bid"]), View.of(["bid", "last"])
    assert one is not other
    assert one.cols != other.cols
    assert other.columns == ("prev", "code", "seq", "ts", "bid", "last")


def test_a_view_that_nobody_holds_is_forgotten() -> None:
    number = View.of(["last", "high", "low"]).cols
    gc.collect()
    assert ("last", "high", "low") not in View._shared
    assert View.of(["last", "high", "low"]).cols != number, "a number would mean two lists of columns"


def test_views_that_nobody_holds_take_no_room() -> None:
    before = len(View._shared)
    for n in range(1000):
        View.of([f"x{n}"])
    gc.collect()
    assert len(View._shared) <= before + 1


def test_the_default_view_shows_everything_but_the_book() -> None:
    assert not DEFAULT_VIEW.has_book
    assert DEFAULT_VIEW.columns == ("prev", "code", "seq", "ts", *DEFAULT_FIELDS)
    assert not {"bids", "asks"} & set(DEFAULT_FIELDS)
    row = {"code": "A", "seq": 1, "bids": [[1, 2]], "unknown": 5}
    assert DEFAULT_VIEW.pick(row) == {"code": "A", "seq": 1, "unknown": 5}


@pytest.mark.parametrize("fields", [["bids"], ["last", "asks"], ["asks", "bids"]])
def test_the_book_is_in_a_view_that_names_it(fields: list[str]) -> None:
    assert View.of(fields).has_book
    assert View.of(fields).pick({"code": "A", "seq": 1, "bids": [[1, 2]], "asks": []}).keys() >= {*fields} - {"last"}
