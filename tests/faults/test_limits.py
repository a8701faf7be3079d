"""At the limits: no file is left to open, ticks come faster than anybody can take them, main or a worker sleeps."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from tests.support.flood import flood
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

pytestmark = pytest.mark.fault

StartServer = Callable[..., Awaitable[QuotepushServer]]

# Of 300 files the server keeps 256 for itself.
OPEN_FILES, PLACES = (280, 300), 44
CODES = [f"C{n:03}" for n in range(400)]
# A machine may be so slow that main lags longer than a probe may take by default; that has a test of its own.
PATIENT = {"probe_timeout_s": 30}
WATCHERS = 8
CODES_EACH = len(CODES) // WATCHERS  # each code has one watcher, so each row that is merged is merged for one client


def ticks(count: int, codes: list[str], **more: Any) -> Iterator[tuple[str, bytes]]:
    """Ticks of all codes in turn; the last ones say ``count`` and a little less."""
    for n in range(1, count + 1):
        yield codes[n % len(codes)], orjson.dumps({"last": n, **more})


def newest(count: int, codes: list[str]) -> dict[str, int]:
    """Code to the price that the last of :func:`ticks` has said."""
    return {codes[n % len(codes)]: n for n in range(count - len(codes) + 1, count + 1)}


async def feed_is_up(server: QuotepushServer) -> bool:
    """Say whether Redis has main as a subscriber: that takes it a moment longer than being ready for clients."""
    return bool(await server.metric("feed_up"))


async def all_are_accepted(server: QuotepushServer, count: int) -> None:
    """Wait until the server has counted as many ticks as were published."""

    async def are_counted() -> bool:
        return await server.metric("ticks_accepted") == count

    await wait_until(are_counted, 60)


async def everything_arrived(server: QuotepushServer, clients: list[RecordingClient], count: int) -> None:
    """Each client has the newest row of each of its codes, and what it was not sent it was told of."""
    prices = newest(count, CODES)
    for client in clients:
        await wait_until(lambda c=client: all(c.last(code) == prices[code] for code in c.codes), 30)
        assert {client.rows[code]["seq"] for code in client.codes} == {count // len(CODES)}
        # The chain of prev, which the client has checked row by row, leaves no row out.
        assert client.received + client.merged == CODES_EACH * count // len(CODES)
        listed = (await client.request("list"))["subscriptions"]
        assert sum(entry["merged"] for entry in listed) == client.merged
        assert client.lives == 1
    assert await server.metric("ticks_refused") == 0
    assert "Traceback" not in server.log()
    assert "ERROR" not in server.log()


def watchers(server: QuotepushServer) -> contextlib.AbstractAsyncContextManager[list[RecordingClient]]:
    return connected_clients(server.ws_url, WATCHERS, lambda n: CODES[n * CODES_EACH : (n + 1) * CODES_EACH])


# Files


async def let_in(server: QuotepushServer) -> RecordingClient:
    """Connect; come back as long as there is no place, for another worker may have spare ones for a second or two."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await RecordingClient(server.ws_url, ["AAPL"]).open()
            except (InvalidHandshake, OSError):
                await asyncio.sleep(0.1)


async def is_full(server: QuotepushServer) -> bool:
    return bool((await server.admin("/readyz"))[1]["connections"] == PLACES)


async def everybody_is_served(clients: list[RecordingClient], redis: RedisServer, price: int) -> None:
    async with redis.client() as publisher:
        await publish(publisher, "AAPL", last=price)
    await wait_until(lambda: all(client.is_open and client.last("AAPL") == price for client in clients))


@pytest.mark.parametrize(("wanted", "granted"), [(0, PLACES), (1000, PLACES), (10, 10)])
async def test_the_start_says_how_many_files_may_be_open_and_how_many_connections_that_makes(
    wanted: int, granted: int, start_server: StartServer
) -> None:
    server = await start_server(workers=1, open_files=OPEN_FILES, max_connections=wanted)
    (line,) = [line for line in server.log().splitlines() if "open-file limit" in line]
    assert line.endswith(f" INFO    main: open-file limit 300, max_connections {granted}")
    assert (await server.admin("/readyz"))[1]["max_connections"] == granted
    lowered = "WARNING main: max_connections is lowered from 1000 to 44: only 300 files may be open"
    assert (lowered in server.log()) is (wanted > granted)


async def test_with_few_files_the_door_is_shut_in_time_and_opens_for_each_who_leaves(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(open_files=OPEN_FILES, max_connections=1000)
    clients = [await let_in(server) for _ in range(PLACES)]
    for price in range(1, 11):
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.ws_url, proxy=None)
        assert refused.value.response.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0
        await everybody_is_served(clients, redis_server, price)
    await wait_until(lambda: is_full(server))
    for price in range(11, 14):
        await clients.pop(0).close()
        clients.append(await let_in(server))
        with pytest.raises(InvalidStatus):
            await connect(server.ws_url, proxy=None)
        await everybody_is_served(clients, redis_server, price)

    async def are_counted() -> bool:
        return await server.metric("connections_refused", reason="overloaded") >= 13

    await wait_until(are_counted)
    for client in clients:
        await client.close()
    assert "Traceback" not in server.log()
    assert "ERROR" not in server.log()


