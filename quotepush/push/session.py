"""One client connection: its rules, its subscriptions, what it is answered.

Laws:

1. ``hello`` first; an ack before the rows it causes; a code's snapshot before its first
   tick; after the ack of an unsubscribe no row of that code.
2. Requests of one session are carried out in the order in which they came.
3. Answers go to the socket at once, never behind rows that wait.

A session knows no socket and no loop: it is handed a :class:`Link` to speak through and a
:class:`Desk` of what the worker offers. Time is an argument.
"""

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quotepush.errors import PeerError
from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Channel, Lane, Shape, Subscription, Subscriptions
from quotepush.quote.code import BadCode, parse_code
from quotepush.wire import messages
from quotepush.wire.formats import DEFAULT_FIELDS, DEFAULT_VIEW, JSON, Codec, View
from quotepush.wire.messages import CLOSE_CODES, Message, Request, RequestError, parse_request

__all__ = ["Answer", "Desk", "Limits", "Link", "Session"]

log = logging.getLogger("quotepush.session")

# A client that goes on over its rate for so long is closed with 4429.
_RATE_PATIENCE_MS = 10_000


class Link(Protocol):
    """The socket as a session sees it."""

    def write(self, data: bytes) -> None:
        """Hand bytes to the socket at once."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye and close; nothing is written afterwards."""

    def hold_requests(self, hold: bool) -> None:
        """Stop, or go on, reading from the client."""


class _Gone:
    """The link of a session that is over."""

    def write(self, data: bytes) -> None: ...

    def close(self, code: int, reason: str) -> None: ...

    def hold_requests(self, hold: bool) -> None: ...


_GONE = _Gone()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may do."""

    codes: int
    codes_per_request: int
    requests_per_s: float
    message_bytes: int

    def as_said(self) -> Mapping[str, Any]:
        """Return them as ``hello`` says them."""
        rate = self.requests_per_s
        return {
            "codes": self.codes,
            "codes_per_request": self.codes_per_request,
            "requests_per_s": int(rate) if rate == int(rate) else rate,
            "message_bytes": self.message_bytes,
            "max_rate": None,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What main says to a question about codes.

    Attributes:
        rows: per code its seq, its newest row as JSON text (None: no tick yet), and its book, if that was asked for.
        refused: per code the error word, e.g. ``unknown_code``.
    """

    rows: Mapping[str, tuple[int, bytes | None, bytes | None]]
    refused: Mapping[str, str]


def _nobody(lane: Lane, outbox: Outbox) -> None:
    raise AssertionError("no hub yet")


@dataclass(slots=True)
class Desk:
    """What a worker offers its sessions: the index, main behind it, the registry, the clock.

    Attributes:
        watch: ask main for these codes (with their books?) and their later ticks; answers through the callback, in
            the stream of ticks, so that nothing falls between the answer and the next tick.
        look: the same without their later ticks.
        deliver: queue a lane's newest row for one of its newcomers; set by the worker that has the hub.
        extra_fields: what views may name besides the fields of the protocol.
        unwatch: nobody here watches these codes any more.
        subscribed: a session's codes have changed (for the registry).
        clock_ms: epoch milliseconds.
    """

    subscriptions: Subscriptions
    limits: Limits
    server: str
    epoch: str
    heartbeat_ms: int
    watch: Callable[[Sequence[str], bool, Callable[[Answer], None]], None]
    look: Callable[[Sequence[str], Callable[[Answer], None]], None]
    unwatch: Callable[[Iterable[str]], None]
    subscribed: Callable[[str], None]
    clock_ms: Callable[[], int]
    extra_fields: frozenset[str] = frozenset()
    deliver: Callable[[Lane, Outbox], None] = _nobody


