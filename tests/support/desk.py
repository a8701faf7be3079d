"""A worker's desk whose main answers when the test says so, and sessions at it whose link remembers what they say."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.session import Session
from quotepush.push.subscriptions import Subscriptions


def message_of(frame: bytes) -> dict[str, Any]:
    length = frame[1]
    at = 2 if length < 126 else 4 if length == 126 else 10
    message: dict[str, Any] = orjson.loads(frame[at:])
    return message


class RecordingLink:
    """Remembers what the session says and does."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.closes: list[tuple[int, str]] = []
        self.holds: list[bool] = []

    def write(self, data: bytes) -> None:
        assert not self.closes, "written after the close"
        self.messages.append(message_of(data))

    def close(self, code: int, reason: str) -> None:
        self.closes.append((code, reason))

    def hold_requests(self, hold: bool) -> None:
        self.holds.append(hold)

    def take(self) -> list[dict[str, Any]]:
        found, self.messages = self.messages, []
        return found


class Question:
    """What main has been asked and has not answered yet."""

    def __init__(
        self,
        codes: Sequence[str],
        books: bool,
        then: Callable[[Answer], None],
        since: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        self.codes = list(codes)
        self.books = books
        self.then = then
        self.since = dict(since or {})


class Counter:
    """A desk whose main answers when the test says so, and a clock that moves when the test says so."""

    def __init__(self, **limits: Any) -> None:
        self.now_ms = 1_000_000
        self.watches: deque[Question] = deque()
        self.looks: deque[Question] = deque()
        self.unwatched: list[str] = []
        self.touched: list[str] = []
        self.delivered: list[str] = []
        self.rows: dict[str, tuple[int, bytes | None]] = {}
        self.books: dict[str, bytes] = {}
        self.unknown: set[str] = set()
        self.epochs: dict[str, str] = {}  # of codes with an epoch of their own
        self.missed: dict[str, list[tuple[int, bytes]]] = {}
        self.stale: set[str] = set()
        self.desk = Desk(
            subscriptions=Subscriptions(),
            limits=Limits(
                **{"codes": 5, "codes_per_request": 10, "requests_per_s": 10.0, "message_bytes": 10_000, **limits}
            ),
            server="0.0.1",
            epoch="epoch-1",
            heartbeat_ms=5000,
            watch=lambda codes, books, since, then: self.watches.append(Question(codes, books, then, since)),
            look=lambda codes, then: self.looks.append(Question(codes, False, then)),
            unwatch=self.unwatched.extend,
            subscribed=self.touched.append,
            clock_ms=lambda: self.now_ms,
            deliver=lambda lane, outbox, restated: self.delivered.append(lane.channel.code),
        )

    def set_row(self, code: str, seq: int) -> None:
        self.rows[code] = (seq, orjson.dumps({"code": code, "seq": seq, "ts": 1, "last": float(seq)}))

    def answer(self, question: Question) -> None:
        refused = {code: "unknown_code" for code in question.codes if code in self.unknown}
        known = [code for code in question.codes if code not in refused]
        books = {code: self.books.get(code, b"{}") if question.books else None for code in known}
        rows = {
            code: (*self.rows.get(code, (0, None)), books[code], self.epochs.get(code, "epoch-1")) for code in known
        }
        missed = {code: self.missed[code] for code in question.since if code in self.missed}
        question.then(Answer(rows, refused, missed, self.stale))

    def answer_all(self) -> None:
        while self.watches or self.looks:
            self.answer(self.watches.popleft() if self.watches else self.looks.popleft())

    def open(self, fd: str = "n.0.1") -> tuple[Session, RecordingLink]:
        link = RecordingLink()
        return Session(fd, link, self.desk), link


def say(session: Session, **request: Any) -> None:
    session.receive(orjson.dumps(request).decode())


def only(link: RecordingLink) -> dict[str, Any]:
    (message,) = link.take()
    return message


def subscribed(counter: Counter, *codes: str) -> tuple[Session, RecordingLink]:
    session, link = counter.open()
    say(session, action="subscribe", codes=list(codes))
    counter.answer_all()
    link.take()
    return session, link
