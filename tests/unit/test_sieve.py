"""Ticks of codes that nobody wants are held back, and nothing of them is missing when somebody does."""

import random
from typing import Any

import pytest

from quotepush.feed import sieve as module
from quotepush.feed.sieve import Sieve


def test_ticks_of_wanted_codes_go_through_as_they_are() -> None:
    sieve = Sieve({"600519.SH", "AAPL"}.__contains__)
    batch = [("sh600519", {"last": 1}), ("AAPL", {"last": 2}), ("AAPL", {"last": 3, "ask": None})]
    assert sieve.sift(batch) == batch
    assert sieve.withheld == 0


def test_what_was_held_back_comes_as_one_tick_when_the_code_is_wanted() -> None:
    wanted: set[str] = set()
    sieve = Sieve(wanted.__contains__)
    assert sieve.sift([("AAPL", {"last": 1, "open": 5}), ("sh600519", {"last": 7}), ("AAPL", {"last": 2})]) == []
    assert sieve.withheld == 3
    assert sieve.release(["AAPL"]) == []  # it is not wanted any more, or not yet
    wanted |= {"AAPL", "600519.SH", "MSFT"}
    assert sieve.release(["AAPL", "MSFT"]) == [("AAPL", {"last": 2, "open": 5})]
    assert sieve.sift([("SH600519", {"ask": 8})]) == [("SH600519", {"last": 7, "ask": 8})]
    assert sieve.release(["AAPL", "600519.SH"]) == []


def test_a_reset_forgets_what_was_held_back() -> None:
    wanted: set[str] = set()
    sieve = Sieve(wanted.__contains__)
    sieve.sift([("AAPL", {"last": 1, "open": 5}), ("AAPL", {"last": 2, "reset": True}), ("AAPL", {"high": 3})])
    sieve.sift([("MSFT", {"open": 5})])
    wanted |= {"AAPL", "MSFT"}
    assert sieve.release(["AAPL"]) == [("AAPL", {"last": 2, "reset": True, "high": 3})]
    assert sieve.sift([("MSFT", {"last": 2, "reset": True})]) == [("MSFT", {"last": 2, "reset": True})]


def test_what_is_held_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_HELD", 2)
    wanted: set[str] = set()
    sieve = Sieve(wanted.__contains__)
    sieve.sift([(code, {"last": 1}) for code in "ABCD"])
    sieve.sift([("A", {"last": 2})])
    wanted |= set("ABCD")
    assert sieve.release("ABCD") == [("A", {"last": 2}), ("B", {"last": 1})]


@pytest.mark.parametrize("seed", range(50))
def test_whoever_watches_a_code_has_what_he_would_have_without_a_sieve(seed: int) -> None:
    chance = random.Random(seed)
    wanted: set[str] = set()
    sieve = Sieve(wanted.__contains__)
    rows: dict[str, dict[str, Any]] = {"A": {}, "B": {}}
    full: dict[str, dict[str, Any]] = {"A": {}, "B": {}}

    def apply(to: dict[str, dict[str, Any]], code: str, tick: dict[str, Any]) -> None:
        row = {} if tick.get("reset") else dict(to[code])
        row.update({field: value for field, value in tick.items() if field != "reset"})
        to[code] = {field: value for field, value in row.items() if value is not None}

    for n in range(200):
        code = chance.choice("AB")
        if chance.random() < 0.2:
            (wanted.discard if code in wanted else wanted.add)(code)
            for released in sieve.release(wanted):
                apply(rows, *released)
        tick: dict[str, Any] = {chance.choice(("last", "ask", "bid")): chance.choice((n, None))}
        if chance.random() < 0.1:
            tick["reset"] = True
        apply(full, code, tick)
        for passed in sieve.sift([(code, tick)]):
            apply(rows, *passed)
        assert all(rows[code] == full[code] for code in wanted)
