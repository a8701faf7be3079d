"""Requests in, messages out: fields and words of docs/protocol.md."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.errors import PeerError
from quotepush.wire import messages
from quotepush.wire.messages import Request, RequestError, parse_request


def parse(said: Any, max_codes: int = 5) -> Request:
    return parse_request(orjson.dumps(said), max_codes)


def fault(said: Any, max_codes: int = 5) -> RequestError:
    text = said if isinstance(said, (str, bytes)) else orjson.dumps(said)
    with pytest.raises(RequestError) as found:
        parse_request(text, max_codes)
    return found.value


@pytest.mark.parametrize(
    ("said", "request_"),
    [
        ({"action": "ping"}, Request("ping")),
        ({"action": "ping", "id": 6}, Request("ping", 6)),
        ({"action": "ping", "id": "six"}, Request("ping", "six")),
        ({"action": "ping", "id": None}, Request("ping")),
        ({"action": "ping", "id": 0}, Request("ping", 0)),
        ({"action": "ping", "id": ""}, Request("ping", "")),
        ({"action": "ping", "id": -5}, Request("ping", -5)),
        ({"action": "ping", "id": 2**64 - 1}, Request("ping", 2**64 - 1)),
        ({"action": "ping", "id": "x" * 128}, Request("ping", "x" * 128)),
        ({"action": "list", "id": 4, "codes": "ignored"}, Request("list", 4)),
        ({"action": "subscribe", "codes": ["A", "b"]}, Request("subscribe", None, ("A", "b"), True)),
        ({"action": "subscribe", "codes": ["A"], "snapshot": False}, Request("subscribe", None, ("A",), False)),
        ({"action": "subscribe", "codes": ["A"], "fields": None}, Request("subscribe", None, ("A",), True)),
        ({"action": "subscribe", "codes": ["A"] * 5}, Request("subscribe", None, ("A",) * 5, True)),
        ({"action": "subscribe", "codes": ["A"], "unknown": [1]}, Request("subscribe", None, ("A",), True)),
        ({"action": "unsubscribe", "id": 1, "codes": ["*"]}, Request("unsubscribe", 1, ("*",))),
        ({"action": "snapshot", "codes": ["A"]}, Request("snapshot", None, ("A",))),
    ],
)  # fmt: skip
def test_a_good_request_is_understood(said: Any, request_: Request) -> None:
    assert parse(said) == request_


def test_a_request_may_be_text_or_bytes() -> None:
    assert parse_request('{"action":"ping"}', 5) == parse_request(b'{"action":"ping"}', 5) == Request("ping")


@pytest.mark.parametrize(
    "text",
    ["", " ", "nonsense", "{", '{"action":"ping"', "{'action':'ping'}", '{"action":NaN}', '{"id":1e999}', "[" * 5000,
     b'{"action":"\xff"}', '{"action":"\\ud800"}'],
)  # fmt: skip
def test_what_is_not_json_is_bad_json(text: str | bytes) -> None:
    found = fault(text)
    assert (found.error, found.request_id, found.action) == ("bad_json", None, None)


@pytest.mark.parametrize("said", [[], 5, "ping", None, True, [{"action": "ping"}]])
def test_what_is_no_object_is_a_bad_request(said: Any) -> None:
    assert fault(orjson.dumps(said)).error == "bad_request"


@pytest.mark.parametrize("request_id", [1.5, True, False, [], {}, "x" * 129, 2**64 + 0.0])
def test_an_id_that_is_neither_number_nor_short_text_is_a_bad_request(request_id: Any) -> None:
    found = fault({"action": "ping", "id": request_id})
    assert (found.error, found.request_id) == ("bad_request", None)


@pytest.mark.parametrize("action", [None, 5, True, [], {}])
def test_an_action_that_is_no_text_is_a_bad_request(action: Any) -> None:
    found = fault({"action": action, "id": 7})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, None)


@pytest.mark.parametrize("action", ["", "fly", "Subscribe", "subscribe ", "x" * 1000])
def test_another_action_is_an_unknown_action(action: str) -> None:
    found = fault({"action": action, "id": 7})
    assert (found.error, found.request_id) == ("unknown_action", 7)
    assert len(found.message) < 200


@pytest.mark.parametrize("action", ["subscribe", "unsubscribe", "snapshot"])
@pytest.mark.parametrize("codes", [None, [], "A", 5, {}, {"A": 1}, [5], ["A", None], [["A"]], ["A"] * 6])
def test_codes_are_a_list_of_some_texts(action: str, codes: Any) -> None:
    found = fault({"action": action, "id": 7, "codes": codes})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, action)
    assert "codes" in found.message


@pytest.mark.parametrize("snapshot", [1, 0, "true", [], {}, None])
def test_snapshot_is_true_or_false(snapshot: Any) -> None:
    assert fault({"action": "subscribe", "codes": ["A"], "snapshot": snapshot}).error == "bad_request"


@pytest.mark.parametrize("option", ["fields", "max_rate", "format", "epoch", "since"])
@pytest.mark.parametrize("value", [0, False, "", [], {}, ["last"], 2, "rows"])
def test_an_option_that_is_not_offered_is_refused_by_name(option: str, value: Any) -> None:
    found = fault({"action": "subscribe", "id": 7, "codes": ["A"], option: value})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, "subscribe")
    assert option in found.message


def test_the_default_format_may_be_asked_for_by_name() -> None:
    assert parse_request('{"action":"subscribe","codes":["A"],"format":"objects"}', 10).codes == ("A",)


def test_a_view_of_a_snapshot_is_refused_too() -> None:
    assert "fields" in fault({"action": "snapshot", "codes": ["A"], "fields": ["last"]}).message


@pytest.mark.parametrize("token", [None, 7, ["secret-token"], {"token": "secret-token"}])
def test_a_token_is_a_text_and_never_repeated(token: Any) -> None:
    found = fault({"action": "auth", "id": 1, "token": token})
    assert (found.error, found.action) == ("bad_request", "auth")
    assert "secret-token" not in found.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
actions = st.sampled_from(["subscribe", "unsubscribe", "list", "snapshot", "ping", "auth"])


@given(st.one_of(
    st.binary(max_size=60),
    json_values.map(orjson.dumps),
    st.fixed_dictionaries(
        {}, optional={"action": actions | json_values, "id": json_values,
        "codes": st.lists(st.text(max_size=4)) | json_values,
                      "snapshot": json_values, "fields": json_values},
    ).map(orjson.dumps),
))  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=1000)
def test_whatever_comes_is_understood_or_refused_with_a_word(text: bytes) -> None:
    words = ("bad_json", "bad_request", "unknown_action")
    try:
        request = parse_request(text, 5)
    except RequestError as e:
        assert e.error in words
        assert e.close_code is None
        said = orjson.loads(messages.error(e, 1, e.request_id, e.action))
        assert said["error"] in words
    else:
        orjson.loads(messages.ack(request.action, request.id, 1))


# Messages


def test_hello_has_the_fields_of_the_protocol() -> None:
    said = orjson.loads(
        messages.hello(
            server="0.3.0", conn="n1.0.17", conn_key="key", epoch="e", time_ms=5, heartbeat_ms=5000,
            fields=iter(["name", "last"]), limits={"codes": 1000},
        )
    )  # fmt: skip
    assert said == {
        "type": "hello", "version": "quotes.v1", "server": "0.3.0", "conn": "n1.0.17", "conn_key": "key", "epoch": "e",
        "time": 5, "auth": "none", "heartbeat_ms": 5000, "fields": ["name", "last"], "limits": {"codes": 1000},
    }  # fmt: skip
    assert next(iter(said)) == "type"


def test_an_ack_repeats_id_and_action() -> None:
    assert orjson.loads(messages.ack("list", 4, 5, subscriptions=[])) == {
        "type": "ack", "id": 4, "action": "list", "time": 5, "subscriptions": [],
    }  # fmt: skip
    assert "id" not in orjson.loads(messages.ack("list", None, 5))
    assert orjson.loads(messages.ack("list", 0, 5))["id"] == 0
    assert orjson.loads(messages.ack("list", "", 5))["id"] == ""


def test_a_pong_repeats_the_id() -> None:
    assert orjson.loads(messages.pong(6, 5)) == {"type": "pong", "id": 6, "time": 5}
    assert orjson.loads(messages.pong(None, 5)) == {"type": "pong", "time": 5}


def test_an_error_says_whether_to_try_again() -> None:
    lasting = PeerError("bad_request", "no")
    assert orjson.loads(messages.error(lasting, 5, 2, "subscribe")) == {
        "type": "error", "id": 2, "action": "subscribe", "error": "bad_request", "message": "no", "retryable": False,
        "time": 5,
    }  # fmt: skip
    passing = PeerError("rate_limited", "slowly", retry_after_ms=400)
    assert orjson.loads(messages.error(passing, 5)) == {
        "type": "error", "error": "rate_limited", "message": "slowly", "retryable": True, "retry_after_ms": 400,
        "time": 5,
    }  # fmt: skip


@pytest.mark.parametrize("feed", ["ok", "stale", "down"])
def test_a_heartbeat_says_how_the_feed_is(feed: str) -> None:
    assert orjson.loads(messages.heartbeat(5, feed, 120)) == {
        "type": "heartbeat", "time": 5, "feed": feed, "feed_age_ms": 120,
    }  # fmt: skip
    assert orjson.loads(messages.heartbeat(5, feed, 0))["feed_age_ms"] == 0
    assert "feed_age_ms" not in orjson.loads(messages.heartbeat(5, feed, None))


def test_a_status_names_scope_and_state() -> None:
    assert orjson.loads(messages.status(5, "connection", "conflating", pending=812)) == {
        "type": "status", "time": 5, "scope": "connection", "state": "conflating", "pending": 812,
    }  # fmt: skip
    closing = orjson.loads(messages.status(5, "connection", "closing", retry_after_ms=1000))
    assert closing["retry_after_ms"] == 1000


def test_a_snapshot_holds_rows_as_they_are() -> None:
    rows = [messages.snapshot_row("A", b'{"code":"A","seq":7,"last":1.5}'), messages.snapshot_row("B", None)]
    assert orjson.loads(messages.snapshot(5, rows)) == {
        "type": "snapshot", "time": 5, "data": [{"code": "A", "seq": 7, "last": 1.5}, {"code": "B", "seq": 0}],
    }  # fmt: skip
    assert orjson.loads(messages.snapshot(5, []))["data"] == []


def test_a_tick_message_is_its_head_its_rows_and_its_tail() -> None:
    row = messages.row_with_prev(b'{"code":"A","seq":7}', 5)
    said = orjson.loads(messages.tick_head(1_721_872_800_123) + row + b"," + row + messages.TICK_TAIL)
    assert (said["type"], said["time"], len(said["data"])) == ("tick", 1_721_872_800_123, 2)
    assert list(said["data"][0].items()) == [("prev", 5), ("code", "A"), ("seq", 7)]


def test_close_codes_are_those_of_the_protocol() -> None:
    assert messages.CLOSE_CODES["going_away"] == 1001
    assert messages.CLOSE_CODES["wrong_frame_kind"] == 1003
    assert messages.CLOSE_CODES["bad_utf8"] == 1007
    assert messages.CLOSE_CODES["too_large"] == 1009
    assert messages.CLOSE_CODES["restart"] == 1012
    assert messages.CLOSE_CODES["overloaded"] == 1013
    assert messages.CLOSE_CODES["rate_limited"] == 4429
    assert len(set(messages.CLOSE_CODES.values())) == len(messages.CLOSE_CODES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"action":"ping","id":7}', (7, "ping")), ('{"action":"subscribe","id":"a","codes":["A"]}',
        ("a", "subscribe")),
        ('{"action":"fly","id":7}', (7, None)), ('{"id":[1],"action":"ping"}', (None, None)),
        ("nonsense", (None, None)),
        ("[]", (None, None)),
    ],
)  # fmt: skip
def test_a_message_that_is_not_carried_out_can_still_be_named(text: str, named: tuple[Any, Any]) -> None:
    assert messages.named(text) == named
