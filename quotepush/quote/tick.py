"""What a tick may say, and how it merges into the row of its code.

Law: a tick is accepted whole or refused whole; a refused one changes nothing.
A row is always complete for what is known of its code: ``null`` clears a field,
an absent field keeps its value, ``change`` and ``change_pct`` are derived here
and nowhere else. Field list, types and units: docs/protocol.md, "The tick".
"""

from typing import Any

import orjson

__all__ = [
    "BOOK_FIELDS", "KNOWN_FIELDS", "SERVERS_OWN", "SHAPES", "BadTick", "Shape", "check_tick", "clear_nulls",
    "decode_tick", "derive_change", "has_book_news", "has_news", "merge_fields", "shape_of", "written_size",
]  # fmt: skip

# Heavy fields, apart from the row: only a view that names them gets them.
BOOK_FIELDS = ("bids", "asks")
BOOK_LEVELS = 5

# A whole number written as a float must still fit an integer when the row is written.
_MAX_WHOLE = 2.0**63

# The latest ts that can be milliseconds: year 5138. More is microseconds or nanoseconds by mistake.
MAX_TS_MS = 10**14

_PRICE, _SIZE, _TS, _TEXT, _LEVELS = range(5)  # numbers first
_KINDS = {
    **dict.fromkeys(
        ("last", "prev_close", "open", "high", "low", "amount", "bid", "ask", "limit_up", "limit_down"), _PRICE
    ),
    **dict.fromkeys(("volume", "last_size", "bid_size", "ask_size"), _SIZE),
    **dict.fromkeys(("name", "phase", "status"), _TEXT),
    **dict.fromkeys(BOOK_FIELDS, _LEVELS),
    "ts": _TS,
}
SERVERS_OWN = frozenset(("code", "seq", "prev", "epoch", "change", "change_pct"))
"""Fields that the server numbers, derives or decides: what a tick says of them is ignored."""

# No plain field of a row.
_OURS = SERVERS_OWN | {"reset"}

# In the order in which docs and the hello message list them.
KNOWN_FIELDS = (
    "name", "last", "prev_close", "open", "high", "low", "change", "change_pct", "volume", "amount", "last_size",
    "bid", "bid_size", "ask", "ask_size", "bids", "asks", "limit_up", "limit_down", "phase", "status",
)  # fmt: skip


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


class Shape:
    """What a tick with these fields has to be looked at for; made once per set of fields.

    A publisher sends the same fields again and again, so the questions are asked once.
    """

    __slots__ = ("codes", "copies", "derives", "known", "levels", "ours", "resets", "ts", "values")

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.known = tuple((name, _KINDS[name]) for name in fields if name in _KINDS)
        self.codes = "code" in fields
        self.copies = "epoch" in fields  # perhaps a copy of a tick that comes through the log
        self.levels = tuple(name for name in fields if name in BOOK_FIELDS)
        self.ours = tuple(name for name in fields if name in _OURS)
        self.values = tuple(name for name in fields if name not in _OURS and name not in BOOK_FIELDS and name != "ts")
        self.ts = "ts" in fields
        self.resets = "reset" in fields
        self.derives = "last" in fields or "prev_close" in fields


SHAPES: dict[tuple[str, ...], Shape] = {}
_MAX_SHAPES = 4096


def shape_of(tick: dict[str, Any]) -> Shape:
    """Return the shape of a decoded tick; :data:`SHAPES` remembers it by the tuple of its fields."""
    fields = tuple(tick)
    shape = SHAPES.get(fields)
    if shape is None:
        if len(SHAPES) >= _MAX_SHAPES:  # a publisher that invents field names
            SHAPES.clear()
        shape = SHAPES[fields] = Shape(fields)
    return shape


def check_tick(tick: dict[str, Any], shape: Shape) -> None:  # hot
    """Look at every known field; sizes that are whole floats become ints.

    Raises:
        BadTick: a known field has a wrong type, is negative, or is out of range.
    """
    for name, kind in shape.known:
        value = tick[name]
        t = type(value)
        if t is float:
            if kind == _PRICE and value >= 0:
                continue
        elif t is int:
            if kind <= _TS and 0 <= value < MAX_TS_MS:
                continue
        elif t is str:
            if kind == _TEXT:
                continue
        elif t is list and kind == _LEVELS and _are_levels(value):
            continue
        tick[name] = _checked(name, kind, value)


