"""What somebody may have: which codes, how often, how many, how late; to whom he may send.

Law: whether a code is allowed is decided on its canonical spelling and on nothing else, so no spelling gets around
it. A claim of a wrong type gives nothing: whoever brings it is refused as a whole.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from quotepush.quote.code import BadCode, parse_code

__all__ = [
    "CLAIMS", "EVERYBODY", "EVERY_CODE", "MOST_RATE", "NOBODY", "UNLIMITED", "BadClaim", "Codes", "Entitlement",
    "MaySend", "codes_of", "entitlement_of",
]  # fmt: skip

# As the option max_rate of a subscription: whoever may have more may have every row.
MOST_RATE = 1000.0
_MOST_COUNT = 1_000_000_000
_MOST_NAME = 128

# Patterns with a * elsewhere than at an end are gone through one by one.
_MOST_INNER = 64
_LONGEST_PATTERN = 64
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:=^-*")


class BadClaim(ValueError):
    """A claim that gives nothing; its argument names it and says how it should be, without its value."""


class Codes:
    """A set of codes, given by patterns in which ``*`` stands for any letters, also for none.

    A pattern without ``*`` is a code in any spelling; one with ``*`` is compared with canonical codes, capitals or not.
    ``in`` takes canonical codes. Costs hardly depend on the number of patterns but for those with a ``*`` inside.

    Raises:
        BadClaim: a text that is no pattern, or too many of a kind.
    """

    __slots__ = ("_beginnings", "_endings", "_exact", "_has_all", "_inner", "patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(map(_canonical_pattern, patterns)))
        exact: list[str] = []
        beginnings: list[str] = []
        endings: list[str] = []
        inner: list[tuple[str, ...]] = []
        for pattern in self.patterns:
            parts = tuple(pattern.split("*"))
            if len(parts) == 1:
                exact.append(pattern)
            elif len(parts) == 2 and not parts[1]:
                beginnings.append(parts[0])
            elif len(parts) == 2 and not parts[0]:
                endings.append(parts[1])
            else:
                inner.append(parts)
        if len(inner) > _MOST_INNER:
            raise BadClaim(f"codes may have at most {_MOST_INNER} patterns with a * elsewhere than at one end")
        self._has_all = "*" in self.patterns
        self._exact = frozenset(exact)
        self._beginnings = tuple(beginnings)
        self._endings = tuple(endings)
        self._inner = tuple(inner)

    @property
    def has_all(self) -> bool:
        """Whether every code is in it."""
        return self._has_all

    def __contains__(self, code: str) -> bool:
        return (
            self._has_all
            or code in self._exact
            or code.endswith(self._endings)
            or code.startswith(self._beginnings)
            or any(_fits(code, parts) for parts in self._inner)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codes) and set(self.patterns) == set(other.patterns)

    def __hash__(self) -> int:
        return hash(frozenset(self.patterns))

    def __repr__(self) -> str:
        return f"Codes({list(self.patterns)!r})"


def _canonical_pattern(text: str) -> str:
    if "*" not in text:
        try:
            return parse_code(text)
        except BadCode:
            raise BadClaim("codes has what is neither a code nor a pattern") from None
    pattern = text.upper()
    if len(text) > _LONGEST_PATTERN or not text.isascii() or not _LETTERS.issuperset(pattern):
        raise BadClaim("codes has what is neither a code nor a pattern")
    while "**" in pattern:
        pattern = pattern.replace("**", "*")
    return pattern


def _fits(code: str, parts: tuple[str, ...]) -> bool:
    """Whether the parts between the stars stand in ``code`` one behind the other, the outer ones at its ends."""
    first, *middle, last = parts
    if len(code) < len(first) + len(last) or not (code.startswith(first) and code.endswith(last)):
        return False
    at, end = len(first), len(code) - len(last)
    for part in middle:  # the first place where it fits leaves the most room for the others
        found = code.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


@lru_cache(maxsize=64)
def codes_of(patterns: tuple[str, ...]) -> Codes:
    """Return the codes of these patterns: many tokens have the same ones, and share them."""
    return Codes(patterns)


EVERY_CODE = Codes(["*"])

EVERYBODY = True
NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class MaySend:
    """To whom somebody may send messages: ``True`` for whomever, or names.

    Attributes:
        all: to everybody at once.
    """

    users: bool | frozenset[str] = NOBODY
    groups: bool | frozenset[str] = NOBODY
    all: bool = False

    def to_user(self, user: str) -> bool:
        """Say whether a message to ``user`` is allowed."""
        return self.users is True or (self.users is not False and user in self.users)

    def to_group(self, group: str) -> bool:
        """Say whether a message to ``group`` is allowed."""
        return self.groups is True or (self.groups is not False and group in self.groups)


@dataclass(frozen=True, slots=True)
class Entitlement:
    """What a connection may have beside the limits that hold for every one.

    Attributes:
        codes: which it may see, by whatever way.
        max_rate: most rows a second and code; None: every row.
        max_codes: most codes on one connection; None: as many as any.
        delay_s: how old its quotes are; 0: live.
        max_conns: most connections of its user; None: any number.
        conns_win: which of them stay when there are more: the ``newest`` or the ``oldest``.
        groups: those that it is in from the beginning.
        may_send: to whom it may send.
    """

    codes: Codes = EVERY_CODE
    max_rate: float | None = None
    max_codes: int | None = None
    delay_s: int = 0
    max_conns: int | None = None
    conns_win: str = "newest"
    groups: tuple[str, ...] = ()
    may_send: MaySend = field(default_factory=MaySend)

    def capped(self, rate: float | None) -> float | None:
        """Return the rate that somebody gets who asks for ``rate`` (None: every row)."""
        if self.max_rate is None or rate is None:
            return self.max_rate if rate is None else rate
        return min(rate, self.max_rate)


UNLIMITED = Entitlement()


def entitlement_of(claims: Mapping[str, Any], delays: Collection[int] = ()) -> Entitlement:
    """Return what the claims of a token give.

    Args:
        delays: what ``delay_s`` may be, besides 0.

    Raises:
        BadClaim: one of them cannot be taken.
    """
    given = {name: parse(claims[name]) for name, parse in CLAIMS.items() if name in claims}
    if not given:
        return UNLIMITED
    entitlement = Entitlement(**given)
    if entitlement.delay_s and entitlement.delay_s not in delays:
        raise BadClaim("delay_s must be one of the server's delays, or 0")
    return entitlement


def _codes(value: Any) -> Codes:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise BadClaim("codes must be a list of texts")
    return codes_of(tuple(value))


def _rate(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= MOST_RATE or not math.isfinite(value):
        raise BadClaim(f"max_rate must be a number above 0 and at most {MOST_RATE:g}")
    return float(value)


def _count(name: str, least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or not least <= value <= _MOST_COUNT:
            raise BadClaim(f"{name} must be a whole number of at least {least}")
        return value

    return parse


def _conns_win(value: Any) -> str:
    if type(value) is not str or value not in ("newest", "oldest"):
        raise BadClaim("conns_win must be newest or oldest")
    return value


def _names(value: Any, claim: str) -> tuple[str, ...]:
    if type(value) is not list or not all(type(name) is str and 0 < len(name) <= _MOST_NAME for name in value):
        raise BadClaim(f"{claim} must be a list of texts of 1 to {_MOST_NAME} letters")
    return tuple(dict.fromkeys(value))


def _may_send(value: Any) -> MaySend:
    if type(value) is not dict:
        raise BadClaim("may_send must be an object with users, groups and all")
    to_all = value.get("all", False)
    if type(to_all) is not bool:
        raise BadClaim("may_send.all must be true or false")
    return MaySend(_receivers(value, "users"), _receivers(value, "groups"), to_all)


def _receivers(value: Mapping[str, Any], kind: str) -> bool | frozenset[str]:
    names = value.get(kind, False)
    if type(names) is bool:
        return EVERYBODY if names else NOBODY
    return frozenset(_names(names, f"may_send.{kind}"))


# Which claims entitle, and how each is read. All other claims say who somebody is.
CLAIMS: dict[str, Callable[[Any], Any]] = {
    "codes": _codes,
    "delay_s": _count("delay_s", 0),
    "max_rate": _rate,
    "max_codes": _count("max_codes", 1),
    "max_conns": _count("max_conns", 1),
    "conns_win": _conns_win,
    "groups": lambda value: _names(value, "groups"),
    "may_send": _may_send,
}
