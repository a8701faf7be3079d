"""What a token's claims give: patterns of codes, limits, and that a claim of a wrong type gives nothing."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.entitlement import (
    CLAIMS,
    EVERY_CODE,
    UNLIMITED,
    BadClaim,
    Codes,
    Entitlement,
    MaySend,
    codes_of,
    entitlement_of,
)
from quotepush.quote.code import parse_code


def fault(**claims: Any) -> str:
    with pytest.raises(BadClaim) as found:
        entitlement_of(claims, [900])
    return str(found.value)


# Codes


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("*", ["A", "600519.SH", "-"], []),
        ("**", ["A"], []),
        ("*.SH", ["600519.SH", ".SH"], ["600519.SZ", "SH", "600519.SHX", "600519XSH"]),
        ("*.sh", ["600519.SH"], ["600519.SZ"]),
        ("AAPL", ["AAPL"], ["AAP", "AAPLX", "XAAPL"]),
        ("aapl", ["AAPL"], []),
        ("sh600519", ["600519.SH"], ["SH600519X"]),
        ("600519", ["600519.SH"], ["600519.SZ"]),
        ("0700.HK", ["00700.HK"], ["700.HK"]),
        ("60*.SH", ["600519.SH", "60.SH"], ["688001.SH", "60", "6.SH"]),
        ("BRK*", ["BRK", "BRK.B"], ["BR", "ABRK"]),
        ("A*A", ["AA", "ABA"], ["A", "AB"]),
        ("A*B*A", ["ABA", "AXBXA"], ["AA", "AB", "AXA"]),
        ("*B*", ["B", "ABC"], ["AC"]),
        ("*A*A*", ["AA", "XAXAX"], ["A", "XAX"]),
        ("BRK.B", ["BRK.B"], ["BRKXB", "BRKB"]),
        ("^GSPC*", ["^GSPC"], ["GSPC"]),
        ("ES=*", ["ES=F"], ["ES-F"]),
    ],
)
def test_a_pattern_allows_what_it_says_and_nothing_else(pattern: str, allowed: list[str], refused: list[str]) -> None:
    codes = Codes([pattern])
    assert [code for code in allowed if code not in codes] == []
    assert [code for code in refused if code in codes] == []


def test_patterns_add_up_and_none_allows_nothing() -> None:
    codes = Codes(["*.SH", "AAPL"])
    assert "600519.SH" in codes and "AAPL" in codes and "MSFT" not in codes
    assert not codes.has_all and EVERY_CODE.has_all and Codes(["A", "*"]).has_all
    assert "A" not in Codes([]) and not Codes([]).has_all


def test_codes_are_the_same_when_their_patterns_are() -> None:
    assert Codes(["a", "b*", "A"]) == Codes(["B*", "A"]) == codes_of(("A", "B*")) != Codes(["A"])
    assert hash(Codes(["a", "b*"])) == hash(Codes(["B*", "A"]))


@pytest.mark.parametrize(
    "pattern", ["", " ", "A B", "A?", "[A]", "a\n*", "é*", "*\0", "x" * 33, "x" * 64 + "*", "ａ*", "ſ*"]
)
def test_what_cannot_be_a_pattern_is_a_fault_that_does_not_repeat_it(pattern: str) -> None:
    message = fault(codes=["A", pattern])
    assert message.startswith("codes") and (len(pattern.strip()) < 2 or pattern not in message)


def test_patterns_that_cost_more_are_bounded() -> None:
    assert Codes(["*.SH"] * 1000 + [f"{n}*" for n in range(1000)] + [f"{n}*X" for n in range(64)])
    assert fault(codes=[f"{n}*X" for n in range(65)]).startswith("codes")


letters = st.text("AB6.", max_size=6)
patterns = st.lists(st.text("AB6.*", min_size=1, max_size=7), max_size=4)


@settings(deadline=None, derandomize=True, max_examples=600)
@given(patterns, letters.filter(bool))
def test_matching_is_that_of_the_plain_definition(texts: list[str], code: str) -> None:
    wanted = any(re.fullmatch(".*".join(map(re.escape, text.split("*"))), code) for text in texts)
    assert (code in Codes(texts)) == wanted


MARKETS = {"SH": ["{}.SH", "sh{}", "SH{}", "{}.SS", "{}.ss", "{}.XSHG", "SSE.{}", "{}.sh"],
           "SZ": ["{}.SZ", "sz{}", "{}.XSHE", "SZSE.{}"], "BJ": ["{}.BJ", "bj{}"]}  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=200)
@given(patterns, st.sampled_from(sorted(MARKETS)), st.text("0123456789", min_size=6, max_size=6), st.data())
def test_no_spelling_of_a_code_is_allowed_more_than_another(
    texts: list[str], market: str, digits: str, data: st.DataObject
) -> None:
    spelled = data.draw(st.sampled_from(MARKETS[market])).format(digits)
    assert parse_code(spelled) == f"{digits}.{market}"
    for codes in (Codes(texts), Codes([spelled]), Codes([f"*.{market}"])):
        assert (parse_code(spelled) in codes) == (f"{digits}.{market}" in codes)
    assert f"{digits}.{market}" in Codes([spelled])


# Claims


def test_without_claims_nothing_is_held_back() -> None:
    assert entitlement_of({"sub": "ann", "level": 2}) is UNLIMITED
    assert Entitlement() == UNLIMITED and UNLIMITED.codes is EVERY_CODE


def test_every_claim_is_taken() -> None:
    claims = {
        "codes": ["*.SH"], "delay_s": 900, "max_rate": 0.5, "max_codes": 10, "max_conns": 2, "conns_win": "oldest",
        "groups": ["a", "b", "a"], "may_send": {"users": ["bob"], "groups": True, "all": False, "more": 1},
    }  # fmt: skip
    assert set(claims) == set(CLAIMS)
    assert entitlement_of(claims, [900]) == Entitlement(
        Codes(["*.SH"]), 0.5, 10, 900, 2, "oldest", ("a", "b"), MaySend(frozenset(["bob"]), True, False)
    )


NOT_CLAIMS: dict[str, list[Any]] = {
    "codes": [None, "*", {"A": 1}, [1], [None], [["A"]], True],
    "delay_s": [None, "900", 900.0, -1, True, 60, 2**70],
    "max_rate": [None, "2", 0, -1, True, 1000.5, float("nan"), float("inf"), [2], 2**70],
    "max_codes": [None, "2", 0, -1, 1.0, True, 2**70, [2]],
    "max_conns": [None, "2", 0, -1, 1.0, True, {}],
    "conns_win": [None, "", "Newest", True, ["newest"], 1],
    "groups": [None, "a", [1], [""], ["x" * 129], {"a": 1}, [None]],
    "may_send": [None, True, "all", [], {"users": "bob"}, {"users": [1]}, {"users": None}, {"groups": 1}, {"all": 1},
                 {"all": None}, {"users": [""]}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in NOT_CLAIMS.items() for v in values], ids=str)
def test_a_claim_of_a_wrong_type_gives_nothing_and_is_named(name: str, value: Any) -> None:
    good = {"codes": ["*"], "max_rate": 2, "max_codes": 1, "groups": []}
    assert fault(**{**good, name: value}).startswith(name)


def test_every_claim_has_wrong_values_here() -> None:
    assert set(NOT_CLAIMS) == set(CLAIMS)


def test_a_rate_is_held_down() -> None:
    assert [UNLIMITED.capped(rate) for rate in (None, 5.0)] == [None, 5.0]
    slow = Entitlement(max_rate=2.0)
    assert [slow.capped(rate) for rate in (None, 5.0, 1.0)] == [2.0, 2.0, 1.0]


def test_who_may_send_to_whom() -> None:
    nobody, anybody = MaySend(), MaySend(True, True, True)
    some = MaySend(frozenset(["bob"]), frozenset(["g"]))
    assert [m.to_user("bob") for m in (nobody, anybody, some)] == [False, True, True]
    assert [m.to_user("eve") for m in (nobody, anybody, some)] == [False, True, False]
    assert [m.to_group("g") for m in (nobody, anybody, some)] == [False, True, True]
    assert [m.to_group("h") for m in (nobody, anybody, some)] == [False, True, False]
    assert [entitlement_of({"may_send": {"users": u}}).may_send.to_user("b") for u in (False, [])] == [False, False]
