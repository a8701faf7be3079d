"""What a client wants and says, message by message."""

from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from quotepush.client_messages import Accepted, BadMessage, Rejected, decode_frame
from quotepush.client_state import ClientState, Options
from quotepush.quote.code import parse_code


def hello(epoch: str = "e1", **limits: int) -> dict[str, Any]:
    return {"type": "hello", "epoch": epoch, "heartbeat_ms": 5000, "limits": limits}


def tick(*rows: tuple[int, str, int]) -> dict[str, Any]:
    return {"type": "tick", "data": [{"prev": prev, "code": code, "seq": seq} for prev, code, seq in rows]}


def snapshot(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"type": "snapshot", "data": list(rows)}


def said(state: ClientState, now_s: float = 0.0) -> list[dict[str, Any]]:
    return [orjson.loads(request) for request in state.due_requests(now_s)]


def ack(request: dict[str, Any], *accepted: tuple[str, str], rejected: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "ack", "id": request["id"], "action": request["action"],
        "accepted": [{"code": code, "as": spelling} for code, spelling in accepted],
        "rejected": [{"as": spelling, "error": "bad_code", "message": "no"} for spelling in rejected],
    }  # fmt: skip


def subscribed(*codes: str) -> ClientState:
    state = ClientState()
    state.greet(hello())
    for code in codes:
        state.want(code)
    (request,) = said(state)
    state.acknowledge(ack(request, *((code, code) for code in codes)))
    return state


def seqs(state: ClientState, message: dict[str, Any]) -> list[int]:
    """Let it take a message; the numbers of the rows that are new."""
    rows, _ = state.take(message)
    return [row["seq"] for row in rows]


def test_nothing_is_said_before_hello_and_everything_in_one_message_after_it():
    state = ClientState()
    state.want("A")
    state.want("B")
    assert said(state) == []
    state.greet(hello())
    assert said(state) == [{"action": "subscribe", "id": 1, "codes": ["A", "B"]}]
    assert said(state) == []


def test_a_new_connection_asks_for_everything_again():
    state = subscribed("A", "B")
    state.lose()
    assert said(state) == []
    state.greet(hello())
    assert [request["codes"] for request in said(state)] == [["A", "B"]]


def test_requests_keep_to_the_servers_limits():
    state = ClientState()
    state.greet(hello(codes_per_request=2))
    for code in "ABC":
        state.want(code)
    assert [request["codes"] for request in said(state)] == [["A", "B"], ["C"]]
    state.lose()
    state.greet(hello(codes_per_request=100, message_bytes=209))
    assert [request["codes"] for request in said(state)] == [["A", "B"], ["C"]]


def test_a_code_refused_at_first_is_forgotten_and_one_refused_later_is_told_and_kept():
    state = ClientState()
    state.greet(hello())
    wishes = [state.want("A"), state.want("no such")]
    (request,) = said(state)
    assert state.acknowledge(ack(request, ("A", "A"), rejected=("no such",))) == []
    assert wishes[0].outcome == Accepted("A", "A")
    assert wishes[1].outcome == Rejected("no such", "bad_code", "no")

    for _ in range(2):
        state.lose()
        state.greet(hello())
        (request,) = said(state)
        assert request["codes"] == ["A"]
        assert state.acknowledge(ack(request, rejected=("A",))) == [Rejected("A", "bad_code", "no")]


def test_a_code_that_cannot_be_sent_is_refused_here():
    state = ClientState()
    assert isinstance(state.want("x" * 129).outcome, Rejected)
    assert isinstance(state.want("\udcff").outcome, Rejected)
    state.greet(hello())
    assert said(state) == []


def test_a_request_refused_as_a_whole_refuses_each_of_its_codes():
    state = ClientState()
    state.greet(hello())
    wish = state.want("A")
    said(state)
    assert state.refuse({"type": "error", "id": 1, "error": "not_entitled", "message": "no"}, 0.0) == 0
    assert wish.outcome == Rejected("A", "not_entitled", "no")


