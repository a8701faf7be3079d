"""What clients ask in the query of an address, read as if a message had said it."""

from typing import Any

from aiohttp import web

from quotepush.errors import PeerError
from quotepush.push.desk import Desk
from quotepush.push.results import understand
from quotepush.push.stream import Asked
from quotepush.wire.events import parse_position, selection
from quotepush.wire.formats import View
from quotepush.wire.messages import Request, parse_request

__all__ = ["asked_of", "subscription_of"]

# The line of a request has room for fewer.
_MOST_CODES = 10_000
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def subscription_of(request: web.Request, desk: Desk) -> Request:
    """Return the codes and options of a query.

    Raises:
        PeerError: something is wrong with it.
    """
    said: dict[str, Any] = {"action": "subscribe", "codes": _listed(request, "codes")}
    if not said["codes"]:
        raise PeerError("bad_request", "codes must name at least one code: ?codes=600519.SH,AAPL")
    if "fields" in request.query:
        said["fields"] = _listed(request, "fields")
    rate = request.query.get("max_rate")
    if rate is not None:
        try:
            said["max_rate"] = float(rate)
        except ValueError:
            raise PeerError("bad_request", "max_rate must be a number") from None
    switch = request.query.get("snapshot")
    if switch is not None:
        said["snapshot"] = _SWITCH.get(switch.lower(), switch)
    return parse_request(said, _MOST_CODES, desk.extra_fields)


def asked_of(request: web.Request, desk: Desk) -> Asked:
    """Return what the client of a stream wants, and from where on.

    Raises:
        PeerError: something is wrong with it.
    """
    if request.query.get("format", "objects") != "objects":
        raise PeerError("bad_request", "a stream has rows as objects")
    wanted = subscription_of(request, desk)
    codes = understand(wanted.codes).codes
    selected = selection(codes, wanted.fields)
    text = request.headers.get("Last-Event-ID", request.query.get("last_event_id", ""))
    if text:
        place = parse_position(text)
        # A position of something else is none: the ack says so of each code.
        epoch, ordinal = ("", 0) if place is None or place[2] != selected else (f"@{place[0]}", place[1])
        wanted = wanted.behind(dict.fromkeys(codes, (epoch, ordinal)))
    goes_on = wanted.max_rate is None and not View.of(wanted.fields).has_book
    return Asked(wanted, selected if goes_on else "")


def _listed(request: web.Request, name: str) -> list[str]:
    return [word.strip() for text in request.query.getall(name, []) for word in text.split(",") if word.strip()]
