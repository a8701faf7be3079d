"""Delayed quotes on a real server: the same market later, by whatever way, and nothing younger by any."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect

from quotepush import Publisher
from tests.support.event_source import connected
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

DELAY_S = 2
CODES = ("AAPL", "600519.SH", "TSLA")

StartServer = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def server(start_server: StartServer, tmp_path: Path) -> QuotepushServer:
    """Tokens, one delay, and somebody without a token sees no more than with it."""
    (tmp_path / "token.key").write_text(KEY)
    return await start_server(
        workers=2, token_key_file=str(tmp_path / "token.key"), delays=f"{DELAY_S},5", anonymous="yes",
        anonymous_delay_s=DELAY_S, requests_per_s=1000, rows_interval_s=0,
    )  # fmt: skip


def bearer(**claims: Any) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token(sub='ann', **claims)}"}}


class Witness:
    """Knows when each price of each code was published, and looks at every row that somebody is shown."""

    def __init__(self) -> None:
        self.published_ms: dict[tuple[str, float], int] = {}
        self.seen: dict[str, set[tuple[str, float]]] = {}

    async def publish(self, redis: Redis, prices: Iterable[int]) -> None:
        for price in prices:
            for code in CODES:
                self.published_ms[code, float(price)] = time.time_ns() // 1_000_000
                await publish(
                    redis, code, last=float(price), prev_close=100.0, name=f"Name of {code}", bids=[[price - 0.1, 5]]
                )
            await asyncio.sleep(0.05)

    def look(self, way: str, rows: list[dict[str, Any]]) -> None:
        now_ms = time.time_ns() // 1_000_000
        for row in rows:
            if "last" in row:
                age_ms = now_ms - self.published_ms[row["code"], row["last"]]
                assert age_ms >= DELAY_S * 1000, f"{way} shows {row} after {age_ms} ms"
                self.seen.setdefault(way, set()).add((row["code"], row["last"]))


async def ask_again_and_again(server: QuotepushServer, witness: Witness) -> None:
    """Everything that a plain GET answers with."""
    async with aiohttp.ClientSession(server.url) as http:
        while True:
            async with http.get(f"/quotes?codes={','.join(CODES)}&fields=last,bids") as response:
                said = await response.json()
                assert said["epoch"].endswith(f"~{DELAY_S}")
                witness.look("/quotes", said["quotes"])
            for query in ("q=name", "movers=10"):
                async with http.get(f"/codes?{query}") as response:
                    found = await response.json()
                    witness.look(query, found if type(found) is list else found["up"] + found["down"])
            await asyncio.sleep(0.05)


async def test_no_way_leads_to_a_row_that_is_younger_than_the_delay(server: QuotepushServer, redis: Redis) -> None:
    witness = Witness()
    clients = {
        "rows": RecordingClient(server.ws_url, CODES, on_ticks=lambda _, rows: witness.look("rows", list(rows))),
        "by token": RecordingClient(
            server.ws_url, CODES, on_ticks=lambda _, rows: witness.look("by token", list(rows)),
            **bearer(delay_s=DELAY_S),
        ),
        "books": RecordingClient(server.ws_url, msgpack=True, history=True),
        "every now and then": RecordingClient(server.ws_url),
    }  # fmt: skip
    for client in clients.values():
        await client.open()
    assert clients["rows"].hello["limits"]["delay_s"] == DELAY_S
    await clients["books"].subscribe(*CODES, fields=["last", "bids"], max_rate=5)

    async def ask_for_snapshots() -> None:
        while True:
            await clients["every now and then"].request("snapshot", codes=list(CODES))
            witness.look("snapshot", list(clients["every now and then"].rows.values()))
            witness.look("books", list(clients["books"].rows.values()))
            await asyncio.sleep(0.05)

    async with connected(server.port, *CODES) as stream:

        async def look_at_stream() -> None:
            while True:
                witness.look("stream", list(stream.rows.values()))
                await asyncio.sleep(0.02)

        tasks = [
            asyncio.create_task(what)
            for what in (ask_again_and_again(server, witness), ask_for_snapshots(), look_at_stream())
        ]
        await witness.publish(redis, range(1, 21))
        await wait_until(lambda: witness.seen.get("rows"), 30, "some of them are shown")
        await witness.publish(redis, range(21, 41))
        newest = {(code, 40.0) for code in CODES}
        ways = ("rows", "by token", "books", "snapshot", "stream", "/quotes", "q=name", "movers=10")

        def all_have_the_newest() -> bool:
            return all(task.done() for task in tasks) or all(newest <= witness.seen.get(way, set()) for way in ways)

        await wait_until(all_have_the_newest, 30, what="everybody is shown the newest rows in the end")
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
    for client in clients.values():
        await client.close()
    assert len(witness.seen["rows"]) > len(CODES), "there were rows on the way to the newest"
    assert await redis.smembers("qp:codes") <= set(CODES)


def restated(client: RecordingClient) -> list[dict[str, Any]]:
    """The rows of its snapshots that are of another epoch than hello says."""
    return [row for m in client.control if m["type"] == "snapshot" for row in m["data"] if "epoch" in row]


async def next_said(socket: ClientConnection) -> dict[str, Any]:
    """What comes next besides heartbeats: the first may come at any time."""
    while (said := orjson.loads(await socket.recv()))["type"] == "heartbeat":
        pass
    return said


async def test_a_connection_changes_between_live_and_delayed_with_its_token(
    server: QuotepushServer, redis: Redis
) -> None:
    published_s = time.monotonic()
    await publish(redis, "AAPL", last=1.0)
    async with RecordingClient(server.ws_url, **bearer()) as client, RecordingClient(server.ws_url) as other:
        await client.subscribe("AAPL")
        await wait_until(lambda: client.last("AAPL") == 1.0)
        await other.subscribe("AAPL")
        assert "AAPL" not in other.rows or time.monotonic() - published_s >= DELAY_S
        await wait_until(lambda: other.last("AAPL") == 1.0)

        published_s = time.monotonic()
        await publish(redis, "AAPL", last=2.0)
        await wait_until(lambda: client.last("AAPL") == 2.0)
        ack = await client.request("auth", token=token(sub="ann", delay_s=DELAY_S))
        assert ack["limits"]["delay_s"] == DELAY_S
        past, *_ = await wait_until(
            lambda: [row for row in restated(client) if row["epoch"].endswith(f"~{DELAY_S}")],
            what="it is back in the past, in another epoch",
        )
        assert past["last"] == 1.0 or time.monotonic() - published_s >= DELAY_S
        await wait_until(lambda: client.last("AAPL") == 2.0, what="and time goes on there")

        await publish(redis, "AAPL", last=3.0)
        assert "delay_s" not in (await client.request("auth", token=token(sub="ann")))["limits"]
        await wait_until(lambda: client.last("AAPL") == 3.0)
        listed = await client.request("list")
        assert [subscription["code"] for subscription in listed["subscriptions"]] == ["AAPL"]


async def test_a_delay_that_the_server_does_not_have_is_refused(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as client:
        refused = await client.request("auth", token=token(sub="ann", delay_s=DELAY_S + 1))
    assert refused["error"] == "auth_failed"


async def test_who_was_away_resumes_in_the_delayed_market(server: QuotepushServer, redis: Redis) -> None:
    await publish(redis, "AAPL", last=1.0)
    async with RecordingClient(server.ws_url) as client:
        await client.subscribe("AAPL")
        await wait_until(lambda: client.last("AAPL") == 1.0)
        seq, epoch = client.rows["AAPL"]["seq"], client.hello["epoch"]
        async with RecordingClient(server.ws_url) as other:  # so that the rows are kept meanwhile
            await other.subscribe("AAPL")
            await client.close()
            await publish(redis, "AAPL", last=2.0)
            await wait_until(lambda: other.last("AAPL") == 2.0)

            place = {"epoch": epoch, "since": {"AAPL": seq}}
            for options, resumed in (({}, "replay"), (bearer(), "snapshot")):
                async with connect(server.ws_url, **options) as socket:
                    await next_said(socket)
                    await socket.send(orjson.dumps({"action": "subscribe", "codes": ["AAPL"], **place}).decode())
                    ack = await next_said(socket)
                    assert ack["accepted"][0]["resume"] == resumed
                    assert (await next_said(socket))["data"][0]["last"] == 2.0


async def test_after_a_restart_the_log_still_shows_what_was(server: QuotepushServer, redis_server: RedisServer) -> None:
    published: dict[float, float] = {}
    async with Publisher(redis_server.url) as publisher:
        for price in range(1, 11):
            published[float(price)] = time.time()
            await publisher.publish([{"code": "AAPL", "last": float(price)}])
            await asyncio.sleep(0.3)
    await server.stop()
    await server.start()

    shown: dict[float, float] = {}
    five = RecordingClient(
        server.ws_url, ["AAPL"], on_ticks=lambda _, rows: shown.update({row["last"]: time.time() for row in rows}),
        **bearer(delay_s=5),
    )  # fmt: skip
    async with five:
        await wait_until(lambda: five.last("AAPL") == 10.0, what="the newest row of before the restart is shown")
    assert list(shown) == sorted(shown)
    assert all(at - published[price] >= 5 for price, at in shown.items())