@pytest.mark.parametrize("named", [{"id": 1}, {}])
def test_a_request_over_the_rate_is_made_again_when_the_server_says(named: dict[str, int]):
    state = ClientState()
    state.greet(hello())
    state.want("A")
    said(state, 10.0)
    error = {"type": "error", **named, "error": "rate_limited", "retryable": True, "retry_after_ms": 400}
    assert state.refuse(error, 10.0) == 0.4
    assert said(state, 10.3) == []
    assert [request["codes"] for request in said(state, 10.4)] == [["A"]]


def test_unsubscribing_takes_any_spelling_and_drops_what_is_on_its_way():
    state = ClientState()
    state.greet(hello())
    state.want("sh600519")
    (request,) = said(state)
    state.acknowledge(ack(request, ("600519.SH", "sh600519")))
    assert state.unwant(["600519.SS"]) == ("600519.SH",)
    assert state.take(tick((1, "600519.SH", 2))) == ([], [])
    (request,) = said(state)
    assert (request["action"], request["codes"]) == ("unsubscribe", ["600519.SH"])
    assert state.is_leaving(["600519.SH"])
    state.acknowledge({"type": "ack", "id": request["id"], "action": "unsubscribe", "removed": ["600519.SH"]})
    assert not state.is_leaving(["600519.SH"])


def test_a_code_dropped_before_its_answer_is_unsubscribed_after_it():
    state = ClientState()
    state.greet(hello())
    wish = state.want("A")
    (request,) = said(state)
    state.unwant("A")
    assert isinstance(wish.outcome, Rejected)
    assert said(state) == []
    state.acknowledge(ack(request, ("A", "A")))
    assert [(r["action"], r["codes"]) for r in said(state)] == [("unsubscribe", ["A"])]


def test_a_code_dropped_and_wanted_again_in_another_spelling_stays():
    state = subscribed("A")
    state.unwant("A")
    state.want("a")
    requests = said(state)
    assert [(r["action"], r["codes"]) for r in requests] == [("unsubscribe", ["A"]), ("subscribe", ["a"])]
    state.acknowledge({"type": "ack", "id": requests[0]["id"], "action": "unsubscribe", "removed": ["A"]})
    state.acknowledge(ack(requests[1], ("A", "a")))
    assert said(state) == []
    assert seqs(state, snapshot({"code": "A", "seq": 1})) == [1]


@pytest.mark.parametrize(
    "message",
    [
        {"type": "tick"},
        {"type": "tick", "data": [1]},
        {"type": "tick", "data": [{"code": "A"}]},
        {"type": "tick", "data": [{"code": 1, "seq": 1}]},
        {"type": "tick", "data": [{"prev": "1", "code": "A", "seq": 1}]},
    ],
)
def test_rows_that_are_none_are_said_to_be_so(message: dict[str, Any]):
    with pytest.raises(BadMessage):
        subscribed("A").take(message)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type":1}', "null", "Good morning, 早"])
def test_a_text_that_is_no_message_is_a_bare_frame(text: str):
    assert decode_frame(text.encode()) == {"type": "raw", "data": text}


@pytest.mark.parametrize("payload", [b"", b"\xff", b'{"type":"tick"}'])
def test_bytes_are_a_bare_frame(payload: bytes):
    assert decode_frame(payload, is_text=False) == {"type": "raw", "data": payload}


# Options


def test_options_go_with_each_code_and_requests_are_grouped_by_them():
    state = ClientState()
    state.greet(hello())
    view = Options(("last",), 2.0)
    state.want("A", view)
    state.want("B")
    state.want("C", view)
    assert said(state) == [
        {"action": "subscribe", "id": 1, "codes": ["A", "C"], "fields": ["last"], "max_rate": 2.0},
        {"action": "subscribe", "id": 2, "codes": ["B"]},
    ]
    state.lose()
    state.greet(hello())
    assert [(r["codes"], r.get("fields")) for r in said(state)] == [(["A", "C"], ["last"]), (["B"], None)]


