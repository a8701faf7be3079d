"""The browser client in a real Chromium, against the real server: restarts, stalls, out of sight, blocked WebSockets,
tokens."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from quotepush import Publisher
from tests.support.blocked_network import BlockedNetwork
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until

# One browser for all; each test has a context of its own in it.
pytestmark = pytest.mark.asyncio(loop_scope="module")

StartServer = Callable[..., Awaitable[QuotepushServer]]

QUICK = {"heartbeat_ms": 200, "ring_code_bytes": 1_000_000}

CONNECT = """
async (options) => {
  const { connect } = await import("/quotepush.js");
  if (window.freshToken) options.token = () => freshToken();
  const seen = (window.seen = { seqs: [], merged: 0, gaps: [], states: [], acks: 0 });
  const quotes = (window.quotes = connect(new URL("/ws", location), options));
  quotes.on("merged", ({ count }) => (seen.merged += count));
  quotes.on("gap", (gap) => seen.gaps.push(gap));
  quotes.on("state", (state) => seen.states.push(state));
  quotes.on("ack", () => seen.acks++);
  quotes.subscribe("AAPL", (row) => seen.seqs.push(row.seq));
}
"""

# Nobody can turn away from a headless browser, so the page is told that somebody did.
LOOK = """
(state) => {
  Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}
