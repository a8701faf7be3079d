"""How an instrument is named: one canonical spelling for all the usual ones.

Invariant: whatever stands behind this module is canonical, and parsing a
canonical code gives it back. Chinese and Hong Kong codes carry their market
(``600519.SH``, ``00700.HK``), everything else is upper-cased and kept.
Spellings: docs/protocol.md, "Codes".
"""

import re
from functools import lru_cache

__all__ = ["MAX_CODE_LENGTH", "BadCode", "parse_code"]

MAX_CODE_LENGTH = 32

_ALLOWED = re.compile(r"[A-Za-z0-9._:=^-]{1,32}\Z", re.ASCII)
_DIGITS_FIRST = re.compile(r"([0-9]{6})\.([A-Z]+)\Z")
_PREFIXED = re.compile(r"(SH|SZ|BJ)([0-9]{6})\Z")
_EXCHANGE_FIRST = re.compile(r"(SSE|SZSE)\.([0-9]{6})\Z")
_HONG_KONG = re.compile(r"(?:HK([0-9]{1,5})|([0-9]{1,5})\.(?:HK|XHKG))\Z")
_BARE = re.compile(r"[0-9]{6}\Z")

_MARKETS = {"SH": "SH", "SS": "SH", "XSHG": "SH", "SSE": "SH", "SZ": "SZ", "XSHE": "SZ", "SZSE": "SZ", "BJ": "BJ"}

# The longest prefix decides: 92xxxx is Beijing although 9 alone is Shanghai.
_BARE_MARKETS = (
    (("43", "83", "87", "92"), "BJ"),
    (("5", "6", "7", "9", "110", "113", "118", "132", "204"), "SH"),
)


class BadCode(ValueError):
    """The text cannot be a code. Its argument says why, for the one who sent it."""


# A spelling is parsed once per process; the bound keeps a hostile client from filling memory.
@lru_cache(maxsize=65_536)
def parse_code(text: str) -> str:
    """Return the canonical code that ``text`` spells.

    >>> parse_code("sh600519"), parse_code("0700.HK"), parse_code("brk.b")
    ('600519.SH', '00700.HK', 'BRK.B')

    Raises:
        BadCode: a character that no code has, or a length outside 1 to 32.
    """
    if not _ALLOWED.match(text):
        if not 1 <= len(text) <= MAX_CODE_LENGTH:
            raise BadCode(f"a code has 1 to {MAX_CODE_LENGTH} characters")
        raise BadCode("a code is made of A-Z a-z 0-9 . _ : = ^ -")
    code = text.upper()
    if m := _DIGITS_FIRST.match(code):
        market = _MARKETS.get(m[2])
        return f"{m[1]}.{market}" if market else code
    if m := _PREFIXED.match(code) or _EXCHANGE_FIRST.match(code):
        return f"{m[2]}.{_MARKETS[m[1]]}"
    if m := _HONG_KONG.match(code):
        return f"{m[1] or m[2]:0>5}.HK"
    if _BARE.match(code):
        return f"{code}.{_market_of(code)}"
    return code


def _market_of(digits: str) -> str:
    for prefixes, market in _BARE_MARKETS:
        if digits.startswith(prefixes):
            return market
    return "SZ"
