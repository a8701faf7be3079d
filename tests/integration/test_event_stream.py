"""Server-Sent Events of a real server: the rows of a WebSocket, resume over cuts, slow readers, tokens, the end."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from tests.support.event_source import EventClient, connected
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

HEARTBEAT_MS = 200


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    # A link that is taken for dead would lose plain ticks, and a Redis that stands still for a moment is not dead.
    return await start_server(heartbeat_ms=HEARTBEAT_MS, probe_timeout_s=30)


async def publish_and_wait(server: QuotepushServer, redis: Redis, code: str, **fields: Any) -> None:
    """Publish one tick and return when the server has it."""
    before = await server.metric("ticks_accepted")
    await publish(redis, code, **fields)

    async def has_it() -> bool:
        return await server.metric("ticks_accepted") > before

    await wait_until(has_it, 20)


async def get(server: QuotepushServer, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    timeout = aiohttp.ClientTimeout(total=20)
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.request(method, server.url + path, headers=named) as response,
    ):
        is_json = response.content_type == "application/json" and method != "HEAD"
        return response.status, response.headers, await (response.json() if is_json else response.text())


async def is_registered(redis: Redis, fd: str, codes: set[str]) -> bool:
    found: set[str] = await redis.smembers(f"qp:fd:{fd}")
    return found == codes


async def has_connections(server: QuotepushServer, count: int) -> bool:
    return await server.metric("connections") == count


async def until_gone(redis: Redis, fd: str) -> None:
    async def is_gone() -> bool:
        return not await redis.exists(f"qp:fd:{fd}")

    await wait_until(is_gone, 20, f"{fd} is out of the registry")


async def test_a_stream_has_the_rows_of_a_websocket_beside_it(server: QuotepushServer, redis: Redis) -> None:
    await publish_and_wait(server, redis, "AAPL", last=1, name="Apple", prev_close=2)
    async with (
        RecordingClient(server.ws_url, ["AAPL", "sh600519"], history=True) as beside,
        connected(server.port, "AAPL", "sh600519", "no such") as stream,
    ):
        for last in range(2, 30):
            await publish(redis, "AAPL", last=last)
            await publish(redis, "600519.SH", last=last, bids=[[last, 1]])
        await stream.until("AAPL", 29)
        await stream.until("600519.SH", 29)
        await wait_until(lambda: beside.last("600519.SH") == 29)
        rows = [row for message in stream.of("tick") for row in message["data"]]
        assert sorted(rows, key=str) == sorted(beside.ticks or (), key=str)
        assert len(rows) == 56 - await server.merged_by_main()
        kinds = [message["type"] for message in stream.messages if message["type"] != "heartbeat"]
        assert kinds[:3] == ["hello", "ack", "snapshot"]
        (ack,) = stream.of("ack")
        assert ack["accepted"] == [{"as": "AAPL", "code": "AAPL"}, {"as": "sh600519", "code": "600519.SH"}]
        assert [entry["error"] for entry in ack["rejected"]] == ["bad_code"]
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        assert stream.headers["x-accel-buffering"] == "no"
        await stream.until_said("heartbeat")
        await wait_until(lambda: is_registered(redis, stream.fd, {"AAPL", "600519.SH"}))
        await wait_until(lambda: has_connections(server, 2))
        fd = stream.fd
    await until_gone(redis, fd)


async def test_options_are_those_of_a_subscription(server: QuotepushServer, redis: Redis) -> None:
    await publish_and_wait(server, redis, "AAPL", last=1, volume=5)
    async with (
        connected(server.port, "AAPL", query="&fields=last&max_rate=1000") as some,
        connected(server.port, "AAPL", query="&snapshot=false&fields=volume,bids") as others,
    ):
        await some.until_said("snapshot")
        assert set(some.rows["AAPL"]) == {"code", "seq", "ts", "last"}
        others.rows["AAPL"] = {"seq": 0}
        await publish(redis, "AAPL", last=2, volume=6, bids=[[1, 2]])
        await some.until("AAPL", 2)
        await wait_until(lambda: others.rows["AAPL"].get("volume") == 6)
        assert others.rows["AAPL"]["bids"] == [[1, 2]]
        assert others.of("snapshot") == []


async def test_who_comes_back_gets_what_it_has_missed_once(server: QuotepushServer, redis: Redis) -> None:
    client = EventClient(server.port, "A", "B")
    await client.open()
    workers = set()
    last = 0
    for _ in range(16):  # cut in the midst of things, so that it lands on either worker; once in 32,768 times not
        await client.until_said("ack")
        workers.add(client.fd.split(".")[1])
        for _ in range(20):
            last += 1
            await publish(redis, "A", last=last)
            await publish(redis, "B", last=last)
        await client.until("A", last - 3)
        await client.cut()
        for _ in range(5):
            last += 1
            await publish(redis, "A", last=last)
            await publish(redis, "B", last=last)
        await client.open()
    await client.until("A", last)
    await client.until("B", last)
    # The reader itself checks that no row came twice and that each goes on from the one before.
    assert [client.seen[code][-1] for code in "AB"] == [last, last]
    assert len(client.seen["A"]) + len(client.seen["B"]) == 2 * last - await server.merged_by_main()
    assert len(client.snapshots) == 2
    assert workers == {"0", "1"}
    await client.cut()


async def test_the_position_may_stand_in_the_address_and_the_header_wins(server: QuotepushServer, redis: Redis) -> None:
    async with connected(server.port, "A") as client:
        await publish(redis, "A", last=1)
        await client.until("A", 1)
        place = client.last_id
    await publish_and_wait(server, redis, "A", last=2)
    async with connected(server.port, "A", query=f"&last_event_id={place}", rows=client.rows) as again:
        await again.until("A", 2)
        (ack,) = again.of("ack")
        assert ack["accepted"] == [{"as": "A", "code": "A", "resume": "replay"}]
    async with connected(server.port, "A", query=f"&last_event_id={place}", Last_Event_ID="nonsense") as again:
        assert again.of("ack")[0]["accepted"][0]["resume"] == "snapshot"
    async with connected(server.port, "A", "B", query=f"&last_event_id={place}") as again:
        assert [entry["resume"] for entry in again.of("ack")[0]["accepted"]] == ["snapshot", "snapshot"]


async def test_a_dead_worker_costs_a_stream_nothing(server: QuotepushServer, redis: Redis) -> None:
    client = EventClient(server.port, "A")
    await client.open()
    await client.until_said("ack")
    for last in range(1, 20):
        await publish(redis, "A", last=last)
    await client.until("A", 19)
    fd = client.fd
    for pid in server.worker_pids():
        os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: client.has_ended, 20)
    await client.cut()
    await publish(redis, "A", last=20)
    await wait_until(lambda: len(server.worker_pids()) == 2, 20)
    await client.open()
    await client.until("A", 20)
    await publish(redis, "A", last=21)
    await client.until("A", 21)
    assert client.seen["A"][-1] == 21
    assert len(client.seen["A"]) == 21 - await server.merged_by_main()
    assert len(client.snapshots) == 1
    await until_gone(redis, fd)
    await client.cut()


async def test_each_stream_that_is_cut_is_come_back_to_at_another_moment(server: QuotepushServer) -> None:
    clients = [EventClient(server.port, "A") for _ in range(12)]
    for client in clients:
        await client.open()
        await client.until_said("hello")
    pauses = [client.retry_ms for client in clients]
    assert all(pause is not None and 500 <= pause < 4000 for pause in pauses)
    assert len(set(pauses)) > 6
    for client in clients:
        await client.cut()


async def test_a_restart_is_announced_and_the_stream_begins_anew(server: QuotepushServer, redis: Redis) -> None:
    client = EventClient(server.port, "A")
    await client.open()
    await client.until_said("ack")
    await publish(redis, "A", last=1)
    await client.until("A", 1)
    assert await server.stop() == 0
    await wait_until(lambda: client.has_ended, 20)
    closing = await client.until_said("status", state="closing")
    assert client.retry_ms == closing["retry_after_ms"] == 1000
    await client.cut()
    await server.start()
    await client.open()
    await wait_until(lambda: len(client.of("snapshot")) == 2, 20)
    assert client.of("ack")[-1]["accepted"][0]["resume"] == "snapshot"
    await publish(redis, "A", last=2)
    await client.until("A", 2)
    await client.cut()


async def test_a_slow_reader_is_merged_for_and_told(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis: Redis
) -> None:
    server = await start_server(workers=1, heartbeat_ms=HEARTBEAT_MS, merge_above_rows=20, probe_timeout_s=30)
    client = EventClient(server.port, "A", "B")
    await client.open(limit=4096)
    await client.until_said("ack")
    client.may_read.clear()
    last = 0

    async def is_merging() -> bool:
        nonlocal last
        for _ in range(50):
            last += 1
            await publish(redis, "A", last=last, text="x" * 7000)
            await publish(redis, "B", last=last)
        return await server.metric("rows_merged") > 100

    await wait_until(is_merging, 60)
    client.may_read.set()
    await client.until("A", last, 60)
    await client.until("B", last, 60)
    await client.until_said("status", state="realtime")  # it is said behind the rows
    states = [message["state"] for message in client.of("status")]
    assert states[:2] == ["conflating", "realtime"]
    await publish(redis, "B", last=last + 1)
    await client.until("B", last + 1)
    assert client.last_id
    await client.cut()


async def test_tokens_are_wanted_and_a_stream_ends_with_its_own(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis: Redis
) -> None:
    server = await start_server(workers=1, token_key=KEY, token_leeway_s=0, heartbeat_ms=HEARTBEAT_MS)
    old = token(sub="ann", exp=int(time.time()) - 60)
    for query, error in (("", "not_authenticated"), (f"&token={old}", "auth_failed")):
        status, headers, body = await get(server, f"/stream?codes=A{query}")
        assert (status, body["error"]) == (401, error)
        assert headers["WWW-Authenticate"].startswith("Bearer")
    good = token(sub="ann", exp=int(time.time()) + 7)
    by_query = EventClient(server.port, "A", query=f"&token={good}")
    by_header = EventClient(server.port, "A", Authorization=f"Bearer {good}")
    for client in (by_query, by_header):
        await client.open()
        await client.until_said("ack")
        assert client.of("hello")[0]["auth"] == "ok"
    for client in (by_query, by_header):
        await wait_until(lambda client=client: client.has_ended, 30)
        assert client.of("error")[-1]["error"] == "auth_failed"
        await until_gone(redis, client.fd)
        await client.open()
        assert client.status == 401
        await client.cut()
    assert good not in server.log()


async def test_three_hundred_codes_and_no_more(server: QuotepushServer) -> None:
    async with connected(server.port, *(f"C{n}" for n in range(302))) as client:
        (ack,) = client.of("ack")
        assert (len(ack["accepted"]), ack["total"], ack["limit"]) == (300, 300, 300)
        assert [(entry["as"], entry["error"]) for entry in ack["rejected"]] == [
            ("C300", "code_limit"),
            ("C301", "code_limit"),
        ]
        assert client.of("hello")[0]["limits"]["codes"] == 300


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", "bad_request"), ("?codes=", "bad_request"), ("?codes=,", "bad_request"), ("?code=A", "bad_request"),
        ("?codes=A&fields=price", "unknown_field"), ("?codes=A&fields=", "bad_request"),
        ("?codes=A&max_rate=fast", "bad_request"), ("?codes=A&max_rate=0", "bad_request"),
        ("?codes=A&max_rate=nan", "bad_request"), ("?codes=A&snapshot=maybe", "bad_request"),
        ("?codes=A&format=rows", "bad_request"),
    ],
)  # fmt: skip
async def test_a_bad_query_is_refused_before_the_stream_begins(
    shared_server: QuotepushServer, query: str, error: str
) -> None:
    status, headers, body = await get(shared_server, f"/stream{query}")
    assert (status, body["error"]) == (400, error)
    assert headers["Content-Type"].startswith("application/json")


@pytest.fixture
async def shared_server(start_server: Callable[..., Awaitable[QuotepushServer]]) -> QuotepushServer:
    return await start_server(workers=1)


async def test_methods_origins_places_and_old_clients(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis: Redis
) -> None:
    server = await start_server(
        workers=1, max_connections=1, base_path="/q", allowed_origins="https://page.example", heartbeat_ms=HEARTBEAT_MS
    )
    path = "/q/stream?codes=A"
    assert (await get(server, "/stream?codes=A"))[0] == 404
    status, headers, _ = await get(server, path, "HEAD")
    assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
    assert (await get(server, path, "POST"))[0] == 405
    assert (await get(server, path, Origin="https://evil.example"))[0] == 403
    async with connected(server.port, "A", path="/q/stream", Origin="https://page.example") as client:
        assert client.headers["access-control-allow-origin"] == "https://page.example"
        assert client.headers["vary"] == "Origin"
        status, headers, body = await get(server, path, Origin="https://page.example")
        assert (status, body["error"], headers["Retry-After"]) == (503, "overloaded", "5")
        fd = client.fd
    await until_gone(redis, fd)

    async def has_room() -> bool:
        return (await get(server, path, "HEAD"))[0] == 200

    await wait_until(has_room)
    # HTTP/1.0, with more behind the request than there should be.
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n".encode())
    assert b"Transfer-Encoding" not in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    assert (await asyncio.wait_for(reader.readuntil(b"event: heartbeat"), 20)).count(b"event: hello") == 1
    writer.close()
    await writer.wait_closed()
    await wait_until(has_room)
    # A connection that was kept alive becomes a stream.
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET /q/page.css HTTP/1.1\r\nHost: x\r\n\r\nGET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert await asyncio.wait_for(reader.readuntil(b"event: heartbeat"), 20)
    writer.close()
    await writer.wait_closed()
    await wait_until(has_room)
    assert "Traceback" not in server.log()


async def test_curl_is_client_enough(server: QuotepushServer, redis: Redis) -> None:
    await publish(redis, "AAPL", last=1)
    curl = await asyncio.create_subprocess_exec(
        "curl", "-sN", f"{server.url}/stream?codes=AAPL", stdout=asyncio.subprocess.PIPE
    )
    assert curl.stdout is not None
    await asyncio.wait_for(curl.stdout.readuntil(b"event: snapshot"), 20)
    await wait_until(lambda: redis.exists("qp:code:AAPL"), 20)
    curl.send_signal(signal.SIGINT)
    await asyncio.wait_for(curl.wait(), 20)

    async def is_gone() -> bool:
        return not await redis.exists("qp:code:AAPL", "qp:codes")

    await wait_until(is_gone, 20)


async def test_a_stream_that_takes_nothing_is_cut_off(
    start_server: Callable[..., Awaitable[QuotepushServer]], redis: Redis
) -> None:
    server = await start_server(workers=1, heartbeat_ms=HEARTBEAT_MS, stall_timeout_s=1)
    client = EventClient(server.port, "A")
    await client.open(limit=4096)
    await client.until_said("ack")
    client.may_read.clear()
    fd = client.fd
    last = 0

    async def is_cut_off() -> bool:
        nonlocal last
        for _ in range(50):
            last += 1
            await publish(redis, "A", last=last, text="x" * 7000)
        return await server.metric("connections_closed", reason="stalled") == 1

    await wait_until(is_cut_off, 90)
    await until_gone(redis, fd)
    await client.cut()
