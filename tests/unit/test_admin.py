"""The private listener's answers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from quotepush.node.admin import make_admin_app


class Node:
    """What main would say."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.facts: dict[str, Any] = {"feed": "ok", "workers": 2}
        self.samples: dict[str, Any] = {"ticks_accepted": [(7, {})]}
        self.base = ""

    async def get(self, path: str, method: str = "GET") -> tuple[int, Any, Any]:
        async with aiohttp.ClientSession() as http, http.request(method, self.base + path) as response:
            is_json = response.content_type == "application/json"
            return response.status, response.headers, await (response.json() if is_json else response.text())


@asynccontextmanager
async def node() -> AsyncIterator[Node]:
    found = Node()
    app = make_admin_app(lambda: (found.reasons, found.facts), lambda: found.samples)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


async def test_health_is_that_the_loop_turns() -> None:
    async with node() as n:
        n.reasons.append("the feed link is down")
        status, headers, body = await n.get("/healthz")
        assert (status, body) == (200, {"status": "alive"})
        assert headers["Cache-Control"] == "no-store"


async def test_a_node_without_reasons_against_it_is_ready() -> None:
    async with node() as n:
        status, headers, body = await n.get("/readyz")
        assert status == 200
        assert body == {"ready": True, "reasons": [], "feed": "ok", "workers": 2}
        assert headers["Cache-Control"] == "no-store"


async def test_a_node_that_is_not_ready_says_why() -> None:
    async with node() as n:
        n.reasons = ["1 of 2 workers are ready", "the feed link is down"]
        status, _, body = await n.get("/readyz")
        assert status == 503
        assert (body["ready"], body["reasons"]) == (False, n.reasons)


async def test_metrics_are_in_the_format_of_prometheus() -> None:
    async with node() as n:
        status, headers, text = await n.get("/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert "quotepush_ticks_accepted_total 7.0" in text
        n.samples = {"ticks_accepted": [(8, {})]}
        assert "quotepush_ticks_accepted_total 8.0" in (await n.get("/metrics"))[2]


async def test_there_is_nothing_else_and_nothing_can_be_changed() -> None:
    async with node() as n:
        assert (await n.get("/"))[0] == 404
        assert (await n.get("/ws"))[0] == 404
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await n.get(path, "POST"))[0] == 405
