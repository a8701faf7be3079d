#!/usr/bin/env python3
"""Draw the plot of docs/performance.md, cost and latency over rows a second, from what ``bench.py --json`` printed.

    for rate in 100 400 1600 3200; do
        python tools/bench.py --json --pin --load market --rate $rate --baseline aiohttp,websockets
    done > rate.json
    python tools/bench/plots.py rate.json docs/images/perf-rate.svg

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


def draw(results: list[dict[str, Any]], target: str) -> None:
    """Draw cost and latency side by side, over the rows a second that were due."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "quotepush"
    from matplotlib import pyplot

    lines: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for one in results:
        lines[one["server"]].append((one["rows_due"] / one["seconds"], one))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    cost = ("cpu_us_row", "CPU of the server, µs a row")
    for axis, (key, title) in zip(axes, (cost, ("p99_ms", "p99, ms")), strict=True):
        for server, points in lines.items():
            points.sort(key=lambda point: point[0])
            xs, ys = [x for x, _ in points], [one[key] for _, one in points]
            axis.plot(xs, ys, marker="o", markersize=3.5, label=server, color=_COLOURS.get(server))
        axis.set_xscale("log")
        if key == "p99_ms":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("rows due per second")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="major", alpha=0.25, linewidth=0.5)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            each.set_minor_locator(mpl.ticker.NullLocator())
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(read(sys.argv[1]), sys.argv[2])
