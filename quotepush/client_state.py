"""What a client wants, what it knows and what it still has to say: the Python client without its socket.

Law: what is asked of the server follows from what is wanted and what the server has acknowledged on this connection,
never from the order in which callers came, so a new connection needs nothing of the old one but the place of each code.

No asyncio, no socket; time is an argument. What the rows mean is in :mod:`quotepush.client_rows`, the rest in
:mod:`quotepush.client`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from quotepush.client_messages import (
    Accepted,
    BadMessage,
    Message,
    Rejected,
    Row,
    read_results,
    refusal_of,
    retry_after_ms,
)
from quotepush.client_rows import Gap, RowStream
from quotepush.quote.code import BadCode, parse_code

__all__ = ["ClientState", "Options", "Wish"]

_Item = TypeVar("_Item")

# What stands in a request beside its codes and options.
_REQUEST_OVERHEAD_BYTES = 200
# What stands in ``since`` beside a code and its epoch.
_SINCE_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Options:
    """How the rows of a code are wanted.

    Attributes:
        fields: the view; None: the usual fields.
        max_rate: most rows a second; None: every row.
    """

    fields: tuple[str, ...] | None = None
    max_rate: float | None = None

    def words(self) -> Message:
        """Return the options that are not the usual ones, as a request has them."""
        words: Message = {}
        if self.fields is not None:
            words["fields"] = self.fields
        if self.max_rate is not None:
            words["max_rate"] = self.max_rate
        return words


class Wish:
    """One spelling that the caller wants rows of.

    Attributes:
        outcome: what the server last said to it; None: nothing yet.
        code: what the server took it for once, so it is asked for on every connection.
        asked: with which options it was asked for on this connection; None: it was not.
    """

    __slots__ = ("asked", "code", "key", "outcome", "spelling")

    def __init__(self, spelling: str) -> None:
        self.spelling = spelling
        self.key = _canonical(spelling)
        self.outcome: Accepted | Rejected | None = None
        self.code: str | None = None
        self.asked: Options | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    action: str
    codes: tuple[str, ...]
    options: Options | None


class ClientState:
    """What one client wants and knows, over all its connections.

    Attributes:
        hello: the server's first message on this connection, or on the last one while there is none.
        is_greeted: there is a connection and the server has said hello.
        stream: the rows.
    """

    def __init__(self) -> None:
        self.hello: Message = {}
        self.is_greeted = False
        self.stream = RowStream()
        self._wishes: dict[str, Wish] = {}  # by spelling
        self._options: dict[str, Options] = {}  # by canonical spelling: one instrument is one subscription
        self._granted: dict[str, Options] = {}  # the same, as the server last took them
        self._wanted: dict[str, set[str]] = {}  # code, once acknowledged: the spellings it is wanted by
        self._held: set[str] = set()  # codes that the server sends on this connection
        self._leaving: set[str] = set()  # codes whose unsubscribe has no answer yet
        self._requests: dict[int, _Request] = {}  # without an answer yet, oldest first
        self._last_id = 0
        self._hold_until_s = 0.0

    # What the caller wants

    def want(self, spelling: str, options: Options | None = None) -> Wish:
        """Want a code from now on, with these options; return the wish, whose outcome the server will tell."""
        wish = self._wishes.get(spelling)
        if wish is None:
            wish = Wish(spelling)
            if (refusal := refusal_of(spelling)) is not None:
                wish.outcome = refusal
                return wish
            self._wishes[spelling] = wish
        options = options or Options()
        self._options[wish.key] = options
        if isinstance(wish.outcome, Rejected):
            wish.asked = None
        if wish.asked != options:
            wish.outcome = None
        return wish

    def unwant(self, codes: Iterable[str]) -> tuple[str, ...]:
        """Stop wanting codes, in any spelling, ``*`` for all; return the canonical codes that were subscribed."""
        removed: dict[str, None] = {}
        for text in codes:
            for wish in self._wishes_like(text):
                del self._wishes[wish.spelling]
                self._options.pop(wish.key, None)
                self._granted.pop(wish.key, None)
                if wish.outcome is None:
                    wish.outcome = Rejected(wish.spelling, "unsubscribed", "it was unsubscribed before the answer came")
            for code in self._codes_like(text):
                del self._wanted[code]
                removed[code] = None
                self.stream.forget(code)
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
            if text in ("*", wish.spelling) or wish.code in codes or (wish.code is None and wish.key == canonical)
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
        return requests + self._due_subscribes()

    def _due_subscribes(self) -> list[bytes]:
        due: dict[Options, dict[str, list[str]]] = {}  # all spellings of a code in one request: one subscription
        for wish in self._wishes.values():
            options = self._options_of(wish)
            if wish.asked != options:
                wish.asked = options
                due.setdefault(options, {}).setdefault(wish.code or wish.key, []).append(wish.spelling)
        requests: list[bytes] = []
        for options, spellings in due.items():
            for part in self._packed(spellings.items(), self._size_with_place, len(orjson.dumps(options.words())) - 2):
                since = self._since(code for code, _ in part)
                codes = [spelling for _, like in part for spelling in like]
                requests.append(self.ask("subscribe", codes=codes, options=options, **since))
        return requests

    def _size_with_place(self, item: tuple[str, list[str]]) -> tuple[int, int]:
        code, spellings = item
        place = self.stream.place(code)
        size = 0 if place is None else _size_of(code) + _size_of(place[0]) + _SINCE_OVERHEAD_BYTES
        return len(spellings), size + sum(map(_size_of, spellings))

    def _since(self, codes: Iterable[str]) -> Message:
        """Return the words that resume those codes whose place is known and whose rows do not come yet."""
        usual = self.hello["epoch"]
        since: dict[str, Any] = {}
        for code in codes:
            place = self.stream.place(code)
            if place is not None and not self.stream.is_flowing(code):
                since[code] = place[1] if place[0] == usual else {"epoch": place[0], "seq": place[1]}
        return {"epoch": usual, "since": since} if since else {}

    def ask(self, action: str, *, codes: Collection[str] = (), options: Options | None = None, **words: Any) -> bytes:
        """Return a request with a new ``id``, which :attr:`last_id` tells."""
        self._last_id += 1
        self._requests[self._last_id] = _Request(action, tuple(codes), options)
        request: Message = {"action": action, "id": self._last_id}
        if codes:
            request["codes"] = list(codes)
        return orjson.dumps(request | (options.words() if options else {}) | words)

    @property
    def last_id(self) -> int:
        """The ``id`` of the newest request."""
        return self._last_id

    def parts(self, codes: Iterable[str]) -> Iterator[list[str]]:
        """Yield codes in parts that one request may hold on this connection."""
        return self._packed(codes, lambda code: (1, _size_of(code)))

    def _packed(
        self, items: Iterable[_Item], size_of: Callable[[_Item], tuple[int, int]], more_bytes: int = 0
    ) -> Iterator[list[_Item]]:
        """Yield items in parts that fit into a request; ``size_of`` tells codes and bytes of one."""
        limits: Mapping[str, Any] = self.hello.get("limits") or {}
        most = max(1, limits.get("codes_per_request") or 1000)
        room = max(1, (limits.get("message_bytes") or 65_536) - _REQUEST_OVERHEAD_BYTES - more_bytes)
        part: list[_Item] = []
        count = size = 0
        for item in items:
            codes, length = size_of(item)
            if part and (count + codes > most or size + length > room):
                yield part
                part, count, size = [], 0, 0
            part.append(item)
            count += codes
            size += length
        if part:
            yield part

    # What the server says

    def greet(self, hello: Message) -> None:
        """Begin a connection with the server's ``hello``."""
        epoch = hello.get("epoch")
        if type(epoch) is not str or type(hello.get("heartbeat_ms")) is not int or hello["heartbeat_ms"] <= 0:
            raise BadMessage("a hello without epoch or heartbeat_ms")
        self.hello = hello
        self.is_greeted = True

    def lose(self) -> None:
        """The connection is gone, and with it whatever was asked or acknowledged on it."""
        self.is_greeted = False
        self._hold_until_s = 0.0
        self._held.clear()
        self._leaving.clear()
        self._requests.clear()
        self.stream.cut()
        for wish in self._wishes.values():
            wish.asked = None

    def take(self, message: Message) -> tuple[list[Row], list[Gap]]:
        """Return what is new in a ``snapshot`` or ``tick`` message, as :meth:`RowStream.take` does."""
        return self.stream.take(message, self.hello["epoch"])

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
                self._accept(wish, entry, request.options)
        return self._refuse(request, results.rejected)

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
                    self._wishes[spelling].asked = None
            return retry_after_s
        self._leaving.difference_update(request.codes)
        if request.action == "subscribe":
            word, text = str(message.get("error")), str(message.get("message"))
            self._refuse(request, [Rejected(spelling, word, text) for spelling in request.codes])
        return 0.0

    def request_id(self, message: Message) -> int:
        """Return which request an answer belongs to, 0 for none."""
        answered = message.get("id")
        if answered is None and message.get("error") == "rate_limited":
            # Refused unread, so it cannot name its request; answers come in the order of requests.
            return next(iter(self._requests), 0)
        return answered if type(answered) is int else 0

    def _accept(self, wish: Wish, entry: Accepted, options: Options | None) -> None:
        if wish.code is not None and wish.code != entry.code:
            spellings = self._wanted.get(wish.code, set())
            spellings.discard(wish.spelling)
            if not spellings and self._wanted.pop(wish.code, None) is not None:
                self.stream.forget(wish.code)
        wish.code = entry.code
        self._wanted.setdefault(entry.code, set()).add(wish.spelling)
        self.stream.begin(entry.code, entry.resume)
        if options is not None:
            self._granted[wish.key] = options
        if options == self._options_of(wish):  # else they were changed since, and the answer is still to come
            wish.outcome = entry

    def _refuse(self, request: _Request, rejected: Iterable[Rejected]) -> list[Rejected]:
        by_spelling = {entry.spelling: entry for entry in rejected}
        lost: list[Rejected] = []
        for spelling in request.codes:
            wish = self._wishes.get(spelling)
            if wish is None or wish.asked != request.options:
                continue  # not wanted any more, or in another way: the answer is still to come
            refusal = by_spelling.get(spelling)
            if refusal is None and wish.outcome is None:
                refusal = Rejected(spelling, "internal", "the server did not say what became of it")
            if refusal is None:
                continue
            wish.outcome = refusal
            granted = self._granted.get(wish.key)
            if wish.code is None:
                self._drop(wish)
            elif granted is not None and granted != request.options:
                # What was refused are the new options; the old ones stand, or are asked for again.
                self._options[wish.key] = granted
                wish.asked = granted if self.stream.is_flowing(wish.code) else None
            else:
                lost.append(refusal)
        return lost

    def _options_of(self, wish: Wish) -> Options:
        return self._options.get(wish.key) or Options()

    def _drop(self, wish: Wish) -> None:
        del self._wishes[wish.spelling]
        if not any(other.key == wish.key for other in self._wishes.values()):
            self._options.pop(wish.key, None)


def _size_of(code: str) -> int:
    return len(orjson.dumps(code)) + 1


def _canonical(text: str) -> str:
    """Return the code that ``text`` spells, or ``text`` itself if it is none."""
    try:
        return parse_code(text)
    except BadCode:
        return text
