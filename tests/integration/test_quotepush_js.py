"""The browser client against a real server, in Node: options, tokens, resuming, streams, a mini-program.

What needs no server is in tests/browser/quotepush.test.mjs, what needs a browser in tests/browser.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.support.blocked_network import BlockedNetwork
from tests.support.numbered_feed import NumberedFeed
from tests.support.processes import worker_pid
from tests.support.redis_server import RedisServer
from tests.support.script_client import NODE_FLAGS, ScriptClient, node
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(node() is None, reason="needs a Node with WebSocket and EventSource, 20.18 or later")

StartServer = Callable[..., Awaitable[QuotepushServer]]

# Neither is taken for dead that stands still for a moment: a server without a message for 2.5 heartbeats, and Redis,
# which would cost plain ticks.
QUICK = {"heartbeat_ms": 1000, "probe_timeout_s": 30, "ring_code_bytes": 1_000_000}


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


def is_whole(seqs: list[int], newest: int) -> bool:
    """Whether these are all numbers from the first on, each once."""
    return bool(seqs) and seqs == list(range(seqs[0], newest + 1))


def check_rows(client: ScriptClient, code: str, newest: int, is_late: bool | int) -> None:
    """Every row of a code has come once, from the first one on, but for those that a main that was late has merged."""
    seqs = client.seqs(code)
    merged = sum(event["count"] for event in client.of("merged") if event["code"] == code)
    assert seqs == sorted(set(seqs)) and seqs[-1] == newest
    assert merged == seqs[-1] - seqs[0] + 1 - len(seqs)
    assert is_late or not merged


def last_of(client: ScriptClient, code: str) -> Any:
    """The last price that its listeners got; None before the first row."""
    rows = client.rows(code)
    return rows[-1].get("last") if rows else None


# Options


async def test_options_go_to_the_server_and_rows_reach_the_listeners_as_objects(
    start_server: StartServer, redis: Redis
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL", fields=["last"], snapshot=False)
        await publish(redis, "AAPL", last=1, prev_close=2, volume=7)
        await client.subscribe("MSFT", snapshot=False)
        await publish(redis, "MSFT", last=3)
        await client.until(lambda: client.rows("AAPL") and client.rows("MSFT"))
        assert client.rows("AAPL")[0].keys() - {"epoch", "prev"} == {"code", "seq", "ts", "last"}
        assert [row["last"] for row in client.rows("MSFT")] == [3]


async def test_other_fields_are_shown_at_once_and_another_rate_makes_no_hole(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with NumberedFeed(redis_server.url, "AAPL") as feed, ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL", fields=["last"])
        await client.until(lambda: client.seqs("AAPL"))
        await client.subscribe("AAPL", fields=["name", "ts"])
        await client.until(lambda: len(client.rows("AAPL")) == 2)
        assert [row.get("last") is None for row in client.rows("AAPL")] == [False, True]
        await client.subscribe("AAPL", fields=["last"])
        feed.start()
        for rate in (20, None, 50, None):
            await client.subscribe("AAPL", fields=["last"], max_rate=rate)
            seen = len(client.rows("AAPL"))
            await client.until(lambda seen=seen: len(client.rows("AAPL")) > seen + 10)
        await feed.stop()
        await client.until(lambda: client.seqs("AAPL")[-1] == feed.newest["AAPL"])
        assert client.of("gap") == []
        seqs = client.seqs("AAPL")[3:]
        assert seqs == sorted(set(seqs))
        counted = sum(merged["count"] for merged in client.of("merged"))
        assert counted == (await client.look())["merged"] == seqs[-1] - seqs[0] + 1 - len(seqs) > 0


# Coming back


@pytest.mark.fault
async def test_every_row_is_seen_once_although_worker_and_server_are_killed(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, **QUICK)
    codes = ["AAPL", "MSFT", "600519.SH"]
    async with NumberedFeed(redis_server.url, *codes) as feed, ScriptClient(server.ws_url) as client:
        feed.start()
        await client.subscribe("AAPL", "MSFT", "sh600519")
        is_late = False
        for way in ("worker", "server", "worker", "restart"):
            seen = len(client.rows("AAPL"))
            await client.until(lambda seen=seen: len(client.rows("AAPL")) > seen + 20)
            lives = len(client.of("hello"))
            is_late |= bool(await server.merged_by_main())
            if way == "worker":
                os.kill(worker_pid(server, "0"), signal.SIGKILL)
            elif way == "server":
                await server.kill()
                await server.start()
            else:
                await server.stop()
                await server.start()
            await client.until(lambda lives=lives: len(client.of("hello")) > lives, 30)
        await feed.stop()
        for code in codes:
            await client.until(lambda code=code: client.seqs(code)[-1] == feed.newest[code])
            check_rows(client, code, feed.newest[code], is_late or await server.merged_by_main())
        assert client.of("gap") == []
        resumed = {entry.get("resume") for ack in client.acks("subscribe")[1:] for entry in ack["accepted"]}
        assert resumed <= {"replay", "current"}


@pytest.mark.fault
async def test_what_could_not_be_replayed_is_told_as_a_gap(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with NumberedFeed(redis_server.url, "AAPL", "MSFT") as feed, ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL", max_rate=100)  # who asks for a rate is not replayed to
        await client.subscribe("MSFT")
        await client.until(lambda: client.seqs("AAPL") and client.seqs("MSFT"))
        known = client.seqs("AAPL")[-1]
        await server.stop()
        for _ in range(5):
            await feed.tick()
        await server.start()
        newest = feed.newest["AAPL"]
        await client.until(lambda: client.seqs("AAPL")[-1] == newest and is_whole(client.seqs("MSFT"), newest))
        assert client.of("gap") == [{"code": "AAPL", "from": known, "to": newest, "reason": "resume"}]


@pytest.mark.fault
async def test_what_the_server_itself_has_lost_is_told_as_a_gap(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with NumberedFeed(redis_server.url, "AAPL") as feed, ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL")
        feed.start()
        deadline = time.monotonic() + 30
        while not client.of("gap"):
            assert time.monotonic() < deadline
            await redis.client_kill_filter(_type="pubsub")
            before = feed.newest["AAPL"]
            while feed.newest["AAPL"] < before + 30:
                with contextlib.suppress(RedisError):
                    await redis.xtrim("qp:log", maxlen=0, approximate=False)
                await asyncio.sleep(0.001)
        await feed.stop()
        await client.until(lambda: client.seqs("AAPL")[-1] == feed.newest["AAPL"])
        lost = 0
        for gap in client.of("gap"):
            assert gap["code"] == "AAPL" and gap["reason"] == "server" and gap["to"] > gap["from"]
            lost += gap["to"] - gap["from"] - 1
        seqs = client.seqs("AAPL")
        assert lost == seqs[-1] - seqs[0] + 1 - len(seqs) - (await client.look())["merged"]


@pytest.mark.fault
async def test_a_code_that_is_numbered_anew_is_told_as_a_gap_and_its_price_goes_on(
    start_server: StartServer, redis: Redis
) -> None:
    server = await start_server(workers=1, rows_interval_s=0.1, **QUICK)
    async with ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL")
        for price in (1, 2, 3):
            await publish(redis, "AAPL", last=price)
        await client.until(lambda: last_of(client, "AAPL") == 3)
        await server.kill()
        await server.start()
        await client.until(lambda: len(client.acks("subscribe")) == 2 and client.state == "open", 30)
        await publish(redis, "AAPL", last=4)
        await client.until(lambda: last_of(client, "AAPL") == 4)
        assert [gap["reason"] for gap in client.of("gap")] == ["epoch"]


# A tab that nobody looks at


async def test_a_hidden_tab_is_sent_less_and_all_again_without_a_hole_when_it_is_looked_at(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    # Whoever comes back asks whether his connection is still there, and gives the answer half a heartbeat.
    server = await start_server(workers=1, **{**QUICK, "heartbeat_ms": 4000})
    async with (
        NumberedFeed(redis_server.url, "AAPL", "MSFT") as feed,
        ScriptClient(server.ws_url, hiddenRate=4) as client,
    ):
        await client.subscribe("AAPL", fields=["last"])
        await client.subscribe("MSFT", max_rate=2)
        feed.start()
        await client.until(lambda: len(client.rows("AAPL")) > 20)
        assert {merged["code"] for merged in client.of("merged")} <= {"MSFT"} or await server.merged_by_main()
        await client.call("setVisible", False)
        await client.until(lambda: len(client.acks("subscribe")) == 3)
        # By the server's own clock: the pong stands behind all rows that were sent before it.
        slowed = client.acks("subscribe")[2]

        async def has_watched_for_two_seconds() -> bool:
            await client.call("ping")
            await asyncio.sleep(0.2)
            return bool(client.of("pong")) and client.of("pong")[-1]["time"] >= slowed["time"] + 2000

        await client.until(has_watched_for_two_seconds)
        pong = client.of("pong")[-1]
        between = client.events[client.events.index(("ack", slowed)) : client.events.index(("pong", pong))]
        rows = [payload for event, payload in between if event == "row" and payload["code"] == "AAPL"]
        assert 0 < len(rows) <= 2 + 4 * (pong["time"] - slowed["time"]) / 1000
        assert "AAPL" in {merged["code"] for merged in client.of("merged")}

        await client.call("setVisible", True)
        await client.until(lambda: len(client.acks("subscribe")) == 4)
        seen = len(client.rows("AAPL"))
        await client.until(lambda: len(client.rows("AAPL")) > seen + 20)
        await feed.stop()
        for code in ("AAPL", "MSFT"):
            await client.until(lambda code=code: client.seqs(code)[-1] == feed.newest[code])
            seqs = client.seqs(code)
            merged = sum(event["count"] for event in client.of("merged") if event["code"] == code)
            assert merged == seqs[-1] - seqs[0] + 1 - len(seqs)
            assert [row.get("prev") for row in client.rows(code)[1:]] == seqs[:-1]
        assert is_whole(client.seqs("AAPL")[seen + 2 :], feed.newest["AAPL"]) or await server.merged_by_main()
        assert client.of("gap") == []
        # Only the code whose own rate is above the hidden one was asked for anew.
        assert [[entry["code"] for entry in ack["accepted"]] for ack in client.acks("subscribe")[2:]] == [["AAPL"]] * 2


# Tokens


def a_token(seconds: float, **claims: Any) -> str:
    return token(sub="ann", exp=int(time.time() + seconds), **claims)


@pytest.fixture
async def guarded(start_server: StartServer) -> QuotepushServer:
    """A server that wants tokens."""
    return await start_server(workers=1, token_key=KEY, token_leeway_s=0, **QUICK)


async def test_a_token_is_sent_behind_the_hello_and_renewed_on_the_open_connection(
    guarded: QuotepushServer, redis: Redis
) -> None:
    async with ScriptClient(guarded.ws_url, token=lambda: a_token(10)) as client:
        await client.call("subscribe", ["AAPL"])
        ends_at_ms = (await client.until(lambda: client.acks("auth")))[0]["expires"]

        def is_over() -> bool:
            return bool(client.of("heartbeat")) and client.of("heartbeat")[-1]["time"] > ends_at_ms + 1000

        await client.until(is_over, 30)
        await publish(redis, "AAPL", last=5)
        await client.until(lambda: last_of(client, "AAPL") == 5)
        assert client.tokens_asked == len(client.acks("auth")) >= 2
        assert len(client.of("hello")) == 1
        assert client.of("error") == []


async def test_a_token_may_be_a_text(guarded: QuotepushServer, redis: Redis) -> None:
    async with ScriptClient(guarded.ws_url, token=a_token(60)) as client:
        await client.subscribe("AAPL")
        await publish(redis, "AAPL", last=5)
        await client.until(lambda: last_of(client, "AAPL") == 5)


async def test_a_refused_token_is_followed_by_one_more_try_with_another(guarded: QuotepushServer) -> None:
    tokens = iter([token("another key of 32 bytes and more", sub="ann"), a_token(60)])
    async with ScriptClient(guarded.ws_url, token=lambda: next(tokens)) as client:
        await client.subscribe("AAPL")
        assert [state["state"] for state in client.of("state")] == ["open", "waiting", "connecting", "open"]
        assert [error["error"] for error in client.of("error")] == ["auth_failed"]


@pytest.mark.parametrize("is_function", [True, False])
async def test_a_second_refusal_and_that_of_a_text_are_for_good(is_function: bool, guarded: QuotepushServer) -> None:
    bad = token("another key of 32 bytes and more", sub="ann")
    async with ScriptClient(guarded.ws_url, token=(lambda: bad) if is_function else bad) as client:
        await client.until(lambda: client.state == "closed")
        assert client.of("state")[-1] == {"state": "closed", "code": 4401, "reason": "auth_failed"}
        assert len(client.of("hello")) == 1 + is_function


async def test_no_token_now_is_told_and_asked_for_again(guarded: QuotepushServer) -> None:
    tokens: list[str | None] = [None, a_token(60)]
    async with ScriptClient(guarded.ws_url, token=lambda: tokens.pop(0)) as client:
        await client.subscribe("AAPL")
        assert client.of("error")[0]["error"] == "no_token"


# Where WebSockets are blocked


async def test_rows_come_by_a_stream_where_websockets_are_blocked(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with (
        NumberedFeed(redis_server.url, "AAPL", "MSFT") as feed,
        BlockedNetwork(server.url) as network,
        ScriptClient(network.url + "/ws") as client,
    ):
        await client.call("subscribe", ["AAPL"], {"fields": ["last"]})
        await client.is_open()
        assert client.of("state")[-1] == {"state": "open", "stream": True}
        # At least: an answer why the first could not be opened may come too late to count.
        assert network.sockets_refused >= 2
        assert network.streams == [{"codes": "AAPL", "fields": "last"}]
        await client.until(lambda: client.rows("AAPL"))  # and with them a position
        await client.call("subscribe", ["MSFT"], {"fields": ["last"]})
        await client.until(lambda: client.rows("AAPL") and client.rows("MSFT"))
        assert network.streams[-1]["codes"] == "AAPL,MSFT"
        assert network.streams[-1]["last_event_id"]
        feed.start()
        await client.until(lambda: len(client.rows("AAPL")) > 20)

        asked = len(network.streams)
        await network.cut()
        await client.until(lambda: len(network.streams) > asked)  # it, or EventSource by itself, comes back
        again = network.streams[-1]
        place = again.get("Last-Event-ID", again.get("last_event_id"))
        assert place and place != network.streams[1]["last_event_id"]
        seen = len(client.rows("AAPL"))
        await client.until(lambda: len(client.rows("AAPL")) > seen + 20)
        await feed.stop()
        for code in ("AAPL", "MSFT"):
            await client.until(lambda code=code: client.seqs(code)[-1] == feed.newest[code])
            check_rows(client, code, feed.newest[code], await server.merged_by_main())
        assert client.of("gap") == []


async def test_the_websocket_is_taken_again_when_it_is_not_blocked_any_more(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with (
        NumberedFeed(redis_server.url, "AAPL") as feed,
        BlockedNetwork(server.url) as network,
        ScriptClient(network.url + "/ws") as client,
    ):
        feed.start()
        await client.call("subscribe", ["AAPL"])
        await client.until(lambda: len(client.rows("AAPL")) > 5)
        refused = network.sockets_refused
        await client.call("wake")
        await client.until(lambda: network.sockets_refused > refused)
        seen = len(client.rows("AAPL"))
        await client.until(lambda: len(client.rows("AAPL")) > seen + 5)  # the stream is not disturbed by it
        assert client.of("state")[-1]["stream"]

        network.is_blocked = False
        await client.call("wake")
        await client.until(lambda: client.of("state")[-1] == {"state": "open"})
        seen = len(client.rows("AAPL"))
        await client.until(lambda: len(client.rows("AAPL")) > seen + 5)
        await feed.stop()
        await client.until(lambda: client.seqs("AAPL")[-1] == feed.newest["AAPL"])
        check_rows(client, "AAPL", feed.newest["AAPL"], await server.merged_by_main())


async def test_a_stream_brings_its_token_and_tells_which_codes_it_cannot_hold(guarded: QuotepushServer) -> None:
    codes = [f"C{n}" for n in range(302)]
    async with (
        BlockedNetwork(guarded.url) as network,
        ScriptClient(network.url + "/ws", token=lambda: a_token(60)) as client,
    ):
        await client.call("subscribe", codes)
        await client.is_open()
        await client.until(lambda: client.rows("C299"))
        assert network.streams[0]["codes"] == ",".join(codes[:300])
        assert network.streams[0]["token"].count(".") == 2
        # Once per stream: on a busy machine there may be a second one.
        assert {(e["error"], *e["codes"]) for e in client.of("error")} == {("code_limit", "C300", "C301")}


async def test_without_streams_the_websocket_is_tried_again_and_again(start_server: StartServer) -> None:
    server = await start_server(workers=1, **QUICK)
    async with (
        BlockedNetwork(server.url) as network,
        ScriptClient(network.url + "/ws", without=["EventSource"]) as client,
    ):
        await client.call("subscribe", ["AAPL"])
        await client.until(lambda: network.sockets_refused >= 3)
        network.is_blocked = False
        await client.until(lambda: client.rows("AAPL"))
        assert network.streams == []


async def test_a_server_that_is_away_for_a_while_is_no_blocked_websocket(
    start_server: StartServer, redis: Redis
) -> None:
    server = await start_server(workers=1, **QUICK)
    async with ScriptClient(server.ws_url) as client:
        await client.subscribe("AAPL")
        await server.kill()
        await client.until(lambda: max(s.get("attempt", 0) for s in client.of("state")) >= 3)
        await server.start()
        await client.until(lambda: len(client.acks("subscribe")) == 2, 30)
        assert client.of("state")[-1] == {"state": "open"}


# A mini-program


async def test_wechat_page_shows_quotes_without_anything_that_only_browsers_have(
    start_server: StartServer, redis: Redis
) -> None:
    server = await start_server(workers=1, **QUICK)
    await publish(redis, "600519.SH", name="贵州茅台", last=1688.2)
    script = Path(__file__).parents[1] / "browser" / "wechat.mjs"
    path = node()
    assert path is not None
    page = await asyncio.create_subprocess_exec(
        path, *NODE_FLAGS, "--experimental-vm-modules", str(script), server.ws_url, "sh600519", stdin=PIPE, stdout=PIPE
    )
    assert page.stdin is not None and page.stdout is not None
    shown: list[dict[str, Any]] = []

    async def read() -> None:
        async for line in page.stdout or ():
            shown.append(json.loads(line))

    reader = asyncio.create_task(read())
    try:

        def last() -> Any:
            prices = [row.get("last") for change in shown for name, row in change.items() if name == "rows.600519_SH"]
            return prices[-1] if prices else None

        def states() -> list[str]:
            return [change["state"] for change in shown if "state" in change]

        await wait_until(lambda: last() == 1688.2)
        await server.kill()
        await wait_until(lambda: states()[-1] == "waiting")
        await server.start()
        await wait_until(lambda: states()[-1] == "open", 30)
        await publish(redis, "600519.SH", last=1690)
        await wait_until(lambda: last() == 1690)
        page.stdin.write(b"onUnload\n")
        await wait_until(lambda: states()[-1] == "closed")
    finally:
        page.stdin.close()
        await asyncio.wait_for(page.wait(), 20)
        await reader
