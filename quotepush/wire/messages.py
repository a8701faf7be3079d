"""What is said on the wire, quotes.v1: requests in, messages out; how it is spelled is for the codecs.

Requests are parsed by a table from action to fields; everything that is wrong
with one is a :class:`~quotepush.errors.PeerError` that names the word on the wire.
Messages are built here and nowhere else. All of it: docs/protocol.md.
"""

import base64
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quotepush.errors import PeerError
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import KNOWN_FIELDS

__all__ = [
    "CLOSE_CODES",
    "PROTOCOL",
    "Request",
    "ack",
    "error",
    "heartbeat",
    "message",
    "named",
    "parse_request",
    "pong",
    "status",
]

PROTOCOL = "quotes.v1"

# Close codes by the word that goes with them; the close reason repeats the word.
CLOSE_CODES = {
    "going_away": 1001,
    "wrong_frame_kind": 1003,
    "bad_utf8": 1007,
    "too_large": 1009,
    "internal": 1011,
    "restart": 1012,
    "overloaded": 1013,
    "auth_failed": 4401,
    "kicked": 4403,
    "auth_timeout": 4408,
    "replaced": 4409,
    "rate_limited": 4429,
}

# What a view may name; a server can be told of more (``extra_fields``).
_FIELDS = frozenset((*KNOWN_FIELDS, "code", "seq", "ts", "prev"))
_MOST_RATE = 1000.0

_ID_BYTES = 128


@dataclass(slots=True, frozen=True)
class Request:
    """One message of a client, checked.

    Attributes:
        action: ``subscribe``, ``unsubscribe``, ``list``, ``snapshot``, ``ping``, ``auth`` or ``send``.
        id: what the client called it, sent back in the answer; None: nothing.
        codes: as the client spelled them.
        snapshot: whether a subscribe wants the newest rows first.
        fields: the view; None: the default one.
        max_rate: most rows per second and code; None: every row.
        format: ``objects`` or ``rows``.
        since: from where to resume: canonical code to epoch and seq, or to a position (``@`` and the life of
            main, and an ordinal).
        token: of ``auth``; no ``repr`` shows it.
        to: of ``send``: ``user``, ``group`` or ``all``, and which.
        data: of ``send``; bytes where the message brought bytes.
    """

    action: str
    id: int | str | None = None
    codes: tuple[str, ...] = ()
    snapshot: bool = True
    fields: tuple[str, ...] | None = None
    max_rate: float | None = None
    format: str = "objects"
    since: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    token: str = field(default="", repr=False)
    to: tuple[str, str] = ("", "")
    data: Any = field(default=None, repr=False)

    def behind(self, since: Mapping[str, tuple[str, int]]) -> "Request":
        """Return the same request as one that resumes."""
        return replace(self, since=since)


def parse_request(said: Any, max_codes: int, extra_fields: Collection[str] = ()) -> Request:
    """Return what a client's decoded message asks for.

    Args:
        extra_fields: what a view may name besides the fields of the protocol.

    Raises:
        PeerError: ``bad_request``, ``unknown_action``, ``unknown_field``; its ``request`` attribute
            is the ``id`` and ``action`` as far as they could be read.
    """
    if type(said) is not dict:
        raise RequestError("bad_request", "a message is an object")
    request_id = said.get("id")
    if not (
        request_id is None or type(request_id) is int or (type(request_id) is str and len(request_id) <= _ID_BYTES)
    ):
        raise RequestError("bad_request", f"id must be a whole number or a text of at most {_ID_BYTES} characters")
    action = said.get("action")
    if type(action) is not str:
        raise RequestError("bad_request", "action must be a text", request_id)
    try:
        parse = _ACTIONS[action]
    except KeyError:
        known = ", ".join(_ACTIONS)
        raise RequestError("unknown_action", f"{action[:40]!r} is none of {known}", request_id) from None
    try:
        return parse(action, request_id, said, max_codes, extra_fields)
    except PeerError as e:
        raise RequestError(e.error, e.message, request_id, action) from None