def test_changed_options_are_said_at_once_and_the_outcome_is_theirs():
    state = subscribed("A")
    wish = state.want("A", Options(max_rate=5.0))
    assert wish.outcome is None
    (request,) = said(state)
    assert (request["codes"], request["max_rate"], "since" in request) == (["A"], 5.0, False)
    state.acknowledge(ack(request, ("A", "A")))
    assert wish.outcome == Accepted("A", "A")
    assert state.want("A", Options(max_rate=5.0)).outcome == Accepted("A", "A")
    assert said(state) == []


def test_options_that_are_refused_leave_the_subscription_as_it_was():
    state = subscribed("A")
    wish = state.want("A", Options(("price",)))
    (request,) = said(state)
    state.refuse({"type": "error", "id": request["id"], "error": "unknown_field", "message": "no"}, 0.0)
    assert wish.outcome == Rejected("A", "unknown_field", "no")
    assert said(state) == []
    assert seqs(state, snapshot({"code": "A", "seq": 1})) == [1]
    state.lose()
    state.greet(hello())
    (request,) = said(state)
    assert "fields" not in request


def test_an_answer_to_former_options_is_not_taken_for_one_to_the_new_ones():
    state = ClientState()
    state.greet(hello())
    wish = state.want("A")
    (first,) = said(state)
    state.want("A", Options(("price",)))
    (second,) = said(state)
    state.acknowledge(ack(first, ("A", "A")))
    assert wish.outcome is None
    assert state.acknowledge(ack(second, rejected=("A",))) == []
    assert isinstance(wish.outcome, Rejected)
    assert said(state) == []  # the server still has the first ones


def test_two_spellings_of_a_code_have_the_same_options_and_stand_in_one_request():
    state = ClientState()
    state.greet(hello(codes_per_request=2))
    for code in ("600519", "A", "sh600519"):
        state.want(code)
    assert [r["codes"] for r in said(state)] == [["600519", "sh600519"], ["A"]]
    state.want("600519", Options(max_rate=1.0))
    assert [(r["codes"], r["max_rate"]) for r in said(state)] == [(["600519", "sh600519"], 1.0)]


# Resuming


def test_a_new_connection_resumes_each_code_behind_its_last_row():
    state = subscribed("A", "B", "C")
    state.take(snapshot({"code": "A", "seq": 5}, {"code": "B", "seq": 9, "epoch": "own"}))
    state.lose()
    state.greet(hello())
    (request,) = said(state)
    assert request["codes"] == ["A", "B", "C"]
    assert (request["epoch"], request["since"]) == ("e1", {"A": 5, "B": {"epoch": "own", "seq": 9}})
    state.lose()
    state.greet(hello("e2"))
    (request,) = said(state)
    assert request["since"]["A"] == {"epoch": "e1", "seq": 5}


def test_a_request_over_the_rate_resumes_when_it_is_made_again():
    state = subscribed("A")
    state.take(snapshot({"code": "A", "seq": 5}))
    state.lose()
    state.greet(hello())
    (request,) = said(state)
    state.refuse({"type": "error", "id": request["id"], "error": "rate_limited", "retryable": True}, 0.0)
    (again,) = said(state, 60.0)
    assert again["since"] == {"A": 5}
    state.acknowledge({**ack(again), "accepted": [{"code": "A", "as": "A", "resume": "replay"}]})
    assert seqs(state, tick((5, "A", 6))) == [6]
    assert said(state, 60.0) == []


def test_a_resuming_request_keeps_to_the_size_the_server_takes():
    state = ClientState()
    state.greet(hello(message_bytes=2000))
    codes = [f"CODE{n:04}" for n in range(100)]
    for code in codes:
        state.want(code)
    for request in said(state):
        state.acknowledge(ack(request, *((code, code) for code in request["codes"])))
    state.take(snapshot(*({"code": code, "seq": 10**12, "epoch": "0123456789abcdef.1"} for code in codes)))
    state.lose()
    state.greet(hello(message_bytes=2000))
    requests = state.due_requests(0.0)
    assert max(map(len, requests)) <= 2000
    assert sum(len(orjson.loads(request)["since"]) for request in requests) == 100


def test_what_was_unsubscribed_is_not_resumed():
    state = subscribed("A")
    state.take(snapshot({"code": "A", "seq": 5}))
    state.unwant("A")
    state.lose()
    state.want("A")
    state.greet(hello())
    (request,) = said(state)
    assert "since" not in request


