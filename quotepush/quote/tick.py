"""What a tick may say, and how it merges into the row of its code.

Law: a tick is accepted whole or refused whole; a refused one changes nothing.
A row is always complete for what is known of its code: ``null`` clears a field,
an absent field keeps its value, ``change`` and ``change_pct`` are derived here
and nowhere else. Field list, types and units: docs/protocol.md, "The tick".
"""

from typing import Any

import orjson

__all__ = ["BOOK_FIELDS", "KNOWN_FIELDS", "BadTick", "check_tick", "decode_tick", "derive_change", "merge_fields"]

# Heavy fields, apart from the row: only a view that names them gets them.
BOOK_FIELDS = ("bids", "asks")
BOOK_LEVELS = 5

# The latest ts that can be milliseconds: year 5138. More is microseconds or nanoseconds by mistake.
MAX_TS_MS = 10**14

_PRICE, _SIZE, _TEXT, _LEVELS, _TS, _OURS = range(6)
_KINDS: dict[str, int] = {
    **dict.fromkeys(
        ("last", "prev_close", "open", "high", "low", "amount", "bid", "ask", "limit_up", "limit_down"), _PRICE
    ),
    **dict.fromkeys(("volume", "last_size", "bid_size", "ask_size"), _SIZE),
    **dict.fromkeys(("name", "phase", "status"), _TEXT),
    **dict.fromkeys(BOOK_FIELDS, _LEVELS),
    "ts": _TS,
    # Numbered, derived or decided by the server: a plain tick cannot set them.
    **dict.fromkeys(("code", "seq", "prev", "epoch", "change", "change_pct", "reset"), _OURS),
}

# In the order in which docs and the hello message list them.
KNOWN_FIELDS = (
    "name", "last", "prev_close", "open", "high", "low", "change", "change_pct", "volume", "amount", "last_size",
    "bid", "bid_size", "ask", "ask_size", "bids", "asks", "limit_up", "limit_down", "phase", "status",
)  # fmt: skip

_ABSENT = object()


class BadTick(ValueError):
    """A tick that is refused. ``reason`` is the word it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def decode_tick(payload: bytes) -> dict[str, Any]:
    """Return the object that ``payload`` (JSON text) holds.

    Raises:
        BadTick: not JSON, or not an object.
    """
    try:
        tick = orjson.loads(payload)
    except orjson.JSONDecodeError as e:
        raise BadTick("bad_json", str(e)) from None
    if type(tick) is not dict:
        raise BadTick("not_an_object", f"a tick is a JSON object, not {type(tick).__name__}")
    return tick


def check_tick(tick: dict[str, Any]) -> None:  # hot
    """Look at every known field; sizes that are whole floats become ints.

    Raises:
        BadTick: a known field has a wrong type, is negative, or is out of range.
    """
    kinds = _KINDS
    whole: list[str] | None = None
    for name, value in tick.items():
        kind = kinds.get(name)
        t = type(value)
        if kind is None:
            if t is dict or t is list:
                _check_depth(name, value)
            continue
        if kind == _OURS or value is None:
            continue
        if kind == _PRICE:
            if t is not float and t is not int:
                raise BadTick("wrong_type", f"{name} must be a number")
            if value < 0:
                raise BadTick("negative", f"{name} must not be negative")
        elif kind == _SIZE:
            if t is float and value.is_integer():
                whole = [*(whole or ()), name]
            elif t is not int:
                raise BadTick("wrong_type", f"{name} must be a whole number")
            if value < 0:
                raise BadTick("negative", f"{name} must not be negative")
        elif kind == _TS:
            if t is not int or not 0 <= value < MAX_TS_MS:
                raise BadTick("wrong_type", "ts must be epoch milliseconds")
        elif kind == _TEXT:
            if t is not str:
                raise BadTick("wrong_type", f"{name} must be a text")
        else:
            _check_levels(name, value)
    for name in whole or ():
        tick[name] = int(tick[name])


def _check_depth(name: str, value: Any) -> None:
    # orjson reads 1,024 levels, but writes 254: what cannot be sent on must not come in.
    try:
        orjson.dumps([value])
    except orjson.JSONEncodeError:
        raise BadTick("too_deep", f"{name} is nested too deep") from None


def _check_levels(name: str, levels: Any) -> None:
    if type(levels) is not list:
        raise BadTick("wrong_type", f"{name} must be a list of [price, size]")
    for level in levels:
        if type(level) is not list or len(level) != 2:
            raise BadTick("wrong_type", f"{name} must be a list of [price, size]")
        for number in level:
            if type(number) is not float and type(number) is not int:
                raise BadTick("wrong_type", f"{name} must hold numbers")
            if number < 0:
                raise BadTick("negative", f"{name} must not hold negative numbers")


def merge_fields(row: dict[str, Any], book: dict[str, Any], tick: dict[str, Any]) -> bool:  # hot
    """Merge a checked tick into ``row`` and its ``book``; say whether ``row`` changed in more than ``ts``.

    Fields that nobody knows pass through; those that the server sets itself are skipped.
    """
    kinds = _KINDS
    changed = False
    derive = False
    for name, value in tick.items():
        kind = kinds.get(name)
        if kind == _OURS:
            continue
        if kind == _LEVELS:
            if value is None:
                book.pop(name, None)
            else:
                book[name] = value[:BOOK_LEVELS]
            continue
        old = row.get(name, _ABSENT)
        if value is None:
            if old is _ABSENT:
                continue
            del row[name]
        else:
            row[name] = value
            if old == value and type(old) is type(value):
                continue
        if kind == _TS:
            continue
        changed = True
        if name == "last" or name == "prev_close":
            derive = True
    if derive:
        change = derive_change(row.get("last"), row.get("prev_close"))
        if change is None:
            row.pop("change", None)
            row.pop("change_pct", None)
        else:
            row["change"], row["change_pct"] = change
    return changed


def derive_change(last: float | None, prev_close: float | None) -> tuple[float, float] | None:
    """Return ``(change, change_pct)``, or None where they do not exist.

    ``change`` has the prices' decimals, ``change_pct`` two, rounded half away from
    zero. Both are exact in decimals: computed with whole numbers, not with floats.
    None unless both prices are above zero: before the open Chinese sources send 0,
    and every board would show -100 %.
    """
    if not last or not prev_close or last <= 0 or prev_close <= 0:
        return None
    decimals = 8
    for fewer in (2, 3, 4):
        if round(last, fewer) == last and round(prev_close, fewer) == prev_close:
            decimals = fewer
            break
    scale = 10**decimals
    a, b = round(last * scale), round(prev_close * scale)
    if not b:  # a price below 0.00000001
        return None
    difference = a - b
    hundredths = (abs(difference) * 20_000 + b) // (2 * b)
    return difference / scale, (hundredths if difference >= 0 else -hundredths) / 100
