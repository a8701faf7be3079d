"""Processes die, sleep and are told to go; clients stall, vanish, rage and come in crowds. Nobody else notices."""

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from tests.support.processes import command_line, is_alive, resident_bytes, worker_pid
from tests.support.raw_websocket import BINARY, CLOSE, PING, TEXT, RawWebSocket, client_frame
from tests.support.redis_server import RedisServer
from tests.support.registry_truth import registry_equals
from tests.support.server import QuotepushServer
from tests.support.steady_feed import SteadyFeed, steady_feed
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

pytestmark = pytest.mark.fault

StartServer = Callable[..., Awaitable[QuotepushServer]]

CODES = [f"C{n:02}" for n in range(20)]
CLIENTS = 60
# Until a worker has been started on a busy machine, and its clients are back.
RESTART_S = 30
# A row of about a kilobyte: whoever does not read is soon far behind.
BULK = {"text": "x" * 1000}


def codes_of(n: int) -> list[str]:
    return [CODES[(n + step) % len(CODES)] for step in (0, 1, 7)]


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@contextlib.asynccontextmanager
async def crowd(
    server: QuotepushServer, redis_server: RedisServer, *, reconnects: bool = True
) -> AsyncIterator[tuple[list[RecordingClient], SteadyFeed]]:
    """Clients that watch, a feed that publishes, and everybody has been served."""
    async with (
        connected_clients(server.ws_url, CLIENTS, codes_of, reconnects=reconnects) as clients,
        steady_feed(redis_server.url, CODES, 500) as feed,
    ):
        await ticks_flow(clients)
        async with redis_server.client() as redis:
            await registry_equals(redis, connections_of(clients))
        yield clients, feed


def connections_of(clients: list[RecordingClient]) -> dict[str, set[str]]:
    return {client.fd: client.codes for client in clients}


async def ticks_flow(clients: list[RecordingClient]) -> None:
    """Wait until everybody is connected and has a tick that was not there yet."""
    await wait_until(lambda: all(client.is_open for client in clients), RESTART_S)
    before = [client.received for client in clients]
    await wait_until(lambda: all(c.received > n for c, n in zip(clients, before, strict=True)), RESTART_S)


async def everybody_is_right(clients: list[RecordingClient], feed: SteadyFeed, redis: Redis) -> None:
    """Stop the feed; everybody has the newest price of each of his codes, and the registry equals the connections."""
    newest = await feed.finish()
    for client in clients:
        await wait_until(
            lambda c=client: c.is_open and all(c.last(code) == newest[code] for code in c.codes), RESTART_S
        )
    await registry_equals(redis, connections_of(clients))


async def is_ready(server: QuotepushServer, connections: int) -> bool:
    status, facts = await server.admin("/readyz")
    return bool(status == 200 and facts["connections"] == connections)


async def noticed_nothing(server: QuotepushServer, clients: list[RecordingClient]) -> None:
    """No connection was lost, and no row was merged, unless main itself lagged."""
    for client in clients:
        assert client.lives == 1
        assert client.states() == []
    if not await server.merged_by_main():
        assert [client.merged for client in clients] == [0] * len(clients)


def assert_clean_log(server: QuotepushServer) -> None:
    for line in server.log().splitlines():
        assert "Traceback" not in line
        assert "ERROR" not in line, line


# Workers


async def test_a_killed_worker_is_replaced_and_only_its_own_clients_notice(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        victims = [client for client in clients if client.worker == "0"]
        others = [client for client in clients if client.worker == "1"]
        assert victims
        assert others
        pid = worker_pid(server, "0")
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: all(client.losses == 1 for client in victims))
        await ticks_flow(clients)
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        assert pid not in server.worker_pids()
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, others)
        assert all(client.lives == 2 for client in victims)
        assert await server.metric("worker_restarts", worker="0") == 1
        assert await server.metric("worker_restarts", worker="1") == 0
    assert_clean_log(server)


