#!/usr/bin/env python3
"""Measure quotepush on this machine: a private Redis, the server, many clients and ticks; a table at the end."""

import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import click
from bench.children import BenchError
from bench.figures import Figures, median_figures
from bench.loads import LOADS, Load
from bench.machine import describe, raise_file_limit
from bench.measure import Placement, Subject, baseline, quotepush, run_once, with_default_collector
from bench.plots import SERIES, Point, draw, image_path, lines_of
from bench.report import Progress, detail_lines, head_lines, ratio_line, result_line, title_line

from quotepush.errors import OperatorError

_BASELINES = ("aiohttp", "websockets")
_SPARE_FILES = 400  # what a server holds open besides its clients
_KNEE_P99_MS = 50.0
_KNEE_STEP = 1.08  # the search ends when the highest good rate and the lowest bad one are so near
_KNEE_MOST_RUNS = 14
_ROWS_IN_TIME = 0.98


@dataclass(frozen=True)
class Step:
    """A load on a server, and which point of a plot that is."""

    load: Load
    subject: Subject
    point: Point | None = None


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    steps: list[Step]
    loaders: int | None
    runs: int
    is_pinned: bool
    is_json: bool
    is_knee: bool
    plot: str | None


class _Numbers(click.ParamType):
    name = "n,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(word) for word in value.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1 or max(numbers) > 64:
            self.fail(f"{value!r} is no list of numbers from 1 to 64, such as 1,2,4", param, ctx)
        return numbers


def _baselines(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    names = [name for name in value.split(",") if name]
    for name in names:
        if name not in _BASELINES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(_BASELINES)}", ctx, param)
    return names


def _loads(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[Load]:
    names = [name for one in value for name in one.split(",")]
    for name in names:
        if name not in LOADS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(LOADS)}", ctx, param)
    return [LOADS[name] for name in names]


def _settings(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str]:
    for one in value:
        if "=" not in one:
            raise click.BadParameter(f"{one!r} is not like max_flush_delay_ms=2", ctx, param)
    return list(value)


