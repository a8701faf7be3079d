"""The plots of docs/performance.md: which loads a series runs, and how its figures are drawn. Nothing needs installing.

``bench.py --plot NAME`` runs a series. A drawing has CPU per row on the left and p99 on the right, over what varies.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from bench.loads import LOADS, Load

__all__ = ["SERIES", "Point", "Series", "draw", "image_path", "lines_of"]

_IMAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "images"
_SECONDS = 2.0
_COLOURS = ("#1f6feb", "#bf8700", "#8250df", "#1a7f37")
_WIDE = 25
_WIDTH, _HEIGHT = 760, 290
_TOP, _BOTTOM, _PANEL_WIDTH, _LEFTS = 30, 212, 310, (44, 432)


@dataclass(frozen=True)
class Point:
    """One run of a series.

    Attributes:
        line: which line of the plot it is a point of.
        x: where on it.
        server: ``quotepush``, or the name of a baseline.
    """

    line: str
    x: float
    load: Load
    server: str = "quotepush"
    workers: int = 1


@dataclass(frozen=True)
class Series:
    """What a plot shows.

    Attributes:
        varies: what stands below it.
    """

    varies: str
    points: tuple[Point, ...]


def _rate() -> Iterable[Point]:
    for rate in (100, 400, 1_600, 3_200):
        load = LOADS["market"].with_options(rate=rate, seconds=_SECONDS)
        for server in ("quotepush", "aiohttp", "websockets"):
            yield Point(server, load.rows_per_s, load, server)


def _clients() -> Iterable[Point]:
    for clients in (100, 300, 1_000, 3_000, 10_000):
        load = Load(name="clients", clients=clients, codes=1_000, per_client=10, rate=1_000, seconds=_SECONDS)
        yield Point("1,000 ticks/s", clients, load)
        yield Point("50,000 rows/s", clients, load.with_options(rate=50_000 * 1_000 / (10 * clients)))


def _codes() -> Iterable[Point]:
    for codes in (100, 300, 1_000, 3_000, 10_000, 20_000):
        load = Load(name="codes", clients=500, codes=codes, per_client=codes // 20, rate=2_000, seconds=_SECONDS)
        yield Point("500 clients, a twentieth of all codes each", codes, load)


def _workers() -> Iterable[Point]:
    for name in ("busy", "market"):
        for workers in (1, 2, 4):
            yield Point(name, workers, LOADS[name].with_options(seconds=_SECONDS), workers=workers)


SERIES = {
    "rate": Series("rows due per second", tuple(_rate())),
    "clients": Series("clients", tuple(_clients())),
    "codes": Series("codes that tick, 2,000 ticks/s in all", tuple(_codes())),
    "workers": Series("workers", tuple(_workers())),
}


def image_path(name: str) -> Path:
    """Return where the plot of a series belongs."""
    return _IMAGES / f"perf-{name}.svg"


# --- drawing ----------------------------------------------------------------------------------------------------------

Lines = dict[str, list[tuple[float, float]]]
"""Points (x, y) by the name of their line."""


def draw(varies: str, cpu_us_row: Lines, p99_ms: Lines) -> str:
    """Return an SVG of both, over what varies."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="11" fill="#24292f">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_panel(_LEFTS[0], "CPU of the server, µs a row", varies, cpu_us_row, is_log=is_wide(cpu_us_row)),
        *_panel(_LEFTS[1], "p99, ms", varies, p99_ms, is_log=True),
        *_legend(list(cpu_us_row)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(left: int, title: str, varies: str, lines: Lines, *, is_log: bool) -> Iterable[str]:
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    y_marks = marks_of_log(min(ys), max(ys)) if is_log else marks_from_zero(max(ys))
    across = _scale(xs[0], xs[-1], left + 14, left + _PANEL_WIDTH - 14, is_log=True)
    up = _scale(y_marks[0], y_marks[-1], _BOTTOM, _TOP, is_log=is_log)
    middle, right = left + _PANEL_WIDTH / 2, left + _PANEL_WIDTH
    yield _text(middle, _TOP - 12, title, "middle", size=12)
    yield _text(middle, _BOTTOM + 34, varies, "middle")
    for y in y_marks:
        yield f'<path d="M{left} {up(y):.1f}H{right}" stroke="#d0d7de" stroke-width="0.7"/>'
        yield _text(left - 5, up(y) + 4, short(y), "end")
    for x in xs:
        yield f'<path d="M{across(x):.1f} {_BOTTOM}v4" stroke="#57606a"/>'
        yield _text(across(x), _BOTTOM + 17, short(x), "middle")
    yield f'<path d="M{left} {_BOTTOM}H{right}" stroke="#57606a"/>'
    for colour, points in zip(_COLOURS, lines.values(), strict=False):
        spots = [(across(x), up(y)) for x, y in sorted(points)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots)


def _legend(names: list[str]) -> Iterable[str]:
    at = float(_LEFTS[0])
    for colour, name in zip(_COLOURS, names, strict=False):
        yield f'<path d="M{at} {_HEIGHT - 18}h18" stroke="{colour}" stroke-width="3"/>'
        yield _text(at + 24, _HEIGHT - 14, name, "start")
        at += 44 + 6.5 * len(name)


def _text(x: float, y: float, words: str, anchor: str, size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def _scale(low: float, high: float, begin: float, end: float, *, is_log: bool) -> Callable[[float], float]:
    """Return where a value between ``low`` and ``high`` is drawn between ``begin`` and ``end``."""
    if is_log:
        low, high = math.log10(low), math.log10(high)
    span = high - low or 1.0
    return lambda value: begin + (end - begin) * ((math.log10(value) if is_log else value) - low) / span


def is_wide(lines: Lines) -> bool:
    """Say whether the figures are so far apart that the small ones would lie on the axis of a plain scale."""
    ys = [y for points in lines.values() for _, y in points]
    return max(ys) > _WIDE * min(ys)


def marks_from_zero(high: float) -> list[float]:
    """Return at most six round numbers from 0 to one that is not below ``high``."""
    step = min(step for step in _round_numbers(high / 100, high) if step * 5 >= high)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def marks_of_log(low: float, high: float) -> list[float]:
    """Return round numbers from one that is not above ``low`` to one that is not below ``high``."""
    numbers = _round_numbers(low / 10, high * 10)
    first = max(i for i, number in enumerate(numbers) if number <= low)
    last = min(i for i, number in enumerate(numbers) if number >= high)
    return numbers[first : max(last, first + 1) + 1]


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten around ``low`` and ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]


def short(value: float) -> str:
    """Return a number as it stands at an axis: ``400k``, ``1.5``."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def lines_of(points: Sequence[Point], figures: Sequence[float | None]) -> Lines:
    """Return the figures of a series' points as lines; those without a figure are left out."""
    lines: Lines = {}
    for point, figure in zip(points, figures, strict=True):
        if figure is not None:
            lines.setdefault(point.line, []).append((point.x, figure))
    return lines
