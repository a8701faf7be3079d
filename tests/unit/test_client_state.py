"""What a client wants, knows and says, message by message; and the queue that merges when it is full."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quotepush.client_state import Accepted, BadMessage, ClientState, Rejected, RowQueue, decode_message


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


def seqs(rows: list[dict[str, Any]]) -> list[int]:
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


def test_a_row_is_new_once_within_an_epoch_whatever_connection_it_comes_by():
    state = subscribed("A")
    assert seqs(state.take(snapshot({"code": "A", "seq": 5}))) == [5]
    assert seqs(state.take(tick((5, "A", 6), (6, "A", 7)))) == [6, 7]
    state.lose()
    state.greet(hello())
    said(state)
    assert state.take(snapshot({"code": "A", "seq": 7})) == []
    assert seqs(state.take(tick((7, "A", 8)))) == [8]


def test_numbering_starts_anew_with_another_epoch():
    state = subscribed("A", "B")
    state.take(snapshot({"code": "A", "seq": 5}, {"code": "B", "seq": 9, "epoch": "own"}))
    state.lose()
    state.greet(hello("e2"))
    assert seqs(state.take(snapshot({"code": "A", "seq": 2}, {"code": "B", "seq": 9, "epoch": "own"}))) == [2]
    assert seqs(state.take(tick((9, "B", 10)))) == [10]
    assert seqs(state.take(snapshot({"code": "B", "seq": 1, "epoch": "other"}))) == [1]


def test_a_code_without_a_value_is_no_row():
    state = subscribed("A")
    assert state.take(snapshot({"code": "A", "seq": 0})) == []
    assert state.rows == {}
    assert seqs(state.take(tick((0, "A", 1)))) == [1]
    assert state.rows["A"]["seq"] == 1


def test_rows_merged_by_the_server_are_counted_per_code():
    state = subscribed("A")
    state.take(snapshot({"code": "A", "seq": 5}))
    state.take(tick((5, "A", 9), (9, "A", 10)))
    assert state.merged == {"A": 3}


def test_unsubscribing_takes_any_spelling_and_drops_what_is_on_its_way():
    state = ClientState()
    state.greet(hello())
    state.want("sh600519")
    (request,) = said(state)
    state.acknowledge(ack(request, ("600519.SH", "sh600519")))
    assert state.unwant(["600519.SS"]) == ("600519.SH",)
    assert state.take(tick((1, "600519.SH", 2))) == []
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
    assert seqs(state.take(snapshot({"code": "A", "seq": 1}))) == [1]


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type":1}', b"\xff"])
def test_messages_that_are_none_are_said_to_be_so(text: str | bytes):
    with pytest.raises(BadMessage):
        decode_message(text)


# The queue


def test_a_queue_that_is_not_full_keeps_every_row():
    queue = RowQueue(3)
    rows = [{"prev": n - 1, "code": "A", "seq": n} for n in (1, 2, 3)]
    for row in rows:
        queue.put(row)
    assert [queue.take() for _ in range(len(queue))] == rows
    assert queue.merged == 0


def test_a_full_queue_keeps_the_newest_row_per_code_with_the_prev_of_the_first():
    queue = RowQueue(4)
    rows = [(1, "A", 2), (4, "B", 6), (2, "A", 3), (3, "A", 5), (5, "A", 6)]
    for prev, code, seq in rows:
        queue.put({"prev": prev, "code": code, "seq": seq})
    assert [queue.take() for _ in range(len(queue))] == [
        {"prev": 4, "code": "B", "seq": 6},
        {"prev": 1, "code": "A", "seq": 5},
        {"prev": 5, "code": "A", "seq": 6},
    ]
    assert queue.merged == 2


def test_merging_leaves_the_rows_of_others_as_they_were():
    queue = RowQueue(2)
    newest = {"prev": 2, "code": "A", "seq": 3}
    for row in ({"prev": 1, "code": "A", "seq": 2}, newest, {"prev": 0, "code": "B", "seq": 1}):
        queue.put(row)
    assert newest["prev"] == 2


@given(
    st.integers(1, 12),
    st.lists(st.one_of(st.sampled_from("ABCDE"), st.just("take"), st.sampled_from(["+A", "+B"])), max_size=200),
)
def test_whatever_comes_and_goes_no_code_loses_its_last_row_and_every_row_is_accounted_for(
    max_rows: int, steps: list[str]
):
    queue = RowQueue(max_rows)
    newest: dict[str, int] = {}
    taken: dict[str, int] = {}
    put = 0

    def take() -> None:
        row = queue.take()
        code, before = row["code"], taken.get(row["code"], 0)
        assert row["seq"] > before
        if "prev" in row:
            assert row["prev"] == before  # the chain that the consumer sees has no hole
        taken[code] = row["seq"]

    took = 0
    for step in steps:
        if step == "take":
            if queue:
                take()
                took += 1
            continue
        code = step[-1]
        seq = newest.get(code, 0) + 1
        row = {"code": code, "seq": seq}
        queue.put(row if step[0] == "+" else {"prev": seq - 1, **row})
        newest[code] = seq
        put += 1
        assert len(queue) <= max(max_rows, 2 * len(newest))
        assert put == took + len(queue) + queue.merged
    while queue:
        take()
    assert taken == newest