class Session:
    """One client.

    Attributes:
        fd: its name in the cluster, ``<node>.<worker>.<n>``.
        codec: the language it speaks.
        subscriptions: canonical code to subscription, in the order of subscribing.
    """

    __slots__ = (
        "_desk", "_inbox", "_is_waiting", "_limited_since_ms", "_link", "_tokens", "_tokens_at_ms", "codec", "fd",
        "is_closed", "opened_ms", "outbox", "subscriptions",
    )  # fmt: skip

    def __init__(self, fd: str, link: Link, desk: Desk, codec: Codec = JSON) -> None:
        self.fd = fd
        self.codec = codec
        self._link = link
        self._desk = desk
        self.outbox = Outbox(self, link.write, codec)
        self.subscriptions: dict[str, Subscription] = {}
        self.is_closed = False
        self.opened_ms = desk.clock_ms()
        self._tokens = max(2.0, desk.limits.requests_per_s)
        self._tokens_at_ms = self.opened_ms
        self._limited_since_ms = 0
        self._is_waiting = False  # for main's answer to a request
        self._inbox: deque[str | bytes] | None = None

    def greet(self) -> None:
        """Send ``hello``."""
        desk = self._desk
        self._say(
            messages.hello(
                server=desk.server,
                conn=self.fd,
                conn_key=secrets.token_urlsafe(16),
                epoch=desk.epoch,
                time_ms=self.opened_ms,
                heartbeat_ms=desk.heartbeat_ms,
                fields=DEFAULT_FIELDS,
                limits=desk.limits.as_said(),
            )
        )

    # What the client says

    def receive(self, data: str | bytes) -> None:
        """Take one message of the client."""
        if self.is_closed:
            return
        if self._is_waiting:
            if self._inbox is None:
                self._inbox = deque()
            self._inbox.append(data)
            return
        now_ms = self._desk.clock_ms()
        said: Any = None
        try:
            try:
                said = self.codec.decode(data)
            except (ValueError, RecursionError) as e:  # what orjson and msgspec raise
                self._spend_token(now_ms)
                raise RequestError("bad_json", f"not {self.codec.language}: {e}") from None
            self._spend_token(now_ms)
            request = parse_request(said, self._desk.limits.codes_per_request, self._desk.extra_fields)
            _HANDLERS[request.action](self, request, now_ms)
        except RequestError as e:
            self._say(messages.error(e, now_ms, e.request_id, e.action))
        except PeerError as e:
            self._say(messages.error(e, now_ms, *messages.named(said)))
            if e.close_code is not None:
                self._link.close(e.close_code, e.error)

    def _spend_token(self, now_ms: int) -> None:
        rate = self._desk.limits.requests_per_s
        most = max(2.0, rate)  # above 1, or each request that is let through would look like a rest
        # max: a wall clock that is set back is no fault of the client's.
        self._tokens = min(most, self._tokens + max(0, now_ms - self._tokens_at_ms) * rate / 1000)
        self._tokens_at_ms = now_ms
        if self._tokens >= 1:
            if self._tokens >= most:
                self._limited_since_ms = 0
            self._tokens -= 1
            return
        if not self._limited_since_ms:
            self._limited_since_ms = now_ms
        goes_on = now_ms - self._limited_since_ms >= _RATE_PATIENCE_MS
        raise PeerError(
            "rate_limited",
            f"at most {rate:g} requests a second",
            close_code=CLOSE_CODES["rate_limited"] if goes_on else None,
            retry_after_ms=max(1, round((1 - self._tokens) * 1000 / rate)),
        )

    def _subscribe(self, request: Request, now_ms: int) -> None:
        results, codes = self._understand(request.codes, self._desk.limits.codes - len(self.subscriptions))
        spelled = self.codec.format(request.format)
        # An array has the columns that its ack names, and no field that nobody knows.
        fields = DEFAULT_FIELDS if spelled.is_array and request.fields is None else request.fields
        shape = Shape(View.of(fields), spelled, request.max_rate)
        channels = self._desk.subscriptions.channels
        missing = [
            code
            for code in codes
            if (channel := channels.get(code)) is None or (shape.view.has_book and channel.book is None)
        ]
        if missing:
            self._ask(
                lambda then: self._desk.watch(missing, shape.view.has_book, then), codes,
                lambda answer: self._finish_subscribe(request, shape, results, codes, answer),
            )  # fmt: skip
        else:
            self._finish_subscribe(request, shape, results, codes, None)

    def _understand(
        self, spellings: Iterable[str], room: int | None
    ) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
        """Return one result per spelling, in order, and the codes that were understood with their results.

        Args:
            room: how many new codes the session may still subscribe to; None: does not matter.
        """
        results: list[dict[str, Any]] = []
        codes: dict[str, list[dict[str, Any]]] = {}
        limit = self._desk.limits.codes
        for spelling in spellings:
            result: dict[str, Any] = {"as": spelling}
            results.append(result)
            try:
                code = parse_code(spelling)
            except BadCode as e:
                result |= {"error": "bad_code", "message": str(e)}
                continue
            if room is not None and code not in codes and code not in self.subscriptions:
                if room <= 0:
                    result |= {"error": "code_limit", "message": f"at most {limit} codes on one connection"}
                    continue
                room -= 1
            result["code"] = code
            codes.setdefault(code, []).append(result)
        return results, codes

    def _finish_subscribe(
        self,
        request: Request,
        shape: Shape,
        results: list[dict[str, Any]],
        codes: dict[str, list[dict[str, Any]]],
        answer: Answer | None,
    ) -> None:
        subscriptions = self._desk.subscriptions
        asked = list(codes) if answer is not None else []
        if self.is_closed:
            self._release(asked)
            return
        if answer is not None:
            self._refuse(codes, answer.refused)
        now_ms = self._desk.clock_ms()
        rows: list[bytes] = []
        missed: list[Lane] = []
        for code in codes:
            channel = subscriptions.open(code, *_found(answer, code))
            if code in self.subscriptions:
                if request.snapshot or self.subscriptions[code].lane.shape != shape:
                    self._change(channel, shape, request.snapshot, missed)
            else:
                base = channel.seq if request.snapshot else None
                lane = subscriptions.add(channel, self.outbox, shape, base=base)
                self.subscriptions[code] = Subscription(lane, base)
            if request.snapshot:
                rows.append(channel.text(shape.view, shape.format))
        self._release(asked)
        columns: dict[str, Any] = {}
        cols = None
        if shape.format.is_array:
            self.outbox.has_arrays = True
            cols = shape.view.cols
            columns = {"cols": cols, "columns": shape.view.columns}
        self._say(
            messages.ack(
                request.action, request.id, now_ms,
                accepted=[{"code": r["code"], "as": r["as"]} for r in results if "error" not in r],
                rejected=[r for r in results if "error" in r],
                total=len(self.subscriptions), limit=self._desk.limits.codes, **columns,
            )
        )  # fmt: skip
        if rows:
            self._link.write(self.codec.rows_frame("snapshot", now_ms, rows, cols))
        for lane in missed:
            self._desk.deliver(lane, self.outbox)
        if codes:
            self._desk.subscribed(self.fd)
        self._go_on()

    def _change(self, channel: Channel, shape: Shape, is_sent: bool, missed: list[Lane]) -> None:
        """Give a subscription other options without a hole; what waits in its old shape goes.

        Args:
            is_sent: the client is being sent the newest row as a snapshot.
            missed: gets the lane when the newest row has to be delivered there instead.
        """
        before = self.subscriptions[channel.code]
        seq, waiting = self.outbox.last_sent(before.lane)
        self.outbox.drop([before.lane])
        base = channel.seq if is_sent else seq
        if shape != before.lane.shape:  # else the lane stays, even if nobody else is in it, and with it its rate
            self._desk.subscriptions.leave(before.lane, self.outbox)
        lane = self._desk.subscriptions.add(channel, self.outbox, shape, base=base)
        after = self.subscriptions[channel.code] = before.go_on(lane, base, seq, waiting)
        if is_sent:
            return
        if base is None:
            if waiting:
                missed.append(lane)
        elif base < channel.seq:
            after.add_own()
            missed.append(lane)

    def _refuse(self, codes: dict[str, list[dict[str, Any]]], refused: Mapping[str, str]) -> None:
        for code, word in refused.items():
            for result in codes.pop(code, ()):
                del result["code"]
                result |= {"error": word, "message": f"{code} is not a code this server knows"}

    def _unsubscribe(self, request: Request, now_ms: int) -> None:
        if "*" in request.codes:
            codes = list(self.subscriptions)
        else:
            _, understood = self._understand(request.codes, None)
            codes = [code for code in understood if code in self.subscriptions]
        self._drop(codes)
        self._say(
            messages.ack(
                request.action, request.id, now_ms, removed=codes, total=len(self.subscriptions),
                limit=self._desk.limits.codes,
            )
        )  # fmt: skip
        if codes:
            self._desk.subscribed(self.fd)

    def _drop(self, codes: Iterable[str]) -> None:
        lanes = [self.subscriptions.pop(code).lane for code in codes]
        self.outbox.drop(lanes)
        left = self._desk.subscriptions.discard(lanes, self.outbox)
        if left:
            self._desk.unwatch(left)

    def _list(self, request: Request, now_ms: int) -> None:
        listed = []
        for code, subscription in self.subscriptions.items():
            lane = subscription.lane
            seq, waiting = self.outbox.last_sent(lane)
            listed.append(
                {
                    "code": code,
                    "fields": lane.view.fields,
                    "max_rate": lane.shape.max_rate,
                    "format": "rows" if lane.format.is_array else "objects",
                    "seq": seq or 0,
                    "merged": subscription.merged_until(seq or 0, waiting),
                }
            )
        self._say(
            messages.ack(
                request.action, request.id, now_ms, subscriptions=listed, total=len(listed),
                limit=self._desk.limits.codes,
            )
        )  # fmt: skip

    def _snapshot(self, request: Request, now_ms: int) -> None:
        results, codes = self._understand(request.codes, None)
        channels = self._desk.subscriptions.channels
        missing = [code for code in codes if code not in channels]
        if missing:
            self._ask(
                lambda then: self._desk.look(missing, then), codes,
                lambda answer: self._finish_snapshot(request, results, codes, answer),
            )  # fmt: skip
        else:
            self._finish_snapshot(request, results, codes, None)

    def _finish_snapshot(
        self,
        request: Request,
        results: list[dict[str, Any]],
        codes: dict[str, list[dict[str, Any]]],
        answer: Answer | None,
    ) -> None:
        asked = list(codes) if answer is not None else []
        if self.is_closed:
            self._release(asked)
            return
        if answer is not None:
            self._refuse(codes, answer.refused)
        now_ms = self._desk.clock_ms()
        rows = []
        for code in codes:
            channel = self._desk.subscriptions.channels.get(code) or Channel(code, *_found(answer, code))
            before = self.subscriptions.get(code)
            if before is None:
                rows.append(channel.text(DEFAULT_VIEW, self.codec.objects))
                continue
            # It stands for the rows that wait, so it shows what they would have shown.
            view = before.lane.view
            shown = View.of((*DEFAULT_FIELDS, *(view.fields or ()))) if view.has_book else DEFAULT_VIEW
            rows.append(channel.text(shown, self.codec.objects))
            self._change(channel, before.lane.shape, True, [])
        self._release(asked)
        self._say(
            messages.ack(
                request.action, request.id, now_ms,
                accepted=[{"code": r["code"], "as": r["as"]} for r in results if "error" not in r],
                rejected=[r for r in results if "error" in r],
            )
        )  # fmt: skip
        self._link.write(self.codec.rows_frame("snapshot", now_ms, rows))
        self._go_on()

    def _ping(self, request: Request, now_ms: int) -> None:
        self._say(messages.pong(request.id, now_ms))

    def _ask(
        self,
        ask: Callable[[Callable[[Answer], None]], None],
        codes: Iterable[str],
        finish: Callable[[Answer], None],
    ) -> None:
        """Ask main for the codes that are not here; the client's next request waits for the answer."""

        def answered(answer: Answer) -> None:
            try:
                finish(answer)
            except Exception:
                # A bug in one session is that session's end and nobody else's.
                log.exception("%s: a request could not be finished", self.fd)
                self._link.close(CLOSE_CODES["internal"], "internal")

        self._desk.subscriptions.claim(codes)
        self._is_waiting = True
        self._link.hold_requests(True)
        ask(answered)

    def _release(self, asked: Iterable[str]) -> None:
        left = self._desk.subscriptions.release(asked)
        if left:
            self._desk.unwatch(left)

    def _go_on(self) -> None:
        """Carry out what has come in while main was asked."""
        if not self._is_waiting:
            return
        self._is_waiting = False
        inbox = self._inbox
        while inbox and not self._is_waiting and not self.is_closed:
            self.receive(inbox.popleft())
        if not inbox:
            self._inbox = None
        if not self._is_waiting and not self.is_closed:
            self._link.hold_requests(False)

    # What the server says

    def _say(self, message: Message) -> None:
        self._link.write(self.codec.frame(message))

    def say_merging(self) -> None:
        """Tell the client that it is too slow for every row."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "conflating", pending=self.outbox.pending))

    def say_caught_up(self) -> None:
        """Tell the client that it gets every row again."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "realtime"))

    def say_closing(self, retry_after_ms: int) -> None:
        """Tell the client that the server leaves, and when to come back."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "closing", retry_after_ms=retry_after_ms))

    def note_merged(self, code: str, rows: int) -> None:
        """Count rows that this session got merged."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.merged += rows

    def note_first_row(self, code: str, seq: int) -> None:
        """Begin to count at the first row of a subscription without a snapshot."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.start(seq)

    def note_skipped_row(self, code: str) -> None:
        """A row was handed out that this session had been sent in a snapshot."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.skip()

    def close(self) -> None:
        """The connection is over: leave every audience."""
        if self.is_closed:
            return
        self.is_closed = True
        self._inbox = None
        self._drop(list(self.subscriptions))
        self.outbox.clear()
        # Break the circle of link, session and outbox: they go at once, not with the garbage collector.
        self._link = _GONE
        self.outbox.write = _GONE.write


def _found(answer: Answer | None, code: str) -> tuple[int, bytes | None, bytes | None]:
    return (0, None, None) if answer is None else answer.rows.get(code, (0, None, None))


_HANDLERS: dict[str, Callable[[Session, Request, int], None]] = {
    "subscribe": Session._subscribe,
    "unsubscribe": Session._unsubscribe,
    "list": Session._list,
    "snapshot": Session._snapshot,
    "ping": Session._ping,
}
