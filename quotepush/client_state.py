"""What a client wants, what it knows and what it still has to say: the Python client without its socket.

Laws:

1. Within an epoch a code's ``seq`` only rises on its way out of here, whatever connection a row came by.
2. What is asked of the server follows from what is wanted and what the server has acknowledged on this connection,
   never from the order in which callers came, so a new connection needs no memory of the old one.
3. A queue that is full merges, newest row per code; no code loses its last row.

No asyncio, no socket; time is an argument. :mod:`quotepush.client` does the rest.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from quotepush.quote.code import BadCode, parse_code

__all__ = [
    "Accepted",
    "BadMessage",
    "ClientState",
    "Message",
    "Rejected",
    "Row",
    "RowQueue",
    "SubscribeResult",
    "Wish",
    "decode_message",
    "read_results",
    "refusal_of",
    "results_of",
    "retry_after_ms",
]

Row = dict[str, Any]
"""A row as the server sent it; its fields are in docs/protocol.md, and publishers may add more."""

Message = dict[str, Any]
"""One message of the server, with its ``type``."""

# No server understands a longer code, and an endless one would cost the connection.
_MAX_SPELLING = 128
# What stands in a request beside its codes.
_REQUEST_OVERHEAD_BYTES = 200
_DEFAULT_RETRY_MS = 1000


class BadMessage(ValueError):
    """The server said something that is not quotes.v1. Its argument says what."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A code that the server understood.

    Attributes:
        code: canonical; this is what rows carry.
        spelling: what was asked for.
    """

    code: str
    spelling: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A code that the server refused.

    Attributes:
        spelling: what was asked for.
        error: the word on the wire, e.g. ``bad_code``, ``unknown_code``, ``code_limit``.
        message: one sentence.
    """

    spelling: str
    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.spelling}: {self.error}: {self.message}"


@dataclass(frozen=True, slots=True)
class SubscribeResult:
    """What became of each code, in the order in which they were given."""

    accepted: tuple[Accepted, ...]
    rejected: tuple[Rejected, ...]

    @property
    def codes(self) -> tuple[str, ...]:
        """The canonical codes that were accepted, each once."""
        return tuple(dict.fromkeys(entry.code for entry in self.accepted))


def results_of(outcomes: Iterable[Accepted | Rejected | None]) -> SubscribeResult:
    """Return outcomes as a result; those that are still open are left out."""
    known = list(outcomes)
    return SubscribeResult(
        tuple(o for o in known if isinstance(o, Accepted)), tuple(o for o in known if isinstance(o, Rejected))
    )


class Wish:
    """One spelling that the caller wants rows of.

    Attributes:
        outcome: what the server last said to it; None: nothing yet.
        is_asked: asked for on this connection.
        was_accepted: the server took it once, so it is asked for on every connection.
    """

    __slots__ = ("is_asked", "outcome", "spelling", "was_accepted")

    def __init__(self, spelling: str) -> None:
        self.spelling = spelling
        self.outcome: Accepted | Rejected | None = None
        self.is_asked = False
        self.was_accepted = False


@dataclass(frozen=True, slots=True)
class _Request:
    action: str
    codes: tuple[str, ...]