"""


# Nothing of the page has run for longer than the watchdog waits: ten quarters of a heartbeat, half a second.
NOTE_STALLS = """
() => {
  seen.stalls = 0;
  let last = Date.now();
  setInterval(() => {
    if (Date.now() - last > 2500) seen.stalls++;
    last = Date.now();
  }, 50);
}
"""


class Watcher:
    """A page with a client that watches AAPL."""

    def __init__(self, page: Page) -> None:
        self.page = page

    async def seen(self, name: str) -> Any:
        return await self.page.evaluate("(name) => seen[name]", name)

    async def has_more(self, rows: int) -> None:
        """Wait for so many more rows."""
        before = len(await self.seen("seqs"))

        async def are_there() -> bool:
            return len(await self.seen("seqs")) >= before + rows

        await wait_until(are_there, 30, f"{rows} more rows")

    async def has(self, name: str, wanted: Callable[[Any], bool]) -> None:
        async def is_so() -> bool:
            return wanted(await self.seen(name))

        await wait_until(is_so, 30, name)


@pytest_asyncio.fixture(loop_scope="module")
async def newest(redis_server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """AAPL ticks all the time; what this returns ends that and says its last ``seq``."""
    publisher = Publisher(redis_server.url)
    last = await publisher.publish([{"code": "AAPL", "last": 1.0}])
    is_over = asyncio.Event()

    async def run() -> None:
        nonlocal last
        while not is_over.is_set():
            last = await publisher.publish([{"code": "AAPL", "last": time.time()}])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), 0.01)

    task = asyncio.create_task(run())

    async def end() -> int:
        is_over.set()
        await task
        return int(last[0])

    yield end
    await end()
    await publisher.aclose()


async def watch(
    browser: Browser, url: str, fresh_token: Callable[[], str] | None = None, awaited: str = "seqs", **options: Any
) -> Watcher:
    """Open a page whose client watches AAPL; return when something of what is ``awaited`` is there."""
    page = await browser.new_page()
    if fresh_token is not None:
        await page.expose_function("freshToken", fresh_token)
    await page.goto(f"{url}/quotepush.js")
    await page.evaluate(CONNECT, options)
    watcher = Watcher(page)
    await watcher.has(awaited, bool)
    return watcher


def is_whole(seqs: list[int]) -> bool:
    return seqs == list(range(seqs[0], seqs[-1] + 1))


async def check_rows(watcher: Watcher, is_late: bool | int) -> None:
    """Every row has come once, but for those that a main that was late has merged; of these it was told."""
    seqs, merged = await watcher.seen("seqs"), await watcher.seen("merged")
    assert seqs == sorted(set(seqs))
    assert merged == seqs[-1] - seqs[0] + 1 - len(seqs)
    assert is_late or not merged
    assert await watcher.seen("gaps") == []


async def test_no_row_is_missing_or_comes_twice_over_restarts_of_the_server(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    server = await start_server(workers=1, **QUICK)
    watcher = await watch(browser, server.url)
    is_late = False
    for end in (server.stop, server.kill):
        await watcher.has_more(20)
        is_late |= bool(await server.merged_by_main())
        await end()
        await server.start()
        await watcher.has_more(20)
    last = await newest()
    await watcher.has("seqs", lambda seqs: seqs[-1] == last)
    await check_rows(watcher, is_late or await server.merged_by_main())


async def test_tab_out_of_sight_is_sent_a_row_a_second_and_every_row_when_it_is_seen_again(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    # Who looks again asks whether the connection is still there, and gives the answer half a heartbeat.
    server = await start_server(workers=1, **{**QUICK, "heartbeat_ms": 4000})
    watcher = await watch(browser, server.url)
    await watcher.has_more(20)
    await watcher.page.evaluate(LOOK, "hidden")
    await watcher.has("acks", lambda acks: acks == 2)
    await watcher.has("merged", lambda merged: merged > 60)
    await watcher.page.evaluate(LOOK, "visible")
    await watcher.has("acks", lambda acks: acks == 3)
    await watcher.has_more(2)
    merged = await watcher.seen("merged")
    await watcher.has_more(50)
    last = await newest()
    await watcher.has("seqs", lambda seqs: seqs[-1] == last)
    await check_rows(watcher, True)
    seqs = await watcher.seen("seqs")
    assert (merged == await watcher.seen("merged") and is_whole(seqs[-50:])) or await server.merged_by_main()


async def test_stream_takes_the_place_of_a_blocked_websocket_and_leaves_it_when_it_is_free(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with BlockedNetwork(server.url) as network:
        watcher = await watch(browser, network.url)
        assert (await watcher.seen("states"))[-1] == {"state": "open", "stream": True}
        await watcher.has_more(20)
        await network.cut()
        await wait_until(lambda: len(network.streams) > 1, 30)
        assert {"Last-Event-ID", "last_event_id"} & set(network.streams[-1])
        await watcher.has_more(20)

        network.is_blocked = False
        await watcher.page.evaluate("() => dispatchEvent(new Event('online'))")
        await watcher.has("states", lambda states: states[-1] == {"state": "open"})
        await watcher.has_more(20)
        last = await newest()
        await watcher.has("seqs", lambda seqs: seqs[-1] == last)
        await check_rows(watcher, await server.merged_by_main())
        await watcher.page.close()


async def test_a_tab_that_was_stalled_for_longer_than_the_watchdog_misses_no_row(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    server = await start_server(workers=1, **QUICK)
    watcher = await watch(browser, server.url)
    await watcher.has_more(20)
    # Nothing of the page runs meanwhile; its watchdog bites after ten quarters of a heartbeat, half a second.
    await watcher.page.evaluate("() => { for (const until = Date.now() + 3000; Date.now() < until; ); }")
    await watcher.has_more(100)
    last = await newest()
    await watcher.has("seqs", lambda seqs: seqs[-1] == last)
    await check_rows(watcher, await server.merged_by_main())


async def test_a_tab_whose_scripts_stand_still_misses_no_row_not_even_over_a_restart(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    server = await start_server(workers=1, **QUICK)
    watcher = await watch(browser, server.url)
    await watcher.page.evaluate(NOTE_STALLS)
    is_late = False
    devtools = await watcher.page.context.new_cdp_session(watcher.page)
    await devtools.send("Debugger.enable")
    for is_restarted in (False, True):
        await watcher.has_more(20)
        paused = asyncio.Event()
        devtools.once("Debugger.paused", lambda _, paused=paused: paused.set())
        await devtools.send("Debugger.pause")
        await asyncio.wait_for(paused.wait(), 30)
        stalled_at = time.time()
        if is_restarted:
            is_late = bool(await server.merged_by_main())
            await server.kill()
            await server.start()
        await wait_until(lambda since=stalled_at: time.time() > since + 3, 30, "six times what the watchdog waits")
        await devtools.send("Debugger.resume")
        await watcher.has("stalls", lambda stalls, count=1 + is_restarted: stalls >= count)
    await watcher.has_more(20)
    last = await newest()
    await watcher.has("seqs", lambda seqs: seqs[-1] == last)
    await check_rows(watcher, is_late or await server.merged_by_main())
    assert "waiting" in [state["state"] for state in await watcher.seen("states")]


async def test_a_token_is_renewed_before_it_expires_and_the_connection_and_its_rows_go_on(
    browser: Browser, start_server: StartServer, newest: Callable[[], Awaitable[int]]
) -> None:
    # A page takes a server for dead after 2.5 heartbeats, and a busy one is not.
    server = await start_server(workers=1, token_key=KEY, token_leeway_s=0, **{**QUICK, "heartbeat_ms": 1000})
    made: list[str] = []

    def fresh_token() -> str:
        made.append(token(sub="ann", exp=int(time.time()) + 9))
        return made[-1]

    watcher = await watch(browser, server.url, fresh_token)
    began = time.time()
    await wait_until(lambda: time.time() > began + 10, 30, "the first token has expired")
    await watcher.has_more(20)
    last = await newest()
    await watcher.has("seqs", lambda seqs: seqs[-1] == last)
    await check_rows(watcher, await server.merged_by_main())
    assert [state["state"] for state in await watcher.seen("states")] == ["open"]
    assert len(made) > 1


async def test_a_stream_whose_token_is_refused_says_so_and_does_not_come_back(
    browser: Browser, start_server: StartServer
) -> None:
    server = await start_server(workers=1, token_key=KEY, **QUICK)
    async with BlockedNetwork(server.url) as network:
        watcher = await watch(browser, network.url, awaited="states", token="not a token")
        await watcher.has("states", lambda states: states[-1]["state"] == "closed")
        assert (await watcher.seen("states"))[-1]["reason"] == "auth_failed"
        await watcher.page.close()
