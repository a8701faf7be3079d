"""The HTTP API by itself: its description is one, its log is quiet, and a bug is an answer, too."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jsonschema
import pytest
from aiohttp import web

from quotepush.backend import Backend
from quotepush.node.admin import make_admin_app
from quotepush.node.api import PREFIX, STATUSES, add_api, openapi
from quotepush.node.api_routes import ROUTES
from tests.support.manual_clock import ManualClock
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in

TOKEN = "sixteen-letters!"


@asynccontextmanager
async def api(backend: Backend, **options: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """The application on a port of its own; yields a session that shows the token."""
    app = make_admin_app(lambda: ([], {}), dict, 1_000)
    add_api(app, backend, TOKEN, "1.2.3", **options)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession(base, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
            yield http
    finally:
        await runner.cleanup()


def test_the_description_says_each_route_once_and_refers_only_to_what_it_has() -> None:
    found = openapi("1.2.3")
    said = {(method, path) for path, some in found["paths"].items() for method in some}
    assert said == {(route.method.lower(), PREFIX + route.path) for route in ROUTES}
    names = [operation["operationId"] for some in found["paths"].values() for operation in some.values()]
    assert len(names) == len(set(names))
    for reference in _references(found):
        assert reference.removeprefix("#/components/schemas/") in found["components"]["schemas"]
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for route in ROUTES:
        assert set(route.refusals) <= STATUSES.keys()


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [one for inner in value.values() for one in _references(inner)]
    return [one for inner in value for one in _references(inner)] if isinstance(value, list) else []


async def test_wrong_tokens_are_logged_once_a_minute(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    caplog.set_level(logging.WARNING)
    async with Backend(redis_server.url) as backend, api(backend, clock=clock.clock.now_s) as http:
        for _ in range(3):
            async with http.get(f"{PREFIX}/stats", headers={"Authorization": "Bearer guess"}) as response:
                assert response.status == 401
        assert len(caplog.records) == 1
        clock.advance(61)
        async with http.get(f"{PREFIX}/stats", headers={"Authorization": "Bearer guess"}) as response:
            assert response.status == 401
    assert [record.getMessage().split(" without")[0] for record in caplog.records] == [
        "HTTP API: 1 calls", "HTTP API: 3 calls",
    ]  # fmt: skip
    assert "guess" not in caplog.text and TOKEN not in caplog.text


async def test_messages_that_say_nothing_are_delivered_as_the_setting_says(redis_server: RedisServer) -> None:
    async with stand_in(redis_server), Backend(redis_server.url) as backend, redis_server.client() as redis:
        for is_kept, wanted in ((False, 0), (True, 1)):
            async with (
                api(backend, is_kept=is_kept) as http,
                http.post(f"{PREFIX}/send", json={"to": {"users": ["eve"]}, "data": 1}) as response,
            ):
                assert (await response.json())["kept"] == wanted
        assert await redis.llen("qp:kept:eve") == 1


async def test_a_bug_is_an_answer_and_a_line_in_the_log(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Backend):
        async def stats(self) -> Any:
            raise ZeroDivisionError("only in the log")

    async with Broken(redis_server.url) as backend, api(backend) as http:
        async with http.get(f"{PREFIX}/stats") as response:
            assert (response.status, (await response.json())["error"]) == (500, "internal")
            assert "only in the log" not in await response.text()
        async with http.post(f"{PREFIX}/send", data=b"x" * 1_001) as response:
            assert (response.status, (await response.json())["error"]) == (413, "too_large")
    assert "only in the log" in caplog.text
