"""What a session may have: by whatever request and spelling, and when that changes while it is open."""

from typing import Any

import pytest

from quotepush.auth import Verifier
from quotepush.entitlement import UNLIMITED, Codes, Entitlement
from quotepush.push.session import Session
from quotepush.token_keys import parse_key_set, secret_key
from quotepush.wire.messages import CLOSE_CODES
from tests.support.desk import Counter, RecordingLink, only, say
from tests.support.tokens import KEY, KeyPair, token

SPELLINGS = ["600519.SH", "sh600519", "SH600519", "600519.SS", "600519.xshg", "SSE.600519", "600519"]


def counter(**limits: Any) -> Counter:
    found = Counter(**limits)
    found.desk.verifier = Verifier([secret_key(KEY)], 0, delays=[900])
    for code in ("A", "B", "C", "600519.SH"):
        found.set_row(code, 7)
    return found


def enter(c: Counter, **claims: Any) -> tuple[Session, RecordingLink]:
    session, link = c.open()
    say(session, action="auth", token=token(sub="ann", **claims))
    assert only(link)["type"] == "ack"
    return session, link


def ask(c: Counter, session: Session, link: RecordingLink, *codes: str, **request: Any) -> list[dict[str, Any]]:
    say(session, action=request.pop("action", "subscribe"), codes=list(codes), **request)
    c.answer_all()
    return link.take()


def words(ack: dict[str, Any]) -> list[tuple[str, str]]:
    return [(r["as"], r["error"]) for r in ack["rejected"]]


# Codes


@pytest.mark.parametrize("action", ["subscribe", "snapshot"])
def test_no_spelling_of_a_code_outside_the_permission_is_answered(action: str) -> None:
    c = counter(codes_per_request=20)
    session, link = enter(c, codes=["A", "*.SZ"])
    ack, *rest = ask(c, session, link, *SPELLINGS, "a", "000001", action=action)
    assert words(ack) == [(spelling, "not_entitled") for spelling in SPELLINGS]
    assert [r["code"] for r in ack["accepted"]] == ["A", "000001.SZ"]
    assert all("600519" not in str(message) for message in rest)
    assert not any("600519" in code for code in c.desk.subscriptions.channels)


def test_a_code_that_is_not_allowed_takes_no_room_and_is_not_asked_of_main() -> None:
    c = counter(codes=2)
    c.unknown = {"B"}
    session, link = enter(c, codes=["A", "C"])
    say(session, action="subscribe", codes=["B", "A", "C"])
    assert [question.codes for question in c.watches] == [["A", "C"]]
    c.answer_all()
    assert words(link.take()[0]) == [("B", "not_entitled")]


def test_a_bad_code_is_called_bad_and_not_forbidden() -> None:
    c = counter()
    session, link = enter(c, codes=[])
    assert words(ask(c, session, link, "no such", "A")[0]) == [("no such", "bad_code"), ("A", "not_entitled")]


def test_resuming_is_no_way_around() -> None:
    c = counter()
    c.missed["A"] = [(8, b'{"code":"A","seq":8,"ts":1}')]
    session, link = enter(c, codes=["B"])
    messages = ask(c, session, link, "a", epoch="epoch-1", since={"A": 7, "a": 7})
    assert words(messages[0]) == [("a", "not_entitled")]
    assert [message["type"] for message in messages] == ["ack"]


# Limits


def test_hello_and_the_ack_of_auth_say_what_holds_for_this_connection() -> None:
    c = counter()
    session, link = c.open()
    session.greet()
    assert only(link)["limits"] == c.desk.limits.as_said()
    say(session, action="auth", token=token(sub="ann", max_rate=2, max_codes=3))
    assert only(link)["limits"] == {**c.desk.limits.as_said(), "codes": 3, "max_rate": 2.0}
    identity = c.desk.identify(token(sub="ann", max_codes=99, max_rate=0.5))
    early, link = Session("n.0.2", RecordingLink(), c.desk, identity=identity), RecordingLink()
    early._link = link
    early.greet()
    hello = only(link)
    assert (hello["auth"], hello["limits"]["codes"], hello["limits"]["max_rate"]) == ("ok", 5, 0.5)


def test_a_token_may_allow_fewer_codes_than_the_server() -> None:
    c = counter()
    session, link = enter(c, max_codes=2)
    ack, _ = ask(c, session, link, "A", "B", "C")
    assert (words(ack), ack["total"], ack["limit"]) == ([("C", "code_limit")], 2, 2)


@pytest.mark.parametrize(("asked", "served"), [(None, 2.0), (5, 2.0), (2, 2.0), (0.5, 0.5)])
def test_no_rate_is_above_that_of_the_token(asked: float | None, served: float) -> None:
    c = counter()
    session, link = enter(c, max_rate=2)
    ask(c, session, link, "A", max_rate=asked)
    assert session.watchlist.subscriptions["A"].lane.shape.max_rate == served
    say(session, action="list")
    assert only(link)["subscriptions"][0]["max_rate"] == served