_AT_LEAST_0, _AT_LEAST_1 = click.IntRange(0), click.IntRange(1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--load", "loads", multiple=True, callback=_loads, metavar="NAME", help="A load, again for another.")
@click.option("--clients", type=_AT_LEAST_1, help="Own load, or another number in the named ones: connections.")
@click.option("--codes", type=click.IntRange(1, 100_000), help="The same: codes that tick.")
@click.option("--per-client", type=click.IntRange(1, 1_000), help="The same: codes per client.")
@click.option("--rate", type=click.FloatRange(0.1), help="The same: ticks a second.")
@click.option("--burst", type=_AT_LEAST_1, help="The same: so many ticks come at once.")
@click.option("--zipf", type=click.FloatRange(0, 5), help="The same: exponent of how unevenly codes tick; 0: evenly.")
@click.option("--pad", type=click.IntRange(0, 7_000), help="The same: bytes that make rows longer.")
@click.option("--slow", type=_AT_LEAST_0, help="The same: clients that never read; the figures are the others'.")
@click.option("--storm", type=_AT_LEAST_0, help="The same: clients that connect at once during the run.")
@click.option("--asking", type=click.IntRange(1, 1_000),
              help="The same: codes that further clients subscribe, with snapshot, again and again.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.2, 3_600),
              help="How long ticks come. [4; storm 6, subscribe 20, stall 30]")  # fmt: skip
@click.option("--workers", type=_Numbers(), default="1", show_default=True, help="Workers of the server, e.g. 1,2,4.")
@click.option("--runs", type=click.IntRange(1, 99), default=1, show_default=True, help="The median of so many.")
@click.option("--loaders", type=click.IntRange(1, 64), help="Processes that hold the clients. [half the cores]")
@click.option("--pin", "is_pinned", is_flag=True, help="Server and load on different cores.")
@click.option("--baseline", "baselines", default="", callback=_baselines, metavar="aiohttp,websockets",
              help="Run these plain servers on the same load too.")  # fmt: skip
@click.option("--knee", "is_knee", is_flag=True,
              help="Search the highest rate of market, or of --load, with p99 <= 50 ms and nothing lost.")  # fmt: skip
@click.option("--set", "settings", multiple=True, callback=_settings, metavar="NAME=VALUE",
              help="A setting of the server.")  # fmt: skip
@click.option("--tls", "is_tls", is_flag=True, help="Over wss, with a certificate that openssl makes for the run.")
@click.option("--gc", "is_gc", is_flag=True,
              help="Also note the garbage collector's pauses, then again with Python's own thresholds.")  # fmt: skip
@click.option("--plot", type=click.Choice(list(SERIES)),
              help="Run a series of loads and draw it into docs/images/perf-….svg.")  # fmt: skip
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.pass_context
def main(
    ctx: click.Context, /, loads: list[Load], workers: list[int], runs: int, loaders: int | None, is_pinned: bool,
    baselines: list[str], is_knee: bool, settings: list[str], is_tls: bool, is_gc: bool, plot: str | None,
    is_json: bool, **own: Any,
) -> None:  # fmt: skip
    """Measure quotepush on this machine and print a table.

    Starts a private Redis, the server and many clients on 127.0.0.1, and ends them all. Without --load every
    load is measured, about two minutes; with options like --clients alone, a load of your own. docs/performance.md
    explains the loads and the columns.
    """
    is_own = any(value is not None for name, value in own.items() if name != "seconds")
    if is_tls and baselines:
        raise click.UsageError("the plain servers of --baseline speak no TLS")
    if plot and (loads or is_own or is_knee or is_gc or is_tls or baselines or workers != [1]):
        raise click.UsageError("--plot has loads and servers of its own; only --seconds, --runs, --pin and --set fit")
    if plot:
        steps = _steps_of_plot(plot, settings, own["seconds"])
    else:
        if not loads:
            loads = [LOADS["market"]] if is_knee else [Load(name="own")] if is_own else list(LOADS.values())
        subjects = [quotepush(count, settings, is_tls=is_tls, is_noting_pauses=is_gc) for count in workers]
        subjects += [with_default_collector(subject) for subject in subjects] if is_gc else []
        subjects += [baseline(name) for name in baselines]
        steps = [Step(load.with_options(**own), subject) for load in loads for subject in subjects]
    try:
        for step in steps:
            _check(step.load, raise_file_limit())
        options = Options(steps, loaders, runs, is_pinned, is_json, is_knee, plot)
        with asyncio.Runner() as runner:
            runner.run(_until_interrupted(lambda: _bench(options)))
    except (BenchError, OperatorError) as e:
        click.echo(f"bench: {e}", err=True)
        ctx.exit(1)
    except asyncio.CancelledError:
        click.echo("\nbench: interrupted; everything it had started is ended", err=True)
        ctx.exit(130)


def _steps_of_plot(name: str, settings: list[str], seconds: float | None) -> list[Step]:
    return [
        Step(
            point.load.with_options(seconds=seconds),
            quotepush(point.workers, settings) if point.server == "quotepush" else baseline(point.server),
            point,
        )
        for point in SERIES[name].points
    ]


def _check(load: Load, file_limit: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        BenchError: with what to change.
    """
    if load.per_client > load.codes:
        raise BenchError(f"{load.name}: a client cannot watch {load.per_client} of {load.codes} codes")
    if load.asking > load.codes:
        raise BenchError(f"{load.name}: nobody can subscribe {load.asking} of {load.codes} codes")
    if load.slow >= load.clients:
        raise BenchError(f"{load.name}: {load.slow} of {load.clients} clients are slow; somebody has to read")
    if load.clients + load.storm + _SPARE_FILES > file_limit:
        raise BenchError(
            f"{load.name}: {load.clients + load.storm:,} clients need more than the {file_limit:,} files that a "
            "process may open here; raise the limit with ulimit -n"
        )
    if load.burst > load.rate * load.seconds:
        raise BenchError(f"{load.name}: not even one burst of {load.burst} comes in {load.seconds:g} s")


async def _until_interrupted(work: Callable[[], Awaitable[None]]) -> None:
    """Do it; the first signal ends it in order, the following ones change nothing about that."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work())
    asked = False

    def end() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, end)
    await task


async def _bench(options: Options) -> None:
    placements = {
        step.subject: Placement.of(step.subject.workers, options.loaders, options.is_pinned) for step in options.steps
    }
    facts = describe() | {"placement": str(placements[options.steps[0].subject])}
    results: list[Figures] = []
    if not options.is_json:
        print("\n".join([*head_lines(facts), "", title_line()]), flush=True)
    progress = Progress()
    measure = _knee if options.is_knee else _median
    ours: dict[Load, Figures] = {}  # the first of quotepush's own on each load
    for step in options.steps:
        load, subject = step.load, step.subject
        figures = await measure(load, subject, placements[subject], options.runs, progress)
        progress.clear()
        result = {"load": load.name, "server": subject.name, "workers": subject.workers, **figures}
        results.append(result if step.point is None else {"line": step.point.line, "x": step.point.x, **result})
        if subject.name == "quotepush":
            ours.setdefault(load, figures)
        if not options.is_json:
            _print(load, subject, figures, ours.get(load))
    if options.plot:
        _draw(options.plot, results)
    if options.is_json:
        print(json.dumps({"machine": facts, "results": results}, indent=1, ensure_ascii=False))


def _draw(plot: str, results: list[Figures]) -> None:
    series, path = SERIES[plot], image_path(plot)
    costs, waits = (
        lines_of(series.points, [one[key] for one in results]) for key in ("cpu_us_row", "p99_ms")
    )  # fmt: skip
    path.write_text(draw(series.varies, costs, waits), encoding="utf-8")
    print(f"bench: drawn: {path}", file=sys.stderr)


def _print(load: Load, subject: Subject, figures: Figures, ours: Figures | None) -> None:
    print(result_line(load.name, subject.label, figures))
    for line in detail_lines(figures):
        print(line)
    if ours is not None and ours is not figures:
        print(ratio_line(figures, ours, "quotepush" if subject.name != "quotepush" else "the first"))
    for note in figures["notes"]:
        print(f"{'':8}! {note}")
    sys.stdout.flush()


async def _median(load: Load, subject: Subject, placement: Placement, runs: int, progress: Progress) -> Figures:
    found = []
    for run in range(1, runs + 1):
        of = f", run {run} of {runs}" if runs > 1 else ""
        progress.begin(f"{load.name} on {subject.label}{of}")
        found.append(await run_once(load, subject, placement, progress.tell))
    return median_figures(found)


async def _knee(load: Load, subject: Subject, placement: Placement, runs: int, progress: Progress) -> Figures:
    """Return the figures at the highest rate that is delivered well; ``knee_ticks_per_s`` names it."""
    best: Figures | None = None
    good, bad = 0.0, float("inf")
    rate, why = load.rate, "the search was ended"
    for _ in range(_KNEE_MOST_RUNS):
        progress.begin(f"{load.name} at {rate:,.0f} ticks/s on {subject.label}")
        found = [await run_once(load.with_options(rate=rate), subject, placement, progress.tell) for _ in range(runs)]
        figures = median_figures(found)
        fault = _fault(figures, rate * load.seconds)
        if fault is None:
            good, best = rate, figures | {"knee_ticks_per_s": rate}
        else:
            bad, why = rate, fault
        progress.tell(f"{figures['rows_per_s']:,.0f} rows/s, {fault or 'well'}")
        if good and bad / good < _KNEE_STEP:
            break
        if bad == float("inf"):
            rate = good * 2
        elif not good:
            rate = bad / 2
        else:
            rate = (good * bad) ** 0.5
    if best is None:
        raise BenchError(f"{load.name} has no knee above {rate:,.0f} ticks/s: {why}")
    best["notes"].insert(0, f"knee: {good:,.0f} ticks/s, {best['rows_per_s']:,.0f} rows/s; a little more, and {why}")
    return best


def _fault(figures: Figures, ticks_due: float) -> str | None:
    """Say why a rate is above the knee, or None."""
    if figures["ticks"] < _ROWS_IN_TIME * ticks_due:
        return "the publisher or Redis fell behind (the server may take more)"
    if figures["lost"] > 0 or figures["in_time"] < _ROWS_IN_TIME or (figures["p99_ms"] or 0) > _KNEE_P99_MS:
        by = "the load generator" if figures["loader_wanted"] >= 0.9 > figures["server_busiest"] else "the server"
        return f"p99 is {figures['p99_ms'] or 0:,.0f} ms, {figures['lost']:,.0f} rows lost, by {by}"
    return None


if __name__ == "__main__":
    main()
