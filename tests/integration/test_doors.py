"""Tricks at the door of a real server: each is ignored, or refused before the upgrade with the status that says why."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import orjson

from tests.support.processes import command_line
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until

StartServer = Callable[..., Awaitable[QuotepushServer]]

_PATIENCE_S = 20.0
HANDSHAKE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Reply:
    """The head of an answer, and the error that its body names."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        is_json = "json" in self.headers.get("content-type", "")
        self.error = orjson.loads(body).get("error", "") if is_json and body else ""


@contextlib.asynccontextmanager
async def knocked(
    server: QuotepushServer, *headers: str, path: str = "/ws", host: str | None = "", upgrade: bool = True
) -> AsyncIterator[Reply]:
    """Ask with exactly these header lines; the connection is open until the end.

    Args:
        host: of the header; empty: the server's own; None: none.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        lines = [f"GET {path} HTTP/1.1", *([] if host is None else [f"Host: {host or f'127.0.0.1:{server.port}'}"])]
        request = "\r\n".join([*lines, *headers]) + "\r\n" + (HANDSHAKE if upgrade else "") + "\r\n"
        writer.write(request.encode("latin-1"))
        async with asyncio.timeout(_PATIENCE_S):
            head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
            length = Reply(head, b"").headers.get("content-length", "0")
            yield Reply(head, await reader.readexactly(int(length)))
    finally:
        writer.transport.abort()


async def knock(server: QuotepushServer, *headers: str, path: str = "/ws", upgrade: bool = True) -> Reply:
    async with knocked(server, *headers, path=path, upgrade=upgrade) as reply:
        return reply


async def connections(server: QuotepushServer) -> int:
    count: int = (await server.admin("/readyz"))[1]["connections"]
    return count


async def refused(server: QuotepushServer, reason: str, count: float) -> None:
    """Wait until so many connections were refused for this reason."""

    async def are_counted() -> bool:
        return await server.metric("connections_refused", reason=reason) == count

    await wait_until(are_counted)


# Origins and headers


async def test_tricks_with_origins_hosts_and_headers_are_refused_before_the_upgrade(start_server: StartServer) -> None:
    server = await start_server(allowed_origins="https://app.example")
    own = f"127.0.0.1:{server.port}"
    for origin in (
        "null", "https://app.example.", "https://app.example:444", "http://app.example", "https://app.example@evil.example",
        "https://evil.example/https://app.example", "https://app.example.evil.example", "https://xapp.example",
        f"http://{own}.", f"http://user@{own}", f"http://{own}@evil.example", "http://127.0.0.1", "http://localhost",
        f"http://127.1:{server.port}", f"http://evil.example#{own}", "", " ", "*", "file://",
        "https://app.example, null",
    ):  # fmt: skip
        reply = await knock(server, f"Origin: {origin}")
        assert (reply.status, reply.error) == (403, "forbidden_origin"), origin
    for origin in ("https://app.example", "HTTPS://APP.EXAMPLE", f"http://{own}", f"https://{own}"):
        assert (await knock(server, f"Origin: {origin}")).status == 101, origin

    several = [("https://app.example", "https://app.example"), (f"http://{own}", "null"), ("null", f"http://{own}")]
    for first, second in several:
        assert (await knock(server, f"Origin: {first}", f"Origin: {second}")).status in (400, 403)

    # The Host that was asked for must be the page's own.
    async with knocked(server, f"Origin: http://{own}", host="evil.example") as reply:
        assert reply.status == 403
    async with knocked(server, host=None) as reply:
        assert reply.status == 400
    for host in (f"{own}\r\nHost: evil.example", f"evil.example\r\nHost: {own}"):
        async with knocked(server, "Origin: http://evil.example", host=host) as reply:
            assert reply.status in (400, 403)
    # Of a whole address in the first line the Host is that one's, whatever else is said (RFC 9112 §3.2.2).
    assert (await knock(server, f"Origin: http://{own}", path="http://evil.example/ws")).status == 403

    for headers in (["X-Long: " + "x" * 9000], ["X-Forwarded-For: " + "1.1.1.1, " * 1000], ["Broken"], ["A\x00: b"]):
        assert (await knock(server, *headers)).status == 400
    assert (await knock(server, path="/ws?" + "x" * 9000)).status == 400
    assert (await knock(server, "X-Long: " + "x" * 8000)).status == 101
    assert await server.metric("connections_opened") >= 0  # main turns
    assert "Traceback" not in server.log()


# Addresses


async def test_addresses_are_counted_for_the_machine_and_believed_only_of_trusted_proxies(
    start_server: StartServer,
) -> None:
    server = await start_server(trusted_proxies="127.0.0.1", max_connections_per_ip=3, workers=2)
    async with AsyncExitStack() as stack:

        async def enter(*headers: str, path: str = "/ws", upgrade: bool = True) -> Reply:
            return await stack.enter_async_context(knocked(server, *headers, path=path, upgrade=upgrade))

        # On both workers together, over WebSockets and streams, whatever the client puts before its proxy's word.
        assert (await enter("X-Forwarded-For: 192.0.2.1")).status == 101
        assert (await enter("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 192.0.2.1:4711")).status == 101
        stream = await enter("X-Forwarded-For: 192.0.2.1", path="/stream?codes=AAPL", upgrade=False)
        assert stream.status == 200
        for trick in (
            ["X-Forwarded-For: 192.0.2.1"], ["X-Forwarded-For: 6.6.6.6, 192.0.2.1"],
            ["X-Forwarded-For: " + "10.0.0.1, " * 60 + "192.0.2.1"], ["X-Forwarded-For: unknown, 192.0.2.1"],
            ["X-Forwarded-For: 7.7.7.7", "X-Forwarded-For: ::ffff:192.0.2.1"], ['X-Forwarded-For: "192.0.2.1"'],
            ["Forwarded: for=6.6.6.6", "X-Forwarded-For: 192.0.2.1"],
            ["X-Real-IP: 6.6.6.6", "X-Forwarded-For: 192.0.2.1"],
        ):  # fmt: skip
            reply = await knock(server, *trick)
            assert (reply.status, reply.error) == (429, "too_many_connections"), trick
            assert int(reply.headers["retry-after"]) > 0
        look = await knock(server, "X-Forwarded-For: 192.0.2.1", upgrade=False)
        assert (look.status, look.error) == (429, "too_many_connections")
        assert (await knock(server, "X-Forwarded-For: 192.0.2.2", upgrade=False)).status == 426
        await refused(server, "too_many_connections", 8)

        # All of a /64 is one.
        for address in ("2001:db8:0:7::1", "[2001:db8:0:7:ffff:1:2:3]:4711", "2001:db8:0:7:8000::"):
            assert (await enter(f"X-Forwarded-For: {address}")).status == 101
        assert (await knock(server, "X-Forwarded-For: 2001:db8:0:7::9")).status == 429
        assert (await knock(server, "X-Forwarded-For: 2001:db8:0:8::9")).status == 101
        # What is no address is the proxy's own.
        for _ in range(3):
            assert (await enter("X-Forwarded-For: garbage")).status == 101
        assert (await knock(server)).status == 429

    async def is_empty() -> bool:
        return await connections(server) == 0 and await server.metric("client_addresses") == 0

    await wait_until(is_empty)
    # Who has gone has given its place back.
    async with AsyncExitStack() as stack:
        for _ in range(3):
            assert (await stack.enter_async_context(knocked(server, "X-Forwarded-For: 192.0.2.1"))).status == 101
    assert "Traceback" not in server.log()


async def test_a_worker_that_dies_gives_the_addresses_of_its_clients_back(start_server: StartServer) -> None:
    server = await start_server(max_connections_per_ip=6, workers=2)
    async with AsyncExitStack() as stack:
        for _ in range(6):
            # From an untrusted peer the header is nothing.
            reply = await stack.enter_async_context(knocked(server, "X-Forwarded-For: 192.0.2.1"))
            assert reply.status == 101
        assert (await knock(server)).status == 429
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)

        async def is_back() -> bool:
            return await server.metric("workers_ready") == 2 and await server.metric("worker_restarts") == 2

        await wait_until(is_back, 30)
        for _ in range(6):
            assert (await stack.enter_async_context(knocked(server))).status == 101
        assert (await knock(server)).status == 429


async def test_a_flood_from_one_address_is_held_back_and_is_one_line_in_the_log(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, trusted_proxies="127.0.0.1", connects_per_ip_s=0.01, questions_per_ip_s=0.01)
    async with knocked(server, "X-Forwarded-For: 192.0.2.1") as first:
        assert first.status == 101
        for _ in range(30):
            reply = await knock(server, "X-Forwarded-For: 192.0.2.1")
            assert (reply.status, reply.error) == (429, "rate_limited")
            assert 0 < int(reply.headers["retry-after"]) <= 100
        assert (await knock(server, "X-Forwarded-For: 192.0.2.2")).status == 101
    async with redis_server.client() as publisher:
        await publish(publisher, "AAPL", last=1)
    question = "/quotes?codes=AAPL"
    assert (await knock(server, "X-Forwarded-For: 192.0.2.9", path=question, upgrade=False)).status == 200
    for path in (question, "/codes?q=A"):
        reply = await knock(server, "X-Forwarded-For: 192.0.2.9", path=path, upgrade=False)
        assert (reply.status, reply.error) == (429, "rate_limited")

    async def are_counted() -> bool:
        return await server.metric("questions_refused", reason="rate_limited") == 2

    await wait_until(are_counted)  # they came last
    assert await server.metric("connections_refused", reason="rate_limited") == 30
    assert server.log().count("rate_limited: ") == 1


# Ends that do not ask


async def test_an_end_that_sends_no_whole_request_is_cut_off_and_the_others_are_served(
    start_server: StartServer,
) -> None:
    server = await start_server(workers=1, request_timeout_s=1)
    loop = asyncio.get_running_loop()
    own = f"Host: 127.0.0.1:{server.port}\r\n"

    async def is_cut(first: bytes, drip: bytes) -> None:
        """Send ``first`` and then, for as long as somebody listens, ``drip`` again and again."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(first)

            async def go_on() -> None:
                with contextlib.suppress(ConnectionError):
                    while drip:
                        await asyncio.sleep(0.05)
                        writer.write(drip)
                        await writer.drain()

            dripping = loop.create_task(go_on())
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(_PATIENCE_S):
                    while await reader.read(65_536):
                        pass
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
        finally:
            writer.transport.abort()

    async with knocked(server) as welcome:
        assert welcome.status == 101
        await asyncio.gather(
            is_cut(b"", b""),
            is_cut(b"GET /ws HTTP/1.1\r\n", b""),
            is_cut(f"GET /ws HTTP/1.1\r\n{own}X-Slow: ".encode(), b"x"),
            # A whole request, and then half of one.
            is_cut(f"GET /ws HTTP/1.1\r\n{own}\r\nGET /ws HT".encode(), b"T"),
        )

        async def is_one() -> bool:
            return await connections(server) == 1

        await wait_until(is_one)
        assert (await knock(server)).status == 101
    assert "Traceback" not in server.log()


async def test_silent_ends_leave_their_files_again(start_server: StartServer) -> None:
    server = await start_server(workers=1, request_timeout_s=3)
    (pid,) = [pid for pid in server.worker_pids() if command_line(pid).endswith("worker 0")]

    def files() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    before = files()  # it may open a few of its own meanwhile
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    try:
        await wait_until(lambda: files() >= before + 25)
        await wait_until(lambda: files() < before + 20, 30)
    finally:
        for end in silent:
            end.close()