def test_a_delay_that_is_none_of_the_servers_is_refused() -> None:
    c = counter()
    session, link = c.open()
    say(session, action="auth", token=token(sub="ann", delay_s=901))
    assert "delay_s" in only(link)["message"]
    assert link.closes == [(CLOSE_CODES["auth_failed"], "auth_failed")]


def test_who_has_a_delay_asks_main_for_delayed_codes_only() -> None:
    c = counter()
    session, link = c.open()
    say(session, action="auth", token=token(sub="ann", delay_s=900))
    assert only(link)["limits"]["delay_s"] == 900
    say(session, action="subscribe", codes=["A"])
    (question,) = c.watches
    assert question.codes == ["A~900"]
    c.answer_all()
    say(session, action="snapshot", codes=["A", "B"])
    (question,) = c.looks
    assert question.codes == ["B~900"]
    c.answer_all()
    assert list(c.desk.subscriptions.channels) == ["A~900"]
    assert [code for said in link.take() for code in said.get("codes", ())] == []


def test_another_delay_shows_what_is_watched_anew_behind_the_request_that_waits() -> None:
    c = counter()
    session, link = enter(c)
    ask(c, session, link, "A")
    say(session, action="subscribe", codes=["B"])
    session.entitle(Entitlement(delay_s=900))
    say(session, action="ping", id="p")
    link.take()
    c.answer(c.watches.popleft())
    assert [said["type"] for said in link.take()] == ["ack", "snapshot"]
    assert c.unwatched == ["A", "B"]
    (question,) = c.watches
    assert question.codes == ["A~900", "B~900"]
    c.answer_all()
    assert [said["type"] for said in link.take()] == ["snapshot", "pong"]
    assert list(c.desk.subscriptions.channels) == ["A~900", "B~900"]

    session.entitle(Entitlement())
    c.answer_all()
    assert list(c.desk.subscriptions.channels) == ["A", "B"]
    session.close()
    assert not c.desk.subscriptions.channels
    assert c.unwatched[-2:] == ["A", "B"]


# Without a token


def test_who_is_anonymous_has_limits_of_his_own_and_all_the_time() -> None:
    c = counter()
    c.desk.anonymous = Entitlement(codes=Codes(["A"]), max_codes=1, max_rate=1.0)
    session, link = c.open()
    session.greet()
    hello = only(link)
    assert (hello["auth"], hello["limits"]["codes"], hello["limits"]["max_rate"]) == ("optional", 1, 1.0)
    assert words(ask(c, session, link, "B", "A")[0]) == [("B", "not_entitled")]
    session.check_identity(c.now_ms + 86_400_000)
    assert not link.closes
    say(session, action="auth", token=token(sub="ann"))
    assert only(link)["limits"] == c.desk.limits.as_said()
    assert words(ask(c, session, link, "B")[0]) == []
    assert session.watchlist.subscriptions["A"].lane.shape.max_rate is None


def test_a_bad_token_does_not_make_anybody_anonymous() -> None:
    c = counter()
    c.desk.anonymous = UNLIMITED
    session, link = c.open()
    say(session, action="auth", token=token("x" * 32, sub="ann"))
    assert link.closes == [(CLOSE_CODES["auth_failed"], "auth_failed")]


# Changes


def test_a_newer_token_takes_effect_on_what_is_subscribed() -> None:
    c = counter()
    session, link = enter(c, codes=["A", "B", "C"])
    ask(c, session, link, "C", "A", "B")
    say(session, action="auth", id=9, token=token(sub="ann", codes=["A", "600519"]))
    ack, status = link.take()
    assert (ack["type"], ack["id"]) == ("ack", 9)
    assert status == {
        "type": "status", "time": c.now_ms, "scope": "codes", "state": "not_entitled", "codes": ["C", "B"]
    }  # fmt: skip
    assert list(session.watchlist.subscriptions) == ["A"]
    assert sorted(c.unwatched) == ["B", "C"] and c.touched[-1] == session.fd
    assert words(ask(c, session, link, "b", "sh600519")[0]) == [("b", "not_entitled")]


def test_codes_beyond_a_lower_limit_go_the_newest_first() -> None:
    c = counter()
    session, link = enter(c)
    for code in ("A", "B", "C"):
        ask(c, session, link, code)
    session.entitle(Entitlement(codes=Codes(["B", "C"]), max_codes=1))
    limits, forbidden, beyond = link.take()
    assert (limits["scope"], limits["state"], limits["limits"]["codes"]) == ("connection", "limits", 1)
    assert (forbidden["state"], forbidden["codes"]) == ("not_entitled", ["A"])
    assert (beyond["state"], beyond["codes"]) == ("code_limit", ["C"])
    assert list(session.watchlist.subscriptions) == ["B"]