@pytest.mark.long
async def test_a_worker_that_is_killed_again_and_again_is_replaced_each_time(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        for restarts in (1, 2, 3):
            os.kill(worker_pid(server, "1"), signal.SIGKILL)

            async def is_replaced(restarts: int = restarts) -> bool:
                return await server.metric("worker_restarts", worker="1") == restarts

            await wait_until(is_replaced, RESTART_S)
            await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
    assert_clean_log(server)


@pytest.mark.long
async def test_all_workers_are_killed_at_once(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: all(client.losses for client in clients))
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
    assert_clean_log(server)


@pytest.mark.long
async def test_a_worker_that_is_silent_is_killed_and_replaced(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(worker_silence_s=4)  # longer than a busy machine keeps the others waiting
    async with crowd(server, redis_server) as (clients, feed):
        others = [client for client in clients if client.worker == "1"]
        pid = worker_pid(server, "0")
        os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda: not is_alive(pid), 30)
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, others)
        assert await server.metric("worker_restarts") == 1
        (error,) = [line for line in server.log().splitlines() if "ERROR" in line]
        assert "worker 0 has been silent" in error


async def test_a_worker_that_was_stopped_for_a_moment_goes_on(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(worker_silence_s=60)
    async with crowd(server, redis_server) as (clients, feed):
        pids = set(server.worker_pids())
        pid = worker_pid(server, "0")
        before = feed.published
        os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda: feed.published > before + 500, 30)
        os.kill(pid, signal.SIGCONT)
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
        assert all(client.lives == 1 for client in clients)
        assert set(server.worker_pids()) == pids
    assert_clean_log(server)


