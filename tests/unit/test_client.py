"""The Python client against real servers, and against small ones that misbehave on purpose."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import web

from quotepush.client import (
    ClientClosed,
    ClientError,
    NotAnswered,
    QuoteClient,
    Refused,
    Rejected,
    Row,
    StateChange,
    WrongUrl,
)
from quotepush.client_link import _retry_after_s
from quotepush.errors import PeerError
from tests.support.raw_websocket import CLOSE, TEXT, client_frame
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until

_QUICK = {"min_backoff_s": 0.01, "max_backoff_s": 0.05}
_HELLO = {"type": "hello", "version": "quotes.v1", "epoch": "e", "heartbeat_ms": 60_000, "time": 0, "limits": {}}

Answer = Callable[[web.WebSocketResponse, dict[str, Any]], Awaitable[None]]


@asynccontextmanager
async def peer(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server of the test's own; its URL."""
    app = web.Application()
    app.router.add_get("/ws", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        assert site._server is not None
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def greeting(hello: dict[str, Any], answer: Answer | None = None) -> Callable[[web.Request], Awaitable[Any]]:
    """A handler that says hello, and answers each request if it knows how."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("quotes.v1.json",))
        await socket.prepare(request)
        await socket.send_json(hello)
        async for message in socket:
            if answer is not None:
                await answer(socket, orjson.loads(message.data))
        return socket

    return handle


async def publish(server: RedisServer, code: str, *lasts: float) -> None:
    async with server.client() as redis:
        for last in lasts:
            await redis.publish(f"quote.{code}", orjson.dumps({"last": last}))


async def next_row(quotes: QuoteClient) -> Row:
    async with asyncio.timeout(10):
        return await anext(quotes)


def states(quotes: QuoteClient) -> list[StateChange]:
    seen: list[StateChange] = []
    quotes.on("state", seen.append)
    return seen


async def test_rows_arrive_the_newest_one_first_and_then_every_tick(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    async with QuoteClient(quotepush_server.url) as quotes:
        result = await quotes.subscribe(["sh600519", "AAPL", "no such"])
        assert result.codes == ("600519.SH", "AAPL")
        assert [(r.spelling, r.error) for r in result.rejected] == [("no such", "bad_code")]
        rows = []
        for last in (1, 2, 3):  # one after the other: a server that is late merges them
            await publish(redis_server, "sh600519", last)
            rows.append(await next_row(quotes))
        assert [(row["prev"], row["code"], row["seq"], row["last"]) for row in rows] == [
            (0, "600519.SH", 1, 1),
            (1, "600519.SH", 2, 2),
            (2, "600519.SH", 3, 3),
        ]
        assert quotes.rows == {"600519.SH": rows[-1]}
        assert (quotes.state, quotes.merged.total(), quotes.merged_locally) == ("open", 0, 0)

        async with QuoteClient(quotepush_server.ws_url) as second:
            await second.subscribe("600519")
            row = await next_row(second)
            assert (row["seq"], row["last"], "prev" in row) == (3, 3, False)


async def test_unsubscribed_codes_are_silent_and_can_come_back(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    async with QuoteClient(quotepush_server.url) as quotes:
        await quotes.subscribe(["A", "B"])
        await publish(redis_server, "A", 1)
        await wait_until(lambda: "A" in quotes.rows)
        assert await quotes.unsubscribe("a") == ("A",)
        assert [entry["code"] for entry in await quotes.list()] == ["B"]
        await publish(redis_server, "A", 2)
        await publish(redis_server, "B", 3)
        assert (await next_row(quotes))["code"] == "B"
        await quotes.subscribe("A")
        row = await next_row(quotes)
        assert (row["code"], row["last"]) == ("A", 2)


async def test_questions_are_answered(quotepush_server: QuotepushServer, redis_server: RedisServer):
    async with QuoteClient(quotepush_server.url) as quotes:
        await quotes.subscribe("A")
        await publish(redis_server, "A", 1)
        await next_row(quotes)
        shot = await quotes.snapshot(["A", "B", "no such", "x" * 200])
        assert list(shot.rows) == ["A"]
        assert (shot.rows["A"]["seq"], shot.rows["A"]["last"]) == (1, 1)
        assert [entry.code for entry in shot.accepted] == ["A", "B"]
        assert {entry.spelling for entry in shot.rejected} == {"no such", "x" * 200}
        assert await quotes.ping() >= 0
        assert quotes.hello is not None and quotes.hello["version"] == "quotes.v1"


async def test_more_requests_than_the_rate_allows_all_succeed(start_server: Callable[..., Awaitable[QuotepushServer]]):
    server = await start_server(workers=1, requests_per_s=20)
    async with QuoteClient(server.url) as quotes:
        results = await asyncio.gather(*(quotes.subscribe(f"C{n}") for n in range(30)))
        assert [result.codes for result in results] == [(f"C{n}",) for n in range(30)]
        assert len(await quotes.list()) == 30


async def test_heartbeats_tell_of_the_feed(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis_server: RedisServer
):
    server = await start_server(workers=1, heartbeat_ms=100)
    beats: list[Any] = []
    async with QuoteClient(server.url) as quotes:
        quotes.on("heartbeat", beats.append)
        await publish(redis_server, "A", 1)
        await wait_until(lambda: quotes.feed_age_ms is not None)
        assert quotes.feed == "ok"
        assert beats
    assert quotes.feed is None


@pytest.mark.fault
async def test_rows_go_on_without_repeats_over_killed_workers_and_a_restarted_server(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis_server: RedisServer
):
    server = await start_server(workers=1)
    async with QuoteClient(server.url, **_QUICK) as quotes:
        seen = states(quotes)
        await quotes.subscribe(["A", "B"])
        for last in (1, 2):  # one after the other: a server that is late merges them
            await publish(redis_server, "A", last)
            assert (await next_row(quotes))["last"] == last

        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: any(change.state == "waiting" for change in seen))
        await wait_until(lambda: quotes.state == "open", 20)
        await wait_until(quotes.list)
        await publish(redis_server, "A", 3)
        row = await next_row(quotes)
        assert (row["last"], row["seq"]) == (3, 3)  # same epoch: rows 1 and 2 are not told again

        epoch = (quotes.hello or {})["epoch"]
        await server.kill()
        await server.start()
        await wait_until(lambda: quotes.state == "open" and (quotes.hello or {})["epoch"] != epoch, 20)

        async def is_subscribed() -> bool:
            return {entry["code"] for entry in await quotes.list()} == {"A", "B"}

        await wait_until(is_subscribed)
        await publish(redis_server, "B", 4)
        # The new epoch may begin with a snapshot of A, as it was when its row was last kept in Redis.
        while (row := await next_row(quotes))["code"] != "B":
            assert (row["code"], row["last"] in (1, 2, 3)) == ("A", True)
        assert row["last"] == 4


async def test_a_queue_nobody_empties_keeps_the_newest_row_of_each_code(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    async with QuoteClient(quotepush_server.url, max_queued_rows=10) as quotes:
        await quotes.subscribe(["A", "B"])
        await publish(redis_server, "B", 0.5)
        await publish(redis_server, "A", *range(1, 101))
        await wait_until(lambda: quotes.rows.get("A", {}).get("last") == 100)
        rows = await quotes.next_rows()
        assert len(rows) <= 10
        assert quotes.merged_locally + quotes.merged.total() + len(rows) == 101
        last = {row["code"]: row["last"] for row in rows}
        assert last == {"A": 100, "B": 0.5}


async def test_a_server_that_says_nothing_is_left_and_tried_again():
    connections = 0
    greet = greeting({**_HELLO, "heartbeat_ms": 20})

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal connections
        connections += 1
        return await greet(request)

    async with peer(handle) as url, QuoteClient(url, **_QUICK) as quotes:
        seen = states(quotes)
        await wait_until(lambda: connections >= 3)
        assert any(change.reason == "no message within 0.05 s" for change in seen)


async def test_a_server_without_a_hello_is_left_and_tried_again():
    async def handle(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("good morning")
        await socket.receive()
        return socket

    async with peer(handle) as url, QuoteClient(url, **_QUICK) as quotes:
        seen = states(quotes)
        await wait_until(lambda: [change.state for change in seen].count("waiting") >= 2)
        assert "does not speak quotes.v1.json" in seen[-1].reason or seen[-1].state == "connecting"


@pytest.mark.parametrize("status", [400, 401, 403])
async def test_a_handshake_refused_for_good_ends_the_client(status: int):
    attempts = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal attempts
        attempts += 1
        return web.Response(status=status)

    async with peer(handle) as url, QuoteClient(url, **_QUICK) as quotes:
        with pytest.raises(Refused) as refusal:
            await quotes.subscribe("A")
        assert refusal.value.status == status
        for use in (quotes.subscribe("A"), quotes.unsubscribe("A"), quotes.ping(), anext(quotes)):
            with pytest.raises(Refused):
                await use
        assert (quotes.state, attempts) == ("closed", 1)


@pytest.mark.parametrize("code", [4401, 4403, 4409])
async def test_a_connection_closed_for_good_ends_the_client_after_its_last_row(code: int):
    async def answer(socket: web.WebSocketResponse, request: dict[str, Any]) -> None:
        accepted = [{"code": "A", "as": "A"}]
        await socket.send_json({"type": "ack", "id": request["id"], "action": "subscribe", "accepted": accepted})
        await socket.send_json({"type": "snapshot", "data": [{"code": "A", "seq": 7}]})
        await socket.close(code=code, message=b"word")

    async with peer(greeting(_HELLO, answer)) as url, QuoteClient(url, **_QUICK) as quotes:
        await quotes.subscribe("A")
        await wait_until(lambda: quotes.state == "closed")
        assert (await next_row(quotes))["seq"] == 7
        with pytest.raises(Refused) as refusal:
            await next_row(quotes)
        assert (refusal.value.close_code, refusal.value.reason) == (code, "word")


async def test_another_kind_of_server_is_a_wrong_address():
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text="hello")

    async with peer(handle) as url, QuoteClient(url) as quotes:
        with pytest.raises(Refused, match="no quotepush server there"):
            await quotes.subscribe("A")
    async with peer(handle) as url, QuoteClient(url + "/elsewhere") as quotes:
        with pytest.raises(Refused, match="404"):
            await quotes.subscribe("A")


async def test_the_server_says_how_long_to_stay_away():
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "40"})

    async def close(socket: web.WebSocketResponse, request: dict[str, Any]) -> None:
        await socket.send_json({"type": "status", "scope": "connection", "state": "closing", "retry_after_ms": 50_000})
        await socket.close(code=1012)

    for handler, at_least_s in ((refuse, 40), (greeting(_HELLO, close), 50)):
        async with peer(handler) as url, QuoteClient(url, **_QUICK) as quotes:
            seen = states(quotes)
            waiting = asyncio.create_task(quotes.subscribe("A"))
            change = await wait_until(lambda seen=seen: next((c for c in seen if c.state == "waiting"), None))
            assert at_least_s <= change.retry_in_s <= at_least_s + 1
        with pytest.raises(ClientClosed):
            await waiting


@pytest.mark.parametrize(("text", "seconds"), [("", 0), ("7", 7), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_retry_after_is_a_number_or_a_date(text: str, seconds: float):
    assert _retry_after_s(text) == seconds


async def test_an_unreachable_server_is_tried_for_ever_and_waiting_can_be_cancelled():
    async with QuoteClient("http://127.0.0.1:1", request_timeout_s=0.05, **_QUICK) as quotes:
        seen = states(quotes)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await quotes.subscribe("A")
        with pytest.raises(NotAnswered):
            await quotes.ping()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(quotes)
        await wait_until(lambda: [change.state for change in seen].count("connecting") >= 4)
        assert seen[-1].reason == "Connection refused"


async def test_closing_in_the_very_turn_in_which_the_connection_is_lost_ends_the_client():
    async def hang_up(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("quotes.v1.json",))
        await socket.prepare(request)
        assert request.transport is not None
        hello = client_frame(TEXT, orjson.dumps(_HELLO), is_masked=False)
        request.transport.write(hello + client_frame(CLOSE, b"\x03\xe9", is_masked=False))
        await socket.receive()
        return socket

    closing: list[asyncio.Task[None]] = []
    async with peer(hang_up) as url:
        quotes = QuoteClient(url, min_backoff_s=30.0, max_backoff_s=60.0)
        changes = states(quotes)

        def close_once_open(change: StateChange) -> None:
            if change.state == "open":
                closing.append(asyncio.create_task(quotes.close()))

        quotes.on("state", close_once_open)
        await quotes.__aenter__()
        await wait_until(lambda: closing)
        async with asyncio.timeout(10):
            await closing[0]
    assert [change.state for change in changes] == ["connecting", "open", "closed"]


async def test_closing_ends_every_wait_and_leaves_no_task():
    before = asyncio.all_tasks()
    async with peer(greeting(_HELLO)) as url:
        quotes = QuoteClient(url)
        async with quotes:
            await wait_until(lambda: quotes.state == "open")
            waiting = [asyncio.create_task(use) for use in (quotes.subscribe("A"), quotes.list(), quotes.ping())]
            iterating = asyncio.create_task(anext(quotes, "end"))
            await asyncio.sleep(0)
            await quotes.close()
            await quotes.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ClientClosed] * 3
        assert await iterating == "end"
        with pytest.raises(ClientClosed):
            await quotes.subscribe("A")
    assert asyncio.all_tasks() == before


async def test_a_question_the_server_refuses_carries_its_word():
    async def answer(socket: web.WebSocketResponse, request: dict[str, Any]) -> None:
        await socket.send_json({"type": "error", "id": request["id"], "error": "bad_request", "message": "no"})

    async with peer(greeting(_HELLO, answer)) as url, QuoteClient(url) as quotes:
        errors: list[Any] = []
        quotes.on("error", errors.append)
        with pytest.raises(PeerError) as refused:
            await quotes.list()
        assert (refused.value.error, refused.value.message) == ("bad_request", "no")
        assert (await quotes.subscribe("A")).rejected == (Rejected("A", "bad_request", "no"),)
        assert len(errors) == 2


async def test_callbacks_get_rows_and_a_failing_one_keeps_nothing_from_the_others(
    quotepush_server: QuotepushServer, redis_server: RedisServer
):
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    rows: list[Row] = []
    async with QuoteClient(quotepush_server.url) as quotes:
        quotes.on("row", lambda row: row["no such field"])
        stop = quotes.on("row", rows.append)
        await quotes.subscribe("A")
        await publish(redis_server, "A", 1)
        await wait_until(lambda: rows)
        stop()
        await publish(redis_server, "A", 2)
        await wait_until(lambda: quotes.rows["A"]["last"] == 2)
        assert [row["last"] for row in rows] == [1]
        assert [type(fault["exception"]) for fault in faults] == [KeyError, KeyError]

    async def later(row: Row) -> None: ...

    with pytest.raises(TypeError):
        quotes.on("row", later)
    with pytest.raises(ValueError, match="none of"):
        quotes.on("rows", print)


@pytest.mark.parametrize(
    "url", ["", "example.com", "ftp://example.com", "http://", "http://a b", "http://h:99999", "http://h:0", "http://["]
)
def test_a_url_that_cannot_be_a_servers_is_told_at_once(url: str):
    with pytest.raises(WrongUrl) as wrong:
        QuoteClient(url)
    assert isinstance(wrong.value, ClientError)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:1", "ws://h:1/ws"),
        ("https://h/", "wss://h/ws"),
        ("ws://h/q/ws", "ws://h/q/ws"),
        ("wss://me:secret@h/ws?token=x", "wss://h/ws"),
    ],
)
def test_the_address_is_completed_and_shown_without_secrets(url: str, shown: str):
    assert QuoteClient(url).url == shown


def test_importing_the_package_does_not_import_the_client():
    program = "import sys, quotepush; assert 'aiohttp' not in sys.modules; from quotepush import QuoteClient as Q; Q.on"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize("token", ["", " ", "secret word", "secret-word\n", "secret-wörd", "secret-word\0"])
def test_a_token_that_cannot_be_one_is_told_at_once_and_not_repeated(token: str) -> None:
    with pytest.raises(ValueError) as wrong:
        QuoteClient("http://127.0.0.1:1", token=token)
    assert "secret" not in str(wrong.value)


@pytest.mark.parametrize("auth", ["required", "optional"])
async def test_a_token_that_was_lost_on_the_way_is_sent_before_anything_else(auth: str) -> None:
    said: list[dict[str, Any]] = []

    async def answer(socket: web.WebSocketResponse, request: dict[str, Any]) -> None:
        said.append(request)
        accepted = [{"code": "A", "as": "A"}]
        await socket.send_json({"type": "ack", "id": request["id"], "action": request["action"], "accepted": accepted})

    async with peer(greeting({**_HELLO, "auth": auth}, answer)) as url, QuoteClient(url, token="a.b.c") as quotes:
        assert (await quotes.subscribe("A")).codes == ("A",)
    assert [(request["action"], request.get("token")) for request in said] == [("auth", "a.b.c"), ("subscribe", None)]


async def test_without_a_token_a_server_that_wants_one_ends_the_client_at_once() -> None:
    async with peer(greeting({**_HELLO, "auth": "required"})) as url, QuoteClient(url, **_QUICK) as quotes:
        with pytest.raises(Refused, match="it wants a token"):
            await quotes.subscribe("A")
        assert quotes.state == "closed"


@pytest.mark.parametrize("code", [4403, 4409])
async def test_another_token_is_no_remedy_for_being_kicked_or_replaced(code: int) -> None:
    asked: list[str] = []

    def newest() -> str:
        asked.append("a.b.c")
        return asked[-1]

    async def close(socket: web.WebSocketResponse, request: dict[str, Any]) -> None:
        await socket.close(code=code)

    async with peer(greeting(_HELLO, close)) as url, QuoteClient(url, token=newest, **_QUICK) as quotes:
        with pytest.raises(Refused) as refused:
            await quotes.subscribe("A")
        assert (refused.value.close_code, refused.value.is_about_token, len(asked)) == (code, False, 1)