class ClientState:
    """What one client wants and knows, over all its connections.

    Attributes:
        hello: the server's first message on this connection, or on the last one while there is none.
        is_greeted: there is a connection and the server has said hello.
        rows: newest row per subscribed code.
        merged: per subscribed code how many rows the server merged into newer ones (``seq - prev - 1``).
    """

    def __init__(self) -> None:
        self.hello: Message = {}
        self.is_greeted = False
        self.rows: dict[str, Row] = {}
        self.merged: Counter[str] = Counter()
        self._wishes: dict[str, Wish] = {}  # by spelling
        self._wanted: dict[str, set[str]] = {}  # code, once acknowledged: the spellings it is wanted by
        self._numbered: dict[str, tuple[str, int]] = {}  # code: the epoch that numbers it, newest seq
        self._held: set[str] = set()  # codes that the server sends on this connection
        self._leaving: set[str] = set()  # codes whose unsubscribe has no answer yet
        self._requests: dict[int, _Request] = {}  # without an answer yet, oldest first
        self._last_id = 0
        self._hold_until_s = 0.0

    # What the caller wants

    def want(self, spelling: str) -> Wish:
        """Want a code from now on; return the wish, whose outcome the server will tell."""
        wish = self._wishes.get(spelling)
        if wish is None:
            wish = Wish(spelling)
            if (refusal := refusal_of(spelling)) is not None:
                wish.outcome = refusal
                return wish
            self._wishes[spelling] = wish
        elif isinstance(wish.outcome, Rejected):
            wish.outcome = None
            wish.is_asked = False
        return wish

    def unwant(self, codes: Iterable[str]) -> tuple[str, ...]:
        """Stop wanting codes, in any spelling, ``*`` for all; return the canonical codes that were subscribed."""
        removed: dict[str, None] = {}
        for text in codes:
            for wish in self._wishes_like(text):
                del self._wishes[wish.spelling]
                if wish.outcome is None:
                    wish.outcome = Rejected(wish.spelling, "unsubscribed", "it was unsubscribed before the answer came")
            for code in self._codes_like(text):
                del self._wanted[code]
                removed[code] = None
                self.rows.pop(code, None)
                self._numbered.pop(code, None)
                self.merged.pop(code, None)
        return tuple(removed)

    def is_leaving(self, codes: Iterable[str]) -> bool:
        """Say whether the server still has to acknowledge that one of these codes was dropped."""
        return any((code in self._held or code in self._leaving) and code not in self._wanted for code in codes)

    def _codes_like(self, text: str) -> list[str]:
        if text == "*":
            return list(self._wanted)
        canonical = _canonical(text)
        return [
            code for code, spellings in self._wanted.items() if text in spellings or code in (text, canonical)
        ]  # fmt: skip

    def _wishes_like(self, text: str) -> list[Wish]:
        codes = set(self._codes_like(text))
        canonical = _canonical(text)
        return [
            wish
            for wish in self._wishes.values()
            if text in ("*", wish.spelling)
            or (isinstance(wish.outcome, Accepted) and wish.outcome.code in codes)
            or (wish.outcome is None and _canonical(wish.spelling) == canonical)
        ]

    # What has to be said

    def due_requests(self, now_s: float) -> list[bytes]:
        """Return the requests that bring this connection to what is wanted, as few as its limits allow."""
        if not self.is_greeted or now_s < self._hold_until_s:
            return []
        requests: list[bytes] = []
        # While a subscribe is under way it is not known which code its spelling means: dropping one now could hit it.
        if not any(request.action == "subscribe" for request in self._requests.values()):
            unwanted = [code for code in self._held if code not in self._wanted]
            self._held.difference_update(unwanted)
            self._leaving.update(unwanted)
            requests += [self.ask("unsubscribe", codes=part) for part in self.parts(unwanted)]
        fresh = [wish for wish in self._wishes.values() if not wish.is_asked]
        for wish in fresh:
            wish.is_asked = True
        requests += [self.ask("subscribe", codes=part) for part in self.parts([wish.spelling for wish in fresh])]
        return requests

    def ask(self, action: str, *, codes: Collection[str] = ()) -> bytes:
        """Return a request with a new ``id``, which :attr:`last_id` tells."""
        self._last_id += 1
        self._requests[self._last_id] = _Request(action, tuple(codes))
        request: Message = {"action": action, "id": self._last_id}
        if codes:
            request["codes"] = list(codes)
        return orjson.dumps(request)

    @property
    def last_id(self) -> int:
        """The ``id`` of the newest request."""
        return self._last_id

    def parts(self, codes: Iterable[str]) -> Iterator[list[str]]:
        """Yield codes in parts that one request may hold on this connection."""
        limits = self.hello.get("limits") or {}
        most = max(1, limits.get("codes_per_request") or 1000)
        room = max(1, (limits.get("message_bytes") or 65_536) - _REQUEST_OVERHEAD_BYTES)
        part: list[str] = []
        size = 0
        for code in codes:
            length = len(orjson.dumps(code)) + 1
            if part and (len(part) >= most or size + length > room):
                yield part
                part, size = [], 0
            part.append(code)
            size += length
        if part:
            yield part

    # What the server says

    def greet(self, hello: Message) -> None:
        """Begin a connection with the server's ``hello``."""
        epoch = hello.get("epoch")
        if type(epoch) is not str or type(hello.get("heartbeat_ms")) is not int or hello["heartbeat_ms"] <= 0:
            raise BadMessage("a hello without epoch or heartbeat_ms")
        before = self.hello.get("epoch")
        if epoch != before:
            self._numbered = {code: known for code, known in self._numbered.items() if known[0] != before}
        self.hello = hello
        self.is_greeted = True

    def lose(self) -> None:
        """The connection is gone, and with it whatever was asked or acknowledged on it."""
        self.is_greeted = False
        self._hold_until_s = 0.0
        self._held.clear()
        self._leaving.clear()
        self._requests.clear()
        for wish in self._wishes.values():
            wish.is_asked = False

    def take(self, message: Message) -> list[Row]:  # hot
        """Return the rows of a ``snapshot`` or ``tick`` message that are new, in order.

        Left out are codes that are not subscribed, rows that are not newer than what is known in
        the same epoch, and snapshot rows without a value (``seq`` 0).
        """
        is_snapshot = message["type"] == "snapshot"
        numbered = self._numbered
        epoch: str = self.hello["epoch"]
        fresh: list[Row] = []
        for row in _rows_in(message):
            code, seq = row["code"], row["seq"]
            if code not in self._wanted:
                continue
            known = numbered.get(code)
            if is_snapshot:
                # A code with an epoch of its own says so in each snapshot row, and nowhere else.
                row_epoch = row.get("epoch") or epoch
                if known is not None and known[0] == row_epoch and seq <= known[1]:
                    continue
                numbered[code] = (row_epoch, seq)
                if seq == 0:
                    continue
            else:
                if known is None:
                    known = (epoch, 0)
                if seq <= known[1]:
                    continue
                numbered[code] = (known[0], seq)
                prev = row.get("prev")
                if prev is not None and seq - prev > 1:
                    self.merged[code] += seq - prev - 1
            self.rows[code] = row
            fresh.append(row)
        return fresh

    def acknowledge(self, message: Message) -> list[Rejected]:
        """Take an ``ack`` or ``pong``; return refusals of codes that had been accepted on an earlier connection."""
        request = self._requests.pop(self.request_id(message), None)
        if request is None:
            return []
        if request.action == "unsubscribe":
            self._leaving.difference_update(request.codes)
            return []
        if request.action != "subscribe":
            return []
        results = read_results(message)
        for entry in results.accepted:
            self._held.add(entry.code)
            wish = self._wishes.get(entry.spelling)
            if wish is not None:
                self._accept(wish, entry)
        return self._refuse(request.codes, results.rejected)

    def refuse(self, message: Message, now_s: float) -> float:
        """Take an ``error``; return after how many seconds :meth:`due_requests` has something to say again, or 0."""
        request = self._requests.pop(self.request_id(message), None)
        if request is None or request.action not in ("subscribe", "unsubscribe"):
            return 0.0
        if message.get("retryable"):
            retry_after_s = retry_after_ms(message) / 1000
            self._hold_until_s = now_s + retry_after_s
            if request.action == "unsubscribe":
                self._leaving.difference_update(request.codes)
                self._held.update(request.codes)
            for spelling in request.codes:
                if request.action == "subscribe" and spelling in self._wishes:
                    self._wishes[spelling].is_asked = False
            return retry_after_s
        self._leaving.difference_update(request.codes)
        if request.action == "subscribe":
            word, text = str(message.get("error")), str(message.get("message"))
            self._refuse(request.codes, [Rejected(spelling, word, text) for spelling in request.codes])
        return 0.0

    def request_id(self, message: Message) -> int:
        """Return which request an answer belongs to, 0 for none."""
        answered = message.get("id")
        if answered is None and message.get("error") == "rate_limited":
            # Refused unread, so it cannot name its request; answers come in the order of requests.
            return next(iter(self._requests), 0)
        return answered if type(answered) is int else 0

    def _accept(self, wish: Wish, entry: Accepted) -> None:
        before = wish.outcome
        if isinstance(before, Accepted) and before.code != entry.code:
            spellings = self._wanted.get(before.code, set())
            spellings.discard(wish.spelling)
            if not spellings:
                self._wanted.pop(before.code, None)
        wish.outcome = entry
        wish.was_accepted = True
        self._wanted.setdefault(entry.code, set()).add(wish.spelling)

    def _refuse(self, spellings: Iterable[str], rejected: Iterable[Rejected]) -> list[Rejected]:
        by_spelling = {entry.spelling: entry for entry in rejected}
        lost: list[Rejected] = []
        for spelling in spellings:
            wish = self._wishes.get(spelling)
            if wish is None:
                continue
            refusal = by_spelling.get(spelling)
            if refusal is None and wish.outcome is None:
                refusal = Rejected(spelling, "internal", "the server did not say what became of it")
            if refusal is None:
                continue
            wish.outcome = refusal
            if wish.was_accepted:
                lost.append(refusal)
            else:
                del self._wishes[spelling]
        return lost


