"""One client's rules, and what happens while main's answer is under way."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.session import Session
from quotepush.push.subscriptions import Row, Subscriptions
from tests.support.desk import Counter, message_of, only, say, subscribed

# hello


def test_hello_names_the_connection_and_its_limits() -> None:
    counter = Counter()
    session, link = counter.open("n1.0.77")
    session.greet()
    hello = only(link)
    assert hello["type"] == "hello"
    assert hello["version"] == "quotes.v1"
    assert (hello["conn"], hello["epoch"], hello["server"]) == ("n1.0.77", "epoch-1", "0.0.1")
    assert (hello["time"], hello["heartbeat_ms"], hello["auth"]) == (1_000_000, 5000, "none")
    assert hello["limits"] == {
        "codes": 5, "codes_per_request": 10, "requests_per_s": 10, "message_bytes": 10_000, "max_rate": None,
    }  # fmt: skip
    assert "last" in hello["fields"] and "change_pct" in hello["fields"]
    assert not {"bids", "asks"} & set(hello["fields"])
    assert len(hello["conn_key"]) >= 16


def test_every_connection_has_a_key_of_its_own() -> None:
    counter = Counter()
    keys = set()
    for number in range(20):
        session, link = counter.open(f"n.0.{number}")
        session.greet()
        key = only(link)["conn_key"]
        assert counter.desk.is_key_of(session.fd, key)
        assert not counter.desk.is_key_of("n.0.20", key)
        keys.add(key)
    assert len(keys) == 20


# subscribe


def test_an_ack_comes_before_the_snapshot() -> None:
    counter = Counter()
    counter.set_row("600519.SH", 7)
    session, link = counter.open()
    say(session, action="subscribe", id=2, codes=["sh600519", "AAPL"])
    assert link.messages == []
    counter.answer_all()
    ack, snapshot = link.take()
    assert ack == {
        "type": "ack", "id": 2, "action": "subscribe", "time": 1_000_000,
        "accepted": [{"code": "600519.SH", "as": "sh600519"}, {"code": "AAPL", "as": "AAPL"}], "rejected": [],
        "total": 2, "limit": 5,
    }  # fmt: skip
    assert snapshot["type"] == "snapshot"
    assert snapshot["data"] == [{"code": "600519.SH", "seq": 7, "ts": 1, "last": 7.0}, {"code": "AAPL", "seq": 0}]


def test_results_are_per_code_and_in_the_order_of_the_request() -> None:
    counter = Counter()
    counter.unknown = {"ZZZ"}
    session, link = counter.open()
    say(session, action="subscribe", codes=["b", "no such", "zzz", "a", "", "x" * 33, "c"])
    counter.answer_all()
    ack, snapshot = link.take()
    assert [entry["code"] for entry in ack["accepted"]] == ["B", "A", "C"]
    assert [entry["as"] for entry in ack["accepted"]] == ["b", "a", "c"]
    assert [(entry["as"], entry["error"]) for entry in ack["rejected"]] == [
        ("no such", "bad_code"), ("zzz", "unknown_code"), ("", "bad_code"), ("x" * 33, "bad_code"),
    ]  # fmt: skip
    assert all(entry["message"] and "code" not in entry for entry in ack["rejected"])
    assert ack["total"] == 3
    assert [row["code"] for row in snapshot["data"]] == ["B", "A", "C"]


def test_several_spellings_of_one_instrument_are_one_subscription() -> None:
    counter = Counter(codes=1)
    session, link = counter.open()
    say(session, action="subscribe", codes=["600519", "sh600519", "600519.SH", "SSE.600519"])
    assert counter.watches[0].codes == ["600519.SH"]
    counter.answer_all()
    ack, snapshot = link.take()
    assert [entry["code"] for entry in ack["accepted"]] == ["600519.SH"] * 4
    assert ack["total"] == 1
    assert len(snapshot["data"]) == 1


def test_a_subscription_without_a_snapshot_gets_none() -> None:
    counter = Counter()
    counter.set_row("AAPL", 7)
    session, link = counter.open()
    say(session, action="subscribe", codes=["AAPL"], snapshot=False)
    counter.answer_all()
    assert only(link)["type"] == "ack"
    lane = session.watchlist.subscriptions["AAPL"].lane
    assert lane.newcomers == {session.outbox: None}


def test_an_epoch_of_its_own_is_said_in_the_ack_and_with_the_row() -> None:
    counter = Counter()
    counter.set_row("A", 9)
    counter.set_row("B", 3)
    counter.epochs["A"] = "epoch-a"
    session, link = counter.open()
    say(session, action="subscribe", codes=["A", "B"])
    counter.answer_all()
    ack, snapshot = link.take()
    assert [entry.get("epoch") for entry in ack["accepted"]] == ["epoch-a", None]
    assert [row.get("epoch") for row in snapshot["data"]] == ["epoch-a", None]
    say(session, action="subscribe", codes=["A", "B"], format="rows", fields=["last"])
    ack, snapshot = link.take()
    assert [entry.get("epoch") for entry in ack["accepted"]] == ["epoch-a", None]
    assert snapshot["epochs"] == {"A": "epoch-a"}


def test_when_nothing_is_accepted_there_is_no_snapshot() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", codes=["no such"])
    ack = only(link)
    assert (ack["accepted"], ack["total"]) == ([], 0)
    assert counter.touched == []


def test_a_code_that_is_here_already_is_answered_without_main() -> None:
    counter = Counter()
    counter.set_row("AAPL", 7)
    subscribed(counter, "AAPL")
    second, link = counter.open("n.0.2")
    say(second, action="subscribe", codes=["AAPL"])
    assert not counter.watches
    assert [message["type"] for message in link.take()] == ["ack", "snapshot"]


def test_only_the_codes_that_are_not_here_are_asked_for() -> None:
    counter = Counter()
    subscribed(counter, "A", "B")
    second, _ = counter.open("n.0.2")
    say(second, action="subscribe", codes=["A", "C", "B", "D"])
    assert [question.codes for question in counter.watches] == [["C", "D"]]


def test_codes_beyond_the_limit_are_rejected_one_by_one() -> None:
    counter = Counter(codes=2)
    session, link = counter.open()
    say(session, action="subscribe", codes=["a", "b", "c", "a", "d"])
    counter.answer_all()
    ack = link.take()[0]
    assert [entry["code"] for entry in ack["accepted"]] == ["A", "B", "A"]
    assert [(entry["as"], entry["error"]) for entry in ack["rejected"]] == [("c", "code_limit"), ("d", "code_limit")]
    say(session, action="subscribe", codes=["a", "b"])  # subscribing again takes no room
    assert link.take()[0]["total"] == 2
    say(session, action="unsubscribe", codes=["a"])
    link.take()
    say(session, action="subscribe", codes=["d", "e"])
    counter.answer_all()
    ack = link.take()[0]
    assert [entry["code"] for entry in ack["accepted"]] == ["D"]
    assert [entry["error"] for entry in ack["rejected"]] == ["code_limit"]


def test_the_registry_hears_of_every_change() -> None:
    counter = Counter()
    session, _ = subscribed(counter, "A")
    assert counter.touched == ["n.0.1"]
    say(session, action="unsubscribe", codes=["A"])
    assert counter.touched == ["n.0.1", "n.0.1"]
    say(session, action="unsubscribe", codes=["A"])
    assert len(counter.touched) == 2


# unsubscribe, list, snapshot, ping


def test_unsubscribe_says_what_was_removed() -> None:
    counter = Counter()
    session, link = subscribed(counter, "600519.SH", "AAPL", "MSFT")
    say(session, action="unsubscribe", id="x", codes=["msft", "sh600519", "600519", "NOT", "no such"])
    assert only(link) == {
        "type": "ack", "id": "x", "action": "unsubscribe", "time": 1_000_000, "removed": ["MSFT", "600519.SH"],
        "total": 1, "limit": 5,
    }  # fmt: skip
    assert counter.unwatched == ["MSFT", "600519.SH"]


def test_a_star_drops_everything() -> None:
    counter = Counter()
    session, link = subscribed(counter, "A", "B")
    say(session, action="unsubscribe", codes=["*"])
    ack = only(link)
    assert (ack["removed"], ack["total"]) == (["A", "B"], 0)
    assert counter.desk.subscriptions.channels == {}


def test_list_names_what_is_subscribed_in_the_order_of_subscribing() -> None:
    counter = Counter()
    counter.set_row("B", 7)
    session, link = subscribed(counter, "B", "A")
    say(session, action="list", id=4)
    ack = only(link)
    assert (ack["type"], ack["id"], ack["action"], ack["total"]) == ("ack", 4, "list", 2)
    plain = {"fields": None, "max_rate": None, "format": "objects", "merged": 0}
    assert ack["subscriptions"] == [{"code": "B", "seq": 7, **plain}, {"code": "A", "seq": 0, **plain}]


def test_a_snapshot_makes_no_subscription() -> None:
    counter = Counter()
    counter.set_row("A", 3)
    session, link = counter.open()
    say(session, action="snapshot", id=5, codes=["a", "no such", "b"])
    assert not counter.watches
    counter.answer_all()
    ack, snapshot = link.take()
    assert (ack["action"], ack["id"]) == ("snapshot", 5)
    assert [entry["code"] for entry in ack["accepted"]] == ["A", "B"]
    assert [entry["error"] for entry in ack["rejected"]] == ["bad_code"]
    assert [row["seq"] for row in snapshot["data"]] == [3, 0]
    assert session.watchlist.subscriptions == {}
    assert counter.desk.subscriptions.channels == {}


def test_a_snapshot_is_not_bound_by_the_limit_of_codes() -> None:
    counter = Counter(codes=1)
    session, link = counter.open()
    say(session, action="snapshot", codes=["a", "b", "c"])
    counter.answer_all()
    assert len(link.take()[1]["data"]) == 3


def test_an_unknown_code_is_refused_in_a_snapshot_too() -> None:
    counter = Counter()
    counter.unknown = {"A"}
    session, link = counter.open()
    say(session, action="snapshot", codes=["a", "b"])
    counter.answer_all()
    ack, snapshot = link.take()
    assert [(entry["as"], entry["error"]) for entry in ack["rejected"]] == [("a", "unknown_code")]
    assert [row["code"] for row in snapshot["data"]] == ["B"]


def test_ping_is_answered_with_its_id() -> None:
    session, link = Counter().open()
    say(session, action="ping", id=6)
    say(session, action="ping")
    assert link.take() == [{"type": "pong", "id": 6, "time": 1_000_000}, {"type": "pong", "time": 1_000_000}]


# Faults


@pytest.mark.parametrize(
    ("text", "error", "request_id", "action"),
    [
        ("nonsense", "bad_json", None, None), ("", "bad_json", None, None), ('{"action":', "bad_json", None, None),
        ("[]", "bad_request", None, None), ("5", "bad_request", None, None), ("{}", "bad_request", None, None),
        ('{"id":1}', "bad_request", 1, None), ('{"action":5,"id":1}', "bad_request", 1, None),
        ('{"action":"fly","id":"a"}', "unknown_action", "a", None),
        ('{"action":"subscribe","id":3}', "bad_request", 3, "subscribe"),
        ('{"action":"subscribe","id":3,"codes":[]}', "bad_request", 3, "subscribe"),
        ('{"action":"subscribe","id":3,"codes":"AAPL"}', "bad_request", 3, "subscribe"),
        ('{"action":"subscribe","id":3,"codes":[5]}', "bad_request", 3, "subscribe"),
        ('{"action":"subscribe","id":3,"codes":["A"],"snapshot":1}', "bad_request", 3, "subscribe"),
        ('{"action":"auth","id":9,"token":"t"}', "bad_request", 9, "auth"),
        ('{"action":"ping","id":1.5}', "bad_request", None, None),
        ('{"action":"ping","id":true}', "bad_request", None, None),
        ('{"action":"ping","id":[1]}', "bad_request", None, None),
    ],
)  # fmt: skip
def test_a_faulty_request_gets_an_error_and_keeps_the_connection(
    text: str, error: str, request_id: Any, action: str | None
) -> None:
    session, link = Counter().open()
    session.receive(text)
    said = only(link)
    assert (said["type"], said["error"], said["retryable"]) == ("error", error, False)
    assert (said.get("id"), said.get("action")) == (request_id, action)
    assert said["message"]
    assert link.closes == []
    say(session, action="ping")
    assert only(link)["type"] == "pong"


@pytest.mark.parametrize(
    "option",
    [{"since": {"A": 1}}, {"since": []}, {"fields": []}, {"max_rate": 0}, {"format": "columns"}],
)
def test_an_option_that_is_not_understood_is_refused_and_not_ignored(option: dict[str, Any]) -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", id=1, codes=["A"], **option)
    said = only(link)
    assert (said["error"], said["id"]) == ("bad_request", 1)
    assert next(iter(option)) in said["message"]
    assert not counter.watches


def test_unknown_keys_are_ignored() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="ping", id=1, colour="red")
    assert only(link)["type"] == "pong"
    say(session, action="subscribe", codes=["A"], colour="red", fields=None)
    counter.answer_all()
    assert link.take()[0]["type"] == "ack"


# The rate of requests


def test_requests_over_the_rate_are_refused_with_the_time_to_wait() -> None:
    counter = Counter()
    session, link = counter.open()
    for _ in range(10):
        say(session, action="ping")
    assert [message["type"] for message in link.take()] == ["pong"] * 10
    say(session, action="ping", id=11)
    said = only(link)
    assert (said["error"], said["retryable"], said["retry_after_ms"]) == ("rate_limited", True, 100)
    assert (said["id"], said["action"]) == (11, "ping")
    counter.now_ms += said["retry_after_ms"]
    say(session, action="ping")
    assert only(link)["type"] == "pong"


def test_a_refused_message_needs_not_be_readable() -> None:
    counter = Counter(requests_per_s=2.0)
    session, link = counter.open()
    for _ in range(2):
        say(session, action="ping")
    link.take()
    for text in ("nonsense", "[]", '{"id":[1],"action":"ping"}', '{"action":"fly","id":7}'):
        session.receive(text)
        assert only(link)["error"] == "rate_limited"


def test_a_refused_request_is_not_carried_out() -> None:
    counter = Counter(requests_per_s=2.0)
    session, _ = counter.open()
    for _ in range(2):
        say(session, action="ping")
    say(session, action="subscribe", codes=["A"])
    assert not counter.watches


def test_who_goes_on_over_the_rate_for_ten_seconds_is_closed() -> None:
    counter = Counter()
    session, link = counter.open()
    for _ in range(11):
        say(session, action="ping")
    began = counter.now_ms
    while not link.closes and counter.now_ms < began + 60_000:
        counter.now_ms += 50  # twice the rate
        say(session, action="ping")
    assert link.closes == [(4429, "rate_limited")]
    assert 10_000 <= counter.now_ms - began <= 10_200
    assert link.messages[-1]["error"] == "rate_limited"


def test_who_keeps_to_the_rate_is_never_refused() -> None:
    counter = Counter()
    session, link = counter.open()
    for _ in range(1000):
        counter.now_ms += 100
        say(session, action="ping")
    assert {message["type"] for message in link.take()} == {"pong"}


def test_who_rests_after_a_burst_is_forgiven() -> None:
    counter = Counter()
    session, link = counter.open()
    for _ in range(30):
        for _ in range(15):
            say(session, action="ping")
        counter.now_ms += 2000
    assert link.closes == []
    assert sum(message["type"] == "pong" for message in link.messages) == 300


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 1.5])
def test_a_slow_rate_lets_the_first_request_through(rate: float) -> None:
    counter = Counter(requests_per_s=rate)
    session, link = counter.open()
    say(session, action="ping")
    assert only(link)["type"] == "pong"


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_at_a_slow_rate_too_who_goes_on_is_closed_and_who_waits_is_not(rate: float) -> None:
    counter = Counter(requests_per_s=rate)
    patient, patient_link = counter.open("n.0.1")
    hasty, hasty_link = counter.open("n.0.2")
    for _ in range(400):
        counter.now_ms += round(100 / rate)
        say(hasty, action="ping")
        if hasty_link.closes:
            break
    assert hasty_link.closes == [(4429, "rate_limited")]
    for _ in range(20):
        counter.now_ms += round(1000 / rate)
        say(patient, action="ping")
    assert {message["type"] for message in patient_link.messages} == {"pong"}


def test_a_clock_that_is_set_back_locks_nobody_out() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="ping")
    counter.now_ms -= 3_600_000
    for _ in range(5):
        say(session, action="ping")
    counter.now_ms += 1000
    say(session, action="ping")
    assert {message["type"] for message in link.take()} == {"pong"}
    assert link.closes == []


# While main's answer is under way


def test_requests_are_carried_out_in_the_order_in_which_they_came() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", id=1, codes=["A"])
    say(session, action="ping", id=2)
    say(session, action="subscribe", id=3, codes=["B"])
    say(session, action="list", id=4)
    say(session, action="unsubscribe", id=5, codes=["A"])
    assert link.messages == []
    counter.answer(counter.watches.popleft())
    assert [message.get("id") for message in link.messages] == [1, None, 2]
    assert len(counter.watches) == 1
    counter.answer(counter.watches.popleft())
    assert [message.get("id") for message in link.messages] == [1, None, 2, 3, None, 4, 5]
    listed = link.messages[5]["subscriptions"]
    assert [entry["code"] for entry in listed] == ["A", "B"]
    assert link.holds == [True, True, False]


def test_the_client_is_not_read_while_main_is_asked() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", codes=["A"])
    assert link.holds == [True]
    counter.answer_all()
    assert link.holds == [True, False]


def test_waiting_requests_spend_the_rate_too() -> None:
    counter = Counter(requests_per_s=3.0)
    session, link = counter.open()
    say(session, action="subscribe", id=0, codes=["A"])
    for n in range(1, 5):
        say(session, action="ping", id=n)
    counter.answer_all()
    said = [message for message in link.take() if message["type"] in ("pong", "error")]
    assert [message["type"] for message in said] == ["pong", "pong", "error", "error"]


def test_an_answer_that_comes_after_the_close_is_given_back() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", codes=["A", "B"])
    say(session, action="ping")
    session.close()
    assert counter.unwatched == []
    counter.answer_all()
    assert link.messages == []
    assert sorted(counter.unwatched) == ["A", "B"]
    assert counter.desk.subscriptions.channels == {}


def test_a_look_that_is_answered_after_the_close_is_harmless() -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="snapshot", codes=["A"])
    session.close()
    counter.answer_all()
    assert link.messages == []
    assert counter.desk.subscriptions.channels == {}


def test_a_closed_session_says_and_hears_nothing() -> None:
    counter = Counter()
    session, link = subscribed(counter, "A", "B")
    session.close()
    session.close()
    assert sorted(counter.unwatched) == ["A", "B"]
    say(session, action="ping")
    session.say_merging()
    session.say_closing(1000)
    session.outbox.write(b"\x81\x02{}")
    assert link.messages == []
    assert counter.desk.subscriptions.count == 0


def test_the_first_of_two_may_leave_while_the_second_waits_for_the_same_code() -> None:
    counter = Counter()
    first, _ = counter.open("n.0.1")
    second, second_link = counter.open("n.0.2")
    say(first, action="subscribe", codes=["A"])
    say(second, action="subscribe", codes=["A"])
    first_question, second_question = counter.watches
    counter.answer(first_question)
    say(first, action="unsubscribe", codes=["A"])
    assert counter.unwatched == []
    counter.answer(second_question)
    assert [message["type"] for message in second_link.take()] == ["ack", "snapshot"]
    say(second, action="unsubscribe", codes=["A"])
    assert counter.unwatched == ["A"]


def test_a_fault_of_ours_in_an_answer_closes_only_this_session(caplog: pytest.LogCaptureFixture) -> None:
    counter = Counter()
    session, link = counter.open()
    say(session, action="subscribe", codes=["A"])
    question = counter.watches.popleft()

    def fail(fd: str) -> None:
        raise RuntimeError("a bug")

    counter.desk.subscribed = fail
    counter.answer(question)
    assert link.closes == [(1011, "internal")]
    assert "could not be finished" in caplog.text


# The claims, as a model: main is far away, sessions come and go

CODES = ("A", "B", "C")


class Chain:
    """A session of the model with what its client has concluded."""

    def __init__(self, machine: "MainMachine", fd: str) -> None:
        self.machine = machine
        self.subscribed: dict[str, int | None] = {}
        self.asked: deque[tuple[int, str, set[str]]] = deque()
        self.next_id = 0
        self.session = Session(fd, self, machine.desk)

    def wants(self, code: str) -> bool:
        """Whether it is to get ticks of this code; requests behind the one under way do not count yet."""
        if self.session.is_closed:
            return False
        _, action, codes = self.asked[0] if self.asked else (0, "", set())
        if action == "subscribe" and code in codes:
            return True
        return code in self.subscribed and not (action == "unsubscribe" and code in codes)

    def request(self, action: str, codes: set[str], **options: Any) -> None:
        self.next_id += 1
        self.asked.append((self.next_id, action, codes))
        say(self.session, action=action, id=self.next_id, codes=sorted(codes), **options)

    def write(self, frame: bytes) -> None:
        message = message_of(frame)
        if message["type"] == "ack":
            request_id, action, codes = self.asked.popleft()
            assert (message["id"], message["action"]) == (request_id, action)
            if action == "subscribe":
                for code in codes:
                    self.subscribed.setdefault(code, None)
            elif action == "unsubscribe":
                assert set(message["removed"]) == codes & set(self.subscribed)
                for code in codes:
                    self.subscribed.pop(code, None)
            return
        for row in message["data"]:
            code, seq = row["code"], row["seq"]
            if message["type"] == "snapshot":
                assert seq >= (self.machine.seen.get((self, code), 0))
                if code in self.subscribed:
                    self.subscribed[code] = seq
            else:
                assert seq > self.machine.seen.get((self, code), 0)
                before = self.subscribed[code]
                assert row.get("prev") == before
                self.subscribed[code] = seq
            self.machine.seen[self, code] = seq

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...


class MainMachine(RuleBasedStateMachine):
    """Main takes questions in order, some time; what it sends arrives in order, some time."""

    def __init__(self) -> None:
        super().__init__()
        self.up: deque[tuple[str, Any, Any]] = deque()
        self.down: deque[tuple[str, Any, Any]] = deque()
        self.board = dict.fromkeys(CODES, 0)
        self.wanted: set[str] = set()  # what main sends
        self.seen: dict[tuple[Chain, str], int] = {}
        self.chains: list[Chain] = []
        self.subscriptions = Subscriptions()
        self.desk = Desk(
            subscriptions=self.subscriptions,
            limits=Limits(codes=10, codes_per_request=10, requests_per_s=1e9, message_bytes=10_000),
            server="test", epoch="e", heartbeat_ms=5000,
            watch=lambda codes, books, since, then: self.up.append(("watch", list(codes), then)),
            look=lambda codes, then: self.up.append(("look", list(codes), then)),
            unwatch=self.unwatch, subscribed=lambda fd: None, clock_ms=lambda: 1000,
        )  # fmt: skip

    @initialize()
    def start(self) -> None:
        self.chains = [Chain(self, f"n.0.{n}") for n in range(3)]

    def unwatch(self, codes: Iterable[str]) -> None:
        codes = list(codes)
        for code in codes:
            assert not any(chain.wants(code) for chain in self.chains), f"{code} is given up but still wanted"
        self.up.append(("unwatch", codes, None))

    def row(self, code: str) -> bytes | None:
        return orjson.dumps({"code": code, "seq": self.board[code]}) if self.board[code] else None

    sets = st.sets(st.sampled_from(CODES), min_size=1)

    @rule(who=st.integers(0, 2), codes=sets, snapshot=st.booleans())
    def subscribe(self, who: int, codes: set[str], snapshot: bool) -> None:
        self.chains[who].request("subscribe", codes, snapshot=snapshot)

    @rule(who=st.integers(0, 2), codes=sets)
    def unsubscribe(self, who: int, codes: set[str]) -> None:
        self.chains[who].request("unsubscribe", codes)

    @rule(who=st.integers(0, 2), codes=sets)
    def snapshot(self, who: int, codes: set[str]) -> None:
        self.chains[who].request("snapshot", codes)

    @rule(who=st.integers(0, 2))
    def reconnect(self, who: int) -> None:
        """One client goes, another comes."""
        gone = self.chains[who]
        self.chains[who] = Chain(self, f"{gone.session.fd}+")
        gone.session.close()

    @rule(code=st.sampled_from(CODES), times=st.integers(1, 3))
    def tick(self, code: str, times: int) -> None:
        for _ in range(times):
            self.board[code] += 1
            if code in self.wanted:
                self.down.append(("row", code, (self.board[code], self.row(code))))

    @rule()
    def main_works(self) -> None:
        if not self.up:
            return
        what, codes, then = self.up.popleft()
        if what == "unwatch":
            self.wanted -= set(codes)
            return
        if what == "watch":
            self.wanted |= set(codes)
        self.down.append(("answer", then, Answer({c: (self.board[c], self.row(c), None, "e") for c in codes}, {})))

    @rule()
    def worker_works(self) -> None:
        if not self.down:
            return
        what, subject, facts = self.down.popleft()
        if what == "answer":
            subject(facts)
        else:
            self.offer(subject, *facts)

    def offer(self, code: str, seq: int, bare: bytes) -> None:
        """The hub in its plainest form: what it does is tested elsewhere."""
        channel = self.subscriptions.channels.get(code)
        if channel is None or seq <= channel.seq:
            return
        channel.renew(seq, bare, None)
        lane = channel.plain
        if lane is None:
            return
        outboxes = [(outbox, Row(lane, seq, lane.seq, bare)) for outbox in lane.audience]
        outboxes += [(outbox, Row(lane, seq, base, bare)) for outbox, base in lane.newcomers.items()]
        lane.seq, lane.rows = seq, lane.rows + 1
        lane.audience.update(lane.newcomers)
        lane.newcomers.clear()
        for outbox, sent in outboxes:
            outbox.rows.append(sent)
            outbox.write(outbox.take(1000))

    @precondition(lambda self: self.chains)
    @rule()
    def come_to_rest(self) -> None:
        while self.up or self.down:
            self.main_works()
            self.worker_works()
        for chain in self.chains:
            assert not chain.asked
            for code, last in chain.subscribed.items():
                if last is not None:
                    assert last == self.board[code], "the newest row has not arrived"
        wanted = {code for chain in self.chains for code in chain.subscribed}
        assert self.wanted == wanted == set(self.subscriptions.channels)

    @invariant()
    def what_is_subscribed_has_a_channel(self) -> None:
        for chain in self.chains:
            assert (
                set(chain.subscribed) == set(chain.session.watchlist.subscriptions) <= set(self.subscriptions.channels)
            )

    def teardown(self) -> None:
        if self.chains:
            self.come_to_rest()
            for who in range(3):
                self.reconnect(who)
            self.come_to_rest()
            assert self.wanted == set()
            assert self.subscriptions.channels == {}
            assert self.subscriptions.count == 0


TestSessionsAndAFarAwayMain = MainMachine.TestCase
TestSessionsAndAFarAwayMain.settings = settings(
    deadline=None, derandomize=True, max_examples=120, stateful_step_count=50
)
