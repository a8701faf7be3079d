"""Messages as Server-Sent Events, and positions."""

import orjson
import pytest

from quotepush.wire import messages
from quotepush.wire.events import EVENTS, parse_position, position, selection, stamped
from quotepush.wire.formats import DEFAULT_VIEW, JSON
from tests.support.event_source import EventReader

ROW = b'{"code":"A","seq":1,"last":1}'


def read(data: bytes) -> EventReader:
    reader = EventReader()
    reader.connect()
    reader.feed(data)
    assert not reader._rest
    return reader


def test_a_message_is_one_event_of_its_type() -> None:
    beat = messages.heartbeat(5, "ok", 7)
    assert (
        EVENTS.frame(beat) == b'event: heartbeat\ndata: {"type":"heartbeat","time":5,"feed":"ok","feed_age_ms":7}\n\n'
    )
    assert read(EVENTS.frame(beat)).messages == [beat]


def test_no_text_can_break_out_of_its_event() -> None:
    said = {"type": "message", "time": 5, "data": "a\n\nevent: b\r\rid: 1\x85\u2028"}
    assert read(EVENTS.frame(said)).messages == [said]
    assert EVENTS.frame(said).count(b"\n") == 3 and b"\r" not in EVENTS.frame(said)


def test_when_to_come_back_is_said_to_browsers_too() -> None:
    closing = read(EVENTS.frame(messages.status(5, "connection", "closing", retry_after_ms=1000)))
    assert closing.retry_ms == 1000
    assert closing.messages[0]["retry_after_ms"] == 1000


@pytest.mark.parametrize("facts", [{}, {"replay": True}, {"gap": True}])
def test_rows_are_the_message_that_a_websocket_gets(facts: dict[str, bool]) -> None:
    for kind in ("tick", "snapshot"):
        rows = [ROW, ROW.replace(b'"A"', b'"B"')]
        frame = JSON.rows_frame(kind, 5, rows, **facts)
        event = EVENTS.rows_frame(kind, 5, rows, **facts)
        assert event == b"event: %b\ndata: %b\n\n" % (kind.encode(), frame[2:])


def test_main_s_own_text_of_a_row_is_one_of_an_event() -> None:
    assert EVENTS.objects.is_mains and JSON.objects.is_mains
    assert EVENTS.objects.encode(orjson.loads(ROW), DEFAULT_VIEW) == ROW


def test_a_position_counts_with_the_rows_before_it_and_not_sooner() -> None:
    reader = EventReader()
    reader.connect()
    event = stamped(EVENTS.rows_frame("snapshot", 5, [ROW]), "a-1-0")
    reader.feed(event[:-1])
    assert (reader.last_id, reader.messages) == ("", [])
    reader.feed(event[-1:])
    assert (reader.last_id, len(reader.messages)) == ("a-1-0", 1)
    reader.feed(EVENTS.frame(messages.heartbeat(5, "ok", 7)))
    assert reader.last_id == "a-1-0"
    reader.feed(stamped(EVENTS.rows_frame("snapshot", 5, [ROW]), ""))
    assert reader.last_id == ""


def test_between_two_events_that_are_written_together_there_is_no_position() -> None:
    reader = EventReader()
    reader.connect()
    reader.feed(stamped(EVENTS.rows_frame("snapshot", 5, [ROW]), "a-1-0"))
    two = stamped(EVENTS.rows_frame("snapshot", 5, [ROW]) * 2, "a-2-0")
    half = two.index(b"\n\n") + 2
    reader.feed(two[:half])
    assert reader.last_id == ""
    reader.feed(two[half:])
    assert reader.last_id == "a-2-0"


def test_a_position_is_read_as_it_was_written() -> None:
    assert parse_position(position("b2d9f0a1", 1042, selection(["A"], None))) == (
        "b2d9f0a1",
        1042,
        selection(["A"], None),
    )


@pytest.mark.parametrize(
    "text", ["", "x", "1-2", "a-1-0", "a-１-00000000", "a-1-00000000 ", "a-1-00000000\n", "a--1-00000000"]
)
def test_what_is_no_position_is_none(text: str) -> None:
    assert parse_position(text) is None


def test_a_selection_is_of_codes_and_fields_in_any_order() -> None:
    assert selection(["A", "B"], ["last", "bid"]) == selection(["B", "A"], ["bid", "last"])
    others = [selection(*s) for s in ((["A"], None), (["A", "B"], None), (["A"], ["last"]), (["A", "last"], None))]
    assert len(set(others)) == 4
