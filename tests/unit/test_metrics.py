"""Plain numbers become Prometheus' text."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quotepush.metrics import METRICS, Sample, exposition


def parsed(samples: dict[str, list[Sample]]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = exposition(samples).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_can_be_shown() -> None:
    samples: dict[str, list[Sample]] = {
        name: [(1.5, dict.fromkeys(labels, "x"))] for name, (_, _, labels) in METRICS.items()
    }
    found = parsed(samples)
    for name, (kind, _, labels) in METRICS.items():
        full = f"quotepush_{name}" + ("_total" if kind == "counter" else "")
        assert found[full, frozenset((label, "x") for label in labels)] == 1.5
    assert len(found) == len(METRICS)


def test_kinds_and_meanings_are_told() -> None:
    text = exposition({"connections": [(3, {"worker": "0"})], "ticks_accepted": [(7, {})]}).decode()
    assert "# TYPE quotepush_connections gauge" in text
    assert "# TYPE quotepush_ticks_accepted_total counter" in text
    assert METRICS["connections"][1] in text
    assert 'quotepush_connections{worker="0"} 3.0' in text


def test_a_metric_may_have_no_sample_or_many() -> None:
    found = parsed({"ticks_refused": [], "connections": [(n, {"worker": str(n)}) for n in range(5)]})
    assert found == {("quotepush_connections", frozenset({("worker", str(n))})): n for n in range(5)}


def test_labels_of_any_text_are_escaped() -> None:
    reason = 'a "quoted"\\\n reason'
    found = parsed({"ticks_refused": [(1, {"reason": reason})]})
    assert found == {("quotepush_ticks_refused_total", frozenset({("reason", reason)})): 1.0}


def test_true_and_false_are_numbers() -> None:
    assert parsed({"feed_up": [(True, {})]}) == {("quotepush_feed_up", frozenset()): 1.0}


def test_a_number_that_is_not_declared_is_a_bug() -> None:
    with pytest.raises(KeyError):
        exposition({"no_such_metric": [(1, {})]})
    with pytest.raises(KeyError):
        exposition({"connections": [(1, {})]})  # without its label


def test_names_follow_the_rules_of_prometheus() -> None:
    for name, (kind, meaning, labels) in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z_]*", name)
        assert kind in ("counter", "gauge")
        assert not name.endswith("_total")
        assert meaning.endswith(".")
        assert all(re.fullmatch(r"[a-z]+", label) for label in labels)
        assert not re.search(r"_(ms|us|minutes)$", name), "Prometheus counts in seconds and bytes"
