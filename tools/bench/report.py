"""What is printed: the head, a line per load and server, ratios, and progress while it runs."""

import sys
import time
from typing import Any

from bench.figures import Figures

__all__ = ["Progress", "detail_lines", "head_lines", "ratio_line", "result_line", "title_line"]

_COLUMNS = (
    ("rows/s", 10, "rows_per_s", "{:,.0f}"), ("in time", 8, "in_time", "{:.3f}"), ("lost", 9, "lost", "{:,.0f}"),
    ("p50 ms", 8, "p50_ms", "{:.2f}"), ("p99 ms", 9, "p99_ms", "{:.2f}"), ("p99.9 ms", 9, "p999_ms", "{:.2f}"),
    ("µs/row", 7, "cpu_us_row", "{:.2f}"), ("µs/tick", 8, "cpu_us_tick", "{:.1f}"),
    ("KiB/conn", 9, "kib_per_conn", "{:.1f}"), ("MiB+", 7, "mib_more", "{:.1f}"),
    ("conn/s", 8, "connects_per_s", "{:,.0f}"), ("+sub/s", 8, "subscribes_per_s", "{:,.0f}"),
)  # fmt: skip
_RATIOS = ("rows_per_s", "p50_ms", "p99_ms", "p999_ms", "cpu_us_row", "cpu_us_tick", "kib_per_conn")
_NAME_WIDTH, _SERVER_WIDTH = 10, 14


def head_lines(facts: dict[str, str]) -> list[str]:
    """Return what stands above the table."""
    return [f"{name.replace('_', ' '):14}{value}" for name, value in facts.items()]


def title_line() -> str:
    """Return the heads of the columns."""
    return f"{'load':{_NAME_WIDTH}}{'server':{_SERVER_WIDTH}}" + "".join(f"{t:>{w}}" for t, w, _, _ in _COLUMNS)


def result_line(load: str, server: str, figures: Figures) -> str:
    """Return a load's figures on one server."""
    cells = []
    for _, width, key, form in _COLUMNS:
        value = figures[key]
        cells.append(f"{'-' if value is None else form.format(value):>{width}}")
    return f"{load:{_NAME_WIDTH}}{server:{_SERVER_WIDTH}}" + "".join(cells)


def detail_lines(figures: Figures) -> list[str]:
    """Return what a load measures besides the columns."""
    lines = [_subscribes_line(how, one) for how, one in figures.get("subscribes", {}).items()]
    if "feed" in figures:
        lines.append(_feed_line(figures["feed"]))
    lines += [_pauses_line(where, one) for where, one in figures.get("gc", {}).items()]
    return [f"{'':{_NAME_WIDTH}}{line}" for line in lines]


def _subscribes_line(how: str, one: dict[str, Any]) -> str:
    return (
        f"{how}: {one['count']:,.0f} subscribes, ack p50 {one['ack_p50_ms']:.1f} ms, p99 {one['ack_p99_ms']:.1f} ms; "
        f"snapshot of {one['kib']:,.0f} KiB read p50 {one['snapshot_p50_ms']:.1f} ms, "
        f"p99 {one['snapshot_p99_ms']:.1f} ms"
    )


def _feed_line(one: dict[str, Any]) -> str:
    return (
        f"main took {one['taken_per_s']:,.0f} ticks/s and missed {one['missed']:,.0f}; feed link cut "
        f"{one['links_cut']:,.0f} times, {one['rows_merged']:,.0f} rows merged in main, at most "
        f"{one['most_lag_ms']:,.0f} ms behind"
    )


def _pauses_line(where: str, one: dict[str, Any]) -> str:
    young, middle, old = (one["counts"][generation] for generation in "012")
    return (
        f"gc, {where}: {one['count']:,.0f} pauses ({young:,.0f} young, {middle:,.0f} middle, {old:,.0f} old), longest "
        f"{one['longest_ms']:.2f} ms, {one['total_ms']:,.1f} ms in all, {one['share']:.2%} of the time"
    )


def ratio_line(figures: Figures, ours: Figures, name: str) -> str:
    """Return how many times ours another server's figures are; below 1 is less than ours."""
    cells = []
    for _, width, key, _ in _COLUMNS:
        one, other = figures[key], ours[key]
        cells.append(f"{f'{one / other:.2f}x' if key in _RATIOS and one and other else '':>{width}}")
    return f"{'':{_NAME_WIDTH}}{f'  / {name}':{_SERVER_WIDTH}}" + "".join(cells).rstrip()


class Progress:
    """One line on standard error that says what is going on; a line per step when that is no terminal."""

    def __init__(self, is_silent: bool = False) -> None:
        self._is_silent = is_silent
        self._is_terminal = sys.stderr.isatty()
        self._step = ""
        self._began = 0.0

    def begin(self, step: str) -> None:
        """A run begins."""
        self._step, self._began = step, time.monotonic()
        if not self._is_terminal and not self._is_silent:
            print(f"bench: {step}", file=sys.stderr, flush=True)

    def tell(self, what: str) -> None:
        """Say how far it is."""
        if self._is_terminal and not self._is_silent:
            elapsed = f"{time.monotonic() - self._began:.0f} s"
            print(f"\r\x1b[Kbench: {self._step}: {what}, {elapsed}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line of the table."""
        if self._is_terminal and not self._is_silent:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
