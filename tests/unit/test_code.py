"""Spellings of codes, as docs/protocol.md, "Codes", lists them."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.quote.code import MAX_CODE_LENGTH, BadCode, parse_code

ALPHABET = string.ascii_letters + string.digits + "._:=^-"

well_formed = st.text(ALPHABET, min_size=1, max_size=MAX_CODE_LENGTH)
six_digits = st.integers(0, 999_999).map("{:06}".format)
# Like an instrument of China or Hong Kong, with any number of digits.
prefixed = st.builds(
    lambda prefix, number, width: f"{prefix}{number:0{width}}"[:8],
    st.sampled_from([case(market) for market in ("sh", "sz", "bj", "hk") for case in (str, str.title, str.upper)]),
    st.integers(0, 999_999), st.integers(1, 6),
)  # fmt: skip

# From the protocol's sentence, longest prefix first wins; written here without looking at the parser's table.
SHANGHAI_PREFIXES = ("5", "6", "7", "9", "110", "113", "118", "132", "204")
BEIJING_PREFIXES = ("43", "83", "87", "92")


def market_by_longest_prefix(digits: str) -> str:
    candidates = [(len(p), "SH") for p in SHANGHAI_PREFIXES if digits.startswith(p)]
    candidates += [(len(p), "BJ") for p in BEIJING_PREFIXES if digits.startswith(p)]
    return max(candidates)[1] if candidates else "SZ"


def spellings(digits: str, market: str) -> list[str]:
    """Every spelling of one Chinese instrument that the protocol promises to accept."""
    prefix = market.lower()
    found = [f"{digits}.{market}", f"{prefix}{digits}", f"{market}{digits}"]
    if market == "SH":
        found += [f"{digits}.SS", f"{digits}.XSHG", f"SSE.{digits}"]
    elif market == "SZ":
        found += [f"{digits}.XSHE", f"SZSE.{digits}"]
    if market_by_longest_prefix(digits) == market:
        found.append(digits)
    return found


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("600519.SH", "600519.SH"), ("sh600519", "600519.SH"), ("SH600519", "600519.SH"), ("600519.SS", "600519.SH"),
        ("600519.XSHG", "600519.SH"), ("SSE.600519", "600519.SH"), ("600519", "600519.SH"),
        ("000001", "000001.SZ"), ("000001.SZ", "000001.SZ"), ("sz000001", "000001.SZ"), ("000001.XSHE", "000001.SZ"),
        ("SZSE.000001", "000001.SZ"), ("sh000001", "000001.SH"), ("000001.SH", "000001.SH"),
        ("430047", "430047.BJ"), ("bj430047", "430047.BJ"), ("430047.BJ", "430047.BJ"), ("920001", "920001.BJ"),
        ("00700.HK", "00700.HK"), ("hk00700", "00700.HK"), ("0700.HK", "00700.HK"), ("hk700", "00700.HK"),
        ("700.hk", "00700.HK"), ("9988.HK", "09988.HK"),
        ("AAPL", "AAPL"), ("aapl", "AAPL"), ("BRK.B", "BRK.B"), ("brk.b", "BRK.B"), ("BTC-USDT", "BTC-USDT"),
        ("ES=F", "ES=F"), ("^GSPC", "^GSPC"), ("fx:eurusd", "FX:EURUSD"), ("a_b", "A_B"),
        # Looks like one of theirs and is not: taken as it is.
        ("60051", "60051"), ("6005190", "6005190"), ("600519.US", "600519.US"), ("SH60051", "SH60051"),
        ("sh6005190", "SH6005190"), ("123456.HK", "123456.HK"), ("HK123456", "HK123456"), ("HK", "HK"), ("SH", "SH"),
        ("SSE.60051", "SSE.60051"), ("600519.SH.X", "600519.SH.X"), ("X.600519.SH", "X.600519.SH"),
    ],
)  # fmt: skip
def test_a_spelling_is_understood(spelling: str, canonical: str) -> None:
    assert parse_code(spelling) == canonical


@pytest.mark.parametrize(
    ("digits", "market"),
    [
        ("500001", "SH"), ("601318", "SH"), ("700001", "SH"), ("900901", "SH"), ("110001", "SH"), ("113001", "SH"),
        ("118001", "SH"), ("132001", "SH"), ("204001", "SH"), ("430001", "BJ"), ("830001", "BJ"), ("870001", "BJ"),
        ("920001", "BJ"), ("000001", "SZ"), ("111001", "SZ"), ("112001", "SZ"), ("131990", "SZ"), ("200002", "SZ"),
        ("205001", "SZ"), ("300750", "SZ"), ("400001", "SZ"), ("420001", "SZ"), ("440001", "SZ"), ("800001", "SZ"),
        ("820001", "SZ"), ("840001", "SZ"), ("910001", "SH"), ("930001", "SH"), ("119001", "SZ"),
    ],
)  # fmt: skip
def test_bare_digits_get_the_market_of_their_prefix(digits: str, market: str) -> None:
    assert parse_code(digits) == f"{digits}.{market}"


@given(six_digits)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_bare_digits_follow_their_longest_prefix(digits: str) -> None:
    assert parse_code(digits) == f"{digits}.{market_by_longest_prefix(digits)}"


@given(six_digits, st.sampled_from(["SH", "SZ", "BJ"]))
@settings(deadline=None, derandomize=True)
def test_every_spelling_of_an_instrument_gives_one_code(digits: str, market: str) -> None:
    understood = {parse_code(spelling) for spelling in spellings(digits, market)}
    assert understood == {f"{digits}.{market}"}


@given(st.integers(0, 99_999))
@settings(deadline=None, derandomize=True)
def test_hong_kong_numbers_are_filled_up_to_five_digits(number: int) -> None:
    for width in range(len(str(number)), 6):
        digits = f"{number:0{width}}"
        for spelling in (f"hk{digits}", f"HK{digits}", f"{digits}.HK", f"{digits}.hk"):
            assert parse_code(spelling) == f"{number:05}.HK"


@given(st.one_of(well_formed, six_digits, prefixed))
@settings(deadline=None, derandomize=True, max_examples=1000)
def test_a_canonical_code_is_its_own_spelling(text: str) -> None:
    code = parse_code(text)
    assert parse_code(code) == code
    assert 1 <= len(code) <= MAX_CODE_LENGTH
    assert re.fullmatch(r"[A-Z0-9._:=^-]+", code)


@given(well_formed)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_case_does_not_matter(text: str) -> None:
    assert parse_code(text) == parse_code(text.lower()) == parse_code(text.upper()) == parse_code(text.swapcase())


@given(st.text(ALPHABET, min_size=1, max_size=MAX_CODE_LENGTH).filter(lambda text: not re.search("[0-9]", text)))
@settings(deadline=None, derandomize=True)
def test_a_code_without_digits_is_only_upper_cased(text: str) -> None:
    assert parse_code(text) == text.upper()


@given(st.text(max_size=40))
@settings(deadline=None, derandomize=True, max_examples=500)
def test_exactly_the_allowed_characters_and_lengths_are_accepted(text: str) -> None:
    is_allowed = 1 <= len(text) <= 32 and all(c in ALPHABET for c in text)
    try:
        parse_code(text)
    except BadCode:
        assert not is_allowed
    else:
        assert is_allowed


@pytest.mark.parametrize(
    "text",
    ["", " ", "no such", "AAPL\n", "\nAAPL", " AAPL", "A" * 33, "茅台", "６００５１９", "AAPL,MSFT", "a/b", "*", "a\0b",
     "ı"],
)  # fmt: skip
def test_what_is_no_code_is_refused(text: str) -> None:
    with pytest.raises(BadCode):
        parse_code(text)


def test_the_reason_of_a_refusal_fits_the_fault() -> None:
    with pytest.raises(BadCode, match="1 to 32 characters"):
        parse_code("A" * 33)
    with pytest.raises(BadCode, match="1 to 32 characters"):
        parse_code("")
    with pytest.raises(BadCode, match="made of"):
        parse_code("no such")


def test_a_code_of_the_longest_length_is_accepted() -> None:
    assert parse_code("a" * 32) == "A" * 32