def named(said: Any) -> tuple[int | str | None, str | None]:
    """Return ``id`` and ``action`` of a decoded message that is not carried out, as far as they can be read."""
    try:
        request = parse_request(said, max_codes=0)
    except RequestError as e:
        return e.request_id, e.action
    return request.id, request.action


class RequestError(PeerError):
    """A request that cannot be carried out; knows which one, so that the answer can say so."""

    def __init__(
        self, error: str, message: str, request_id: int | str | None = None, action: str | None = None
    ) -> None:
        super().__init__(error, message)
        self.request_id = request_id
        self.action = action


def _codes(said: Mapping[str, Any], max_codes: int) -> tuple[str, ...]:
    codes = said.get("codes")
    if type(codes) is not list or not codes:
        raise PeerError("bad_request", "codes must be a list of at least one code")
    if len(codes) > max_codes:
        raise PeerError("bad_request", f"at most {max_codes} codes in one request")
    if not all(type(code) is str for code in codes):
        raise PeerError("bad_request", "codes must be texts")
    return tuple(codes)


_Said = Mapping[str, Any]
_Id = int | str | None


def _parse_subscribe(action: str, request_id: _Id, said: _Said, max_codes: int, extra: Collection[str]) -> Request:
    wanted = said.get("snapshot", True)
    if type(wanted) is not bool:
        raise PeerError("bad_request", "snapshot must be true or false")
    spelled = said.get("format")
    if spelled is None:
        spelled = "objects"
    elif spelled not in ("objects", "rows"):
        raise PeerError("bad_request", "format must be objects or rows")
    codes = _codes(said, max_codes)
    return Request(action, request_id, codes, wanted, _view(said, extra), _max_rate(said), spelled, _since(said))


def _since(said: _Said) -> dict[str, tuple[str, int]]:
    since, epoch = said.get("since"), said.get("epoch")
    if since is None:
        return {}
    if type(since) is not dict:
        raise PeerError("bad_request", "since must be an object of codes")
    found: dict[str, tuple[str, int]] = {}
    for spelling, place in since.items():
        of, seq = (place.get("epoch"), place.get("seq")) if type(place) is dict else (epoch, place)
        if type(of) is not str or of.startswith("@") or type(seq) is not int or not 0 <= seq < 1 << 63:
            raise PeerError(
                "bad_request", "since has a seq for each code, and epoch or the code itself names the epoch"
            )
        try:
            found[parse_code(spelling)] = of, seq
        except (BadCode, TypeError):
            continue  # it is refused among the codes
    return found


def _view(said: _Said, extra: Collection[str]) -> tuple[str, ...] | None:
    fields = said.get("fields")
    if fields is None:
        return None
    if type(fields) is not list or not fields or not all(type(name) is str for name in fields):
        raise PeerError("bad_request", "fields must be a list of at least one name")
    for name in fields:
        if name not in _FIELDS and name not in extra:
            raise PeerError("unknown_field", f"{name[:40]!r} is no field; hello lists the usual ones")
    return tuple(fields)


def _max_rate(said: _Said) -> float | None:
    rate = said.get("max_rate")
    if rate is None:
        return None
    if type(rate) not in (int, float) or not 0 < rate <= _MOST_RATE:  # NaN is not above 0 either
        raise PeerError("bad_request", f"max_rate must be above 0 and at most {_MOST_RATE:g} rows a second")
    return float(rate)


def _parse_codes(action: str, request_id: _Id, said: _Said, max_codes: int, extra: Collection[str]) -> Request:
    for option in ("fields", "format", "max_rate"):
        if said.get(option) is not None:
            raise PeerError("bad_request", f"{option} is for subscribe")
    return Request(action, request_id, _codes(said, max_codes))


def _parse_plain(action: str, request_id: _Id, said: _Said, max_codes: int, extra: Collection[str]) -> Request:
    return Request(action, request_id)


def _parse_auth(action: str, request_id: _Id, said: _Said, max_codes: int, extra: Collection[str]) -> Request:
    token = said.get("token")
    if type(token) is not str:
        raise PeerError("bad_request", "token must be a text")
    return Request(action, request_id, token=token)


