"""The ticker page in a browser: opened, watched, and spoken of by code and column."""

import re
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from playwright.async_api import Locator, Page, expect

__all__ = ["PATIENCE_MS", "Publish", "Visit", "Witness", "add", "cell", "codes", "expect_connected", "line"]

# A reconnect may wait out a pause or two, a feed that is down is said by the next heartbeat.
PATIENCE_MS = 30_000

Publish = Callable[..., Awaitable[None]]
Visit = Callable[..., Awaitable[Page]]


class Witness:
    """What a page should not have done while nobody looked.

    Attributes:
        faults: console errors and uncaught exceptions, without those of failed connections.
        failures: the console's lines about failed connections.
        hosts: every ``host:port`` that was spoken to.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.failures: list[str] = []
        self.hosts: set[str] = set()

    def watch(self, page: Page) -> None:
        page.on("console", lambda message: self._hear(message.type, message.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: self._note(socket.url))

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            # 426 and 503 are answers to the page's question why it could not connect: the server is back, or leaves.
            marks = ("net::ERR", "WebSocket connection to", "a status of 426", "a status of 503")
            is_network = any(mark in text for mark in marks)
            (self.failures if is_network else self.faults).append(text)

    def _note(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.hosts.add(urlsplit(url).netloc)


async def expect_connected(page: Page) -> None:
    await expect(page.locator("#state")).to_have_text(re.compile("^(Live|Connected|实时|已连接)"), timeout=PATIENCE_MS)


def line(page: Page, code: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=code, exact=True))


def cell(page: Page, code: str, name: str) -> Locator:
    return line(page, code).locator(f".{name}")


async def add(page: Page, spelling: str) -> None:
    await page.get_by_label("Add a code to the list").fill(spelling)
    await page.keyboard.press("Enter")


async def codes(page: Page) -> list[str]:
    return await page.locator("tbody .code").all_text_contents()  # also of lines that are out of sight
