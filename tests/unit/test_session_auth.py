"""What a session without a token may do, how it gets one, renews it and loses it."""

from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest

from quotepush.auth import Verifier
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.session import Session
from quotepush.push.subscriptions import Subscriptions
from quotepush.token_keys import secret_key
from quotepush.wire.formats import CODECS, JSON, Codec
from quotepush.wire.messages import CLOSE_CODES
from tests.support.tokens import KEY, token

NOW_S = 1_800_000_000
ASKS = [
    {"action": "subscribe", "codes": ["A"]},
    {"action": "unsubscribe", "codes": ["*"]},
    {"action": "list"},
    {"action": "snapshot", "codes": ["A"]},
]


class Link:
    """Remembers what the session says and does."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.said: list[dict[str, Any]] = []
        self.raw = b""
        self.closes: list[tuple[int, str]] = []
        self.session: Session

    def write(self, data: bytes) -> None:
        assert not self.closes, "written after the close"
        self.raw += data
        length = data[1]
        body = data[2 if length < 126 else 4 :]
        self.said.append(self._codec.decode(body if self._codec.is_binary else body.decode()))

    def close(self, code: int, reason: str) -> None:
        self.closes.append((code, reason))
        self.session.close()

    def hold_requests(self, hold: bool) -> None: ...

    def take(self) -> dict[str, Any]:
        """The one thing it has said since."""
        (message,) = self.said
        self.said = []
        return message


class Room:
    """A desk whose main answers at once, or when told, and whose clock moves when told."""

    def __init__(self, *, key: str = KEY, leeway_s: float = 0, auth_timeout_ms: int = 10_000) -> None:
        self.now_ms = NOW_S * 1000
        self.questions: list[tuple[Sequence[str], Callable[[Answer], None]]] = []
        self.answers_at_once = True
        self.unwatched: list[str] = []
        self.desk = Desk(
            subscriptions=Subscriptions(), limits=Limits(5, 10, 10.0, 10_000), server="0", epoch="e",
            heartbeat_ms=5000, watch=lambda codes, books, since, then: self._ask(codes, then), look=self._ask,
            unwatch=self.unwatched.extend, subscribed=lambda fd: None, clock_ms=lambda: self.now_ms,
            verifier=Verifier([secret_key(key)], leeway_s) if key else None, auth_timeout_ms=auth_timeout_ms,
        )  # fmt: skip

    def _ask(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        self.questions.append((codes, then))
        if self.answers_at_once:
            self.answer()

    def answer(self) -> None:
        codes, then = self.questions.pop()
        then(Answer(dict.fromkeys(codes, (0, None, None, "")), {}))

    def open(self, handshake: str | None = None, codec: Codec = JSON) -> tuple[Session, Link]:
        link = Link(codec)
        identity = None if handshake is None else self.desk.identify(handshake)
        link.session = Session("n.0.1", link, self.desk, codec, identity)
        return link.session, link


def say(session: Session, **request: Any) -> None:
    session.receive(orjson.dumps(request).decode())


def logged_in(room: Room, **claims: Any) -> tuple[Session, Link]:
    """A session that has sent a token of ``ann`` and subscribed to A."""
    session, link = room.open()
    say(session, action="auth", token=token(sub="ann", **claims))
    say(session, action="subscribe", codes=["A"])
    assert [message["type"] for message in link.said] == ["ack", "ack", "snapshot"]
    link.said = []
    return session, link


def assert_closed(link: Link, error: str) -> dict[str, Any]:
    """It has been told why, then closed with the word's own code; return what it was told."""
    message = link.said[-1]
    assert (message["type"], message["error"], message["retryable"]) == ("error", error, False)
    assert link.closes == [(CLOSE_CODES[error], error)]
    assert link.session.is_closed
    return message


# Hello


def test_hello_says_what_this_server_wants() -> None:
    for room, handshake, auth in (
        (Room(key=""), None, "none"),
        (Room(key=""), token(sub="ann"), "none"),
        (Room(), None, "required"),
        (Room(), token(sub="ann"), "ok"),
        (Room(), token(), "ok"),
    ):
        session, link = room.open(handshake)
        session.greet()
        assert link.take()["auth"] == auth


# Without a key


