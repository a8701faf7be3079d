"""One client connection: its rules, its requests, what it is answered.

Laws:

1. ``hello`` first; an ack before the rows it causes; a code's snapshot before its first
   tick; after the ack of an unsubscribe no row of that code.
2. Requests of one session are carried out in the order in which they came.
3. Answers go to the socket at once, never behind rows that wait.
4. Nothing is subscribed or sent that its entitlement does not allow, from the moment on in which that changes.

What it knows of its surroundings is :mod:`quotepush.push.desk`; how the rows of a code go on through all this is its
:class:`~quotepush.push.watchlist.Watchlist`'s affair.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from quotepush.auth import Identity, UnknownKey
from quotepush.entitlement import Entitlement
from quotepush.errors import PeerError
from quotepush.push.desk import Answer, Delivered, Desk, Gone, Limits, Link
from quotepush.push.outbox import Outbox
from quotepush.push.results import Results, understand
from quotepush.push.subscriptions import Channel, Lane, Shape
from quotepush.push.watchlist import Watchlist
from quotepush.wire import messages
from quotepush.wire.formats import DEFAULT_FIELDS, DEFAULT_VIEW, JSON, Codec, Format, View
from quotepush.wire.messages import CLOSE_CODES, Message, Request, RequestError, parse_request

if TYPE_CHECKING:
    from quotepush.push.members import Member

__all__ = ["Session"]

log = logging.getLogger("quotepush.session")

# A client that goes on over its rate for so long is closed with 4429.
_RATE_PATIENCE_MS = 10_000
# Codes in one status message.
_CODES_PER_STATUS = 500

# A message that could not be sent just now can be sent again after so long.
_RETRY_SEND_MS = 1000

_GONE = Gone()
_NOT_ASKED = Answer({}, {})


class Session:
    """One client.

    Attributes:
        fd: its name in the cluster, ``<node>.<worker>.<n>``.
        codec: the language it speaks.
        identity: who it has proved to be; None: nobody yet, or this server takes no tokens.
        entitlement: what it may have.
        member: its user, groups and session data; None: it has none.
        had: names of the messages that it was sent and that may come again, newest last; None: of none.
        watchlist: what it is subscribed to.
    """

    __slots__ = (
        "_allowance", "_allowance_at_ms", "_claimed", "_desk", "_epoch", "_inbox", "_is_waiting", "_limited_since_ms",
        "_limits", "_link", "_most", "_send_due_ms", "codec", "entitlement", "fd", "had", "identity", "is_closed",
        "member", "opened_ms", "outbox", "watchlist",
    )  # fmt: skip

    def __init__(
        self,
        fd: str,
        link: Link,
        desk: Desk,
        codec: Codec = JSON,
        identity: Identity | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.fd = fd
        self.codec = codec
        self.identity = identity
        self._link = link
        self.member: Member | None = None
        self.had: deque[str] | None = None
        self._most = limits or desk.limits  # whatever it is entitled to
        self._adopt(desk.entitlement_of(identity))
        self._desk = desk = desk.of(self.entitlement.delay_s)
        self.outbox = Outbox(self, link.write, codec)
        self.watchlist = Watchlist(desk.subscriptions, self.outbox)
        self.is_closed = False
        self.opened_ms = desk.clock_ms()
        self._epoch = desk.epoch  # as hello says it; other epochs are named with their codes
        self._allowance = max(2.0, self._limits.requests_per_s)
        self._allowance_at_ms = self.opened_ms
        self._limited_since_ms = 0
        self._send_due_ms = 0.0
        self._is_waiting = False  # for main's answer to a request
        self._claimed: Sequence[str] = ()  # the codes of that request
        self._inbox: deque[str | bytes] | None = None

    def greet(self) -> None:
        """Send ``hello``."""
        desk = self._desk
        self._say(
            messages.hello(
                server=desk.server,
                conn=self.fd,
                conn_key=desk.conn_key(self.fd),
                epoch=self._epoch,
                time_ms=self.opened_ms,
                heartbeat_ms=desk.heartbeat_ms,
                fields=DEFAULT_FIELDS,
                limits=self._limits.as_said(),
                auth=self._auth_state(),
            )
        )

    # What the client says

    def carry_out(self, request: Request) -> None:
        """Do what a client has asked for in another way than by a message."""
        _HANDLERS[request.action](self, request, self._desk.clock_ms())

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
            request = parse_request(said, self._limits.codes_per_request, self._desk.extra_fields)
            self._require_identity(request)
            _HANDLERS[request.action](self, request, now_ms)
        except RequestError as e:
            self._say(messages.error(e, now_ms, e.request_id, e.action))
        except PeerError as e:
            self._say(messages.error(e, now_ms, *messages.named(said)))
            if e.close_code is not None:
                self._link.close(e.close_code, e.error)

    def _auth_state(self) -> str:
        if self._desk.verifier is None:
            return "none"
        if self.identity is not None:
            return "ok"
        return "required" if self._desk.needs_identity else "optional"

    def _require_identity(self, request: Request) -> None:
        if self.identity is None and self._desk.needs_identity and request.action not in _FOR_ANYBODY:
            raise PeerError("not_authenticated", "this server wants a token first: send auth")

    def _auth(self, request: Request, now_ms: int) -> None:
        try:
            self._take_token(request, now_ms)
        except UnknownKey:
            # Its key may be a new one. Until main has looked, the next request waits.
            self._is_waiting = True
            self._link.hold_requests(True)
            self._desk.renew_keys(lambda: self._auth_again(request))

    def _auth_again(self, request: Request) -> None:
        if self.is_closed:
            return
        now_ms = self._desk.clock_ms()
        try:
            try:
                self._take_token(request, now_ms)
            except PeerError as e:
                self._say(messages.error(e, now_ms, request.id, request.action))
                if e.close_code is not None:
                    self._link.close(e.close_code, e.error)
            self._go_on()
        except Exception:
            self._end_failed()

    def _take_token(self, request: Request, now_ms: int) -> None:
        identity = self._desk.identify(request.token)
        if identity is None:
            raise PeerError("bad_request", "this server takes no tokens; everybody may subscribe")
        if self.identity is not None and self.identity.user != identity.user:
            raise PeerError("already_authenticated", "this connection is another user's; open a new one for this token")
        before, self.identity = self.identity, identity
        try:
            self._desk.identified(self, before)
        except PeerError:
            self.identity = before
            raise
        self._adopt(identity.entitlement)
        expires = {} if identity.expires_ms is None else {"expires": identity.expires_ms}
        self._say_ack(request, now_ms, **expires, limits=self._limits.as_said())
        self._enforce()

    # What it may have

    def entitle(self, entitlement: Entitlement) -> None:
        """Let the session have this from now on, and tell the client what it loses, and its limits if they change.

        For whoever changes it while the connection is open; a newer token does the same.
        """
        if self.is_closed:
            return
        before = self._limits
        self._adopt(entitlement)
        if self._limits != before:
            limits = self._limits.as_said()
            self._say(messages.status(self._desk.clock_ms(), "connection", "limits", limits=limits))
        self._enforce()

    def _adopt(self, entitlement: Entitlement) -> None:
        self.entitlement = entitlement
        self._limits = self._most.under(entitlement)

    def _enforce(self) -> None:
        """Drop what is subscribed and not allowed, then the newest subscriptions beyond the limit; hold rates down.

        Where quotes are older or younger now, show what stays anew; behind a request that main is being asked about.
        """
        for word in ("not_entitled", "code_limit"):
            refused = self.watchlist.refused(self.watchlist.subscriptions, self.entitlement, self._limits.codes)
            codes = [code for code, reason in refused.items() if reason == word]
            if codes:
                self._drop(codes)
                self._say_codes(word, codes)
                self._desk.subscribed(self.fd)
        for lane, restated in self.watchlist.hold_down(self.entitlement):
            self._desk.deliver(lane, self.outbox, restated)
        if not self._is_waiting:
            self._change_desk()

    def _change_desk(self) -> None:
        """Go to the desk of the delay that the session has now, and watch there what it watched."""
        desk = self._desk.of(self.entitlement.delay_s)
        if desk is self._desk:
            return
        shapes = {code: subscription.lane.shape for code, subscription in self.watchlist.subscriptions.items()}
        self._unwatch(self.watchlist.move(desk.subscriptions))
        self._desk = desk
        if not shapes:
            return
        results = understand(shapes)
        has_books = any(shape.view.has_book for shape in shapes.values())
        self._answer(
            results, list(shapes),
            lambda then: desk.watch(list(shapes), has_books, {}, then),
            lambda answer: self._show_anew(shapes, results, answer),
            is_subscribing=True,
        )  # fmt: skip

    def _show_anew(self, shapes: Mapping[str, Shape], results: Results, answer: Answer) -> None:
        """Begin to watch codes at a desk that the session has just come to."""
        now_ms = self._desk.clock_ms()
        shown: dict[tuple[View, Format], list[tuple[Channel, View]]] = {}
        for code in results.codes:
            shape = replace(shapes[code], max_rate=self.entitlement.capped(shapes[code].max_rate))
            channel = self._desk.subscriptions.open(code, *_found(answer, code), is_stale=code in answer.stale)
            self.watchlist.begin(channel, shape, channel.seq)
            shown.setdefault((shape.view, shape.format), []).append((channel, shape.view))
        self._release()
        for (_, spelled), some in shown.items():
            self._say_snapshot(now_ms, some, spelled)
        self._say_codes("stale", self.watchlist.stale(results.codes))

    def check_identity(self, now_ms: int) -> None:
        """Close the session when its token has expired, or when it has sent none in time."""
        verifier = self._desk.verifier
        if verifier is None or self.is_closed:
            return
        if self.identity is None:
            if self._desk.needs_identity and now_ms - self.opened_ms >= self._desk.auth_timeout_ms:
                self._end(PeerError("auth_timeout", "no token came in time"), now_ms)
        elif verifier.has_expired(self.identity, now_ms):
            self._end(PeerError("auth_failed", "the token has expired"), now_ms)

    def _end(self, fault: PeerError, now_ms: int) -> None:
        self._say(messages.error(fault, now_ms))
        self._link.close(CLOSE_CODES[fault.error], fault.error)

    def _count_request(self, now_ms: int) -> None:
        rate = self._limits.requests_per_s
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
        watched = self.watchlist.subscriptions
        results = understand(request.codes, watched, self._limits.codes, self.entitlement.codes)
        spelled = self.codec.format(request.format)
        # An array has the columns that its ack names, and no field that nobody knows.
        fields = DEFAULT_FIELDS if spelled.is_array and request.fields is None else request.fields
        shape = Shape(View.of(fields), spelled, self.entitlement.capped(request.max_rate))
        subscriptions = self._desk.subscriptions
        # Kept rows have no books; with a rate nobody wants every row; who is subscribed has missed nothing.
        since: dict[str, tuple[str, int]] = {}
        if not shape.view.has_book and shape.max_rate is None:
            since = {c: place for c, place in request.since.items() if c in results.codes and c not in watched}
        missing = [
            code
            for code in results.codes
            if (channel := subscriptions.get(code)) is None
            or (shape.view.has_book and channel.book is None)
            or code in since
        ]
        self._answer(
            results, missing,
            lambda then: self._desk.watch(missing, shape.view.has_book, since, then),
            lambda answer: self._finish_subscribe(request, shape, results, answer),
            is_subscribing=True,
        )  # fmt: skip

    def _finish_subscribe(self, request: Request, shape: Shape, results: Results, answer: Answer) -> None:
        now_ms = self._desk.clock_ms()
        shown: list[tuple[Channel, View]] = []
        undelivered: list[tuple[Lane, int]] = []
        # Again: its entitlement may have changed while main was asked.
        shape = replace(shape, max_rate=self.entitlement.capped(request.max_rate))
        for code in results.codes:
            self.watchlist.note_asked(code, request.max_rate, shape.max_rate)
            is_stale = code in answer.stale
            channel = self._desk.subscriptions.open(code, *_found(answer, code), is_stale=is_stale)
            resume = "snapshot"
            is_sent = request.snapshot or code in request.since
            before = self.watchlist.subscriptions.get(code)
            if before is not None:
                if is_sent or before.lane.shape != shape:
                    newest = self.watchlist.change(channel, shape, is_sent=is_sent)
                    if newest is not None:
                        undelivered.append(newest)
            elif code in answer.missed:
                resume = self.watchlist.resume(
                    channel, shape, request.since[code][1], answer.missed[code], self._limits.replay_bytes
                )
            elif code in answer.behind:
                prev, missed = answer.behind[code]
                # Of a view nobody knows which rows had news for it, and so which of them he was sent last.
                if shape.view is not DEFAULT_VIEW or not request.snapshot:
                    prev = None
                resume = self.watchlist.resume_behind(channel, shape, prev, missed, self._limits.replay_bytes)
            else:
                self.watchlist.begin(channel, shape, channel.seq if is_sent else None)
            if code in request.since:
                results.note(code, resume=resume)
            if resume == "snapshot" and is_sent:
                shown.append((channel, shape.view))
            if channel.epoch not in ("", self._epoch):
                results.note(code, epoch=channel.epoch)
        columns: dict[str, Any] = {}
        if shape.format.is_array:
            self.outbox.has_arrays = True
            columns = {"cols": shape.view.cols, "columns": shape.view.columns}
        self._say_results(request, now_ms, results, **self._room(), **columns)
        if shown:
            self._say_snapshot(now_ms, shown, shape.format)
        self._say_codes("stale", self.watchlist.stale(results.codes))
        for lane, restated in undelivered:
            self._desk.deliver(lane, self.outbox, restated)
        if self.outbox.replay is not None:
            if answer.behind:
                self.outbox.order_replay()
            self._desk.replay(self.outbox)
        if results.codes:
            self._desk.subscribed(self.fd)

    def _unsubscribe(self, request: Request, now_ms: int) -> None:
        watched = self.watchlist.subscriptions
        if "*" in request.codes:
            codes = list(watched)
        else:
            codes = [code for code in understand(request.codes).codes if code in watched]
        self._drop(codes)
        self._say_ack(request, now_ms, removed=codes, **self._room())
        if codes:
            self._desk.subscribed(self.fd)

    def _list(self, request: Request, now_ms: int) -> None:
        self._say_ack(request, now_ms, subscriptions=self.watchlist.listed(), **self._room())

    def _snapshot(self, request: Request, now_ms: int) -> None:
        results = understand(request.codes, allowed=self.entitlement.codes)
        subscriptions = self._desk.subscriptions
        missing = [code for code in results.codes if subscriptions.get(code) is None]
        self._answer(
            results, missing,
            lambda then: self._desk.look(missing, then),
            lambda answer: self._finish_snapshot(request, results, answer),
        )  # fmt: skip

    def _finish_snapshot(self, request: Request, results: Results, answer: Answer) -> None:
        now_ms = self._desk.clock_ms()
        shown: list[tuple[Channel, View]] = []
        for code in results.codes:
            channel = self._desk.subscriptions.get(code) or Channel(code, *_found(answer, code))
            before = self.watchlist.subscriptions.get(code)
            view = DEFAULT_VIEW
            if before is not None:
                # It stands for the rows that wait, so it shows what they would have shown.
                if before.lane.view.has_book:
                    view = View.of((*DEFAULT_FIELDS, *(before.lane.view.fields or ())))
                self.watchlist.change(channel, before.lane.shape, is_sent=True)
            shown.append((channel, view))
        self._say_results(request, now_ms, results)
        self._say_snapshot(now_ms, shown, self.codec.objects)

    def _send(self, request: Request, now_ms: int) -> None:
        kind, name = request.to
        may_send = self.entitlement.may_send
        allowed = {"user": may_send.to_user, "group": may_send.to_group}
        if not (may_send.all if kind == "all" else allowed[kind](name)):
            raise PeerError(
                "not_entitled", f"this connection may not send to {'all' if kind == 'all' else f'this {kind}'}"
            )
        self._count_send(now_ms)
        most = self._desk.message_bytes
        try:
            size = len(request.data) if isinstance(request.data, bytes) else len(orjson.dumps(request.data))
        except TypeError as e:
            raise PeerError("bad_request", f"data must be what JSON can say, or bytes alone: {e}") from None
        if size > most:
            raise PeerError("too_large", f"a message has at most {most} bytes of data")
        self._is_waiting = True
        self._link.hold_requests(True)
        self._desk.send(self, request, lambda delivered: self._finish_send(request, delivered))

    def _finish_send(self, request: Request, delivered: Delivered) -> None:
        if self.is_closed:
            return
        now_ms = self._desk.clock_ms()
        try:
            if delivered.error:
                retry_after_ms = _RETRY_SEND_MS if delivered.is_retryable else None
                fault = PeerError(delivered.error, delivered.message, retry_after_ms=retry_after_ms)
                self._say(messages.error(fault, now_ms, request.id, request.action))
            else:
                kept = {"kept": delivered.kept} if delivered.kept else {}
                self._say_ack(request, now_ms, delivered=delivered.count, **kept)
            self._go_on()
        except Exception:
            self._end_failed()

    def _count_send(self, now_ms: int) -> None:
        """Hold the rate of messages down: a burst of a second's worth, or of two messages."""
        rate = self._desk.sends_per_s
        due_ms = max(self._send_due_ms, now_ms)
        early_ms = due_ms - now_ms - 1000 * (max(rate, 2.0) - 1) / rate
        if early_ms > 0:
            raise PeerError(
                "rate_limited", f"at most {rate:g} messages a second", retry_after_ms=max(1, math.ceil(early_ms))
            )
        self._send_due_ms = due_ms + 1000 / rate

    def _ping(self, request: Request, now_ms: int) -> None:
        self._say(messages.pong(request.id, now_ms))

    def _answer(
        self,
        results: Results,
        missing: Sequence[str],
        ask: Callable[[Callable[[Answer], None]], None],
        finish: Callable[[Answer], None],
        *,
        is_subscribing: bool = False,
    ) -> None:
        """Finish a request: at once, or behind main's answer about what is missing, and the client's next one waits."""
        if not missing:
            finish(_NOT_ASKED)
            return
        before = self.entitlement

        def answered(answer: Answer) -> None:
            try:
                if self.is_closed:
                    self._release()
                    return
                results.refuse(answer.refused)
                if self.entitlement is not before:
                    most = self._limits.codes if is_subscribing else None
                    results.refuse(self.watchlist.refused(results.codes, self.entitlement, most))
                finish(answer)
                self._go_on()
            except Exception:
                self._end_failed()

        self._claimed = tuple(results.codes)
        self._desk.subscriptions.claim(self._claimed)
        self._is_waiting = True
        self._link.hold_requests(True)
        ask(answered)

    def _end_failed(self) -> None:
        """A bug in one session is that session's end and nobody else's."""
        log.exception("%s: a request could not be finished", self.fd)
        self._link.close(CLOSE_CODES["internal"], "internal")

    def _go_on(self) -> None:
        """Carry out what has come in while main was asked."""
        self._is_waiting = False
        self._change_desk()
        inbox = self._inbox
        while inbox and not self._is_waiting and not self.is_closed:
            self.receive(inbox.popleft())
        if not inbox:
            self._inbox = None
        if not self._is_waiting and not self.is_closed:
            self._link.hold_requests(False)

    def _release(self) -> None:
        claimed, self._claimed = self._claimed, ()
        self._unwatch(self._desk.subscriptions.release(claimed))

    def _drop(self, codes: Iterable[str]) -> None:
        self._unwatch(self.watchlist.drop(codes))

    def _unwatch(self, left: Sequence[str]) -> None:
        if left:
            self._desk.unwatch(left)

    # What the server says

    def _say(self, message: Message) -> None:
        self._link.write(self.codec.frame(message))

    def _say_ack(self, request: Request, now_ms: int, **results: Any) -> None:
        self._say(messages.ack(request.action, request.id, now_ms, **results))

    def _say_results(self, request: Request, now_ms: int, results: Results, **facts: Any) -> None:
        """Say what has become of the codes; those that nobody wants after all are given up first."""
        self._release()
        self._say_ack(request, now_ms, **results.as_said(), **facts)

    def _room(self) -> Mapping[str, int]:
        """Return how many codes this connection has, and may have, as an ack says it."""
        return {"total": len(self.watchlist.subscriptions), "limit": self._limits.codes}

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
        self.outbox.write(self.codec.rows_frame("snapshot", now_ms, rows, cols, **facts))

    def _say_codes(self, state: str, codes: Sequence[str]) -> None:
        for start in range(0, len(codes), _CODES_PER_STATUS):
            some = codes[start : start + _CODES_PER_STATUS]
            self._say(messages.status(self._desk.clock_ms(), "codes", state, codes=some))

    def say_merging(self) -> None:
        """Tell the client that it is too slow for every row."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "conflating", pending=self.outbox.pending))

    def say_caught_up(self) -> None:
        """Tell the client that it gets every row again."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "realtime"))

    def say_closing(self, retry_after_ms: int) -> None:
        """Tell the client that the server leaves, and when to come back."""
        self._say(messages.status(self._desk.clock_ms(), "connection", "closing", retry_after_ms=retry_after_ms))

    def say_freshness(self, codes: Iterable[str]) -> None:
        """Tell the client which of these codes are stale and which are fresh, as far as it does not know."""
        stale, fresh = self.watchlist.news_of_freshness(codes)
        self._say_codes("stale", stale)
        self._say_codes("fresh", fresh)

    def close(self) -> None:
        """The connection is over: leave every audience."""
        if self.is_closed:
            return
        self.is_closed = True
        self._inbox = None
        self._drop(list(self.watchlist.subscriptions))
        self.outbox.clear()
        # Break the circle of link, session and outbox: they go at once, not with the garbage collector.
        self._link = _GONE
        self.outbox.write = _GONE.write


def _found(answer: Answer, code: str) -> tuple[int, bytes | None, bytes | None, str]:
    return answer.rows.get(code, (0, None, None, ""))


_HANDLERS: dict[str, Callable[[Session, Request, int], None]] = {
    "subscribe": Session._subscribe,
    "unsubscribe": Session._unsubscribe,
    "list": Session._list,
    "snapshot": Session._snapshot,
    "ping": Session._ping,
    "auth": Session._auth,
    "send": Session._send,
}

# What may be asked without a token where one is needed.
_FOR_ANYBODY = ("auth", "ping")