def test_a_change_that_takes_nothing_away_says_nothing() -> None:
    c = counter()
    session, link = enter(c)
    ask(c, session, link, "A", "B")
    session.entitle(Entitlement(codes=Codes(["*"]), groups=("g",)))
    session.entitle(Entitlement(codes=Codes(["A", "B"])))
    assert link.take() == [] and not c.unwatched


def test_rates_are_held_down_and_let_go_to_what_was_asked_for() -> None:
    c = counter()
    session, link = enter(c)

    def rates() -> list[float | None]:
        return [s.lane.shape.max_rate for s in session.watchlist.subscriptions.values()]

    ask(c, session, link, "A")
    ask(c, session, link, "B", max_rate=5)
    ask(c, session, link, "C", max_rate=0.5)
    session.entitle(Entitlement(max_rate=1.0))
    assert rates() == [1.0, 1.0, 0.5]
    session.entitle(Entitlement(max_rate=4.0))
    assert rates() == [4.0, 4.0, 0.5]
    ask(c, session, link, "A", max_rate=3)
    say(session, action="unsubscribe", codes=["B"])
    ask(c, session, link, "B", max_rate=1)
    session.entitle(UNLIMITED)
    assert rates() == [3.0, 0.5, 1.0]
    ask(c, session, link, "A")
    assert rates() == [None, 0.5, 1.0]


def test_a_row_that_was_not_sent_comes_when_the_rate_is_let_go() -> None:
    c = counter()
    session, link = enter(c, max_rate=1)
    ask(c, session, link, "A", "B")
    channel = c.desk.subscriptions.channels["A"]
    channel.renew(8, b'{"code":"A","seq":8,"ts":1,"last":8.0}', None)
    session.entitle(UNLIMITED)
    assert c.delivered == ["A"]


def test_a_change_while_main_is_asked_holds_for_its_answer() -> None:
    c = counter()
    session, link = enter(c)
    ask(c, session, link, "A")
    say(session, action="subscribe", id=1, codes=["sh600519", "B", "C"])
    session.entitle(Entitlement(codes=Codes(["A", "B", "C"]), max_codes=2, max_rate=3.0))
    link.take()
    c.answer_all()
    ack, snapshot = link.take()
    assert words(ack) == [("sh600519", "not_entitled"), ("C", "code_limit")]
    assert [row["code"] for row in snapshot["data"]] == ["B"]
    assert [s.lane.shape.max_rate for s in session.watchlist.subscriptions.values()] == [3.0, 3.0]
    assert sorted(c.desk.subscriptions.channels) == ["A", "B"]
    say(session, action="snapshot", codes=["C", "600519"])
    session.entitle(Entitlement(codes=Codes(["C"])))
    c.answer_all()
    assert words(next(m for m in link.take() if m["type"] == "ack")) == [("600519", "not_entitled")]


def test_a_session_that_is_over_is_entitled_to_nothing_more() -> None:
    c = counter()
    session, link = enter(c)
    ask(c, session, link, "A")
    session.close()
    session.entitle(Entitlement(codes=Codes([])))
    assert link.take() == []


# Keys that are not known yet


def test_a_token_of_a_new_key_waits_for_it_and_so_does_what_comes_behind() -> None:
    c = counter()
    old, new = KeyPair("ES256"), KeyPair("ES256")
    verifier = c.desk.verifier = Verifier(parse_key_set(old.jwks(kid="old")))
    waiting: list[Any] = []
    c.desk.renew_keys = waiting.append
    session, link = c.open()
    say(session, action="auth", id=1, token=new.token(sub="ann", kid="new"))
    say(session, action="subscribe", id=2, codes=["A"])
    assert not link.messages and link.holds == [True]
    verifier.renew(parse_key_set(new.jwks(kid="new")))
    waiting.pop()()
    c.answer_all()
    assert [(m["type"], m.get("id")) for m in link.take()] == [("ack", 1), ("ack", 2), ("snapshot", None)]
    assert link.holds[-1] is False


def test_a_token_of_a_key_that_nobody_knows_closes_the_connection_behind_the_question() -> None:
    c = counter()
    c.desk.verifier = Verifier(parse_key_set(KeyPair("ES256").jwks(kid="old")))
    session, link = c.open()
    say(session, action="auth", id=1, token=KeyPair("ES256").token(sub="ann", kid="new"))
    message = only(link)
    assert (message["error"], message["id"], message["action"]) == ("auth_failed", 1, "auth")
    assert link.closes == [(CLOSE_CODES["auth_failed"], "auth_failed")]


def test_a_session_may_end_while_keys_are_asked_for() -> None:
    c = counter()
    c.desk.verifier = Verifier(parse_key_set(KeyPair("ES256").jwks(kid="old")))
    waiting: list[Any] = []
    c.desk.renew_keys = waiting.append
    session, link = c.open()
    say(session, action="auth", token=KeyPair("ES256").token(sub="ann", kid="new"))
    session.check_identity(c.now_ms + 60_000)
    assert link.closes == [(CLOSE_CODES["auth_timeout"], "auth_timeout")]
    session.close()
    waiting.pop()()
    assert session.identity is None
