"""The ticker page in a real Chromium, against the real server and a real Redis."""

import re
from collections.abc import Awaitable, Callable

import pytest
from playwright.async_api import expect

from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.ticker_page import PATIENCE_MS, Publish, Visit, Witness, add, cell, codes, expect_connected, line

# One browser for all; each test has a context of its own in it, which shares nothing with the others'.
pytestmark = pytest.mark.asyncio(loop_scope="module")


def at(end: str) -> "re.Pattern[str]":
    """An address that ends so. The page changes it by itself, which its browser tells a moment later."""
    return re.compile(re.escape(end) + "$")


AWAY = re.compile("cannot be reached|Connection lost|restarting|going away|stopped answering")


@pytest.fixture
async def quotepush_server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    return await start_server(workers=1, heartbeat_ms=1000)


async def test_added_code_shows_its_quote_and_every_change(visit: Visit, publish: Publish, witness: Witness) -> None:
    page = await visit("#AAPL")
    await add(page, "sh600519")
    await expect(cell(page, "600519.SH", "label")).to_have_text("no quote yet")

    await publish("sh600519", last=1688.2, prev_close=1675.6, bid=1688.1, ask=1688.3, volume=1_234_567, name="贵州茅台")
    await expect(cell(page, "600519.SH", "last")).to_have_text("1,688.20")
    for name, text in {
        "label": "贵州茅台",
        "change": "+12.60",
        "pct": "+0.75%",
        "bid": "1,688.10",
        "ask": "1,688.30",
        "volume": "1.23M",
        "time": re.compile(r"\d\d:\d\d:\d\d"),
    }.items():
        await expect(cell(page, "600519.SH", name)).to_have_text(text)

    await publish("600519.SH", last=1670)
    await expect(cell(page, "600519.SH", "last")).to_have_text("1,670.00")
    await expect(cell(page, "600519.SH", "change")).to_have_text("−5.60")
    await expect(cell(page, "600519.SH", "last")).to_have_attribute("data-flash", re.compile("^down"))
    await expect(page.locator("#state")).to_have_text("Live")
    assert witness.failures == []


async def test_refused_code_shows_the_reason_and_leaves_the_list_alone(visit: Visit) -> None:
    page = await visit("#AAPL,MSFT")
    await expect(line(page, "MSFT")).to_be_visible()
    await add(page, "no!such")

    await expect(page.get_by_role("alert")).to_have_text(re.compile(r"^no!such: .{10,}"))
    await expect(page.locator("#code")).to_have_attribute("aria-invalid", "true")
    assert await codes(page) == ["AAPL", "MSFT"]

    await page.keyboard.type("NVDA")
    await expect(page.get_by_role("alert")).to_have_text("")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("NVDA added.")


async def test_refused_code_of_a_shared_list_stays_and_says_why(visit: Visit) -> None:
    page = await visit("#AAPL,no!such")
    await expect(cell(page, "no!such", "label")).to_have_text(re.compile("^Refused: .{10,}"))
    await page.get_by_role("button", name="Remove no!such").click()
    assert await codes(page) == ["AAPL"]


