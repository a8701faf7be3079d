"""Messages as Server-Sent Events, and the positions from which a stream of them goes on.

https://html.spec.whatwg.org/multipage/server-sent-events.html: an event is a block of lines with an empty one
behind it. Its ``id`` counts when the whole block has come, so a position in the block of its last rows can never say
more, or less, than what the client has got. An empty one takes back the position before: what came since has none.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from quotepush.wire.formats import JsonCodec

__all__ = ["EVENTS", "parse_position", "position", "selection", "stamped"]

# Life, ordinal, selection: b2d9f0a1-1042-9c3e01d2.
_POSITION = re.compile(r"([0-9a-f]{1,32})-([0-9]{1,18})-([0-9a-f]{8})", re.ASCII)
_NO_POSITION = b"id\n"


class _Events(JsonCodec):
    """JSON messages, each as one event of its type; rows are objects."""

    subprotocol = ""

    def frame(self, message: Mapping[str, Any]) -> bytes:
        """Return a message as a whole event; when it says when to come back, browsers are told so in their own way."""
        retry = b"retry: %d\n" % message["retry_after_ms"] if "retry_after_ms" in message else b""
        return b"event: %b\n%bdata: %b\n\n" % (message["type"].encode(), retry, orjson.dumps(message))

    def bare_frame(self, payload: str | bytes) -> bytes | None:
        """Return a text as the data of an event ``message``; bytes cannot be the data of one."""
        if not isinstance(payload, str):
            return None
        lines = re.split(r"\r\n|\r|\n", payload)  # the three ends of a line that the standard knows
        return b"event: message\n%b\n" % b"".join(b"data: %b\n" % line.encode() for line in lines)

    def rows_frame(
        self, kind: str, time_ms: int, rows: Sequence[bytes], cols: int | None = None, **facts: Any
    ) -> bytes:
        """Return a ``tick`` or ``snapshot`` message as a whole event."""
        head = orjson.dumps({"type": kind, "time": time_ms, **facts})[:-1]
        return b'event: %b\ndata: %b,"data":[%b]}\n\n' % (kind.encode(), head, b",".join(rows))


EVENTS = _Events()


def stamped(events: bytes, place: str) -> bytes:
    """Return whole events with a position behind the last of them; an empty one takes the position back."""
    if not place:
        return _NO_POSITION + events
    last = b"%bid: %b\n\n" % (events[:-1], place.encode())
    # Between two events there is no position that would be true.
    return _NO_POSITION + last if events.count(b"\n\n") > 1 else last


def selection(codes: Iterable[str], fields: Iterable[str] | None) -> str:
    """Return a short name of what is watched: a position holds for these codes and fields and for no others."""
    named = "\n".join(sorted(codes)) + "\n\n" + ("" if fields is None else "\n".join(sorted(set(fields))))
    return f"{zlib.crc32(named.encode()):08x}"


def position(life: str, ordinal: int, selected: str) -> str:
    """Return a position: everything of this selection was sent up to the ordinal, in this life of main."""
    return f"{life}-{ordinal}-{selected}"


def parse_position(text: str) -> tuple[str, int, str] | None:
    """Return life, ordinal and selection; None when it is no position of ours."""
    match = _POSITION.fullmatch(text)
    return (match[1], int(match[2]), match[3]) if match else None
