"""What is said on the wire, quotes.v1 as JSON: requests in, messages out.

Requests are parsed by a table from action to fields; everything that is wrong
with one is a :class:`~quotepush.errors.PeerError` that names the word on the wire.
Messages are built here and nowhere else. All of it: docs/protocol.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from quotepush.errors import PeerError

__all__ = [
    "CLOSE_CODES",
    "PROTOCOL",
    "SUBPROTOCOL",
    "Request",
    "ack",
    "error",
    "heartbeat",
    "named",
    "parse_request",
    "pong",
    "row_with_prev",
    "row_without_prev",
    "snapshot",
    "snapshot_row",
    "status",
    "tick_head",
]

PROTOCOL = "quotes.v1"
SUBPROTOCOL = "quotes.v1.json"

TICK_TAIL = b"]}"

# Close codes by the word that goes with them; the close reason repeats the word.
CLOSE_CODES = {
    "going_away": 1001,
    "wrong_frame_kind": 1003,
    "bad_utf8": 1007,
    "too_large": 1009,
    "internal": 1011,
    "restart": 1012,
    "overloaded": 1013,
    "rate_limited": 4429,
}

# Options of PROTOCOL quotes.v1 that this server does not offer: refused, so that no client
# believes it was granted what it asked for.
_NOT_OFFERED = ("fields", "max_rate", "format", "epoch", "since")

_ID_BYTES = 128


@dataclass(slots=True, frozen=True)
class Request:
    """One message of a client, checked.

    Attributes:
        action: ``subscribe``, ``unsubscribe``, ``list``, ``snapshot`` or ``ping``.
        id: what the client called it, sent back in the answer; None: nothing.
        codes: as the client spelled them.
        snapshot: whether a subscribe wants the newest rows first.
    """

    action: str
    id: int | str | None = None
    codes: tuple[str, ...] = ()
    snapshot: bool = True


def parse_request(text: str | bytes, max_codes: int) -> Request:
    """Return what a client's message asks for.

    Raises:
        PeerError: ``bad_json``, ``bad_request``, ``unknown_action``; its ``request`` attribute
            is the ``id`` and ``action`` as far as they could be read.
    """
    try:
        said = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise RequestError("bad_json", f"not JSON: {e}") from None
    if type(said) is not dict:
        raise RequestError("bad_request", "a message is a JSON object")
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
        return parse(action, request_id, said, max_codes)
    except PeerError as e:
        raise RequestError(e.error, e.message, request_id, action) from None


def named(text: str | bytes) -> tuple[int | str | None, str | None]:
    """Return ``id`` and ``action`` of a message that is not carried out, as far as they can be read."""
    try:
        request = parse_request(text, max_codes=0)
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


def _parse_subscribe(action: str, request_id: int | str | None, said: Mapping[str, Any], max_codes: int) -> Request:
    for option in _NOT_OFFERED:
        if said.get(option) is not None and (option, said[option]) != ("format", "objects"):
            raise PeerError("bad_request", f"this server does not offer {option}")
    wanted = said.get("snapshot", True)
    if type(wanted) is not bool:
        raise PeerError("bad_request", "snapshot must be true or false")
    return Request(action, request_id, _codes(said, max_codes), wanted)


def _parse_codes(action: str, request_id: int | str | None, said: Mapping[str, Any], max_codes: int) -> Request:
    if action == "snapshot" and said.get("fields") is not None:
        raise PeerError("bad_request", "this server does not offer fields")
    return Request(action, request_id, _codes(said, max_codes))


def _parse_plain(action: str, request_id: int | str | None, said: Mapping[str, Any], max_codes: int) -> Request:
    return Request(action, request_id)


def _parse_auth(action: str, request_id: int | str | None, said: Mapping[str, Any], max_codes: int) -> Request:
    raise PeerError("bad_request", "this server takes no tokens; everybody may subscribe")


_ACTIONS = {
    "subscribe": _parse_subscribe,
    "unsubscribe": _parse_codes,
    "list": _parse_plain,
    "snapshot": _parse_codes,
    "ping": _parse_plain,
    "auth": _parse_auth,
}


def hello(
    *, server: str, conn: str, conn_key: str, epoch: str, time_ms: int, heartbeat_ms: int, fields: Iterable[str],
    limits: Mapping[str, Any],
) -> bytes:  # fmt: skip
    """Return the first message of every connection."""
    return orjson.dumps(
        {
            "type": "hello", "version": PROTOCOL, "server": server, "conn": conn, "conn_key": conn_key, "epoch": epoch,
            "time": time_ms, "auth": "none", "heartbeat_ms": heartbeat_ms, "fields": list(fields),
            "limits": dict(limits),
        }
    )  # fmt: skip


def ack(action: str, request_id: int | str | None, time_ms: int, **results: Any) -> bytes:
    """Return the answer to a request that was carried out."""
    return orjson.dumps({"type": "ack", **_id(request_id), "action": action, "time": time_ms, **results})


def pong(request_id: int | str | None, time_ms: int) -> bytes:
    """Return the answer to ``{"action":"ping"}``."""
    return orjson.dumps({"type": "pong", **_id(request_id), "time": time_ms})


def error(fault: PeerError, time_ms: int, request_id: int | str | None = None, action: str | None = None) -> bytes:
    """Return what a client is told about its fault."""
    said: dict[str, Any] = {"type": "error", **_id(request_id)}
    if action is not None:
        said["action"] = action
    said |= {"error": fault.error, "message": fault.message, "retryable": fault.retry_after_ms is not None}
    if fault.retry_after_ms is not None:
        said["retry_after_ms"] = fault.retry_after_ms
    said["time"] = time_ms
    return orjson.dumps(said)


def heartbeat(time_ms: int, feed: str, feed_age_ms: int | None) -> bytes:
    """Return the sign of life; ``feed_age_ms`` is absent while no tick was ever seen."""
    said: dict[str, Any] = {"type": "heartbeat", "time": time_ms, "feed": feed}
    if feed_age_ms is not None:
        said["feed_age_ms"] = feed_age_ms
    return orjson.dumps(said)


def status(time_ms: int, scope: str, state: str, **facts: Any) -> bytes:
    """Return a change of state: of the connection, or of some codes."""
    return orjson.dumps({"type": "status", "time": time_ms, "scope": scope, "state": state, **facts})


def snapshot(time_ms: int, rows: Iterable[bytes]) -> bytes:
    """Return the newest rows, each as JSON text."""
    return b'{"type":"snapshot","time":%d,"data":[%b]}' % (time_ms, b",".join(rows))


def snapshot_row(code: str, row: bytes | None) -> bytes:
    """Return a snapshot's row: the newest one, or ``seq`` 0 for a code without a value."""
    return row if row is not None else b'{"code":"%b","seq":0}' % code.encode()


def tick_head(time_ms: int) -> bytes:
    """Return what stands before the rows of a tick message; :data:`TICK_TAIL` stands behind them."""
    return b'{"type":"tick","time":%d,"data":[' % time_ms


def row_with_prev(row: bytes, prev: int) -> bytes:
    """Return ``row`` (a JSON object) with ``prev`` as its first field."""
    return b'{"prev":%d,%b' % (prev, row[1:])


def row_without_prev(row: bytes) -> bytes:
    """Return a row made by :func:`row_with_prev` as it was before."""
    return b"{" + row[row.index(b",") + 1 :]


def _id(request_id: int | str | None) -> dict[str, int | str]:
    return {} if request_id is None else {"id": request_id}
