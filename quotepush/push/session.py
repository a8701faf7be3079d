"""One client connection: its rules, its subscriptions, what it is answered.

Laws:

1. ``hello`` first; an ack before the rows it causes; a code's snapshot before its first
   tick; after the ack of an unsubscribe no row of that code.
2. Requests of one session are carried out in the order in which they came.
3. Answers go to the socket at once, never behind rows that wait.

What it knows of its surroundings is :mod:`quotepush.push.desk`.
"""

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quotepush.auth import Identity
from quotepush.errors import PeerError
from quotepush.push.desk import Answer, Desk, Gone, Link
from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Channel, Lane, Row, Shape, Subscription
from quotepush.quote.code import BadCode, parse_code
from quotepush.wire import messages
from quotepush.wire.formats import DEFAULT_FIELDS, DEFAULT_VIEW, JSON, Codec, Format, View
from quotepush.wire.messages import CLOSE_CODES, Message, Request, RequestError, parse_request

__all__ = ["Session"]

log = logging.getLogger("quotepush.session")

# A client that goes on over its rate for so long is closed with 4429.
_RATE_PATIENCE_MS = 10_000
# Codes in one status message.
_CODES_PER_STATUS = 500

_GONE = Gone()


class Session:
    """One client.

    Attributes:
        fd: its name in the cluster, ``<node>.<worker>.<n>``.
        codec: the language it speaks.
        identity: who it has proved to be; None: nobody yet, or this server takes no tokens.
        subscriptions: canonical code to subscription, in the order of subscribing.
    """

    __slots__ = (
        "_allowance", "_allowance_at_ms", "_desk", "_epoch", "_inbox", "_is_waiting", "_limited_since_ms", "_link",
        "codec", "fd", "identity", "is_closed", "opened_ms", "outbox", "subscriptions",
    )  # fmt: skip

    def __init__(self, fd: str, link: Link, desk: Desk, codec: Codec = JSON, identity: Identity | None = None) -> None:
        self.fd = fd
        self.codec = codec
        self.identity = identity
        self._link = link
        self._desk = desk
        self.outbox = Outbox(self, link.write, codec)
        self.subscriptions: dict[str, Subscription] = {}
        self.is_closed = False
        self.opened_ms = desk.clock_ms()
        self._epoch = desk.epoch  # as hello says it; other epochs are named with their codes
        self._allowance = max(2.0, desk.limits.requests_per_s)
        self._allowance_at_ms = self.opened_ms
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
                epoch=self._epoch,
                time_ms=self.opened_ms,
                heartbeat_ms=desk.heartbeat_ms,
                fields=DEFAULT_FIELDS,
                limits=desk.limits.as_said(),
                auth="none" if desk.verifier is None else "required" if self.identity is None else "ok",
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
                self._count_request(now_ms)
                raise RequestError("bad_json", f"not {self.codec.language}: {e}") from None
            self._count_request(now_ms)
            request = parse_request(said, self._desk.limits.codes_per_request, self._desk.extra_fields)
            self._require_identity(request)
            _HANDLERS[request.action](self, request, now_ms)
        except RequestError as e:
            self._say(messages.error(e, now_ms, e.request_id, e.action))
        except PeerError as e:
            self._say(messages.error(e, now_ms, *messages.named(said)))
            if e.close_code is not None:
                self._link.close(e.close_code, e.error)

    def _require_identity(self, request: Request) -> None:
        if self.identity is None and self._desk.verifier is not None and request.action not in _FOR_ANYBODY:
            raise PeerError("not_authenticated", "this server wants a token first: send auth")

    def _auth(self, request: Request, now_ms: int) -> None:
        identity = self._desk.identify(request.token)
        if identity is None:
            raise PeerError("bad_request", "this server takes no tokens; everybody may subscribe")
        if self.identity is not None and self.identity.user != identity.user:
            raise PeerError("already_authenticated", "this connection is another user's; open a new one for this token")
        self.identity = identity
        expires = {} if identity.expires_ms is None else {"expires": identity.expires_ms}
        self._say(messages.ack(request.action, request.id, now_ms, **expires))

    def check_identity(self, now_ms: int) -> None:
        """Close the session when its token has expired, or when it has sent none in time."""
        verifier = self._desk.verifier
        if verifier is None or self.is_closed:
            return
        if self.identity is None:
            if now_ms - self.opened_ms >= self._desk.auth_timeout_ms:
                self._end(PeerError("auth_timeout", "no token came in time"), now_ms)
        elif verifier.has_expired(self.identity, now_ms):
            self._end(PeerError("auth_failed", "the token has expired"), now_ms)

    def _end(self, fault: PeerError, now_ms: int) -> None:
        self._say(messages.error(fault, now_ms))
        self._link.close(CLOSE_CODES[fault.error], fault.error)

    def _count_request(self, now_ms: int) -> None:
        rate = self._desk.limits.requests_per_s
        most = max(2.0, rate)  # above 1, or each request that is let through would look like a rest
        # max: a wall clock that is set back is no fault of the client's.
        self._allowance = min(most, self._allowance + max(0, now_ms - self._allowance_at_ms) * rate / 1000)
        self._allowance_at_ms = now_ms
        if self._allowance >= 1:
            if self._allowance >= most:
                self._limited_since_ms = 0
            self._allowance -= 1
            return
        if not self._limited_since_ms:
            self._limited_since_ms = now_ms
        goes_on = now_ms - self._limited_since_ms >= _RATE_PATIENCE_MS
        raise PeerError(
            "rate_limited",
            f"at most {rate:g} requests a second",
            close_code=CLOSE_CODES["rate_limited"] if goes_on else None,
            retry_after_ms=max(1, round((1 - self._allowance) * 1000 / rate)),
        )

    def _subscribe(self, request: Request, now_ms: int) -> None:
        results, codes = self._understand(request.codes, self._desk.limits.codes - len(self.subscriptions))
        spelled = self.codec.format(request.format)
        # An array has the columns that its ack names, and no field that nobody knows.
        fields = DEFAULT_FIELDS if spelled.is_array and request.fields is None else request.fields
        shape = Shape(View.of(fields), spelled, request.max_rate)
        channels = self._desk.subscriptions.channels
        # Kept rows have no books; with a rate nobody wants every row; who is subscribed has missed nothing.
        since: dict[str, tuple[str, int]] = {}
        if not shape.view.has_book and shape.max_rate is None:
            since = {c: place for c, place in request.since.items() if c in codes and c not in self.subscriptions}
        missing = [
            code
            for code in codes
            if (channel := channels.get(code)) is None
            or (shape.view.has_book and channel.book is None)
            or code in since
        ]
        if missing:
            self._ask(
                lambda then: self._desk.watch(missing, shape.view.has_book, since, then), codes,
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
        channels: list[Channel] = []
        missed: list[tuple[Lane, int]] = []
        for code in codes:
            is_stale = answer is not None and code in answer.stale
            channel = subscriptions.open(code, *_found(answer, code), is_stale=is_stale)
            resume = "snapshot"
            is_sent = request.snapshot or code in request.since
            if code in self.subscriptions:
                if is_sent or self.subscriptions[code].lane.shape != shape:
                    self._change(channel, shape, is_sent, missed)
            elif answer is not None and code in answer.missed:
                resume = self._resume(channel, shape, request.since[code][1], answer.missed[code])
            else:
                base = channel.seq if is_sent else None
                lane = subscriptions.add(channel, self.outbox, shape, base=base)
                self.subscriptions[code] = Subscription(lane, base)
            if code in request.since:
                for result in codes[code]:
                    result["resume"] = resume
            if resume == "snapshot" and is_sent:
                channels.append(channel)
            if channel.epoch not in ("", self._epoch):
                for result in codes[code]:
                    result["epoch"] = channel.epoch
        self._release(asked)
        columns: dict[str, Any] = {}
        if shape.format.is_array:
            self.outbox.has_arrays = True
            columns = {"cols": shape.view.cols, "columns": shape.view.columns}
        self._say(
            messages.ack(
                request.action, request.id, now_ms,
                accepted=[r for r in results if "error" not in r],
                rejected=[r for r in results if "error" in r],
                total=len(self.subscriptions), limit=self._desk.limits.codes, **columns,
            )
        )  # fmt: skip
        if channels:
            self._say_snapshot(now_ms, [(channel, shape.view) for channel in channels], shape.format)
        self._say_stale(codes)
        for lane, restated in missed:
            self._desk.deliver(lane, self.outbox, restated)
        if self.outbox.replay is not None:
            self._desk.replay(self.outbox)
        if codes:
            self._desk.subscribed(self.fd)
        self._go_on()

    def _resume(self, channel: Channel, shape: Shape, since: int, missed: Sequence[tuple[int, bytes]]) -> str:
        """Subscribe behind ``since`` with the rows that were missed; return what the ack calls that."""
        base = missed[-1][0] if missed else since
        lane = self._desk.subscriptions.add(channel, self.outbox, shape, base=base)
        subscription = self.subscriptions[channel.code] = Subscription(lane, since)
        if not missed:
            return "current"
        if self.outbox.replay is None:
            self.outbox.replay = deque()
        prev = since
        for seq, bare in missed:
            text = Channel(channel.code, seq, bare).text(shape.view, shape.format)
            self.outbox.replay.append(Row(lane, seq, prev, text))
            subscription.add_own()
            prev = seq
        return "replay"

    def _say_snapshot(self, now_ms: int, shown: Sequence[tuple[Channel, View]], spelled: Format) -> None:
        """Send the newest rows of these channels; arrays are all of one view."""
        rows: list[bytes] = []
        epochs: dict[str, str] = {}
        for channel, view in shown:
            text = channel.text(view, spelled)
            if channel.epoch not in ("", self._epoch):
                epochs[channel.code] = channel.epoch
                text = spelled.with_epoch(text, channel.epoch)
            rows.append(text)
        facts = {"epochs": epochs} if epochs and spelled.is_array else {}
        cols = shown[0][1].cols if spelled.is_array else None
        self._link.write(self.codec.rows_frame("snapshot", now_ms, rows, cols, **facts))

    def _change(self, channel: Channel, shape: Shape, is_sent: bool, missed: list[tuple[Lane, int]]) -> None:
        """Give a subscription other options without a hole; what waits in its old shape goes.

        Args:
            is_sent: the client is being sent the newest row as a snapshot.
            missed: gets the lane when the newest row has to be delivered there instead, and why it is restated.
        """
        before = self.subscriptions[channel.code]
        seq, waiting = self.outbox.last_sent(before.lane)
        restated = 0 if is_sent else self.outbox.restating(before.lane)
        self.outbox.drop([before.lane])
        base = channel.seq if is_sent or restated else seq
        if shape != before.lane.shape:  # else the lane stays, even if nobody else is in it, and with it its rate
            self._desk.subscriptions.leave(before.lane, self.outbox)
        lane = self._desk.subscriptions.add(channel, self.outbox, shape, base=base)
        after = self.subscriptions[channel.code] = before.go_on(lane, base, seq, waiting)
        if is_sent:
            return
        if restated:
            missed.append((lane, restated))
        elif base is None:
            if waiting:
                missed.append((lane, 0))
        elif base < channel.seq:
            after.add_own()
            missed.append((lane, 0))

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
        shown: list[tuple[Channel, View]] = []
        for code in codes:
            channel = self._desk.subscriptions.channels.get(code) or Channel(code, *_found(answer, code))
            before = self.subscriptions.get(code)
            view = DEFAULT_VIEW
            if before is not None:
                # It stands for the rows that wait, so it shows what they would have shown.
                if before.lane.view.has_book:
                    view = View.of((*DEFAULT_FIELDS, *(before.lane.view.fields or ())))
                self._change(channel, before.lane.shape, True, [])
            shown.append((channel, view))
        self._release(asked)
        self._say(
            messages.ack(
                request.action, request.id, now_ms,
                accepted=[r for r in results if "error" not in r],
                rejected=[r for r in results if "error" in r],
            )
        )  # fmt: skip
        self._say_snapshot(now_ms, shown, self.codec.objects)
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

    def _say_stale(self, codes: Iterable[str]) -> None:
        """Tell the client which of the codes that it has just subscribed to are stale, also when it knows."""
        stale = [code for code in codes if self.subscriptions[code].lane.channel.is_stale]
        for code in stale:
            self.subscriptions[code].is_stale = True
        self._say_codes("stale", stale)

    def say_freshness(self, codes: Iterable[str]) -> None:
        """Tell the client which of these codes are stale and which are fresh, as far as it does not know."""
        stale: list[str] = []
        fresh: list[str] = []
        for code in sorted(codes):
            subscription = self.subscriptions.get(code)
            if subscription is not None:
                is_stale = subscription.lane.channel.is_stale
                if subscription.is_stale is not is_stale:
                    subscription.is_stale = is_stale
                    (stale if is_stale else fresh).append(code)
        self._say_codes("stale", stale)
        self._say_codes("fresh", fresh)

    def _say_codes(self, state: str, codes: Sequence[str]) -> None:
        for start in range(0, len(codes), _CODES_PER_STATUS):
            some = codes[start : start + _CODES_PER_STATUS]
            self._say(messages.status(self._desk.clock_ms(), "codes", state, codes=some))

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

    def note_restated(self, code: str, seq: int, new_seq: int) -> None:
        """What was sent of ``code`` up to ``seq`` does not lead to the row ``new_seq`` that comes."""
        subscription = self.subscriptions.get(code)
        if subscription is not None:
            subscription.restate(seq, new_seq)

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


def _found(answer: Answer | None, code: str) -> tuple[int, bytes | None, bytes | None, str]:
    return (0, None, None, "") if answer is None else answer.rows.get(code, (0, None, None, ""))


_HANDLERS: dict[str, Callable[[Session, Request, int], None]] = {
    "subscribe": Session._subscribe,
    "unsubscribe": Session._unsubscribe,
    "list": Session._list,
    "snapshot": Session._snapshot,
    "ping": Session._ping,
    "auth": Session._auth,
}

# What may be asked without a token where one is needed.
_FOR_ANYBODY = ("auth", "ping")
