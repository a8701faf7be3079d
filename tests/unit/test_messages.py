"""Requests in, messages out: fields and words of docs/protocol.md."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.errors import PeerError
from quotepush.quote.tick import KNOWN_FIELDS
from quotepush.wire import messages
from quotepush.wire.messages import Request, RequestError, parse_request


def parse(said: Any, max_codes: int = 5) -> Request:
    return parse_request(said, max_codes, ["my_own"])


def fault(said: Any, max_codes: int = 5) -> RequestError:
    with pytest.raises(RequestError) as found:
        parse_request(said, max_codes)
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
        ({"action": "subscribe", "codes": ["A"], "max_rate": None, "format": None}, Request("subscribe", None, ("A",))),
        (
            {"action": "subscribe", "codes": ["A"], "fields": ["bids", "my_own"], "max_rate": 2, "format": "rows"},
            Request("subscribe", None, ("A",), True, ("bids", "my_own"), 2.0, "rows"),
        ),
        ({"action": "subscribe", "codes": ["A"], "format": "objects"}, Request("subscribe", None, ("A",))),
        ({"action": "subscribe", "codes": ["A"], "max_rate": 999}, Request("subscribe", None, ("A",), max_rate=999.0)),
        ({"action": "subscribe", "codes": ["A"], "max_rate": 0.1}, Request("subscribe", None, ("A",), max_rate=0.1)),
        ({"action": "subscribe", "codes": ["A"] * 5}, Request("subscribe", None, ("A",) * 5, True)),
        ({"action": "subscribe", "codes": ["A"], "unknown": [1]}, Request("subscribe", None, ("A",), True)),
        ({"action": "unsubscribe", "id": 1, "codes": ["*"]}, Request("unsubscribe", 1, ("*",))),
        ({"action": "snapshot", "codes": ["A"]}, Request("snapshot", None, ("A",))),
    ],
)  # fmt: skip
def test_a_good_request_is_understood(said: Any, request_: Request) -> None:
    assert parse(said) == request_


@pytest.mark.parametrize("said", [[], 5, "ping", None, True, [{"action": "ping"}]])
def test_what_is_no_object_is_a_bad_request(said: Any) -> None:
    assert fault(said).error == "bad_request"


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


@pytest.mark.parametrize(
    ("said", "since"),
    [
        ({"epoch": "e", "since": {"A": 5}}, {"A": ("e", 5)}),
        ({"epoch": "e", "since": {"sh600519": 5, "aapl": 0}}, {"600519.SH": ("e", 5), "AAPL": ("e", 0)}),
        ({"epoch": "e", "since": {"A": 2**63 - 1}}, {"A": ("e", 2**63 - 1)}),
        ({"epoch": "e", "since": {"A": {"epoch": "a", "seq": 5}, "B": 6}}, {"A": ("a", 5), "B": ("e", 6)}),
        ({"since": {"A": {"epoch": "a", "seq": 5}}}, {"A": ("a", 5)}),
        ({"since": {"A": {"epoch": "", "seq": 0, "more": 1}}}, {"A": ("", 0)}),
        ({"epoch": "e", "since": {"no such": 5, "A": 6}}, {"A": ("e", 6)}),  # it is refused among the codes
        ({"epoch": "e", "since": {"600519": 5, "600519.SH": 6}}, {"600519.SH": ("e", 6)}),
        ({"epoch": "e", "since": {}}, {}),
        ({"since": {}}, {}),
        ({"since": None}, {}),
        ({"epoch": "e"}, {}),
        ({"epoch": 5}, {}),  # says nothing without since
    ],
)
def test_since_has_an_epoch_and_a_seq_for_each_code(said: dict[str, Any], since: dict[str, tuple[str, int]]) -> None:
    assert parse({"action": "subscribe", "codes": ["A"], **said}).since == since


@pytest.mark.parametrize("since", [0, False, "", [], ["A"], 2, "A", [["A", 5]]])
def test_a_since_that_is_no_object_is_refused_by_name(since: Any) -> None:
    found = fault({"action": "subscribe", "id": 7, "codes": ["A"], "epoch": "e", "since": since})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, "subscribe")
    assert "since" in found.message


@pytest.mark.parametrize(
    "place",
    [None, "5", 5.0, True, False, -1, 2**63, [], [5], {}, {"epoch": "e"}, {"seq": 5}]
    + [{"epoch": epoch, "seq": 5} for epoch in (None, 5, True, [], {})]
    + [{"epoch": "e", "seq": seq} for seq in (None, "5", 5.0, True, -1, 2**63, [], {})],
)
def test_a_place_that_is_no_seq_in_an_epoch_is_refused(place: Any) -> None:
    found = fault({"action": "subscribe", "id": 7, "codes": ["A"], "epoch": "e", "since": {"B": 5, "A": place}})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, "subscribe")
    assert "since" in found.message


@pytest.mark.parametrize("epoch", [{}, {"epoch": None}, {"epoch": 5}, {"epoch": ["e"]}, {"epoch": True}])
def test_a_number_alone_needs_the_epoch_beside_it(epoch: dict[str, Any]) -> None:
    found = fault({"action": "subscribe", "codes": ["A"], "since": {"A": 5}, **epoch})
    assert found.error == "bad_request"
    assert "epoch" in found.message


@pytest.mark.parametrize(
    ("option", "value"),
    [("fields", value) for value in ([], "last", 5, {"last": 1}, ["last", 5], [None], [["last"]], False, 0)]
    + [("max_rate", value) for value in (0, -1, 1001, 1e9, "2", True, False, [2], {}, float("nan"), float("inf"))]
    + [("format", value) for value in ("", "row", "Rows", 0, 5, ["rows"], {}, True, False)],
)
def test_an_option_of_a_wrong_kind_is_refused_by_name(option: str, value: Any) -> None:
    found = fault({"action": "subscribe", "id": 7, "codes": ["A"], option: value})
    assert (found.error, found.request_id, found.action) == ("bad_request", 7, "subscribe")
    assert option in found.message


@pytest.mark.parametrize("name", ["", "Last", "price", "my_own", "x" * 1000, "reset", "epoch"])
def test_a_field_that_nobody_knows_is_an_unknown_field(name: str) -> None:
    found = fault({"action": "subscribe", "id": 7, "codes": ["A"], "fields": ["last", name]})
    assert (found.error, found.request_id, found.action) == ("unknown_field", 7, "subscribe")
    assert len(found.message) < 200


@pytest.mark.parametrize("name", [*KNOWN_FIELDS, "code", "seq", "prev", "ts"])
def test_every_field_of_a_row_may_be_named(name: str) -> None:
    assert parse({"action": "subscribe", "codes": ["A"], "fields": [name]}).fields == (name,)


@pytest.mark.parametrize("action", ["snapshot", "unsubscribe"])
@pytest.mark.parametrize("option", [{"fields": ["last"]}, {"max_rate": 2}, {"format": "rows"}])
def test_the_options_of_a_subscription_are_refused_elsewhere(action: str, option: dict[str, Any]) -> None:
    found = fault({"action": action, "codes": ["A"], **option})
    assert found.error == "bad_request"
    assert next(iter(option)) in found.message


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
    json_values,
    st.fixed_dictionaries(
        {}, optional={"action": actions | json_values, "id": json_values,
        "codes": st.lists(st.text(max_size=4)) | json_values, "snapshot": json_values,
        "fields": st.lists(st.sampled_from(["last", "bids", "no"])) | json_values,
        "epoch": st.text(max_size=4) | json_values,
        "since": st.dictionaries(st.sampled_from(["A", "no such"]), st.integers() | json_values) | json_values,
        "max_rate": st.floats() | json_values, "format": st.sampled_from(["rows", "objects"]) | json_values},
    ),
))  # fmt: skip
@settings(deadline=None, derandomize=True, max_examples=500)
def test_whatever_comes_is_understood_or_refused_with_a_word(said: Any) -> None:
    words = ("bad_request", "unknown_action", "unknown_field")
    try:
        request = parse_request(said, 5)
    except RequestError as e:
        assert e.error in words
        assert e.close_code is None
        assert messages.error(e, 1, e.request_id, e.action)["error"] in words
        orjson.dumps(messages.error(e, 1, e.request_id, e.action))
    else:
        orjson.dumps(messages.ack(request.action, request.id, 1))


# Messages


def test_hello_has_the_fields_of_the_protocol() -> None:
    said = messages.hello(
            server="0.3.0", conn="n1.0.17", conn_key="key", epoch="e", time_ms=5, heartbeat_ms=5000,
            fields=iter(["name", "last"]), limits={"codes": 1000},
    )  # fmt: skip
    assert said == {
        "type": "hello", "version": "quotes.v1", "server": "0.3.0", "conn": "n1.0.17", "conn_key": "key", "epoch": "e",
        "time": 5, "auth": "none", "heartbeat_ms": 5000, "fields": ["name", "last"], "limits": {"codes": 1000},
    }  # fmt: skip
    assert next(iter(said)) == "type"


def test_an_ack_repeats_id_and_action() -> None:
    assert messages.ack("list", 4, 5, subscriptions=[]) == {
        "type": "ack", "id": 4, "action": "list", "time": 5, "subscriptions": [],
    }  # fmt: skip
    assert "id" not in messages.ack("list", None, 5)
    assert messages.ack("list", 0, 5)["id"] == 0
    assert messages.ack("list", "", 5)["id"] == ""


def test_a_pong_repeats_the_id() -> None:
    assert messages.pong(6, 5) == {"type": "pong", "id": 6, "time": 5}
    assert messages.pong(None, 5) == {"type": "pong", "time": 5}


def test_an_error_says_whether_to_try_again() -> None:
    lasting = PeerError("bad_request", "no")
    assert messages.error(lasting, 5, 2, "subscribe") == {
        "type": "error", "id": 2, "action": "subscribe", "error": "bad_request", "message": "no", "retryable": False,
        "time": 5,
    }  # fmt: skip
    passing = PeerError("rate_limited", "slowly", retry_after_ms=400)
    assert messages.error(passing, 5) == {
        "type": "error", "error": "rate_limited", "message": "slowly", "retryable": True, "retry_after_ms": 400,
        "time": 5,
    }  # fmt: skip


@pytest.mark.parametrize("feed", ["ok", "stale", "down"])
def test_a_heartbeat_says_how_the_feed_is(feed: str) -> None:
    assert messages.heartbeat(5, feed, 120) == {
        "type": "heartbeat", "time": 5, "feed": feed, "feed_age_ms": 120,
    }  # fmt: skip
    assert messages.heartbeat(5, feed, 0)["feed_age_ms"] == 0
    assert "feed_age_ms" not in messages.heartbeat(5, feed, None)


def test_a_status_names_scope_and_state() -> None:
    assert messages.status(5, "connection", "conflating", pending=812) == {
        "type": "status", "time": 5, "scope": "connection", "state": "conflating", "pending": 812,
    }  # fmt: skip
    closing = messages.status(5, "connection", "closing", retry_after_ms=1000)
    assert closing["retry_after_ms"] == 1000


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
    ("said", "named"),
    [
        ({"action": "ping", "id": 7}, (7, "ping")),
        ({"action": "subscribe", "id": "a", "codes": ["A"]}, ("a", "subscribe")),
        ({"action": "fly", "id": 7}, (7, None)), ({"id": [1], "action": "ping"}, (None, None)),
        (None, (None, None)),
        ([], (None, None)),
    ],
)  # fmt: skip
def test_a_message_that_is_not_carried_out_can_still_be_named(said: Any, named: tuple[Any, Any]) -> None:
    assert messages.named(said) == named