def _checked(name: str, kind: int, value: Any) -> Any:
    """Return an unusual value of a known field as it goes into the row."""
    t = type(value)
    if kind == _LEVELS:
        if value is not None:
            _check_levels(name, value)
    elif kind == _TEXT:
        if value is not None and t is not str:
            raise BadTick("wrong_type", f"{name} must be a text")
    elif value is None:
        pass
    elif kind == _TS:
        if t is not int or not 0 <= value < MAX_TS_MS:
            raise BadTick("wrong_type", "ts must be epoch milliseconds")
    elif kind == _PRICE:
        if t is not float and t is not int:
            raise BadTick("wrong_type", f"{name} must be a number")
    elif t is float and value.is_integer() and value < _MAX_WHOLE:
        value = int(value)
    elif t is not int:
        raise BadTick("wrong_type", f"{name} must be a whole number")
    if kind < _TS and value is not None and value < 0:
        raise BadTick("negative", f"{name} must not be negative")
    return value


def written_size(tick: dict[str, Any]) -> int:
    """Return how many bytes a tick has as JSON; orjson reads 1,024 levels, but writes only 254.

    Raises:
        BadTick: it is nested too deep, so what could come in could not go out.
    """
    try:
        return len(orjson.dumps([tick])) - 2
    except orjson.JSONEncodeError:
        raise BadTick("too_deep", "a field is nested too deep") from None


def _are_levels(levels: list[Any]) -> bool:  # hot
    for level in levels:
        if type(level) is not list or len(level) != 2:
            return False
        price, size = level
        if type(price) is not float and type(price) is not int:
            return False
        if type(size) is not int and type(size) is not float:
            return False
        if price < 0 or size < 0:
            return False
    return True


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


def has_news(row: dict[str, Any], tick: dict[str, Any], shape: Shape) -> bool:  # hot
    """Say whether merging ``tick`` would change ``row`` in more than ``ts``."""
    for name in shape.values:
        value = tick[name]
        if value is None:
            if name in row:
                return True
        else:
            old = row.get(name, row)  # the row itself: equal to no field
            if old != value or type(old) is not type(value):
                return True
    return False


def has_book_news(book: dict[str, Any], tick: dict[str, Any], shape: Shape) -> bool:
    """Say whether merging ``tick`` would change the book."""
    for name in shape.levels:
        levels = tick[name]
        if book.get(name) != (None if levels is None else levels[:BOOK_LEVELS]):
            return True
    return False


def merge_fields(row: dict[str, Any], book: dict[str, Any], tick: dict[str, Any], shape: Shape) -> None:  # hot
    """Merge a checked tick into ``row`` and its ``book``; ``tick`` is used up.

    Fields that nobody knows pass through; those that the server sets itself are left alone.
    """
    for name in shape.ours:
        del tick[name]
    if shape.levels:
        for name in shape.levels:
            levels = tick.pop(name)
            if levels is None:
                book.pop(name, None)
            else:
                book[name] = levels[:BOOK_LEVELS]
    row.update(tick)
    if shape.derives and ("prev_close" in row or "change" in row):
        change = derive_change(row.get("last"), row.get("prev_close"))
        if change is not None:
            row["change"], row["change_pct"] = change
        elif "change" in row:
            del row["change"], row["change_pct"]


def clear_nulls(row: dict[str, Any]) -> None:
    """Remove the fields that a tick has just cleared."""
    for name in [name for name, value in row.items() if value is None]:
        del row[name]


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
    try:
        a, b = round(last * scale), round(prev_close * scale)
        if not b:  # a price below 0.00000001
            return None
        difference = a - b
        hundredths = (abs(difference) * 20_000 + b) // (2 * b)
        return difference / scale, (hundredths if difference >= 0 else -hundredths) / 100
    except OverflowError:  # finite, but no price: the quotient is beyond a float
        return None