async def test_second_spelling_of_a_code_is_no_second_line(visit: Visit) -> None:
    page = await visit("#600519.SH")
    await add(page, "600519 SH600519")
    await expect(page.get_by_role("alert")).to_have_text("SH600519 is 600519.SH, which is already on the list.")
    assert await codes(page) == ["600519.SH"]


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_page_tells_of_a_lost_server_and_recovers_by_itself(
    way: str, visit: Visit, publish: Publish, quotepush_server: QuotepushServer
) -> None:
    page = await visit("#AAPL")
    await publish("AAPL", last=100, prev_close=99)
    await expect(cell(page, "AAPL", "last")).to_have_text("100.00")

    await getattr(quotepush_server, way)()
    await expect(page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
    await expect(page.locator("#countdown")).to_have_text(re.compile(r"next attempt in \d+ s|connecting"))
    await expect(page.get_by_role("button", name="Try now")).to_be_visible()
    await expect(cell(page, "AAPL", "tag")).to_have_text("stale")
    await expect(cell(page, "AAPL", "last")).to_have_text("100.00")

    await quotepush_server.start()
    await expect_connected(page)
    await publish("AAPL", last=101.5, prev_close=99)
    await expect(cell(page, "AAPL", "last")).to_have_text("101.50")
    await expect(cell(page, "AAPL", "tag")).to_be_hidden()
    await expect(page.get_by_role("button", name="Try now")).to_be_hidden()


async def test_feed_that_is_down_is_told_and_its_quotes_are_marked(
    visit: Visit, publish: Publish, redis_server: RedisServer
) -> None:
    page = await visit("#AAPL")
    await publish("AAPL", last=100)
    await expect(cell(page, "AAPL", "last")).to_have_text("100.00")
    redis_server.kill()
    await expect(page.locator("#state")).to_have_text("Connected, but the feed is down", timeout=PATIENCE_MS)
    await expect(cell(page, "AAPL", "tag")).to_have_text("stale")
    redis_server.start()
    await expect(page.locator("#state")).not_to_have_text("Connected, but the feed is down", timeout=PATIENCE_MS)


async def test_vendor_text_is_shown_and_never_run(visit: Visit, publish: Publish) -> None:
    page = await visit("#AAPL")
    name = "<img src=x onerror=alert(1)>&amp;"
    await publish("AAPL", last=1, name=name)
    await expect(cell(page, "AAPL", "label")).to_have_text(name)
    await expect(page.locator("tbody img")).to_have_count(0)


async def test_list_lives_in_the_address_and_in_the_browser(visit: Visit, quotepush_server: QuotepushServer) -> None:
    page = await visit()
    assert len(await codes(page)) >= 6
    await expect(page).to_have_url(re.compile(re.escape("#600519.SH,")))

    shared = await page.context.new_page()
    await shared.goto(f"{quotepush_server.url}/#AAPL,600519,%5EGSPC")
    await expect(line(shared, "600519.SH")).to_be_visible()
    assert await codes(shared) == ["AAPL", "600519.SH", "^GSPC"]
    await expect(shared).to_have_url(at("#AAPL,600519.SH,%5EGSPC"))

    await shared.get_by_role("button", name="Remove ^GSPC").focus()
    await shared.keyboard.press("Enter")
    await expect(shared.get_by_role("button", name="Remove 600519.SH")).to_be_focused()
    await expect(shared).to_have_url(at("#AAPL,600519.SH"))

    await page.goto("about:blank")
    await page.goto(f"{quotepush_server.url}/")
    await expect(line(page, "600519.SH")).to_be_visible()
    assert await codes(page) == ["AAPL", "600519.SH"]


async def test_emptied_list_stays_empty_until_filled_again(visit: Visit) -> None:
    page = await visit("#AAPL")
    await page.get_by_role("button", name="Remove AAPL").click()
    await expect(page.get_by_text("No codes on this list.")).to_be_visible()
    await page.reload()
    await expect(page.get_by_text("No codes on this list.")).to_be_visible()
    await page.get_by_role("button", name="Show some well-known ones").click()
    await expect(line(page, "600519.SH")).to_be_visible()


async def test_colours_of_rise_and_fall_can_be_swapped_and_stay_so(visit: Visit, publish: Publish) -> None:
    async def colour() -> tuple[int, int]:
        css = await cell(page, "AAPL", "last").evaluate("cell => getComputedStyle(cell).color")
        red, green, _blue = (int(n) for n in re.findall(r"\d+", css)[:3])
        return red, green

    page = await visit("#AAPL")
    await publish("AAPL", last=100, prev_close=99)
    await expect(cell(page, "AAPL", "change")).to_have_text("+1.00")
    red, green = await colour()
    assert red > green

    await page.get_by_label("Green up").check()
    red, green = await colour()
    assert green > red

    await page.reload()
    await expect(cell(page, "AAPL", "change")).to_have_text("+1.00")
    red, green = await colour()
    assert green > red


LAYOUT_SHIFTS = """
window.layoutShifts = [];
const where = ({ node, previousRect: from, currentRect: to }) =>
  `${node?.outerHTML ?? node?.data} from ${from.x},${from.y} to ${to.x},${to.y}`;
new PerformanceObserver((list) => {
  for (const { value, hadRecentInput, sources } of list.getEntries()) {
    if (!hadRecentInput) window.layoutShifts.push([value, ...sources.map(where)]);
  }
}).observe({ type: "layout-shift", buffered: true });
"""


@pytest.mark.parametrize("width", [1280, 375])
async def test_nothing_moves_while_prices_change(width: int, visit: Visit, publish: Publish) -> None:
    page = await visit("#600519.SH,AAPL,MSFT", viewport={"width": width, "height": 800})
    await page.evaluate(LAYOUT_SHIFTS)
    prices = [9.99, 10.01, 999.99, 1000.0, 12345.678, 0.5, 88.8]
    for n, price in enumerate(prices):
        for code in ("600519.SH", "AAPL", "MSFT"):
            tick = {"last": price, "prev_close": 10, "bid": price, "ask": price + 1, "volume": 10**n}
            await publish(code, **tick, name="贵州茅台", status="halted" if n % 2 else "trading")
        await expect(cell(page, "MSFT", "last")).to_have_text(f"{price:,.{2 if n < 4 else 3}f}")
    await page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert await page.evaluate("layoutShifts") == []


async def test_page_fits_a_phone_and_keeps_its_table_there(visit: Visit, publish: Publish) -> None:
    page = await visit("#600519.SH,AAPL", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    await publish(
        "600519.SH", last=1688.2, prev_close=1675.6, bid=1688.1, ask=1688.3, volume=123_456_789, name="贵州茅台"
    )
    await expect(cell(page, "600519.SH", "last")).to_have_text("1,688.20")
    await expect(cell(page, "600519.SH", "bid")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    cut = await line(page, "600519.SH").evaluate(
        "row => [...row.cells].filter((cell) => cell.scrollWidth > cell.clientWidth).map((cell) => cell.className)"
    )
    assert cut == []


async def test_page_works_under_a_content_policy_that_allows_nothing_inline(
    visit: Visit, quotepush_server: QuotepushServer, witness: Witness
) -> None:
    page = await visit("#AAPL")
    response = await page.request.get(f"{quotepush_server.url}/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy or "default-src 'none'" in policy
    assert "unsafe" not in policy
    await expect(line(page, "AAPL")).to_be_visible()
    assert witness.faults == []  # a violation is a console error


async def test_page_can_be_used_by_keyboard_and_screen_reader(visit: Visit) -> None:
    page = await visit("#AAPL")
    await page.keyboard.press("/")
    await expect(page.get_by_label("Add a code to the list")).to_be_focused()
    await expect(page.get_by_role("status")).to_have_text(re.compile("Live|Connected"))
    headers = await page.get_by_role("columnheader").all_inner_texts()
    assert headers[:10] == ["Code", "Name", "Trend", "Last", "Change", "Change %", "Bid", "Ask", "Volume", "Time"]
    await expect(page.get_by_role("table", name="Live quotes")).to_be_visible()
    await expect(page.get_by_role("radio", name="Red up")).to_be_checked()
