#!/usr/bin/env python3
"""Take the pictures of the ticker page that the documents show: a private Redis, the server, half a simulated day.

    python tools/screenshots.py                  # docs/images/page*.png; needs Chromium

The market runs some hundred times faster than a clock until it is half past two where the browser is.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import orjson
from bench.page_stage import page_stage
from playwright.async_api import Browser, Page, expect
from redis.asyncio import Redis

from quotepush.feed.simulate import Market

IMAGES = Path(__file__).parent.parent / "docs" / "images"
LIST = "600519.SH,300750.SZ,601318.SH,002594.SZ,600036.SH,688981.SH,000001.SZ,AAPL,MSFT,NVDA,TSLA,AMZN,GOOGL"
NAMES = {"en-US": (None, "Banks", "US tech"), "zh-CN": (None, "银行", "美股科技")}
CODES = 300
DAY_MS = 4 * 3_600_000
SEEN_PART = 0.8  # of the day
STEP_MS = 36_000
TICKS_PER_STEP = 500
STEP_S = 0.06
LIVE_S = 6.0

PICTURES: dict[str, dict[str, Any]] = {
    "page": {"viewport": {"width": 1440, "height": 900}, "locale": "en-US"},
    "page-dark": {"viewport": {"width": 1440, "height": 900}, "locale": "en-US", "color_scheme": "dark"},
    "page-zh": {"viewport": {"width": 1440, "height": 900}, "locale": "zh-CN"},
    "page-phone": {"viewport": {"width": 375, "height": 812}, "locale": "en-US", "is_mobile": True, "has_touch": True,
                   "device_scale_factor": 2},
}  # fmt: skip


async def play(redis_url: str) -> AsyncIterator[float]:
    """Publish the day up to now, then as it goes on; yields the part of it that is over."""
    until_ms = time.time() * 1000
    at_ms = int(until_ms - SEEN_PART * DAY_MS)
    first_ms = at_ms
    market = Market(CODES, seed=7, day_ms=DAY_MS)
    async with Redis.from_url(redis_url) as redis:
        while True:
            pipe = redis.pipeline(transaction=False)
            is_live = at_ms >= time.time() * 1000 - STEP_MS
            for code, tick in market.ticks(at_ms, TICKS_PER_STEP // (10 if is_live else 1)):
                pipe.publish(f"quote.{code}", orjson.dumps(tick))
            await pipe.execute()
            yield (at_ms - first_ms) / (SEEN_PART * DAY_MS)
            await asyncio.sleep(STEP_S)
            at_ms = int(time.time() * 1000) if is_live else at_ms + STEP_MS


def timezone() -> str:
    """The one in which it is between two and three in the afternoon."""
    ahead = 14 - datetime.now(UTC).hour
    if ahead > 14:
        ahead -= 24
    if ahead < -12:
        ahead += 24
    return f"Etc/GMT{-ahead:+d}" if ahead else "Etc/GMT"


async def visit(browser: Browser, url: str, name: str) -> Page:
    context = await browser.new_context(**{"timezone_id": timezone(), "device_scale_factor": 1, **PICTURES[name]})
    lists = [{"codes": LIST.split(","), "name": name} for name in NAMES[PICTURES[name]["locale"]]]
    kept = orjson.dumps({"lists": lists, "current": 0}).decode()
    await context.add_init_script(f"localStorage.setItem('quotepush.lists', {orjson.dumps(kept).decode()})")
    page = await context.new_page()
    opened = "" if name == "page-phone" else "&open=600519.SH"
    await page.goto(f"{url}#{LIST}{opened}")
    await expect(page.locator("#state")).not_to_have_text("Connecting")
    return page


async def take(images: Path) -> None:
    async with page_stage() as stage:
        pages = {name: await visit(stage.browser, stage.url, name) for name in PICTURES}
        live_from_s = None
        async for part in play(stage.redis_url):
            if part < 0.998:
                continue
            live_from_s = live_from_s or time.monotonic()
            if time.monotonic() - live_from_s > LIVE_S:
                break
        for name, page in pages.items():
            await page.screenshot(path=images / f"{name}.png")
        await pages["page-phone"].get_by_role("button", name="600519.SH", exact=True).click()
        await pages["page-phone"].wait_for_timeout(600)
        await pages["page-phone"].screenshot(path=images / "page-phone-detail.png")


@click.command()
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), default=IMAGES, show_default=True)
def main(images: Path) -> None:
    """Write the pictures into a folder."""
    asyncio.run(take(images))


if __name__ == "__main__":
    main()
