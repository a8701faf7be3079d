#!/usr/bin/env python3
"""Keep the ticker page open for long and see whether it grows: heap after a forced collection, nodes, listeners.

    python tools/bench/page_hour.py                      # an hour at 1,000 rows a second
    python tools/bench/page_hour.py --seconds 300 --every 30

Details are open half of the time, of one code after the other; the page is searched, sorted and switched between two
lists now and then, as people do.
"""

import asyncio
import time

import click
from page_stage import codes_of, page_stage, ticking
from playwright.async_api import CDPSession, Page

_MIB = 1 << 20


async def run(seconds: float, every_s: float, codes: int, per_s: float) -> None:
    """Print a line per sample until the time is over, and by how much the heap grew in its second half."""
    names = codes_of(codes)
    async with page_stage() as stage, ticking(stage.redis_url, names, per_s):
        page = await stage.browser.new_page(viewport={"width": 1440, "height": 900})
        await page.goto(f"{stage.url}#{','.join(names)}")
        session = await page.context.new_cdp_session(page)
        for domain in ("HeapProfiler", "Performance"):
            await session.send(f"{domain}.enable")
        begin = time.monotonic()
        heaps: list[float] = []
        click.echo("     s   heap MiB    nodes  listeners  documents       rows")
        while (elapsed := time.monotonic() - begin) < seconds:
            figures = await _sample(session)
            heaps.append(figures["JSHeapUsedSize"] / _MIB)
            click.echo(
                f"{elapsed:6.0f} {heaps[-1]:10.2f} {figures['Nodes']:8.0f} {figures['JSEventListeners']:10.0f} "
                f"{figures['Documents']:10.0f} {await page.locator('#rate').inner_text():>10}"
            )
            await _use(page, names[len(heaps) % codes], every_s)
        half = heaps[len(heaps) // 2 :]
        click.echo(f"second half: {half[0]:.2f} MiB at its begin, {half[-1]:.2f} at its end, {max(half):.2f} at most")


async def _sample(session: CDPSession) -> dict[str, float]:
    for _ in range(2):  # what the first one lets go of may hold more
        await session.send("HeapProfiler.collectGarbage")
    answer = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in answer["metrics"]}


async def _use(page: Page, code: str, for_s: float) -> None:
    """Use the page for a while, and leave it as it was."""
    await page.get_by_role("button", name=code, exact=True).click()
    await page.locator("canvas").hover()
    await page.wait_for_timeout(for_s * 500)
    await page.keyboard.press("Escape")
    await page.get_by_role("columnheader", name="Change %").get_by_role("button").click()
    await page.locator("#code").fill("X00")
    await page.wait_for_timeout(for_s * 250)
    await page.locator("#code").fill("")
    for _ in range(2):  # back to the order of the list
        await page.get_by_role("columnheader", name="Change %").get_by_role("button").click()
    lists = page.get_by_role("navigation", name="Watchlists").get_by_role("button")
    await lists.first.click()
    await page.wait_for_timeout(for_s * 50)
    await lists.last.click()
    await page.wait_for_timeout(for_s * 200)


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=3600.0)
@click.option("--every", "every_s", default=60.0, help="Seconds between two samples.")
@click.option("--codes", default=200)
@click.option("--per-s", default=1000.0, help="Rows a second in all.")
def main(seconds: float, every_s: float, codes: int, per_s: float) -> None:
    """Print a table: heap after a forced collection, DOM nodes, listeners, rows a second."""
    asyncio.run(run(seconds, every_s, codes, per_s))


if __name__ == "__main__":
    main()
