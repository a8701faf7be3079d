#!/usr/bin/env python3
"""Measure the frames of the ticker page while many codes tick: the work in each, and how even they are.

    python tools/bench/page_frames.py                        # 200 codes, 20 ticks a second each
    python tools/bench/page_frames.py --codes 100 --per-s 5 --detail

Work is taken from a trace of Chromium: the tasks of the page's main thread (scripts, style, layout, paint) between two
animation frames, by the clock and in CPU time, which other programs on the machine lengthen less. Evenness is what a
page sees: the time between two calls of requestAnimationFrame. Chromium runs headless and draws 60 frames a second in
software.
"""

import asyncio
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

import click
from page_stage import codes_of, page_stage, ticking

_TRACED = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline", "blink.user_timing"]
_FRAMES = """
(seconds) => new Promise((done) => {
  const at = [];
  const end = performance.now() + seconds * 1000;
  const step = (now) => (at.push(now), now < end ? requestAnimationFrame(step) : done(at));
  requestAnimationFrame(step);
})
"""
_LONG_US = 50_000


@dataclass(frozen=True, slots=True)
class Frames:
    """What one run has shown, in milliseconds."""

    count: int
    busy: list[float]
    cpu: list[float]
    between: list[float]
    long_tasks: list[float]
    rows_per_s: str

    def __str__(self) -> str:
        return (
            f"{self.count} frames, {self.rows_per_s} rows; work a frame: "
            f"p50 {_at(self.busy, 0.5):.1f} ms, p99 {_at(self.busy, 0.99):.1f} ms, most {max(self.busy):.1f} ms, "
            f"of CPU time p50 {_at(self.cpu, 0.5):.1f} ms, p99 {_at(self.cpu, 0.99):.1f} ms; "
            f"between frames: p50 {_at(self.between, 0.5):.1f} ms, p99 {_at(self.between, 0.99):.1f} ms; "
            f"tasks over 50 ms: {len(self.long_tasks)}"
        )


async def measure(codes: int, per_s: float, seconds: float, height: int, detail: bool) -> Frames:
    """Open the page with so many codes, let them tick, and look at its frames for some seconds."""
    names = codes_of(codes)
    async with page_stage() as stage, ticking(stage.redis_url, names, codes * per_s):
        page = await stage.browser.new_page(viewport={"width": 1440, "height": height})
        await page.goto(f"{stage.url}#{','.join(names)}" + ("&open=X0000" if detail else ""))
        await page.locator("#lines tr:last-child .last", has_text=re.compile(r"\d")).wait_for(state="attached")
        await page.wait_for_timeout(3000)
        await stage.browser.start_tracing(page=page, categories=_TRACED)
        at = await page.evaluate(_FRAMES, seconds)
        trace = json.loads(await stage.browser.stop_tracing())
        rows = await page.locator("#rate").inner_text()
        busy, cpu, long_tasks = work_of(trace["traceEvents"])
        return Frames(len(busy), busy, cpu, [b - a for a, b in itertools.pairwise(at)], long_tasks, rows)


def work_of(events: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Return the page's work between two animation frames, its CPU time, and the tasks that were long, all in ms."""
    frames = [event for event in events if event["name"] == "FireAnimationFrame"]
    threads = [(event["pid"], event["tid"]) for event in frames]
    thread = max(set(threads), key=threads.count)
    starts = sorted(event["ts"] for event in frames if (event["pid"], event["tid"]) == thread)
    tasks = sorted(
        (event["ts"], event["dur"], event.get("tdur", event["dur"]))
        for event in events
        if event.get("ph") == "X" and (event["pid"], event["tid"]) == thread and event["name"].endswith("RunTask")
    )
    tasks = [task for n, task in enumerate(tasks) if not n or task[0] >= tasks[n - 1][0] + tasks[n - 1][1]]
    # Several callbacks belong to one frame.
    starts = [ts for n, ts in enumerate(starts) if not n or ts - starts[n - 1] > 4000]
    busy, cpu, n = [], [], 0
    for begin, end in itertools.pairwise(starts):
        while n < len(tasks) and tasks[n][0] < begin:
            n += 1
        of_frame = []
        while n < len(tasks) and tasks[n][0] < end:
            of_frame.append(tasks[n])
            n += 1
        busy.append(sum(task[1] for task in of_frame) / 1000)
        cpu.append(sum(task[2] for task in of_frame) / 1000)
    return busy, cpu, [duration / 1000 for _, duration, _ in tasks if duration > _LONG_US]


def _at(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


@click.command(context_settings={"show_default": True})
@click.option("--codes", default=200, help="Lines of the table.")
@click.option("--per-s", default=20.0, help="Ticks a second of each.")
@click.option("--seconds", default=10.0, help="How long frames are looked at.")
@click.option("--height", default=900, help="Of the window: how many lines are in sight.")
@click.option("--detail", is_flag=True, help="With the details of a code open.")
@click.option("--runs", default=1)
def main(codes: int, per_s: float, seconds: float, height: int, detail: bool, runs: int) -> None:
    """Print what was measured, a line a run."""
    for _ in range(runs):
        click.echo(str(asyncio.run(measure(codes, per_s, seconds, height, detail))))


if __name__ == "__main__":
    main()
