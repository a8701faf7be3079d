"""Is the feed link alive, and how far is it behind?"""

import pytest

from quotepush.ingest.probe import LinkProbe


def test_a_new_link_is_alive_and_not_behind() -> None:
    probe = LinkProbe(1.5)
    assert not probe.is_dead(1000.0)
    assert probe.lag_s == 0.0
    assert probe.waiting_s(1000.0) == 0.0


def test_the_lag_is_what_the_last_answer_took() -> None:
    probe = LinkProbe(1.5)
    probe.answered(probe.next(10.0), 10.25)
    assert probe.lag_s == pytest.approx(0.25)
    probe.answered(probe.next(11.0), 11.0)
    assert probe.lag_s == 0.0


def test_an_answer_that_is_overdue_means_a_dead_link() -> None:
    probe = LinkProbe(1.5)
    probe.next(10.0)
    assert not probe.is_dead(11.4)
    assert probe.is_dead(11.5)
    assert probe.waiting_s(11.5) == pytest.approx(1.5)


def test_later_probes_do_not_hide_an_older_one_without_an_answer() -> None:
    probe = LinkProbe(1.5)
    first = probe.next(10.0)
    second = probe.next(11.0)
    assert first != second
    probe.answered(second, 11.1)
    assert probe.is_dead(11.5)
    probe.answered(first, 11.6)
    assert not probe.is_dead(20.0)


def test_an_answer_late_or_not_is_an_answer() -> None:
    probe = LinkProbe(1.5)
    probe.answered(probe.next(10.0), 11.9)
    assert not probe.is_dead(100.0)
    assert probe.lag_s == pytest.approx(1.9)


def test_an_answer_to_nothing_is_ignored() -> None:
    probe = LinkProbe(1.5)
    token = probe.next(10.0)
    probe.answered(b"something else", 10.1)
    assert probe.waiting_s(10.1) == pytest.approx(0.1)
    probe.answered(token, 10.2)
    probe.answered(token, 99.0)  # twice
    assert probe.lag_s == pytest.approx(0.2)


def test_a_link_on_which_something_comes_is_not_dead_however_late_the_answer_is() -> None:
    probe = LinkProbe(1.5)
    probe.next(10.0)
    probe.heard(11.4)
    assert not probe.is_dead(12.8)
    assert probe.is_dead(12.9)
    assert probe.waiting_s(12.9) == pytest.approx(2.9)
