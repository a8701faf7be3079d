"""What people do with the ticker page all day, in a real Chromium against the real server and a real Redis."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from playwright.async_api import Page, Route, WebSocket, expect

from tests.support.blocked_network import BlockedNetwork
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import steady_feed
from tests.support.ticker_page import PATIENCE_MS, Publish, Visit, add, cell, codes, expect_connected, line
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOOK = {
    "bids": [[99.9 - n / 10, 100 * (n + 1)] for n in range(5)],
    "asks": [[100.1 + n / 10, 200 * (n + 1)] for n in range(5)],
}
SHOWN = """
() => [...document.querySelectorAll("#lines tr")].map((row) =>
  [row.querySelector(".open").textContent, row.querySelector(".last").textContent])
"""


@pytest.fixture
async def quotepush_server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    return await start_server(workers=1, heartbeat_ms=1000)


def at(end: str) -> "re.Pattern[str]":
    """An address that ends so. The page changes it by itself, which its browser tells a moment later."""
    return re.compile(re.escape(end) + "$")


async def expect_newest(page: Page, newest: dict[str, float]) -> None:
    """Every code of the list shows its newest price in the end."""

    async def is_shown() -> bool:
        shown = await page.evaluate(SHOWN)
        return {code: float(text.replace(",", "")) for code, text in shown if text != "–"} == newest

    await wait_until(is_shown, 60, "every newest price")


async def level(page: Page, name: str) -> list[str]:
    row = page.locator("#detail").get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))
    return await row.get_by_role("cell").all_inner_texts()


async def test_two_hundred_codes_are_live_at_once(
    visit: Visit, redis_server: RedisServer, quotepush_server: QuotepushServer
) -> None:
    wanted = [f"X{n:03}" for n in range(200)]
    async with steady_feed(redis_server.url, wanted, rate_per_s=2000) as feed:
        page = await visit(f"#{','.join(wanted)}")
        assert await codes(page) == wanted
        await expect(cell(page, "X199", "last")).to_have_text(re.compile(r"\d"), timeout=PATIENCE_MS)
        await line(page, "X150").locator(".open").click()
        await expect(page.locator("[data-part=note]")).to_have_text(re.compile("since"), timeout=PATIENCE_MS)

        await quotepush_server.kill()
        await quotepush_server.start()
        await expect_connected(page)
        newest = await feed.finish()
    await expect_newest(page, newest)
    await expect(page.locator("#detail [data-part=last]")).to_have_text(
        await cell(page, "X150", "last").text_content() or ""
    )
    await expect(page.locator("#lines [data-stale]")).to_have_count(0)


async def test_stalled_tab_says_that_it_was_slow_and_has_every_newest_price(
    visit: Visit, redis_server: RedisServer, start_server: Callable[..., Awaitable[QuotepushServer]]
) -> None:
    server = await start_server(workers=1, heartbeat_ms=1000, merge_above_rows=50)
    wanted = [f"X{n:03}" for n in range(100)]
    released = asyncio.Event()

    async def answer(route: Route) -> None:
        await released.wait()
        await route.fulfill(body="")

    async with steady_feed(redis_server.url, wanted, rate_per_s=2000, padding={"name": "x" * 4000}) as feed:
        page = await visit(f"#{','.join(wanted)}", at=server.url)
        await page.route("**/stall", answer)
        # A question that waits for its answer holds the whole tab.
        stall = "() => { const q = new XMLHttpRequest(); q.open('GET', '/stall', false); q.send(); }"
        stalled = asyncio.create_task(page.evaluate(stall))

        async def is_merging() -> bool:
            return await server.metric("rows_merged") > 200

        await wait_until(is_merging, 60, "rows are merged for the tab")
        told = asyncio.create_task(expect(page.locator("#slow")).to_have_text(re.compile("^Slow"), timeout=PATIENCE_MS))
        newest = await feed.finish()
        released.set()
        await stalled
        await told
    await expect_newest(page, newest)
    await expect(page.locator("#slow")).to_have_text("", timeout=PATIENCE_MS)


async def test_details_have_figures_a_book_and_a_chart_and_give_the_connection_back(
    visit: Visit, publish: Publish
) -> None:
    page = await visit("#AAPL,MSFT")
    sent: list[dict[str, Any]] = []

    def hear(socket: WebSocket) -> None:
        socket.on("framesent", lambda frame: sent.append(json.loads(frame)))

    page.on("websocket", hear)
    await page.reload()
    await expect_connected(page)
    tick = {"last": 100, "prev_close": 98, "open": 97, "high": 101, "low": 96, "volume": 1000, "limit_up": 107.8}
    await publish("AAPL", **tick, **BOOK, bid=99.9, ask=100.1, name="Apple", phase="regular", status="halted")
    await expect(cell(page, "AAPL", "last")).to_have_text("100.00")
    opener = line(page, "AAPL").get_by_role("button", name="AAPL", exact=True)
    await opener.press("Enter")

    pane = page.get_by_role("complementary", name="Details of AAPL")
    await expect(pane.get_by_role("heading", name="AAPL")).to_be_focused()
    await expect(page).to_have_url(at("#AAPL,MSFT&open=AAPL"))
    await expect(pane.locator("tr.bid").last).to_contain_text("99.50")
    assert await level(page, "Ask 5") == ["100.50", "1,000"]
    assert await level(page, "Bid 1") == ["99.90", "100"]
    for part, text in {
        "high": "101.00",
        "spread": "0.20",
        "limitUp": "107.80",
        "limitDown": "–",
        "tag": "halted",
    }.items():
        await expect(pane.locator(f"[data-part={part}]")).to_have_text(text)

    chart = pane.get_by_role("slider")
    await expect(chart).to_have_attribute("aria-label", re.compile("Price of AAPL since"))
    await chart.press("Home")
    await expect(chart).to_have_attribute("aria-valuetext", re.compile(r"^\d\d:\d\d:\d\d: 100\.00"))
    painted = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
    await wait_until(lambda: chart.evaluate(painted), 20, "the chart is painted")

    await page.keyboard.press("Escape")
    await expect(pane).to_be_hidden()
    await expect(opener).to_be_focused()
    await expect(page).to_have_url(at("#AAPL,MSFT"))

    def has_given_back() -> bool:
        views = [frame for frame in sent if frame["action"] == "subscribe" and frame["codes"] == ["AAPL"]]
        return len(views) == 2 and "bids" in views[0]["fields"] and "fields" not in views[1]

    await wait_until(has_given_back, 20, "the usual view")
    await publish("AAPL", last=101.5)
    await expect(cell(page, "AAPL", "last")).to_have_text("101.50")


async def test_code_of_a_shared_address_is_shown_without_being_on_the_list(visit: Visit, publish: Publish) -> None:
    page = await visit("#MSFT&open=aapl")
    await publish("AAPL", last=100, **BOOK)
    pane = page.locator("#detail")
    await expect(pane.locator("[data-part=title]")).to_have_text("AAPL")
    await expect(pane.locator("[data-part=last]")).to_have_text("100.00")
    assert await codes(page) == ["MSFT"]

    await pane.get_by_role("button", name="Add to this list").click()
    await expect(cell(page, "AAPL", "last")).to_have_text("100.00")
    await page.get_by_role("button", name="Remove AAPL").click()
    await publish("AAPL", last=102, bids=[[101, 700]])
    await expect(pane.locator("[data-part=last]")).to_have_text("102.00")
    await expect(pane.locator("tr.bid").first).to_contain_text("700")


async def test_a_stream_in_the_place_of_a_blocked_websocket_has_details_too(
    visit: Visit, publish: Publish, quotepush_server: QuotepushServer
) -> None:
    async with BlockedNetwork(quotepush_server.url) as network:
        page = await visit("#AAPL,MSFT", at=network.url)
        await publish("AAPL", last=100, prev_close=98, **BOOK)
        await expect(cell(page, "AAPL", "last")).to_have_text("100.00")
        assert network.sockets_refused
        await line(page, "AAPL").locator(".open").click()
        await expect(page.locator("#detail tr.bid").first).to_contain_text("99.90")
        await publish("AAPL", last=101)
        await expect(page.locator("#detail [data-part=last]")).to_have_text("101.00")
        await page.close()


async def test_watchlists_are_made_named_switched_and_deleted(visit: Visit, quotepush_server: QuotepushServer) -> None:
    page = await visit("#AAPL")
    lists = page.get_by_role("navigation", name="Watchlists")
    await expect(page.get_by_text("A list somebody shared")).to_be_visible()
    assert await lists.get_by_role("button").all_inner_texts() == ["Watchlist", "Shared list"]
    await lists.get_by_role("button", name="Watchlist").click()
    assert len(await codes(page)) == 12

    await page.get_by_role("button", name="New list").click()
    await page.get_by_label("Name of the list").fill("Tech & more")
    await page.keyboard.press("Enter")
    await add(page, "NVDA, MSFT")
    await expect(line(page, "MSFT")).to_be_visible()
    await expect(lists.get_by_role("button", name="Tech & more")).to_have_attribute("aria-current", "true")
    await expect(page).to_have_url(at("#NVDA,MSFT&name=Tech%20%26%20more"))

    await page.get_by_role("button", name="Rename list").click()
    await page.get_by_label("Name of the list").fill("Tech")
    await page.keyboard.press("Enter")
    await page.reload()
    assert await codes(page) == ["NVDA", "MSFT"]
    assert await lists.get_by_role("button").all_inner_texts() == ["Watchlist", "Tech"]

    # A link from somebody else takes nothing away, and is kept when it is changed.
    await page.goto("about:blank")
    await page.goto(f"{quotepush_server.url}/#TSLA,AMZN&name=Theirs")
    await expect(lists.get_by_role("button", name="Theirs")).to_have_attribute("aria-current", "true")
    await page.get_by_role("button", name="Remove TSLA").click()
    assert await lists.get_by_role("button").all_inner_texts() == ["Watchlist", "Tech", "Theirs"]
    await page.get_by_role("button", name="Undo").click()
    assert await codes(page) == ["TSLA", "AMZN"]

    await lists.get_by_role("button", name="Tech", exact=True).click()
    await page.get_by_role("button", name="Delete list").click()
    await expect(page.get_by_role("alert")).to_have_text("Tech deleted.")
    assert await lists.get_by_role("button").all_inner_texts() == ["Watchlist", "Theirs"]
    await page.get_by_role("button", name="Undo").click()
    assert await codes(page) == ["NVDA", "MSFT"]


async def test_search_finds_codes_by_name_and_is_used_by_keyboard(
    visit: Visit, publish: Publish, quotepush_server: QuotepushServer
) -> None:
    page = await visit("#AAPL")
    for code, name in {"600519.SH": "贵州茅台", "600809.SH": "山西汾酒", "<b>.X": "x"}.items():
        await publish(code, last=10, prev_close=9, name=name)
    box = page.get_by_role("combobox", name="Add a code to the list")

    async def is_known() -> bool:
        return bool(await (await page.request.get(f"{quotepush_server.url}/codes?q=茅台")).json())

    await wait_until(is_known, 30, "the server knows the name")
    await box.focus()
    await page.keyboard.insert_text("茅台")  # at once, as an input method does: one question, and one answer
    await expect(box).to_have_attribute("aria-expanded", "true")
    await box.press("ArrowDown")
    active = await box.get_attribute("aria-activedescendant")
    assert active is not None
    await expect(page.locator(f"#{active}")).to_have_attribute("aria-selected", "true")
    await expect(page.locator(f"#{active}")).to_contain_text("贵州茅台")
    await box.press("Enter")
    await expect(line(page, "600519.SH")).to_be_visible()
    await expect(box).to_have_value("")
    await expect(box).to_have_attribute("aria-expanded", "false")

    await box.fill("6005")
    await expect(page.locator("#found li").first).to_contain_text("on the list")
    await box.press("Escape")
    await expect(page.get_by_role("listbox")).to_be_hidden()
    await expect(box).to_have_value("6005")


async def test_movers_are_shown_and_open_their_details(visit: Visit, publish: Publish) -> None:
    page = await visit("#AAPL")
    await publish("UP", last=11, prev_close=10, name="Riser")
    await publish("DOWN", last=9, prev_close=10, name="Faller")
    strip = page.get_by_role("region", name="Biggest movers")
    await expect(strip.get_by_role("button", name="Riser +10.00%")).to_be_visible(timeout=PATIENCE_MS)
    await strip.get_by_role("button", name="Faller −10.00%").click()
    await expect(page.locator("#detail [data-part=title]")).to_have_text("DOWN")
    assert await codes(page) == ["AAPL"]


async def test_page_speaks_chinese_where_the_browser_does_and_remembers_another_choice(
    visit: Visit, publish: Publish
) -> None:
    page = await visit("#600519.SH,no!such", locale="zh-CN")
    await publish("600519.SH", last=1688.2, prev_close=1675.6, volume=12_345_678, status="halted")
    await expect(cell(page, "600519.SH", "volume")).to_have_text("1230万")
    await expect(cell(page, "600519.SH", "tag")).to_have_text("停牌")
    await expect(cell(page, "no!such", "label")).to_have_text("被拒绝：不是有效的代码")
    await expect(page.get_by_role("status")).to_have_text("实时")
    assert await page.evaluate("document.documentElement.lang") == "zh-CN"
    # Every word has its translation: what is left in Latin letters are names and codes.
    texts = await page.evaluate("[...document.querySelectorAll('[data-t]')].map((e) => e.textContent)")
    assert [text for text in texts if not re.search(r"[\u4e00-\u9fff]", text)] == []

    await page.get_by_label("语言").select_option("en")
    await expect(cell(page, "600519.SH", "volume")).to_have_text("12.3M")
    await expect(cell(page, "600519.SH", "tag")).to_have_text("halted")
    await page.reload()
    await expect(page.get_by_role("status")).to_have_text(re.compile("Live|Connected"))
    await expect(page.get_by_role("columnheader", name="Volume")).to_be_visible()


async def test_both_languages_have_words_for_the_same_things(visit: Visit) -> None:
    page = await visit("#AAPL")
    missing = await page.evaluate(
        """async () => {
          const words = await import("./page-words.js");
          const used = [...document.querySelectorAll("[data-t], [data-t-to]")].flatMap(({ dataset: { t, tTo } }) =>
            [t, ...(tTo ?? "").split(" ").map((pair) => pair.split("=")[1])].filter(Boolean));
          return used.filter((key) => !words.has(key));
        }"""
    )
    assert missing == []


async def test_lines_are_sorted_and_put_in_order_by_keyboard(visit: Visit, publish: Publish) -> None:
    page = await visit("#AAPL,MSFT,NVDA")
    for n, code in enumerate(("MSFT", "AAPL", "NVDA")):
        await publish(code, last=100 + n, prev_close=100)
        await expect(cell(page, code, "pct")).to_have_text(f"+{n}.00%" if n else "0.00%")
    header = page.get_by_role("columnheader", name="Change %")
    await header.get_by_role("button").click()
    assert await codes(page) == ["NVDA", "AAPL", "MSFT"]
    await expect(header).to_have_attribute("aria-sort", "descending")
    await header.get_by_role("button").click()
    assert await codes(page) == ["MSFT", "AAPL", "NVDA"]
    await header.get_by_role("button").click()
    assert await codes(page) == ["AAPL", "MSFT", "NVDA"]

    await page.get_by_role("button", name="NVDA", exact=True).press("Alt+ArrowUp")
    assert await codes(page) == ["AAPL", "NVDA", "MSFT"]
    await expect(page).to_have_url(at("#AAPL,NVDA,MSFT"))
    await expect(page.get_by_role("button", name="NVDA", exact=True)).to_be_focused()
    await line(page, "MSFT").drag_to(line(page, "AAPL"))
    await expect(page.locator("tbody .code")).to_have_text(["MSFT", "AAPL", "NVDA"])


async def test_details_are_a_sheet_on_a_phone(visit: Visit, publish: Publish) -> None:
    page = await visit("#600519.SH", viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    await publish("600519.SH", last=1688.2, prev_close=1675.6, name="贵州茅台", **BOOK)
    await expect(cell(page, "600519.SH", "last")).to_have_text("1,688.20")
    await line(page, "600519.SH").locator(".last").tap()
    pane = page.locator("#detail")
    await expect(pane.locator("tr.ask").first).to_contain_text("100.50")
    box = await pane.bounding_box()
    assert box is not None and (box["x"], box["width"]) == (0, 375) and box["y"] + box["height"] == 740
    assert await page.evaluate("document.documentElement.scrollWidth") == 375
    assert await page.locator("#code").evaluate("input => Boolean(input.closest('[inert]'))")
    await pane.get_by_role("button", name="Close").tap()
    await expect(pane).to_be_hidden()
    assert not await page.locator("#code").evaluate("input => Boolean(input.closest('[inert]'))")


DAY = """
async () => {
  const { Day, MOST_POINTS } = await import("./page-day.js");
  const start = 1_800_000_000_000;
  const day = new Day();
  const take = (at, row) => day.take({ prev: 1, prev_close: 10, ts: at, ...row }, at);
  for (let n = 0; n < 20_000; n++) take(start + n * 1000, { last: 10 + n / 1000, volume: n });
  const traded = day.points.reduce((sum, { volume }) => sum + volume, 0);
  const long = { points: day.points.length, most: MOST_POINTS, traded };
  const [first, last] = [day.points[0].at, day.points.at(-1)];
  take(start + 20_000_000, { last: 30, volume: 20_000, phase: "break" });
  const rest = day.points.at(-1).at === last.at;
  const copy = Day.revived(JSON.parse(JSON.stringify(day)));
  take(start + 90_000_000, { last: 12, volume: 10 });
  return { long, span: last.at - first, rest, copied: copy.points.length === long.points, next: day.points.length };
}
"""


async def test_a_day_has_few_points_however_long_it_is_and_loses_no_volume(visit: Visit, publish: Publish) -> None:
    page = await visit("#AAPL")
    seen = await page.evaluate(DAY)
    assert seen["long"]["points"] <= seen["long"]["most"]
    assert seen["long"]["traded"] == 19_999
    assert seen["span"] > 19_000_000
    assert seen["rest"] and seen["copied"]
    assert seen["next"] == 1  # another day

    await publish("AAPL", last=100, prev_close=99)
    await line(page, "AAPL").locator(".open").click()
    note = page.locator("[data-part=note]")
    await expect(note).to_have_text(re.compile(r"since \d\d:\d\d:\d\d"))
    since = await note.inner_text()
    await page.reload()
    await expect(note).to_have_text(since)


async def test_nothing_moves_when_the_page_is_loaded_and_its_strip_and_book_are_filled(
    visit: Visit, publish: Publish
) -> None:
    for code in ("600519.SH", "MSFT"):
        await publish(code, last=101, prev_close=100, name="贵州茅台")
    page = await visit("#600519.SH,MSFT&open=MSFT", viewport={"width": 1440, "height": 900})
    await page.evaluate(
        """() => {
          window.shifts = [];
          new PerformanceObserver((list) => {
            for (const { value, hadRecentInput, sources } of list.getEntries()) {
              if (!hadRecentInput) shifts.push([value, ...sources.map(({ node }) => node?.outerHTML ?? "")]);
            }
          }).observe({ type: "layout-shift", buffered: true });
        }"""
    )
    for n in range(8):
        last = round(10.0**n / 7 + 0.1, 2)
        await publish("MSFT", last=last, prev_close=100, volume=10**n, **BOOK)
        await expect(page.locator("#detail [data-part=last]")).to_have_text(f"{last:,.2f}")
    await expect(page.locator("#movers .up button").first).to_be_enabled()
    await page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert await page.evaluate("shifts") == []