class RowQueue:
    """Rows that the caller has not taken, in order and in bounded memory.

    It holds every row until there are ``max_rows``. Then, and only then, it is merged: one newest
    row per code stays, in its place, with the ``prev`` of the first row merged into it, so that
    ``seq - prev - 1`` still counts all rows that the caller did not get. With so many codes that
    merging does not halve it, it may grow to twice the number of codes.

    Attributes:
        merged: rows that were merged into newer ones here.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 1:
            raise ValueError(f"a queue holds at least one row, not {max_rows}")
        self.merged = 0
        self._max_rows = max_rows
        self._limit = max_rows
        self._rows: deque[Row] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, row: Row) -> None:  # hot
        """Add the newest row of a code."""
        if len(self._rows) >= self._limit:
            self._merge()
        self._rows.append(row)

    def take(self) -> Row:
        """Return the oldest row and forget it."""
        return self._rows.popleft()

    def drop(self, codes: Collection[str]) -> None:
        """Forget the rows of these codes."""
        if codes:
            self._rows = deque(row for row in self._rows if row["code"] not in codes)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()

    def _merge(self) -> None:
        newest: dict[str, Row] = {}
        prevs: dict[str, int | None] = {}
        for row in self._rows:
            code = row["code"]
            prev = row.get("prev")
            # A row without prev begins a new chain: nothing before it can be counted.
            if prev is None or code not in prevs:
                prevs[code] = prev
            newest.pop(code, None)
            newest[code] = row
        self.merged += len(self._rows) - len(newest)
        self._rows = deque(_with_prev(row, prevs[code]) for code, row in newest.items())
        # Half of it must be free again, or a merge would be due at almost every row.
        self._limit = max(self._max_rows, 2 * len(newest))


def decode_message(text: bytes | str) -> Message:
    """Return one message of the server.

    Raises:
        BadMessage: not a JSON object with a ``type``.
    """
    try:
        message = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise BadMessage(f"not JSON: {e}") from None
    if type(message) is not dict or type(message.get("type")) is not str:
        raise BadMessage("not an object with a type")
    return message


def read_results(message: Message) -> SubscribeResult:
    """Return what an ``ack`` says about each code."""
    accepted, rejected = message.get("accepted") or [], message.get("rejected") or []
    try:
        return SubscribeResult(
            tuple(Accepted(entry["code"], entry["as"]) for entry in accepted),
            tuple(Rejected(entry["as"], entry["error"], str(entry.get("message", ""))) for entry in rejected),
        )
    except (KeyError, TypeError, AttributeError):
        raise BadMessage("an ack without its results") from None


def retry_after_ms(message: Message) -> float:
    """Return how long the server asks us to wait."""
    told = message.get("retry_after_ms")
    return max(0.0, told) if isinstance(told, int | float) else _DEFAULT_RETRY_MS


def _rows_in(message: Message) -> list[Row]:
    rows = message.get("data")
    if type(rows) is not list:
        raise BadMessage("rows that are no list")
    for row in rows:
        if (
            type(row) is not dict
            or type(row.get("code")) is not str
            or type(row.get("seq")) is not int
            or type(row.get("prev", 0)) is not int
        ):
            raise BadMessage("a row without code or seq")
    return rows


def _with_prev(row: Row, prev: int | None) -> Row:
    """Return ``row`` with this ``prev``; a copy when it differs, because others hold the row too."""
    if row.get("prev") == prev:
        return row
    bare = {name: value for name, value in row.items() if name != "prev"}
    return bare if prev is None else {"prev": prev, **bare}


def refusal_of(spelling: str) -> Rejected | None:
    """Return why a code cannot even be sent, None if it can."""
    if len(spelling) > _MAX_SPELLING:
        return Rejected(spelling, "bad_code", "too long to be a code")
    try:
        spelling.encode()
    except UnicodeEncodeError:
        return Rejected(spelling, "bad_code", "not text in UTF-8")
    return None


def _canonical(text: str) -> str:
    """Return the code that ``text`` spells, or ``text`` itself if it is none."""
    try:
        return parse_code(text)
    except BadCode:
        return text
