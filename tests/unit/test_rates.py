"""How often one address may ask, on a clock that moves when the test says so."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quotepush.push.rates import BURST_S, Rates


def ask(rates: Rates, key: str, now_s: float) -> bool:
    if rates.wait_s(key, now_s):
        return False
    rates.charge(key, now_s)
    return True


@pytest.mark.parametrize("per_s", [0.01, 0.1, 0.5, 1, 3, 100])
def test_after_a_pause_ten_seconds_worth_may_come_at_once_and_at_least_one(per_s: float) -> None:
    rates = Rates(per_s)
    allowed = sum(ask(rates, "a", 1000.0) for _ in range(2000))
    assert allowed == max(1, int(per_s * BURST_S))
    assert sum(ask(rates, "a", 1000.0 + 1 / per_s) for _ in range(10)) == 1


@settings(deadline=None)
@given(st.floats(0.01, 1000), st.floats(0, 1e7), st.integers(1, 300))
def test_who_keeps_to_the_rate_never_waits(per_s: float, start_s: float, count: int) -> None:
    rates = Rates(per_s)
    assert all(ask(rates, "a", start_s + n * 1.0001 / per_s) for n in range(count))


@pytest.mark.parametrize("seed", range(10))
def test_over_any_time_nobody_gets_more_than_the_rate_and_the_burst(seed: int) -> None:
    rng = random.Random(seed)
    rates, now_s, served = Rates(5), 0.0, list[float]()
    for _ in range(3000):
        now_s += rng.choice([0.0, 0.01, 0.1, 1.0])
        if ask(rates, "a", now_s):
            served.append(now_s)
    for first in range(0, len(served), 37):
        for last in range(first, len(served), 41):
            assert last - first + 1 <= 5 * (served[last] - served[first] + BURST_S) + 1


def test_after_the_time_that_is_told_the_address_may_ask_again() -> None:
    rates = Rates(0.5)
    while ask(rates, "a", 7.0):
        pass
    wait_s = rates.wait_s("a", 7.0)
    assert 0 < wait_s <= 2
    assert rates.wait_s("a", 7.0 + wait_s / 2) > 0
    assert ask(rates, "a", 7.0 + wait_s)


def test_addresses_do_not_wait_for_each_other() -> None:
    rates = Rates(0.1)
    assert all(ask(rates, key, 1.0) for key in "abc")
    assert not any(ask(rates, key, 1.0) for key in "abc")


def test_a_dear_attempt_counts_as_several() -> None:
    rates = Rates(1)
    rates.charge("a", 1.0, 9)
    assert ask(rates, "a", 1.0)
    assert not ask(rates, "a", 1.0)


def test_without_a_rate_nobody_waits_and_nothing_is_remembered() -> None:
    rates = Rates(0)
    assert all(ask(rates, "a", 1.0) for _ in range(1000))
    assert len(rates) == 0


def test_whom_nobody_knows_nobody_counts() -> None:
    rates = Rates(0.1)
    assert all(ask(rates, "", 1.0) for _ in range(10))
    assert len(rates) == 0


def test_of_more_addresses_than_fit_those_are_forgotten_that_have_been_quiet_for_longest() -> None:
    rates = Rates(0.001, most_keys=100)
    for n in range(1000):
        assert ask(rates, f"a{n}", float(n))
        ask(rates, "busy", float(n))
        rates.charge("busy", float(n))
        assert len(rates) <= 101
    assert rates.wait_s("busy", 1000.0)
    assert rates.wait_s("a999", 1000.0)
    assert not rates.wait_s("a0", 1000.0)


def test_addresses_that_were_quiet_long_enough_are_remembered_no_longer() -> None:
    rates = Rates(10)
    for n in range(1000):
        rates.charge(f"a{n}", 1.0)
    for n in range(1000):
        rates.charge("b", 100.0 + n)
    assert len(rates) <= 1