@pytest.mark.parametrize("said", ["a secret", token(sub="ann"), "", None, 7])
def test_a_server_without_a_key_takes_no_tokens_and_asks_for_none(said: Any) -> None:
    room = Room(key="")
    session, link = room.open()
    say(session, action="auth", id=9, token=said)
    answer = link.take()
    assert (answer["error"], answer["id"], answer["action"]) == ("bad_request", 9, "auth")
    room.now_ms += 86_400_000
    session.check_identity(room.now_ms)
    say(session, action="list")
    assert link.take()["type"] == "ack"
    assert not link.closes


# Before the token


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask["action"])
def test_nothing_is_done_without_a_token(ask: dict[str, Any]) -> None:
    room = Room()
    session, link = room.open()
    say(session, id=3, **ask)
    answer = link.take()
    assert (answer["type"], answer["error"], answer["id"]) == ("error", "not_authenticated", 3)
    assert (answer["action"], answer["retryable"]) == (ask["action"], False)
    assert not (link.closes or room.questions or session.watchlist.subscriptions or room.desk.subscriptions.channels)


def test_a_ping_needs_no_token() -> None:
    session, link = Room().open()
    say(session, action="ping", id=1)
    assert link.take()["type"] == "pong"


def test_asking_without_a_token_costs_requests_like_any_other() -> None:
    session, link = Room().open()
    for _ in range(11):
        say(session, action="list")
    assert [message["error"] for message in link.said] == ["not_authenticated"] * 10 + ["rate_limited"]


@pytest.mark.parametrize("said", [None, 7, True, ["a.b.c"], {"a": 1}])
def test_a_token_that_is_no_text_is_a_bad_request(said: Any) -> None:
    session, link = Room().open()
    say(session, action="auth", token=said)
    assert link.take()["error"] == "bad_request"
    assert not link.closes


# The token


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.language)
def test_a_good_token_opens_everything(codec: Codec) -> None:
    room = Room()
    session, link = room.open(codec=codec)
    message = codec.frame({"action": "auth", "id": 1, "token": token(sub="ann", exp=NOW_S + 60)})
    body = message[2 if message[1] < 126 else 4 :]
    session.receive(body if codec.is_binary else body.decode())
    assert link.take() == {
        "type": "ack", "id": 1, "action": "auth", "time": room.now_ms, "expires": (NOW_S + 60) * 1000,
        "limits": dict(room.desk.limits.as_said()),
    }  # fmt: skip
    assert session.identity is not None
    assert session.identity.user == "ann"


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask["action"])
def test_with_a_token_from_the_handshake_everything_is_open_at_once(ask: dict[str, Any]) -> None:
    session, link = Room().open(token(sub="ann"))
    say(session, **ask)
    assert link.said[0]["type"] == "ack"


def test_a_token_without_expiry_has_none_in_its_ack() -> None:
    room = Room()
    session, link = room.open()
    say(session, action="auth", token=token(sub="ann"))
    assert "expires" not in link.take()
    room.now_ms += 10**12
    session.check_identity(room.now_ms)
    assert not link.closes


