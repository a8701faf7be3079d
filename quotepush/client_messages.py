"""The words between the Python client and its server: what an answer says, read once and checked.

Law: whatever is no quotes.v1 is a :class:`BadMessage` here, and nowhere later.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

__all__ = [
    "Accepted",
    "BadMessage",
    "Message",
    "Rejected",
    "Row",
    "SubscribeResult",
    "decode_frame",
    "read_results",
    "refusal_of",
    "results_of",
    "retry_after_ms",
    "rows_in",
]

Row = dict[str, Any]
"""A row as the server sent it; its fields are in docs/protocol.md, and publishers may add more."""

Message = dict[str, Any]
"""One message of the server, with its ``type``."""

# No server understands a longer code, and an endless one would cost the connection.
_MAX_SPELLING = 128
_DEFAULT_RETRY_MS = 1000


class BadMessage(ValueError):
    """The server said something that is not quotes.v1. Its argument says what."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A code that the server understood.

    Attributes:
        code: canonical; this is what rows carry.
        spelling: what was asked for.
        resume: ``current``, ``replay`` or ``snapshot`` where a subscription was resumed, else None.
    """

    code: str
    spelling: str
    resume: str | None = field(default=None, compare=False)


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


def decode_frame(payload: bytes, *, is_text: bool = True) -> Message:
    """Return one frame of the server as a message.

    What is no JSON object with a ``type`` is a backend's bare frame: ``{"type": "raw", "data": …}``, with its
    text or bytes.
    """
    if not is_text:
        return {"type": "raw", "data": payload}
    try:
        message = orjson.loads(payload)
    except orjson.JSONDecodeError:
        message = None
    if type(message) is not dict or type(message.get("type")) is not str:
        return {"type": "raw", "data": payload.decode(errors="replace")}
    return message


def read_results(message: Message) -> SubscribeResult:
    """Return what an ``ack`` says about each code."""
    accepted, rejected = message.get("accepted") or [], message.get("rejected") or []
    try:
        return SubscribeResult(
            tuple(Accepted(entry["code"], entry["as"], entry.get("resume")) for entry in accepted),
            tuple(Rejected(entry["as"], entry["error"], str(entry.get("message", ""))) for entry in rejected),
        )
    except (KeyError, TypeError, AttributeError):
        raise BadMessage("an ack without its results") from None


def rows_in(message: Message) -> list[Row]:
    """Return the rows of a ``snapshot`` or ``tick`` message."""
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


def retry_after_ms(message: Message) -> float:
    """Return how long the server asks us to wait."""
    told = message.get("retry_after_ms")
    return max(0.0, told) if isinstance(told, int | float) else _DEFAULT_RETRY_MS


def refusal_of(spelling: str) -> Rejected | None:
    """Return why a code cannot even be sent, None if it can."""
    if len(spelling) > _MAX_SPELLING:
        return Rejected(spelling, "bad_code", "too long to be a code")
    try:
        spelling.encode()
    except UnicodeEncodeError:
        return Rejected(spelling, "bad_code", "not text in UTF-8")
    return None