@pytest.mark.long
async def test_a_main_that_was_stopped_for_a_while_keeps_its_workers(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(worker_silence_s=4)
    async with crowd(server, redis_server) as (clients, feed):
        pids = set(server.worker_pids())
        before = feed.published
        os.kill(server.pid, signal.SIGSTOP)
        await wait_until(lambda: feed.published > before + 2500, 30)  # five seconds
        for client in clients[::10]:
            await client.ping()
        os.kill(server.pid, signal.SIGCONT)
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
        assert all(client.lives == 1 for client in clients)
        assert set(server.worker_pids()) == pids
    assert_clean_log(server)


@pytest.mark.long
async def test_a_worker_told_to_end_says_goodbye_to_its_clients(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        victims = [client for client in clients if client.worker == "0"]
        others = [client for client in clients if client.worker == "1"]
        os.kill(worker_pid(server, "0"), signal.SIGTERM)
        await wait_until(lambda: all(client.losses == 1 for client in victims))
        for client in victims:
            assert client.states() == ["closing"]
        await ticks_flow(clients)
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, others)
        assert await server.metric("worker_restarts") == 1
    assert_clean_log(server)


# Main


async def test_a_killed_main_takes_its_workers_along_and_a_new_one_serves_again(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        dead = connections_of(clients)
        pids = server.worker_pids()
        await server.kill()
        assert not any(is_alive(pid) for pid in pids)
        await server.start()
        await ticks_flow(clients)
        await everybody_is_right(clients, feed, redis)
        assert all(client.losses >= 1 for client in clients)
        assert not dead.keys() & connections_of(clients).keys()
        assert f"{CLIENTS} connections of an earlier life removed" in server.log()
    await registry_equals(redis, {})
    assert await server.stop() == 0
    # The newest rows are kept, and what was told as wanted, so that the next start tells what has changed.
    assert not [key for key in await redis.keys("*") if not key.startswith(("qp:row", "qp:demanded:"))]
    assert_clean_log(server)


async def test_main_is_killed_while_a_worker_starts(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    server = quotepush_server
    before = set(server.worker_pids())
    os.kill(worker_pid(server, "0"), signal.SIGKILL)
    await wait_until(lambda: set(server.worker_pids()) - before)
    await server.kill()  # waits until the workers are gone, the new one too
    await server.start()
    async with connected_clients(server.ws_url, 4, codes_of) as clients, steady_feed(redis_server.url, CODES):
        await ticks_flow(clients)


# Slow clients


async def stalled_clients(server: QuotepushServer, count: int, **options: Any) -> list[RecordingClient]:
    """Clients that subscribe to everything and then read no more."""
    clients = [RecordingClient(server.ws_url, CODES, receive_buffer_bytes=8192, **options) for _ in range(count)]
    for client in clients:
        await client.open()
        client.stop_reading()
    return clients


@pytest.mark.long
async def test_clients_that_stop_reading_cost_bounded_memory_and_nobody_else_s_time(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(workers=1)
    (pid,) = server.worker_pids()
    async with (
        connected_clients(server.ws_url, 10, lambda n: CODES[n : n + 2]) as others,
        steady_feed(redis_server.url, CODES, 500, BULK) as feed,
    ):
        slow = await stalled_clients(server, 30, history=True)
        await ticks_flow(others)
        at_first = resident_bytes(pid)

        async def have_missed_a_lot() -> bool:
            return await server.metric("rows_merged") * len(BULK["text"]) > 60_000_000

        await wait_until(have_missed_a_lot, 60)
        assert resident_bytes(pid) - at_first < 30_000_000
        await noticed_nothing(server, others)
        newest = await feed.finish()
        for client in others:
            await wait_until(lambda c=client: all(c.last(code) == newest[code] for code in c.codes))
        # Now they read again: what was on its way, and then of each code the newest row at once.
        for client in slow:
            client.go_on_reading()
        for client in slow:
            await wait_until(lambda c=client: all(c.last(code) == newest[code] for code in CODES))
            await wait_until(lambda c=client: c.states() == ["conflating", "realtime"])
            assert client.ticks is not None
            assert {row["code"] for row in client.ticks[-len(CODES) :]} == set(CODES)
            assert client.merged > 500
            listed = (await client.request("list"))["subscriptions"]
            assert sum(entry["merged"] for entry in listed) == client.merged
            (conflating,) = [m for m in client.control if m.get("state") == "conflating"]
            assert conflating["pending"] > 0
        # From here on they get every row again.
        merged, by_main = [client.merged for client in slow], await server.merged_by_main()
        for price in range(1, 20):
            await redis.publish("quote.C00", orjson.dumps({"last": price}))
        for client in slow:
            await wait_until(lambda c=client: c.last("C00") == 19)
        if await server.merged_by_main() == by_main:  # else main itself lagged
            assert [client.merged for client in slow] == merged
        await registry_equals(redis, connections_of([*others, *slow]))
        for client in slow:
            await client.close()
    assert_clean_log(server)


async def test_a_request_of_a_client_that_lags_is_answered_before_its_rows(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1)
    async with steady_feed(redis_server.url, CODES, 1000, BULK) as feed:
        (slow,) = await stalled_clients(server, 1, history=True)
        await wait_until(lambda: server.metric("rows_merged"), 30)
        answers = [asyncio.create_task(slow.request("ping")) for _ in range(3)]
        snapshot = asyncio.create_task(slow.snapshot("C01"))
        await feed.finish()
        slow.go_on_reading()
        assert [answer["type"] for answer in await asyncio.gather(*answers)] == ["pong"] * 3
        (row,) = await snapshot
        assert row["last"] <= feed.newest["C01"]
        await wait_until(lambda: all(slow.last(code) == feed.newest[code] for code in CODES))
        await slow.close()
    assert_clean_log(server)


@pytest.mark.long
async def test_a_client_that_never_reads_again_is_cut_off(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(workers=1, stall_timeout_s=3, heartbeat_ms=200)
    async with (
        RecordingClient(server.ws_url, CODES) as other,
        steady_feed(redis_server.url, CODES, 500, BULK) as feed,
    ):
        slow = await stalled_clients(server, 5)

        async def are_gone() -> bool:
            return await server.metric("connections_closed", reason="stalled") == 5

        await wait_until(are_gone, 30)
        await registry_equals(redis, connections_of([other]))
        await wait_until(lambda: is_ready(server, 1), RESTART_S)
        for client in slow:
            client.go_on_reading()
            await wait_until(lambda c=client: c.has_ended)
            assert client.close_code == 1006
            await client.close()
        await everybody_is_right([other], feed, redis)
        await noticed_nothing(server, [other])
    assert_clean_log(server)


@pytest.mark.long
async def test_a_client_that_takes_a_little_now_and_then_is_not_cut_off(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, stall_timeout_s=5, heartbeat_ms=100)
    async with (
        steady_feed(redis_server.url, CODES, 300, BULK),
        RawWebSocket(server.port, receive_buffer_bytes=8192) as ws,
    ):
        await ws.request("subscribe", codes=CODES)
        loop = asyncio.get_running_loop()
        end = loop.time() + 11
        while loop.time() < end or await server.metric("rows_merged") <= 1000:
            assert await loop.sock_recv(ws.socket, 4096)
            await asyncio.sleep(0.5)
        assert await server.metric("connections_closed") == 0


@pytest.mark.long
async def test_a_client_that_says_goodbye_and_never_reads_again_is_cut_off(
    start_server: StartServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = await start_server(workers=1, stall_timeout_s=1, heartbeat_ms=200)
    async with (
        steady_feed(redis_server.url, CODES, 500, BULK),
        RawWebSocket(server.port, receive_buffer_bytes=8192) as ws,
    ):
        await ws.request("subscribe", codes=CODES)
        await wait_until(lambda: server.metric("rows_merged"), 30)
        await ws.send_frame(CLOSE, (1000).to_bytes(2, "big"))
        await wait_until(lambda: is_ready(server, 0), RESTART_S)
        await registry_equals(redis, {})


# Clients that vanish


@pytest.mark.long
async def test_a_peer_that_answers_no_ping_is_dropped_and_one_that_does_is_kept(
    start_server: StartServer, redis: Redis
) -> None:
    # So long that the one who answers does so in time, however busy this process is.
    server = await start_server(workers=1, ping_interval_s=0.3, ping_timeout_s=3, heartbeat_ms=100)
    async with RecordingClient(server.ws_url, ["AAPL"]) as quiet, RawWebSocket(server.port) as dead:
        await dead.request("subscribe", codes=["AAPL", "MSFT"])
        await dead.read_message("snapshot")
        pinged = False
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                opcode, _ = await dead.read_frame()
                assert opcode != CLOSE
                pinged = pinged or opcode == PING
        assert pinged
        await wait_until(lambda: server.metric("connections_closed", reason="no_pong"))
        await registry_equals(redis, connections_of([quiet]))
        beats = quiet.heartbeats
        await wait_until(lambda: quiet.heartbeats > beats + 40, 30)
        assert quiet.is_open
    assert_clean_log(server)


async def test_connections_that_are_reset_leave_nothing_behind(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server, reconnects=False) as (clients, feed):
        for client in clients[::2]:
            client.abort()
        clients[:] = clients[1::2]
        await wait_until(lambda: is_ready(server, len(clients)), RESTART_S)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, clients)
    assert_clean_log(server)


async def test_connections_that_are_reset_in_the_middle_of_anything_leave_nothing_behind(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    handshake = (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    subscribe = client_frame(TEXT, orjson.dumps({"action": "subscribe", "codes": CODES}))
    everything = handshake + subscribe + client_frame(TEXT, b'{"action":"list"}') * 5
    dice = random.Random(1)
    async with crowd(server, redis_server) as (clients, feed):
        for n in range(400):
            s = socket.create_connection(("127.0.0.1", server.port))
            s.sendall(everything[: dice.choice((len(handshake), len(everything), dice.randrange(len(everything))))])
            if n % 4:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if n % 3 == 0:
                await asyncio.sleep(dice.random() / 200)
            s.close()
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, clients)

        async def are_counted() -> bool:
            return await server.metric("connections") == CLIENTS

        await wait_until(are_counted)
    assert_clean_log(server)


# Clients that rage

GARBAGE = [
    b"\0" * 1000,
    b"\xff" * 1000,
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x5a" * 500,  # a TLS hello
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /ws HTTP/1.1\r\n\r\n",
    b"GET " + b"/x" * 20_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /ws HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"*1\r\n$4\r\nPING\r\n",
    b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: short\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"GET /..%2f..%2f..%2fetc/passwd HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /ws\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
    random.Random(7).randbytes(20_000),
]  # fmt: skip


async def throw(port: int, garbage: bytes) -> bytes:
    """Send anything to a port, close our side, and return all that comes back before the other does."""
    loop = asyncio.get_running_loop()
    with socket.socket() as s:
        s.setblocking(False)
        await loop.sock_connect(s, ("127.0.0.1", port))
        answer = b""
        try:
            await loop.sock_sendall(s, garbage)
            s.shutdown(socket.SHUT_WR)
            while data := await asyncio.wait_for(loop.sock_recv(s, 65_536), 10):
                answer += data
        except (ConnectionError, OSError):
            pass
        return answer


async def test_garbage_on_both_ports_harms_nobody(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        for port in (server.port, server.admin_port):
            for garbage in GARBAGE:
                answer = await throw(port, garbage)
                assert b"HTTP/1.1 101" not in answer
                assert b"root:" not in answer
                assert b"Traceback" not in answer
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, clients)
    assert_clean_log(server)


MALFORMED = {
    "a reserved opcode": client_frame(3, b"x"),
    "a reserved control opcode": client_frame(11, b"x"),
    "a reserved bit": client_frame(TEXT, b'{"action":"ping"}', bits=0x40),
    "all reserved bits": client_frame(TEXT, b"x", bits=0x70),
    "a ping in fragments": client_frame(PING, b"x", fin=False),
    "a ping that is too long": client_frame(PING, b"x" * 126),
    "a close that is too long": client_frame(CLOSE, b"\x03\xe8" + b"x" * 124),
    "a close with one byte": client_frame(CLOSE, b"\x03"),
    "a close with a code that nobody may send": client_frame(CLOSE, (1005).to_bytes(2, "big")),
    "a close with a code below all": client_frame(CLOSE, (3).to_bytes(2, "big")),
    "a close whose reason is no text": client_frame(CLOSE, b"\x03\xe8\xff\xfe"),
    "a continuation of nothing": client_frame(0, b"x"),
    "a message within a message": client_frame(TEXT, b"x", fin=False) + client_frame(TEXT, b"y"),
    "a length beyond everything": b"\x81\xff" + b"\xff" * 8 + b"mask",
    "a length of four gigabytes": b"\x81\xff" + (1 << 32).to_bytes(8, "big") + b"mask" + b"x" * 1000,
    "a binary message": client_frame(BINARY, b"\0\1\2"),
    "no text": client_frame(TEXT, b"\xff\xfe"),
    "noise": random.Random(3).randbytes(5000),
}


async def test_malformed_frames_end_their_own_connection_only(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (clients, feed):
        ends = {}
        for name, frames in MALFORMED.items():
            async with RawWebSocket(server.port) as ws:
                await ws.request("subscribe", codes=["C00"])
                await ws.read_message("snapshot")
                with contextlib.suppress(ConnectionError):
                    await ws.send_bytes(frames)
                    await ws.send_bytes(client_frame(TEXT, b'{"action":"ping"}') * 3)
                try:
                    ends[name] = (await ws.read_close())[0]
                except (EOFError, ConnectionError):
                    ends[name] = 1006
        assert {name: code for name, code in ends.items() if code not in (1002, 1003, 1007, 1009)} == {}
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await everybody_is_right(clients, feed, redis)
        await noticed_nothing(server, clients)
    assert_clean_log(server)


BAD_TICKS: dict[bytes, str] = {
    b"": "bad_json",
    b"{": "bad_json",
    b"nonsense": "bad_json",
    b'{"last":NaN}': "bad_json",
    b'{"last":Infinity}': "bad_json",
    b'{"last":1e999}': "bad_json",
    b'{"name":"\xff\xfe"}': "bad_json",
    b"\x80\x04\x95": "bad_json",
    b"[" * 3000: "bad_json",
    b"[]": "not_an_object",
    b'"text"': "not_an_object",
    b"1": "not_an_object",
    b"null": "not_an_object",
    b'{"last":"1"}': "wrong_type",
    b'{"last":true}': "wrong_type",
    b'{"last":[]}': "wrong_type",
    b'{"volume":1.5}': "wrong_type",
    b'{"ts":"now"}': "wrong_type",
    b'{"ts":1e13}': "wrong_type",
    b'{"ts":-1}': "wrong_type",
    b'{"ts":1700000000000000}': "wrong_type",
    b'{"name":5}': "wrong_type",
    b'{"bids":[[1]]}': "wrong_type",
    b'{"bids":[[1,2,3]]}': "wrong_type",
    b'{"asks":{"1":2}}': "wrong_type",
    b'{"code":5}': "wrong_type",
    b'{"last":-0.01}': "negative",
    b'{"volume":-5}': "negative",
    b'{"asks":[[-1,5]]}': "negative",
    b'{"code":"OTHER","last":1}': "wrong_channel",
    b'{"code":"no such","last":1}': "bad_code",
    b'{"text":"' + b"x" * 9000 + b'"}': "too_large",
    b'{"deep":' + b"[" * 500 + b"]" * 500 + b"}": "too_deep",
}


async def test_bad_ticks_at_speed_are_counted_and_harm_no_good_one(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis
) -> None:
    server = quotepush_server
    rounds = 100
    async with crowd(server, redis_server) as (clients, feed), redis_server.client() as vandal:
        for _ in range(rounds):
            pipeline = vandal.pipeline(transaction=False)
            for n, payload in enumerate(BAD_TICKS):
                pipeline.publish(f"quote.{CODES[n % len(CODES)]}", payload)
            await pipeline.execute()

        async def are_counted() -> bool:
            return await server.metric("ticks_refused") == rounds * len(BAD_TICKS)

        await wait_until(are_counted)
        for reason in set(BAD_TICKS.values()):
            count = sum(each == reason for each in BAD_TICKS.values())
            assert await server.metric("ticks_refused", reason=reason) == rounds * count, reason
        await everybody_is_right(clients, feed, redis)
        assert await server.metric("ticks_accepted") == feed.published
        await noticed_nothing(server, clients)
    assert_clean_log(server)


async def test_a_row_that_grows_without_end_is_stopped_and_its_code_goes_on(
    start_server: StartServer, redis: Redis
) -> None:
    server = await start_server(workers=1, max_row_bytes=2000, max_board_codes=3)
    async with RecordingClient(server.ws_url, ["A", "B", "D"]) as client:
        for n in range(100):
            await redis.publish("quote.A", orjson.dumps({f"field{n}": "x" * 100}))
        await redis.publish("quote.A", b'{"last":7}')
        for code in "BCDE":
            await redis.publish(f"quote.{code}", b'{"last":8}')
        await wait_until(lambda: client.last("A") == 7 and client.last("B") == 8)
        assert len(orjson.dumps(client.rows["A"])) < 2200
        assert await server.metric("ticks_refused", reason="row_too_large") > 70

        async def is_full() -> bool:
            return await server.metric("ticks_refused", reason="board_full") == 2

        await wait_until(is_full)  # those came behind the one that is here
        assert client.last("D") is None
        assert await server.metric("board_codes") == 3
    assert_clean_log(server)


# Crowds


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process open some thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096))
    if wanted < 4096:
        pytest.skip(f"only {wanted} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.long
async def test_a_thousand_clients_come_at_once_and_go_at_once(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis, many_files: None
) -> None:
    server = quotepush_server
    async with crowd(server, redis_server) as (others, feed):
        newcomers = [RecordingClient(server.ws_url, codes_of(n)) for n in range(1000)]
        await asyncio.gather(*(client.open() for client in newcomers))
        await wait_until(lambda: is_ready(server, CLIENTS + 1000), RESTART_S)
        await everybody_is_right([*others, *newcomers], feed, redis)
        assert all(client.lives == 1 for client in others)
        await asyncio.gather(*(client.close() for client in newcomers))
        await wait_until(lambda: is_ready(server, CLIENTS), RESTART_S)
        await registry_equals(redis, connections_of(others))
    await registry_equals(redis, {})
    assert_clean_log(server)


@pytest.mark.long
async def test_a_thousand_clients_come_back_at_once_when_the_server_does(
    quotepush_server: QuotepushServer, redis_server: RedisServer, redis: Redis, many_files: None
) -> None:
    server = quotepush_server
    async with (
        connected_clients(server.ws_url, 1000, codes_of, reconnects=True) as clients,
        steady_feed(redis_server.url, CODES, 200) as feed,
    ):
        await server.kill()
        await server.start()
        await wait_until(lambda: all(client.is_open for client in clients), 60)
        await everybody_is_right(clients, feed, redis)
        await wait_until(lambda: is_ready(server, 1000), RESTART_S)
    await registry_equals(redis, {})
    assert_clean_log(server)


async def test_no_process_is_left_behind(start_server: StartServer) -> None:
    server = await start_server(workers=3)
    pids = [server.pid, *server.worker_pids()]
    assert sorted(command_line(pid).rpartition(": ")[2] for pid in pids) == ["main", "worker 0", "worker 1", "worker 2"]
    assert await server.stop() == 0
    assert not any(is_alive(pid) for pid in pids)
