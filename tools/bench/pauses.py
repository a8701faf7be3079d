"""Pauses for Python's garbage collector in the processes of a server: noted by ``gc_probe``, summed up here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["noting_pauses", "summary"]

_PROBE = Path(__file__).resolve().parent / "gc_probe"


def noting_pauses(python_path: str | None, *, has_defaults: bool) -> dict[str, str]:
    """Return the environment in which a server notes its pauses.

    Args:
        python_path: the ``PYTHONPATH`` that it would have had.
        has_defaults: hold it to Python's own thresholds.
    """
    path = f"{_PROBE}:{python_path}" if python_path else str(_PROBE)
    defaults = {"BENCH_GC_DEFAULTS": "1"} if has_defaults else {}
    return {"PYTHONPATH": path, "BENCH_GC_LEFT": "{directory}", **defaults}


def summary(left: Iterable[str], phases: dict[str, tuple[float, float]]) -> dict[str, dict[str, Any]]:
    """Return the pauses of each phase, of main and of all workers together.

    Args:
        left: what each process wrote down.
        phases: begin and end of each, in epoch seconds.

    Returns:
        by ``"main, ticks"`` and so on ``count``, ``total_ms``, ``longest_ms``, ``share`` (of the phase, the busiest
        process) and ``counts`` (by generation).
    """
    found: dict[str, dict[str, Any]] = {}
    for text in left:
        process = json.loads(text)
        role = "workers" if any("quotepush.node.worker" in word for word in process["command"]) else "main"
        for phase, (begin, end) in phases.items():
            pauses = [(generation, 1000 * s) for at, generation, s in process["pauses"] if begin <= at < end]
            times_ms = [ms for _, ms in pauses]
            one = found.setdefault(
                f"{role}, {phase}",
                {"count": 0, "total_ms": 0.0, "longest_ms": 0.0, "share": 0.0, "counts": {"0": 0, "1": 0, "2": 0}},
            )
            one["count"] += len(pauses)
            one["total_ms"] += sum(times_ms)
            one["longest_ms"] = max([one["longest_ms"], *times_ms])
            one["share"] = max(one["share"], sum(times_ms) / 1000 / max(1e-6, end - begin))
            for generation, _ in pauses:
                one["counts"][str(generation)] += 1
    return dict(sorted(found.items()))
