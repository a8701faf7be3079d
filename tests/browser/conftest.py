"""What the tests in a browser may ask for."""

import json
import shutil
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.ticker_page import PATIENCE_MS, Publish, Visit, Witness, expect_connected

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=PATIENCE_MS)  # five seconds are not enough on a busy machine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip("no Chromium on PATH: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def publish(redis_server: RedisServer) -> AsyncIterator[Publish]:
    """``await publish("AAPL", last=1.5)``, as any program in any language would."""
    async with redis_server.client() as redis:

        async def publish(code: str, **tick: Any) -> None:
            await redis.publish(f"quote.{code}", json.dumps(tick))

        yield publish


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, quotepush_server: QuotepushServer, witness: Witness) -> AsyncIterator[Visit]:
    """``page = await visit("#AAPL")``: a connected page in a context of its own, which gets the options.

    ``at`` is another address of the same server.
    """
    known = {urlsplit(quotepush_server.url).netloc}

    async def visit(address: str = "", at: str = quotepush_server.url, **context: Any) -> Page:
        known.add(urlsplit(at).netloc)
        page = await (await browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})).new_page()
        page.set_default_timeout(PATIENCE_MS)
        witness.watch(page)
        await page.goto(f"{at}/{address}")
        await expect_connected(page)
        return page

    yield visit
    for context in browser.contexts:
        await context.close()
    assert witness.faults == []
    assert witness.hosts <= known
