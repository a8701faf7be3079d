"""Refusals are counted by their word, and a flood of them is a line a minute."""

import pytest

from quotepush.push.refusals import Refusals


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_connections_and_questions_are_counted_by_their_words() -> None:
    refusals = Refusals()
    for error, is_connection in (("overloaded", True), ("overloaded", True), ("overloaded", False), ("restart", True)):
        refusals.note(error, "192.0.2.1", 1.0, is_connection=is_connection)
    assert refusals.connections == {"overloaded": 2, "restart": 1}
    assert refusals.questions == {"overloaded": 1}


def test_a_flood_is_one_line_a_minute_which_says_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    for n in range(1200):  # two minutes
        refusals.note("rate_limited", f"192.0.2.{n % 100}", n / 10, is_connection=n % 2 == 0)
    assert lines(caplog) == [
        "rate_limited: 1 refused, the newest from 192.0.2.0",
        "rate_limited: 600 refused, the newest from 192.0.2.0",
    ]


def test_each_word_has_its_own_line_and_may_carry_advice(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    refusals.note("rate_limited", "192.0.2.1", 0.0, is_connection=True, advice=", which is a proxy")
    refusals.note("overloaded", "192.0.2.2", 0.0, is_connection=True)
    assert lines(caplog) == [
        "rate_limited: 1 refused, the newest from 192.0.2.1, which is a proxy",
        "overloaded: 1 refused, the newest from 192.0.2.2",
    ]