async def test_when_silent_sockets_have_used_up_all_files_the_clients_are_served_on(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    """Who says nothing is no connection yet, and takes a file all the same."""
    server = await start_server(workers=1, open_files=OPEN_FILES)
    (pid,) = server.worker_pids()
    clients = [await let_in(server) for _ in range(10)]
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * OPEN_FILES[1])]
    try:
        await wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) >= OPEN_FILES[1] - 1, 30)
        for price in range(1, 20):
            await everybody_is_served(clients, redis_server, price)
    finally:
        for s in silent:
            s.close()
    clients.append(await let_in(server))
    await everybody_is_served(clients, redis_server, 20)
    assert server.worker_pids() == [pid]
    for client in clients:
        assert client.lives == 1
        await client.close()
    assert "Traceback" not in server.log()


# Ticks


@pytest.mark.long
async def test_a_flood_of_ticks_is_counted_to_the_last_and_the_feed_link_lives(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    count = 200_000
    server = await start_server(**PATIENT)
    await wait_until(lambda: feed_is_up(server))
    async with watchers(server) as clients:
        flooded = await flood(redis_server, ticks(count, CODES))
        assert flooded.replies == b":1\r\n" * count  # the feed link was there for each of them
        await all_are_accepted(server, count)
        await everything_arrived(server, clients, count)
        assert len(flooded.feed_clients) == 1
        assert await server.metric("feed_links") == 1
        print(
            f"\n{flooded}; {sum(client.received for client in clients):,} rows delivered, "
            f"{sum(client.merged for client in clients):,} merged, "
            f"{await server.metric('rows_merged_main'):,.0f} of them by main"
        )


async def test_ticks_that_come_while_main_stands_still_are_all_taken(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    count = 20_000  # 2 MB: no worker is behind by so little
    server = await start_server(**PATIENT)
    await wait_until(lambda: feed_is_up(server))
    async with watchers(server) as clients:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            flooded = await flood(redis_server, ticks(count, CODES))
            await asyncio.sleep(1)  # the fault itself: two probes are due meanwhile
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert flooded.replies == b":1\r\n" * count
        await all_are_accepted(server, count)
        await everything_arrived(server, clients, count)
        assert await server.metric("feed_links") == 1
        merged = sum(client.merged for client in clients)
        by_main = await server.metric("rows_merged_main")

        async def are_counted() -> bool:
            return await server.metric("rows_merged") + by_main == merged

        await wait_until(are_counted)
        print(f"\nmain stood still: {merged:,} of {count:,} rows merged, {by_main:,.0f} of them by main")


@pytest.mark.long
async def test_a_main_that_lags_longer_than_a_probe_may_take_keeps_the_link(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    """Between two links ticks are lost, and every client is told that the feed is down."""
    count = 300_000  # 20 MB for Redis to hold back, of the 32 that it allows
    server = await start_server(workers=1, probe_interval_s=0.1, probe_timeout_s=3)  # more than Redis stands still
    await wait_until(lambda: feed_is_up(server))
    async with RecordingClient(server.ws_url, CODES[:20]) as client:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            flooded = await flood(redis_server, ticks(count, CODES[:20]))
            await asyncio.sleep(3.2)  # the fault itself: longer than a probe may take
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert flooded.replies == b":1\r\n" * count
        prices = newest(count, CODES[:20])
        await wait_until(lambda: all(client.last(code) == prices[code] for code in client.codes), 30)

        async def has_caught_up() -> bool:
            return await server.metric("feed_lag_seconds") < 0.1 and await feed_is_up(server)

        await wait_until(has_caught_up, 30)
        assert "feed link lost" not in server.log()
        assert await server.metric("ticks_accepted") == count
        assert await server.metric("feed_links") == 1


async def test_rows_that_are_merged_for_a_worker_that_stands_still_are_counted(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    count = 8000
    server = await start_server(workers=1, worker_silence_s=60, max_row_bytes=4096, **PATIENT)
    await wait_until(lambda: feed_is_up(server))
    (pid,) = server.worker_pids()
    async with watchers(server) as clients:
        os.kill(pid, signal.SIGSTOP)
        try:
            await flood(redis_server, ticks(count, CODES, text="x" * 3000))  # 24 MB; a worker is slow above 4
            await all_are_accepted(server, count)
        finally:
            os.kill(pid, signal.SIGCONT)
        await everything_arrived(server, clients, count)
        merged = sum(client.merged for client in clients)
        assert merged

        async def are_counted() -> bool:
            return await server.metric("rows_merged") + await server.metric("rows_merged_main") == merged

        await wait_until(are_counted, 20)
