"""What is sent to the visitor of the ticker page: it is seen, it is text, and it is in nobody's way."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Locator, Page, expect

from quotepush import Backend
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.ticker_page import Publish, Visit, cell, line
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
async def quotepush_server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    return await start_server(workers=1, heartbeat_ms=1000)


@pytest_asyncio.fixture(loop_scope="module")
async def backend(redis_server: RedisServer) -> AsyncIterator[Backend]:
    async with Backend(redis_server.url, timeout_s=20) as backend:
        yield backend


def messages(page: Page) -> Locator:
    return page.locator("#messages").get_by_role("listitem")


async def visitor(backend: Backend, user: str) -> None:
    """Make the one page that is there a user's."""

    async def conn() -> str:
        sessions = await backend.sessions()
        return sessions[0]["conn"] if sessions else ""

    await backend.bind_user(await wait_until(conn), user)


async def test_messages_stack_say_whence_they_come_and_are_dismissed(visit: Visit, backend: Backend) -> None:
    page = await visit("#AAPL")
    await visitor(backend, "ann")

    async def is_counted() -> bool:
        return await backend.conn_count() == 1

    await wait_until(is_counted)
    before = await page.evaluate("document.documentElement.scrollHeight")
    where = await page.locator("#quotes").bounding_box()

    await backend.send_to_user("ann", {"title": "Order filled", "text": "100 AAPL at 199.80"})
    await expect(messages(page)).to_have_count(1)
    first = messages(page).first
    await expect(first).to_contain_text("To you")
    await expect(first.locator("b")).to_have_text("Order filled")
    await expect(first.get_by_text("100 AAPL at 199.80")).to_be_visible()
    assert await first.locator("time").get_attribute("datetime")
    await backend.send_to_all("Markets close early")
    await backend.send_to_all({"n": 1, "deep": {"x": [None]}})
    await backend.send_to_all([1, "two"])
    await backend.send_to_all(b"\x00\xff")
    await expect(messages(page)).to_have_count(5)
    texts = await messages(page).all_inner_texts()
    for text, wanted in zip(
        texts, ("2 bytes", '[1,"two"]', '{"n":1,"deep":{"x":[null]}}', "Markets close early", "Order"), strict=True
    ):
        assert wanted in text, "the newest one is on top"
    assert "To everybody" in texts[0]
    region = page.get_by_role("region", name="Messages")
    await expect(region.get_by_role("list")).to_have_attribute("aria-live", "polite")

    assert await page.evaluate("document.documentElement.scrollHeight") == before
    assert await page.locator("#quotes").bounding_box() == where, "nothing has moved"

    await messages(page).nth(1).get_by_role("button", name="Dismiss").press("Enter")
    await expect(messages(page)).to_have_count(4)
    await expect(messages(page).nth(1).get_by_role("button", name="Dismiss")).to_be_focused()
    await page.get_by_role("button", name="Dismiss all 4").click()
    await expect(messages(page)).to_have_count(0)
    await expect(page.get_by_role("button", name="Dismiss")).to_have_count(0)
    await backend.send_to_all("last")
    await messages(page).first.get_by_role("button", name="Dismiss").press("Enter")
    await expect(page.get_by_label("Add a code to the list")).to_be_focused()


async def test_a_price_alert_opens_its_code(visit: Visit, backend: Backend, publish: Publish) -> None:
    page = await visit("#AAPL,MSFT")
    await publish("MSFT", last=400, prev_close=390)
    await expect(cell(page, "MSFT", "last")).to_have_text("400.00")
    alert = {"title": "MSFT is at 400", "text": "You asked for 400", "code": "MSFT"}
    job = await backend.send_to_all(alert, at=timedelta(seconds=1))
    assert job.to == {"all": True}
    button = messages(page).get_by_role("button", name="MSFT", exact=True)
    await button.click(timeout=20_000)
    pane = page.get_by_role("complementary", name="Details of MSFT")
    await expect(pane.locator("[data-part=last]")).to_have_text("400.00")
    await page.keyboard.press("Escape")
    await expect(pane).to_be_hidden()
    await backend.send_to_all({"title": "T", "code": "no code <i>", "more": True})
    await expect(messages(page).first).to_contain_text('{"more":true,"code":"no code <i>"}')


async def test_whatever_a_message_is_it_is_text_and_bounded(visit: Visit, backend: Backend) -> None:
    page = await visit("#AAPL", locale="zh-CN")
    evil = "<img src=x onerror='document.title=1'><script>document.title=1</script>"
    await backend.send_to_all(evil)
    await backend.send_to_all({"title": evil, "text": evil, "code": evil, evil: evil})
    await backend.send_to_all({"title": {"deep": 1}, "text": 5, "code": None})
    for data in (None, 0, False, "", "x" * 5000, ["y" * 5000], {"title": "z" * 5000}):
        await backend.send_to_all(data)
    await expect(messages(page)).to_have_count(10)
    assert await page.locator("#messages img, #messages script").count() == 0
    texts = await messages(page).all_inner_texts()
    assert evil in texts[-1] and all("发给所有人" in text for text in texts)
    assert all(len(text) < 700 for text in texts[:3]) and all("…" in text for text in texts[:3])
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await page.title() != "1"

    await page.get_by_label("语言").select_option("en")
    await expect(messages(page).first).to_contain_text("To everybody")
    for n in range(60):
        await backend.send_to_all(n)
    await expect(messages(page).first).to_contain_text("59")
    assert await messages(page).count() == 50


async def test_a_message_of_somebody_else_names_him(visit: Visit, redis_server: RedisServer) -> None:
    page = await visit("#AAPL")
    command: dict[str, Any] = {
        "op": "send",
        "to": {"all": True},
        "data": "hi",
        "sender": {"conn": "n.0.1", "user": "bob"},
    }
    async with redis_server.client() as redis:
        await redis.publish("qp:to", json.dumps(command))
    await expect(messages(page).first).to_contain_text("from bob")


async def test_on_a_phone_messages_fit_and_the_page_can_still_be_used(visit: Visit, backend: Backend) -> None:
    page = await visit("#AAPL,MSFT", viewport={"width": 375, "height": 667}, is_mobile=True, has_touch=True)
    for n in range(8):
        await backend.send_to_all({"title": f"News {n}", "text": "word " * 20})
    await expect(messages(page)).to_have_count(8)
    box = await page.locator("#messages").bounding_box()
    assert box is not None and box["height"] <= 0.4 * 667 and box["x"] >= 0 and box["x"] + box["width"] <= 375
    await line(page, "AAPL").locator(".open").tap()
    await expect(page.locator("#detail")).to_be_visible()
    await page.get_by_role("button", name="Dismiss all 8").tap()
    await expect(messages(page)).to_have_count(0)
    assert await page.evaluate("document.activeElement.id") != "code", "no keyboard comes up"
