#!/usr/bin/env python3
"""Draw the plots of docs/performance.md from what ``tools/bench.py --json`` printed.

    python tools/bench/plots.py rate    rate.json    docs/images/perf-rate.svg
    python tools/bench/plots.py clients clients.json docs/images/perf-clients.svg

A file may hold several of the benchmark's answers, one behind the other. Needs matplotlib, which nothing else does.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

_COLOURS = {"quotepush": "#1f6feb", "aiohttp": "#bf8700", "websockets": "#8250df"}


def read(path: str) -> list[dict[str, Any]]:
    """Return all results of a file."""
    text, at, found = Path(path).read_text(), 0, []
    decoder = json.JSONDecoder()
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        answer, at = decoder.raw_decode(text, at)
        found += answer["results"]
    return found


def draw(results: list[dict[str, Any]], kind: str, target: str) -> None:
    """Draw cost and latency side by side.

    Args:
        kind: ``rate``: over rows a second that were due; ``clients``: over connections.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "quotepush"
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for one in results:
        x = one["rows_due"] / one["seconds"] if kind == "rate" else one["clients"]
        lines[one["server"]].append((x, one))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    cost = ("cpu_us_row", "CPU of the server, µs a row")
    for axis, (key, title) in zip(axes, (cost, ("p99_ms", "p99, ms")), strict=True):
        for server, points in lines.items():
            points.sort(key=lambda point: point[0])
            xs, ys = [x for x, _ in points], [one[key] for _, one in points]
            axis.plot(xs, ys, marker="o", markersize=3.5, label=server, color=_COLOURS.get(server))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("rows due per second" if kind == "rate" else "clients")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="both", alpha=0.25, linewidth=0.5)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            each.set_minor_formatter(mpl.ticker.NullFormatter())
    if len(lines) > 1:
        axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(read(sys.argv[2]), sys.argv[1], sys.argv[3])