BAD = {
    "garbage": "a secret",
    "empty": "",
    "unsigned": token("x" * 32, sub="ann"),
    "expired": token(sub="ann", exp=NOW_S),
    "early": token(sub="ann", nbf=NOW_S + 1),
    "nobody": token(sub=7),
    "large": "x" * 8193,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_closes_the_connection(bad: str) -> None:
    session, link = Room().open()
    say(session, action="auth", id="x", token=BAD[bad])
    message = assert_closed(link, "auth_failed")
    assert (message["id"], message["action"]) == ("x", "auth")
    say(session, action="auth", token=token(sub="ann"))
    assert len(link.said) == 1
    assert session.identity is None


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_token_closes_a_connection_that_had_a_good_one(bad: str) -> None:
    room = Room()
    session, link = logged_in(room)
    say(session, action="auth", token=BAD[bad])
    assert_closed(link, "auth_failed")
    assert room.unwatched == ["A"]


def test_no_answer_repeats_a_token() -> None:
    room = Room()
    for text in (*BAD.values(), token(sub="ann"), token(sub="bob")):
        session, link = room.open(token(sub="ann"))
        session.greet()
        say(session, action="auth", id=1, token=text)
        say(session, action="auth", id=1, token=[text])
        for part in text.split("."):
            assert len(part) < 5 or part.encode() not in link.raw


# Renewal


def test_a_newer_token_of_the_same_user_moves_the_expiry_and_keeps_the_rest() -> None:
    room = Room()
    session, link = logged_in(room, exp=NOW_S + 60)
    room.now_ms += 50_000
    say(session, action="auth", id=2, token=token(sub="ann", exp=NOW_S + 120))
    assert link.take()["expires"] == (NOW_S + 120) * 1000
    assert list(session.watchlist.subscriptions) == ["A"]
    room.now_ms = (NOW_S + 119) * 1000
    session.check_identity(room.now_ms)
    assert not link.closes
    room.now_ms += 1000
    session.check_identity(room.now_ms)
    assert_closed(link, "auth_failed")


def test_the_newest_token_counts_also_when_it_ends_sooner() -> None:
    room = Room()
    session, link = logged_in(room)
    say(session, action="auth", token=token(sub="ann", exp=NOW_S + 1))
    room.now_ms += 1000
    session.check_identity(room.now_ms)
    assert_closed(link, "auth_failed")


@pytest.mark.parametrize(("first", "other"), [("ann", "bob"), ("ann", None), (None, "ann"), ("ann", "Ann")])
def test_another_users_token_changes_nothing(first: str | None, other: str | None) -> None:
    def of(user: str | None, exp: int) -> str:
        return token(exp=exp, **({} if user is None else {"sub": user}))

    room = Room()
    session, link = room.open(of(first, NOW_S + 60))
    say(session, action="auth", id=5, token=of(other, NOW_S + 3600))
    answer = link.take()
    assert (answer["error"], answer["id"], link.closes) == ("already_authenticated", 5, [])
    assert session.identity is not None
    assert (session.identity.user, session.identity.expires_ms) == (first, (NOW_S + 60) * 1000)
    room.now_ms += 60_000
    session.check_identity(room.now_ms)
    assert_closed(link, "auth_failed")


def test_nobody_in_particular_can_be_renewed_too() -> None:
    session, link = Room().open(token(exp=NOW_S + 60))
    say(session, action="auth", token=token(exp=NOW_S + 120))
    assert link.take()["expires"] == (NOW_S + 120) * 1000


# The end


@pytest.mark.parametrize("leeway_s", [0, 5, 60])
def test_a_token_that_has_expired_closes_its_connection(leeway_s: int) -> None:
    room = Room(leeway_s=leeway_s)
    session, link = logged_in(room, exp=NOW_S + 60)
    session.check_identity((NOW_S + 60 + leeway_s) * 1000 - 1)
    assert not link.closes
    session.check_identity((NOW_S + 60 + leeway_s) * 1000)
    assert assert_closed(link, "auth_failed")["message"] == "the token has expired"
    assert room.unwatched == ["A"]
    session.check_identity((NOW_S + 99) * 1000)
    assert len(link.closes) == 1


def test_who_sends_no_token_in_time_is_closed() -> None:
    room = Room(auth_timeout_ms=3000)
    session, link = room.open()
    say(session, action="ping")
    link.take()
    session.check_identity(room.now_ms + 2999)
    assert not link.closes
    session.check_identity(room.now_ms + 3000)
    assert_closed(link, "auth_timeout")


def test_who_has_sent_a_token_in_time_stays() -> None:
    room = Room(auth_timeout_ms=3000)
    session, link = logged_in(room)
    session.check_identity(room.now_ms + 1_000_000)
    assert not link.closes


def test_a_token_may_expire_while_main_is_asked() -> None:
    room = Room()
    session, link = logged_in(room, exp=NOW_S + 60)
    room.answers_at_once = False
    say(session, action="subscribe", codes=["B"])
    say(session, action="auth", token=token(sub="ann", exp=NOW_S + 600))  # waits behind it
    session.check_identity((NOW_S + 60) * 1000)
    assert_closed(link, "auth_failed")
    room.answer()
    assert sorted(room.unwatched) == ["A", "B"]
    assert room.desk.subscriptions.channels == {}


def test_a_renewal_waits_for_its_turn_like_any_request() -> None:
    room = Room()
    session, link = logged_in(room, exp=NOW_S + 60)
    room.answers_at_once = False
    say(session, action="subscribe", id=1, codes=["B"])
    say(session, action="auth", id=2, token=token(sub="ann"))
    assert not link.said
    room.answer()
    assert [message.get("id") for message in link.said if message["type"] == "ack"] == [1, 2]
    session.check_identity((NOW_S + 60) * 1000)
    assert not link.closes