def test_rows_of_a_question_are_none_of_a_subscription_that_is_not_acknowledged_yet():
    state = subscribed("A")
    state.take(snapshot({"code": "A", "seq": 5}))
    state.lose()
    state.greet(hello())
    assert state.take(snapshot({"code": "A", "seq": 9})) == ([], [])
    (request,) = said(state)
    assert request["since"] == {"A": 5}


# Whatever is asked and answered, in any order

_SPELLINGS = ["A", "a", "600519", "sh600519", "600519.SH", "no such"]
_VIEWS = [Options(), Options(("last",)), Options(None, 2.0), Options(("price",))]  # the server knows no price


class Conversation(RuleBasedStateMachine):
    """A client's state and a server that answers when it likes, or not before the connection is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.state = ClientState()
        self.wanted: dict[str, Options] = {}  # code: as the caller last asked and the server could grant
        self.inbox: list[dict[str, Any]] = []  # requests that the server has not read
        self.watched: dict[str, Options] = {}  # on the server
        self.now_s = 0.0

    def hear(self) -> None:
        self.inbox += said(self.state, self.now_s)

    def answer(self, request: dict[str, Any]) -> None:
        if request["action"] == "unsubscribe":
            removed = [code for code in request["codes"] if self.watched.pop(code, None)]
            self.state.acknowledge({**ack(request), "removed": removed})
            return
        fields, max_rate = request.get("fields"), request.get("max_rate")
        if fields == ["price"]:
            error = {"type": "error", "id": request["id"], "error": "unknown_field", "message": "no"}
            self.state.refuse(error, self.now_s)
            return
        options = Options(None if fields is None else tuple(fields), max_rate)
        good = [spelling for spelling in request["codes"] if spelling != "no such"]
        self.watched.update((parse_code(spelling), options) for spelling in good)
        bad = tuple(spelling for spelling in request["codes"] if spelling == "no such")
        self.state.acknowledge(ack(request, *((parse_code(s), s) for s in good), rejected=bad))

    @rule(spelling=st.sampled_from(_SPELLINGS), options=st.sampled_from(_VIEWS))
    def subscribe(self, spelling: str, options: Options) -> None:
        self.settle()  # else it depends on when the server reads which options could be granted
        self.state.want(spelling, options)
        self.hear()
        if spelling != "no such" and options.fields != ("price",):
            self.wanted[parse_code(spelling)] = options

    @rule(spelling=st.sampled_from([*_SPELLINGS[:-1], "*"]))
    def unsubscribe(self, spelling: str) -> None:
        self.state.unwant([spelling])
        self.hear()
        if spelling == "*":
            self.wanted.clear()
        else:
            self.wanted.pop(parse_code(spelling), None)

    @rule()
    def connect(self) -> None:
        if not self.state.is_greeted:
            self.state.greet(hello())
            self.hear()

    @precondition(lambda self: self.state.is_greeted)
    @rule()
    def lose(self) -> None:
        self.state.lose()
        self.inbox.clear()
        self.watched.clear()

    @precondition(lambda self: self.inbox)
    @rule()
    def the_server_answers(self) -> None:
        self.answer(self.inbox.pop(0))
        self.hear()

    @precondition(lambda self: self.inbox)
    @rule()
    def the_server_is_asked_too_much(self) -> None:
        request = self.inbox.pop(0)
        error = {"type": "error", "id": request["id"], "error": "rate_limited", "retryable": True}
        self.now_s += self.state.refuse({**error, "retry_after_ms": 500}, self.now_s) + 0.001
        self.hear()

    @rule()
    def settle(self) -> None:
        """In the end, on a connection that lasts, the server holds what is wanted and nothing else."""
        self.connect()
        for _ in range(100):
            if not self.inbox:
                break
            self.answer(self.inbox.pop(0))
            self.hear()
        assert not self.inbox
        assert self.watched == self.wanted
        assert all(self.state.stream.is_flowing(code) for code in self.wanted)


Conversation.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_in_the_end_the_server_holds_what_is_wanted = Conversation.TestCase
