#!/usr/bin/env python3
"""Publish ticks to Redis: a simulated market, a CSV recording, or JSON lines from any other program."""

import asyncio
import math
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import click
import uvloop
from click.core import ParameterSource
from rich.console import Console
from rich.live import Live
from rich.text import Text

from quotepush.errors import OperatorError
from quotepush.feed import FeedOptions, FeedSummary, JsonLines, Recording, Simulation, run_feed
from quotepush.feed.run import Source

_ONLY_WITH = {
    "codes": "the simulation",
    "rate": "the simulation",
    "seed": "the simulation",
    "steady": "the simulation",
    "speed": "--csv",
    "now": "--csv",
}


def _speed(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Read a factor above 0, or ``max``."""
    if value == "max":
        return math.inf
    try:
        speed = float(value)
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise click.BadParameter(f"{value!r} is neither a number above 0 nor max", ctx, param)
    return speed


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--redis", "redis_url", metavar="URL", default="redis://127.0.0.1:6379/0", help="Where to publish.")
@click.option("--prefix", default="qp:", help="The server's redis_prefix.")
@click.option("--plain", is_flag=True, help="Plain PUBLISH on a channel: no log, nothing is caught up.")
@click.option("--channel", metavar="TEMPLATE", default="quote.{code}", help="With --plain: channel of a tick.")
@click.option("--codes", metavar="N", type=int, default=3000, help="Simulation: how many instruments.")
@click.option(
    "--rate", metavar="TICKS_PER_S", type=float, default=1000.0, help="Simulation: ticks a second, on average."
)
@click.option("--seed", metavar="N", type=int, default=1, help="Simulation: the same seed makes the same market.")
@click.option("--steady", is_flag=True, help="Simulation: hold the rate, without opening, lunch and bursts.")
@click.option(
    "--csv", "csv_path", metavar="FILE[.gz]", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replay a recording at its own pace.",
)  # fmt: skip
@click.option("--speed", metavar="N|max", default="1", callback=_speed, help="Recording: times faster, or unpaced.")
@click.option("--now", is_flag=True, help="Recording: replace its times by those of the replay.")
@click.option("--stdin", is_flag=True, help="Read one JSON object with a code per line from standard input.")
@click.option("--demand", is_flag=True, help="Publish only ticks of codes that somebody watches, anywhere.")
@click.option(
    "--registry", "registry_url", metavar="URL", default=None, show_default=False,
    help="With --demand: the servers' registry_redis, if that is another Redis.",
)  # fmt: skip
@click.option("--duration", "duration_s", metavar="S", type=float, help="Stop after so many seconds.")
@click.option("--count", metavar="N", type=int, help="Stop after so many ticks.")
@click.pass_context
def main(
    ctx: click.Context,
    redis_url: str,
    prefix: str,
    plain: bool,
    channel: str,
    codes: int,
    rate: float,
    seed: int,
    steady: bool,
    csv_path: Path | None,
    speed: float,
    now: bool,
    stdin: bool,
    demand: bool,
    registry_url: str | None,
    duration_s: float | None,
    count: int | None,
) -> None:
    """Publish ticks to Redis: a simulated market unless --csv or --stdin is given.

    Ctrl-C ends it with a summary. Exit codes: 0 ended, 1 Redis or the file failed, 2 wrong arguments.
    """
    if csv_path is not None and stdin:
        raise click.UsageError("--csv and --stdin exclude each other")
    source: Source
    if csv_path is not None:
        source = Recording(path=csv_path, speed=speed, is_now=now)
    elif stdin:
        source = JsonLines()
    else:
        source = Simulation(codes=codes, rate_per_s=rate, seed=seed, is_steady=steady)
    of_source = "--csv" if csv_path is not None else "--stdin" if stdin else "the simulation"
    for name, belongs_to in _ONLY_WITH.items():
        if belongs_to != of_source and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} belongs to {belongs_to}")
    if not plain and ctx.get_parameter_source("channel") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--channel belongs to --plain")
    if registry_url is not None and not demand:
        raise click.UsageError("--registry belongs to --demand")
    options = FeedOptions(
        redis_url=redis_url,
        source=source,
        prefix=prefix,
        channel=channel if plain else None,
        is_on_demand=demand,
        registry_url=registry_url,
        duration_s=duration_s,
        count=count,
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            summary = runner.run(_feed(options))
    except OperatorError as e:
        for line in str(e).splitlines():
            click.echo(f"feed: {line}", err=True)
        ctx.exit(e.exit_code)
    click.echo(f"feed: {summary}")


async def _feed(options: FeedOptions) -> FeedSummary:
    """Run the feed; on a terminal keep one line of figures up to date below what is reported."""
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with ExitStack() as stack:
        live: Live | None = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
        before: FeedSummary | None = None

        def report(line: str) -> None:
            console.print(f"feed: {line}", soft_wrap=True)

        def progress(now: FeedSummary) -> None:
            nonlocal before
            if live is not None:
                live.update(Text(_status(now, before), overflow="ellipsis", no_wrap=True), refresh=True)
            before = now

        return await run_feed(options, stop=stop, report=report, progress=progress if live else None)


def _status(now: FeedSummary, before: FeedSummary | None) -> str:
    rate = 0.0
    if before is not None and now.elapsed_s > before.elapsed_s:
        rate = (now.sent - before.sent) / (now.elapsed_s - before.elapsed_s)
    unwanted = f"  {now.withheld:,} unwanted" if now.withheld else ""
    return (
        f"{now.sent:,} ticks  {rate:,.0f}/s  {now.codes:,} codes  {now.bad_lines:,} bad lines  {now.dropped:,} dropped"
        + unwanted
    )


if __name__ == "__main__":
    sys.exit(main())