def _parse_send(action: str, request_id: _Id, said: _Said, max_codes: int, extra: Collection[str]) -> Request:
    to = said.get("to")
    if type(to) is not dict or len(named := [kind for kind in ("user", "group", "all") if kind in to]) != 1:
        raise PeerError("bad_request", "to must name one of user, group and all")
    (kind,) = named
    name = to[kind]
    if kind == "all":
        if name is not True:
            raise PeerError("bad_request", "to.all must be true")
        name = ""
    elif type(name) is not str or not name:
        raise PeerError("bad_request", f"to.{kind} must be a text that is not empty")
    if "data" not in said:
        raise PeerError("bad_request", "a message has data")
    data = said["data"]
    encoding = said.get("encoding")
    if encoding is not None:
        if encoding != "base64" or type(data) is not str:
            raise PeerError("bad_request", "encoding must be base64, and data a text")
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError:
            raise PeerError("bad_request", "data is not base64") from None
    return Request(action, request_id, to=(kind, name), data=data)


_ACTIONS = {
    "subscribe": _parse_subscribe,
    "unsubscribe": _parse_codes,
    "list": _parse_plain,
    "snapshot": _parse_codes,
    "ping": _parse_plain,
    "auth": _parse_auth,
    "send": _parse_send,
}


Message = dict[str, Any]


def hello(
    *, server: str, conn: str, conn_key: str, epoch: str, time_ms: int, heartbeat_ms: int, fields: Iterable[str],
    limits: Mapping[str, Any], auth: str = "none",
) -> Message:  # fmt: skip
    """Return the first message of every connection.

    Args:
        auth: ``none`` (this server takes no tokens), ``required``, ``optional``, or ``ok`` (the handshake brought one).
    """
    return {
        "type": "hello", "version": PROTOCOL, "server": server, "conn": conn, "conn_key": conn_key, "epoch": epoch,
        "time": time_ms, "auth": auth, "heartbeat_ms": heartbeat_ms, "fields": list(fields), "limits": dict(limits),
    }  # fmt: skip


def ack(action: str, request_id: int | str | None, time_ms: int, **results: Any) -> Message:
    """Return the answer to a request that was carried out."""
    return {"type": "ack", **_id(request_id), "action": action, "time": time_ms, **results}


def pong(request_id: int | str | None, time_ms: int) -> Message:
    """Return the answer to ``{"action":"ping"}``."""
    return {"type": "pong", **_id(request_id), "time": time_ms}


def error(fault: PeerError, time_ms: int, request_id: int | str | None = None, action: str | None = None) -> Message:
    """Return what a client is told about its fault."""
    said: Message = {"type": "error", **_id(request_id)}
    if action is not None:
        said["action"] = action
    said |= {"error": fault.error, "message": fault.message, "retryable": fault.retry_after_ms is not None}
    if fault.retry_after_ms is not None:
        said["retry_after_ms"] = fault.retry_after_ms
    said["time"] = time_ms
    return said


def heartbeat(time_ms: int, feed: str, feed_age_ms: int | None) -> Message:
    """Return the sign of life; ``feed_age_ms`` is absent while no tick was ever seen."""
    said: Message = {"type": "heartbeat", "time": time_ms, "feed": feed}
    if feed_age_ms is not None:
        said["feed_age_ms"] = feed_age_ms
    return said


def status(time_ms: int, scope: str, state: str, **facts: Any) -> Message:
    """Return a change of state: of the connection, or of some codes."""
    return {"type": "status", "time": time_ms, "scope": scope, "state": state, **facts}


def message(time_ms: int, origin: str, fields: Mapping[str, Any], sender: Mapping[str, Any] | None = None) -> Message:
    """Return what a program, or another client, has sent.

    Args:
        time_ms: when it was sent.
        origin: to whom: ``conn``, ``user``, ``group`` or ``all``.
        fields: ``data``, and its ``encoding`` when it is bytes (:meth:`~quotepush.wire.formats.Codec.binary`).
        sender: the client who speaks: ``conn`` and ``user``.
    """
    said: Message = {"type": "message", "time": time_ms, "from": origin, **fields}
    if sender is not None:
        said["sender"] = sender
    return said


def _id(request_id: int | str | None) -> Message:
    return {} if request_id is None else {"id": request_id}
