"""The pages and components of docs/clients.md, as they stand there, in a real Chromium against a real server."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Browser, ConsoleMessage, Error, Page

from quotepush import Backend
from tests.support.examples import ROOT, blocks_of
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.store import running
from tests.support.waiting import wait_until

# One server and one browser for all.
pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = ROOT / "docs" / "clients.md"
HERE = Path(__file__).parent

# What a project has besides: boards that the test puts up and takes away.
MAIN = {
    "React": (
        "main.jsx",
        """
        import { StrictMode, useState } from "react";
        import { createRoot } from "react-dom/client";
        import { Board } from "./Board.jsx";

        function Boards() {
          const [boards, setBoards] = useState({});
          window.show = setBoards;
          const sections = Object.entries(boards);
          return sections.map(([name, codes]) => <section id={name} key={name}><Board codes={codes} /></section>);
        }
        createRoot(document.body).render(<StrictMode><Boards /></StrictMode>);
        """,
    ),
    "Vue": (
        "main.js",
        """
        import { createApp, h, shallowRef } from "vue";
        import Board from "./Board.vue";

        const boards = shallowRef({});
        window.show = (shown) => (boards.value = shown);
        const section = ([name, codes]) => h("section", { id: name, key: name }, h(Board, { codes }));
        createApp(() => Object.entries(boards.value).map(section)).mount(document.body);
        """,
    ),
}


class Site:
    """Where somebody's page comes from: another host than the quotepush server's.

    Attributes:
        files: what it has.
        faults: what its page complains of.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.origin = ""
        self.faults: list[str] = []

    def hear(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.faults.append(said.text)

    def catch(self, error: Error) -> None:
        self.faults.append(str(error))

    async def answer(self, request: web.Request) -> web.Response:
        name = request.path.lstrip("/")
        if name not in self.files:
            return web.Response(status=404)
        kind = "text/javascript" if name.endswith("js") else "text/html"
        return web.Response(text=self.files[name], content_type=kind)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.origin = f"http://localhost:{runner.addresses[0][1]}"
    yield site
    await runner.cleanup()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(
    redis_server: RedisServer, site: Site, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[QuotepushServer]:
    server = QuotepushServer(
        tmp_path_factory.mktemp("server"), redis_server.url, workers=1, allowed_origins=site.origin, probe_timeout_s=30
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def file_of(name: str, heading: str, server: QuotepushServer) -> str:
    (block,) = [block for block in blocks_of(CLIENTS) if block.tags == (name,) and block.heading == heading]
    return block.text.replace("127.0.0.1:8008", f"127.0.0.1:{server.port}")


async def open_page(browser: Browser, site: Site, files: dict[str, str]) -> Page:
    """Open the first of ``files`` in a page of the site, which has them all and nothing else."""
    site.files = files
    site.faults.clear()
    page = await browser.new_page()
    page.on("console", site.hear)
    page.on("pageerror", site.catch)
    await page.goto(f"{site.origin}/{next(iter(files))}")
    return page


async def publish(redis_server: RedisServer, code: str, last: float) -> None:
    async with redis_server.client() as redis:
        assert await redis.publish(f"quote.{code}", json.dumps({"last": last, "prev_close": 100})) == 1


async def has(page: Page, selector: str, wanted: str) -> None:
    async def is_there() -> bool:
        return " ".join((await page.inner_text(selector)).split()) == wanted

    await wait_until(is_there, 30, f"{selector} shows {wanted}")


async def is_watched(redis_server: RedisServer, *codes: str) -> None:
    """Wait until the server has subscriptions to these codes and no others."""

    async def is_so() -> set[str] | bool:
        async with redis_server.client() as redis:
            found: set[str] = await redis.smembers("qp:codes")
        return found == set(codes)

    await wait_until(is_so, 30, f"{codes} are watched and nothing else")


async def test_page_shows_prices_and_the_state_of_its_connection(
    browser: Browser, site: Site, server: QuotepushServer, redis_server: RedisServer
) -> None:
    await publish(redis_server, "AAPL", 101)
    script = (ROOT / "quotepush" / "static" / "quotepush.js").read_text(encoding="utf-8")
    html = file_of("quotes.html", "A page", server)
    page = await open_page(browser, site, {"quotes.html": html, "quotepush.js": script})
    await has(page, "#state", "open")
    await has(page, "#quotes", "600519.SH – – % AAPL 101 1 %")
    await publish(redis_server, "sh600519", 102)
    await has(page, "#quotes", "600519.SH 102 2 % AAPL 101 1 %")
    await page.close()
    await is_watched(redis_server)


async def bundle(project: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        "node", str(HERE / "bundle.mjs"), str(project), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return (project / "bundle.js").read_text(encoding="utf-8")


def needed(*packages: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("no node on PATH")
    if not all((HERE / "node_modules" / name / "package.json").exists() for name in packages):
        pytest.skip("packages of npm are missing: npm ci --prefix tests/browser")


async def open_boards(browser: Browser, site: Site, server: QuotepushServer, project: Path, framework: str) -> Page:
    needed("esbuild", "vue", "react-dom")
    for block in blocks_of(CLIENTS):
        if block.heading in ("One connection for many components", framework) and block.tags:
            (name,) = block.tags
            (project / name).write_text(file_of(name, block.heading, server), encoding="utf-8")
    name, text = MAIN[framework]
    (project / name).write_text(text, encoding="utf-8")
    html = '<!doctype html><body></body><script type="module" src="bundle.js"></script>'
    return await open_page(browser, site, {"index.html": html, "bundle.js": await bundle(project)})


@pytest.mark.parametrize("framework", MAIN)
async def test_components_share_a_connection_and_count_who_watches_a_code(
    framework: str,
    browser: Browser,
    site: Site,
    server: QuotepushServer,
    redis_server: RedisServer,
    tmp_path: Path,
) -> None:
    async def show(**boards: Sequence[str]) -> None:
        await page.evaluate("(boards) => window.show(boards)", boards)

    page = await open_boards(browser, site, server, tmp_path, framework)
    await page.wait_for_function("() => 'show' in window")
    for code in ("sh600519", "AAPL", "MSFT"):
        await publish(redis_server, code, 101)

    await show(one=["sh600519", "AAPL"], two=["AAPL"])
    await has(page, "#one", "sh600519 101 1 AAPL 101 1")
    await has(page, "#two", "AAPL 101 1")
    await is_watched(redis_server, "600519.SH", "AAPL")
    await publish(redis_server, "sh600519", 102)
    await has(page, "#one", "sh600519 102 2 AAPL 101 1")

    # One of two goes: the other keeps its code, and what only the first watched is given up.
    await show(two=["AAPL"])
    await is_watched(redis_server, "AAPL")
    await publish(redis_server, "AAPL", 103)
    await has(page, "#two", "AAPL 103 3")

    # Other codes in the same place.
    await show(two=["AAPL", "MSFT"])
    await has(page, "#two", "AAPL 103 3 MSFT 101 1")
    await publish(redis_server, "MSFT", 104)
    await has(page, "#two", "AAPL 103 3 MSFT 104 4")
    await show(two=["MSFT"])
    await has(page, "#two", "MSFT 104 4")
    await is_watched(redis_server, "MSFT")
    async with Backend(redis_server.url, timeout_s=20) as backend:
        assert len(await backend.sessions()) == 1  # the worker itself says so

    await show()
    await is_watched(redis_server)
    assert site.faults == []
    await page.close()
