"""What docs/protocol.md promises, said to a real server by a client of somebody else's make."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.raw_websocket import BINARY, CLOSE, PING, PONG, TEXT, RawWebSocket, client_frame
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

StartServer = Callable[..., Awaitable[QuotepushServer]]


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuotepushServer]:
    """One server with every default, for all tests that need no other; each takes codes of its own (``new_codes``).

    But it does not take a Redis for dead that stands still for a moment: plain ticks would be lost.
    """
    server = QuotepushServer(tmp_path_factory.mktemp("server"), shared_redis.url, probe_timeout_s=30)
    asyncio.run(server.start())
    yield server
    try:
        assert asyncio.run(server.stop()) == 0
    finally:
        server.kill_everything()
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()


@pytest.fixture
async def redis(shared_redis: RedisServer) -> AsyncIterator[Redis]:
    async with shared_redis.client() as client:
        yield client


@pytest.fixture
async def own_redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """For tests that start a server of their own."""
    async with redis_server.client() as client:
        yield client


_numbers = itertools.count(1)


def new_codes(count: int) -> list[str]:
    """Codes that no other test uses."""
    return [f"T{next(_numbers):05}" for _ in range(count)]


async def publish_and_wait(server: QuotepushServer, redis: Redis, code: str, **fields: Any) -> None:
    """Publish one tick and return when the server has it."""
    before = await server.metric("ticks_accepted")
    await publish(redis, code, **fields)

    async def has_it() -> bool:
        return await server.metric("ticks_accepted") > before

    await wait_until(has_it)


def of_type(client: RecordingClient, kind: str) -> list[dict[str, Any]]:
    """The messages of one type that it was sent."""
    return [message for message in client.control if message["type"] == kind]


# Hello


async def test_hello_comes_first_and_says_who_serves_and_what_is_allowed(server: QuotepushServer) -> None:
    before_ms = time.time_ns() // 1_000_000
    async with RecordingClient(server.ws_url) as client:
        hello = client.hello
    assert hello["version"] == "quotes.v1"
    assert hello["conn"].startswith("test.")
    assert len(hello["conn_key"]) >= 16
    assert len(hello["epoch"]) >= 8
    assert before_ms <= hello["time"] <= time.time_ns() // 1_000_000
    assert hello["auth"] == "none"
    assert hello["heartbeat_ms"] == 5000
    assert {"name", "last", "change_pct", "volume"} <= set(hello["fields"])
    assert not {"bids", "asks"} & set(hello["fields"])
    assert hello["limits"] == {
        "codes": 1000, "codes_per_request": 1000, "requests_per_s": 10, "message_bytes": 131072, "max_rate": None,
    }  # fmt: skip


async def test_each_connection_has_a_name_and_a_key_of_its_own(server: QuotepushServer) -> None:
    async with connected_clients(server.ws_url, 8) as clients:
        assert len({client.hello["conn"] for client in clients}) == 8
        assert len({client.hello["conn_key"] for client in clients}) == 8
        assert len({client.hello["epoch"] for client in clients}) == 1


# Subscribe


async def test_a_subscriber_gets_the_snapshot_and_then_each_tick(server: QuotepushServer, redis: Redis) -> None:
    known, new = new_codes(2)
    await publish_and_wait(server, redis, known, last=190.5, prev_close=190, ts=1_700_000_000_000)
    async with RecordingClient(server.ws_url, history=True) as client:
        ack = await client.subscribe(known, new)
        assert ack["accepted"] == [{"code": known, "as": known}, {"code": new, "as": new}]
        assert (ack["rejected"], ack["total"], ack["limit"]) == ([], 2, 1000)
        (snapshot,) = of_type(client, "snapshot")
        assert snapshot["data"] == [
            {
                "code": known, "seq": 1, "ts": 1_700_000_000_000, "last": 190.5, "prev_close": 190, "change": 0.5,
                "change_pct": 0.26,
            },
            {"code": new, "seq": 0},
        ]  # fmt: skip
        await publish(redis, known, last=189, ts=1_700_000_000_001)
        await publish(redis, new, last=400.25, ts=1_700_000_000_002)
        await wait_until(lambda: client.received == 2)
    assert client.ticks == [
        {
            "prev": 1, "code": known, "seq": 2, "ts": 1_700_000_000_001, "last": 189, "prev_close": 190, "change": -1.0,
            "change_pct": -0.53,
        },
        {"prev": 0, "code": new, "seq": 1, "ts": 1_700_000_000_002, "last": 400.25},
    ]  # fmt: skip


async def test_several_spellings_of_one_instrument_are_one_subscription(server: QuotepushServer, redis: Redis) -> None:
    async with RecordingClient(server.ws_url, history=True) as client:
        ack = await client.subscribe("sh600519", "600519.SS", "600519", "0700.hk", "brk.b", "000001")
        assert ack["accepted"] == [
            {"code": "600519.SH", "as": "sh600519"},
            {"code": "600519.SH", "as": "600519.SS"},
            {"code": "600519.SH", "as": "600519"},
            {"code": "00700.HK", "as": "0700.hk"},
            {"code": "BRK.B", "as": "brk.b"},
            {"code": "000001.SZ", "as": "000001"},
        ]
        assert ack["total"] == 4
        await publish(redis, "600519", last=1688)
        await publish(redis, "SSE.600519", last=1689)
        await publish(redis, "hk00700", last=300)
        await wait_until(lambda: client.received + client.merged == 3)
        assert client.last("600519.SH") == 1689
        assert client.last("00700.HK") == 300
        assert (await client.unsubscribe("600519.XSHG"))["removed"] == ["600519.SH"]


async def test_one_bad_code_does_not_refuse_the_others(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as client:
        ack = await client.subscribe("AAPL", "no such", "MSFT", "", "A" * 33, "价格")
        assert [entry["as"] for entry in ack["accepted"]] == ["AAPL", "MSFT"]
        assert [(r["as"], r["error"]) for r in ack["rejected"]] == [
            ("no such", "bad_code"), ("", "bad_code"), ("A" * 33, "bad_code"), ("价格", "bad_code"),
        ]  # fmt: skip
        assert all(r["message"] for r in ack["rejected"])
        assert ack["total"] == 2


async def test_without_a_snapshot_the_first_tick_has_no_prev(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    await publish_and_wait(server, redis, code, last=1)
    async with RecordingClient(server.ws_url, history=True) as client:
        await client.subscribe(code, snapshot=False)
        await client.ping()
        assert [m["type"] for m in client.control] == ["hello", "ack", "pong"]
        await publish_and_wait(server, redis, code, last=2)
        await publish_and_wait(server, redis, code, last=3)
        await wait_until(lambda: client.received == 2)
    assert client.ticks is not None
    assert ["prev" in row for row in client.ticks] == [False, True]
    assert [row["seq"] for row in client.ticks] == [2, 3]


async def test_subscribing_again_leaves_no_hole(server: QuotepushServer, redis: Redis) -> None:
    again, other = new_codes(2)
    before = await server.merged_by_main()
    async with RecordingClient(server.ws_url, [again, other], history=True) as client:
        for price in range(1, 41):
            await publish(redis, again, last=price)
            await publish(redis, other, last=price)
            if price % 8 == 0:
                ack = await client.subscribe(again.lower(), snapshot=price % 16 == 0)
                assert ack["total"] == 2
        await wait_until(lambda: client.last(again) == client.last(other) == 40)
        merged = await server.merged_by_main() - before
        assert client.merged <= merged
        assert 40 - merged <= sum(row["code"] == other for row in client.ticks or ()) <= 40


async def test_a_thousand_codes_are_subscribed_in_one_ack_and_one_snapshot(
    server: QuotepushServer, redis: Redis
) -> None:
    codes = new_codes(1000)
    before = await server.metric("ticks_accepted")
    pipeline = redis.pipeline(transaction=False)
    for n, code in enumerate(codes[::2]):
        pipeline.publish(f"quote.{code}", orjson.dumps({"last": n}))
    await pipeline.execute()

    async def are_known() -> bool:
        return await server.metric("ticks_accepted") == before + 500

    await wait_until(are_known)
    async with RecordingClient(server.ws_url) as client:
        ack = await client.subscribe(*codes)
        assert [entry["code"] for entry in ack["accepted"]] == codes
        assert (ack["rejected"], ack["total"]) == ([], 1000)
        assert [m["type"] for m in client.control] == ["hello", "ack", "snapshot"]
        rows = client.control[-1]["data"]
        assert [row["code"] for row in rows] == codes
        assert [row["seq"] for row in rows] == [1, 0] * 500
        await publish(redis, codes[999], last=7)
        await wait_until(lambda: client.last(codes[999]) == 7)


async def test_nobody_gets_a_tick_of_a_code_that_he_did_not_ask_for(server: QuotepushServer, redis: Redis) -> None:
    codes = new_codes(4)
    async with connected_clients(server.ws_url, 10, lambda n: codes[: n % 5], history=True) as clients:
        for price in range(1, 20):
            for code in codes:
                await publish(redis, code, last=price)
        for n, client in enumerate(clients):
            await wait_until(lambda client=client, n=n: all(client.last(code) == 19 for code in codes[: n % 5]))
        for client in clients:
            await client.ping()  # whatever was on its way is here
        for n, client in enumerate(clients):
            assert client.received + client.merged == 19 * (n % 5)
            assert {row["code"] for row in client.ticks or ()} == set(codes[: n % 5])


async def test_sessions_on_both_workers_are_served(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    # The kernel spreads connections by their ports: all of sixteen get the same worker once in 32,768 times.
    async with connected_clients(server.ws_url, 16, lambda n: [code]) as clients:
        assert {client.worker for client in clients} == {"0", "1"}
        for price in range(1, 6):
            await publish(redis, code, last=price)
        await wait_until(lambda: all(client.last(code) == 5 for client in clients))
        assert {client.received + client.merged for client in clients} == {5}


async def test_a_tick_that_changes_nothing_but_its_time_is_not_sent(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code], history=True) as client:
        for ts, last in ((1, 5), (2, 5), (3, 5), (4, 6), (5, 6)):
            await publish_and_wait(server, redis, code, last=last, ts=ts)
        await wait_until(lambda: client.last(code) == 6)
        await client.ping()
        assert client.ticks == [
            {"prev": 0, "code": code, "seq": 1, "ts": 1, "last": 5},
            {"prev": 1, "code": code, "seq": 4, "ts": 4, "last": 6},
        ]
        (listed,) = (await client.request("list"))["subscriptions"]
        assert (listed["code"], listed["seq"], listed["merged"]) == (code, 4, 2)


# Unsubscribe, list, snapshot, ping


async def test_after_the_ack_of_an_unsubscribe_no_row_comes(server: QuotepushServer, redis: Redis) -> None:
    left, kept = new_codes(2)
    async with RecordingClient(server.ws_url, [left, kept]) as client:
        ack = await client.unsubscribe(left, "IBM")
        assert (ack["removed"], ack["total"]) == ([left], 1)
        await publish(redis, left, last=1)
        await publish(redis, kept, last=1)
        await wait_until(lambda: client.last(kept) == 1)
        assert client.received == 1
        await client.subscribe(left)
        assert client.last(left) == 1
        await publish(redis, left, last=2)
        await wait_until(lambda: client.last(left) == 2)


async def test_a_star_unsubscribes_from_everything(server: QuotepushServer, redis: Redis) -> None:
    codes = new_codes(3)
    async with RecordingClient(server.ws_url, codes) as client:
        ack = await client.unsubscribe("*")
        assert (sorted(ack["removed"]), ack["total"]) == (codes, 0)
        assert (await client.request("list"))["subscriptions"] == []
        await publish_and_wait(server, redis, codes[0], last=1)
        await client.ping()
        assert client.received == 0


async def test_list_shows_the_subscriptions_and_where_each_stands(server: QuotepushServer, redis: Redis) -> None:
    quiet, busy = new_codes(2)
    async with RecordingClient(server.ws_url, [quiet, busy]) as client:
        for price in (1, 2, 3):
            await publish_and_wait(server, redis, busy, last=price)
        await wait_until(lambda: client.last(busy) == 3)
        ack = await client.request("list")
        options = {"fields": None, "max_rate": None, "format": "objects"}
        assert ack["subscriptions"] == [
            {"code": quiet, **options, "seq": 0, "merged": 0},
            {"code": busy, **options, "seq": 3, "merged": 0},
        ]
        assert ack["total"] == 2


async def test_a_snapshot_request_makes_no_subscription(server: QuotepushServer, redis: Redis) -> None:
    known, new = new_codes(2)
    await publish_and_wait(server, redis, known, last=5)
    async with RecordingClient(server.ws_url) as client:
        first, second = await client.snapshot(known.lower(), new)
        assert (first["code"], first["seq"], first["last"]) == (known, 1, 5)
        assert second == {"code": new, "seq": 0}
        assert (await client.request("list"))["total"] == 0
        await publish_and_wait(server, redis, known, last=6)
        assert (await client.snapshot(known))[0]["last"] == 6
        assert client.received == 0


async def test_ticks_follow_on_a_snapshot_that_was_asked_for_in_between(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code]) as client:
        for price in range(1, 30):
            await publish(redis, code, last=price)
            if price % 7 == 0:
                await client.snapshot(code)
        await wait_until(lambda: client.last(code) == 29)


async def test_a_snapshot_request_names_what_it_did_not_understand(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as client:
        answer = await client.request("snapshot", codes=["AAPL", "no such"])
        assert answer["accepted"] == [{"code": "AAPL", "as": "AAPL"}]
        assert [r["error"] for r in answer["rejected"]] == ["bad_code"]


async def test_an_answer_carries_the_id_of_its_request_if_it_had_one(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as client:
        await client.send_raw('{"action":"ping","id":"a text"}')
        await client.send_raw('{"action":"ping","unknown":"is ignored"}')
        await client.send_raw('{"action":"ping","id":-7}')
        await wait_until(lambda: len(of_type(client, "pong")) == 3)
        assert [pong.get("id") for pong in of_type(client, "pong")] == ["a text", None, -7]
        assert abs(of_type(client, "pong")[0]["time"] - time.time() * 1000) < 60_000


async def test_requests_are_answered_in_the_order_in_which_they_came(server: QuotepushServer) -> None:
    codes = new_codes(3)
    async with RawWebSocket(server.port) as ws:
        requests = [
            {"action": "subscribe", "id": 1, "codes": codes[:2]},
            {"action": "unsubscribe", "id": 2, "codes": codes[:1]},
            {"action": "snapshot", "id": 3, "codes": codes[2:]},
            {"action": "subscribe", "id": 4, "codes": codes},
            {"action": "list", "id": 5},
            {"action": "ping", "id": 6},
        ]
        await ws.send_bytes(b"".join(client_frame(TEXT, orjson.dumps(request)) for request in requests))
        answers = []
        while not answers or answers[-1].get("id") != 6:
            _, payload = await ws.read_frame()
            answers.append(orjson.loads(payload))
    assert [(a["type"], a.get("id")) for a in answers] == [
        ("hello", None), ("ack", 1), ("snapshot", None), ("ack", 2), ("ack", 3), ("snapshot", None), ("ack", 4),
        ("snapshot", None), ("ack", 5), ("pong", 6),
    ]  # fmt: skip
    assert [entry["code"] for entry in answers[-2]["subscriptions"]] == [codes[1], codes[0], codes[2]]


async def test_what_comes_in_one_piece_with_the_handshake_is_heard(server: QuotepushServer) -> None:
    async with RawWebSocket(server.port, behind=client_frame(TEXT, b'{"action":"ping","id":1}')) as ws:
        assert (await ws.read_message("pong"))["id"] == 1


async def test_a_message_in_fragments_with_a_ping_in_between_is_one_message(server: QuotepushServer) -> None:
    async with RawWebSocket(server.port) as ws:
        await ws.send_frame(TEXT, b'{"action":', fin=False)
        await ws.send_frame(PING, b"between")
        await ws.send_frame(0, b'"ping","id":', fin=False)
        await ws.send_frame(0, b"8}")
        await ws.read_message("hello")
        opcode, payload = await ws.read_frame()
        while opcode == TEXT:  # a heartbeat
            opcode, payload = await ws.read_frame()
        assert (opcode, payload) == (PONG, b"between")
        assert (await ws.read_message("pong"))["id"] == 8


async def test_a_control_ping_is_answered_at_once_and_is_no_request(server: QuotepushServer) -> None:
    async with RawWebSocket(server.port) as ws:
        for n in range(100):
            await ws.send_frame(PING, b"%d" % n)
        pongs: list[bytes] = []
        while len(pongs) < 100:
            opcode, payload = await ws.read_frame()
            if opcode == PONG:
                pongs.append(payload)
        assert pongs == [b"%d" % n for n in range(100)]
        await ws.request("ping")
        await ws.read_message("pong")


# Heartbeats


async def test_heartbeats_tell_how_the_feed_is(
    start_server: StartServer, redis_server: RedisServer, own_redis: Redis
) -> None:
    server = await start_server(workers=1, heartbeat_ms=100, feed_stale_s=0.5, probe_interval_s=0.1)
    async with RecordingClient(server.ws_url) as client:

        def beat(feed: str) -> dict[str, Any] | None:
            return client.heartbeat if client.heartbeat and client.heartbeat["feed"] == feed else None

        never = await wait_until(lambda: beat("stale"))
        assert "feed_age_ms" not in never  # no tick was ever seen

        async def is_fresh() -> dict[str, Any] | None:
            await publish(own_redis, "IBM", last=1)  # of no code that he watches
            return beat("ok")

        fresh = await wait_until(is_fresh)
        assert 0 <= fresh["feed_age_ms"] < 1000
        old = await wait_until(lambda: beat("stale"))
        assert old["feed_age_ms"] >= 500
        redis_server.kill()
        down = await wait_until(lambda: beat("down"))
        assert down["feed_age_ms"] >= old["feed_age_ms"]
        redis_server.start()
        await wait_until(lambda: beat("stale"))


async def test_heartbeats_come_to_a_client_that_says_nothing(start_server: StartServer) -> None:
    server = await start_server(workers=1, heartbeat_ms=100)
    async with RecordingClient(server.ws_url) as client:
        assert client.hello["heartbeat_ms"] == 100
        await wait_until(lambda: client.heartbeats >= 5)


# Errors and limits

_WRONG_REQUESTS = {
    "{": "bad_json",
    "": "bad_json",
    '{"action":"ping","id":NaN}': "bad_json",
    '{"action":"ping"} ': "pong",
    '"ping"': "bad_request",
    "[]": "bad_request",
    "null": "bad_request",
    "{}": "bad_request",
    '{"action":7}': "bad_request",
    '{"action":"ping","id":1.5}': "bad_request",
    '{"action":"ping","id":[]}': "bad_request",
    '{"action":"ping","id":true}': "bad_request",
    '{"action":"ping","id":"' + "x" * 129 + '"}': "bad_request",
    '{"action":"subscribe"}': "bad_request",
    '{"action":"subscribe","codes":[]}': "bad_request",
    '{"action":"subscribe","codes":"AAPL"}': "bad_request",
    '{"action":"subscribe","codes":[1]}': "bad_request",
    '{"action":"subscribe","codes":["A"],"snapshot":"yes"}': "bad_request",
    '{"action":"subscribe","codes":[' + ",".join(['"A"'] * 1001) + "]}": "bad_request",
    '{"action":"subscribe","codes":["A"],"fields":[]}': "bad_request",
    '{"action":"subscribe","codes":["A"],"fields":["last","price"]}': "unknown_field",
    '{"action":"subscribe","codes":["A"],"max_rate":0}': "bad_request",
    '{"action":"subscribe","codes":["A"],"format":"columns"}': "bad_request",
    '{"action":"subscribe","codes":["A"],"epoch":"e","since":["A"]}': "bad_request",
    '{"action":"subscribe","codes":["A"],"since":{"A":1}}': "bad_request",
    '{"action":"unsubscribe"}': "bad_request",
    '{"action":"snapshot","codes":{}}': "bad_request",
    '{"action":"snapshot","codes":["A"],"fields":["last"]}': "bad_request",
    '{"action":"auth","token":"a secret"}': "bad_request",
    '{"action":"buy"}': "unknown_action",
    '{"action":"__class__"}': "unknown_action",
    '{"action":"' + "x" * 1000 + '"}': "unknown_action",
    "[" * 2000: "bad_json",
    '{"action":"\\ud800"}': "bad_json",
}


async def test_a_wrong_request_gets_an_error_and_keeps_the_connection(start_server: StartServer) -> None:
    server = await start_server(workers=1, requests_per_s=1000)
    async with RecordingClient(server.ws_url) as client:
        for n, message in enumerate(_WRONG_REQUESTS, 2):
            await client.send_raw(message)
            await wait_until(lambda n=n: len(client.control) == n)
        answers = list(client.control)[1:]
        assert [a.get("error", a["type"]) for a in answers] == list(_WRONG_REQUESTS.values())
        for answer in answers:
            if answer["type"] == "error":
                assert answer["message"]
                assert answer["retryable"] is False
                assert "retry_after_ms" not in answer
                assert len(orjson.dumps(answer)) < 500
                assert "a secret" not in answer["message"]
        assert (await client.request("list"))["total"] == 0


async def test_an_error_names_the_request_and_what_is_wrong_with_it(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as client:
        answer = await client.request("subscribe", codes=["AAPL"], since={"AAPL": 1})
        assert (answer["type"], answer["error"], answer["action"]) == ("error", "bad_request", "subscribe")
        assert "since" in answer["message"]
        answer = await client.request("sell")
        assert (answer["type"], answer["error"]) == ("error", "unknown_action")


async def test_a_code_that_the_symbol_file_does_not_list_is_refused(
    start_server: StartServer, own_redis: Redis, tmp_path: Path
) -> None:
    symbols = tmp_path / "symbols.txt"
    symbols.write_text("# what we know\nsh600519   # Moutai\n\nAAPL\n")
    server = await start_server(workers=1, symbol_file=str(symbols))
    async with RecordingClient(server.ws_url) as client:
        ack = await client.subscribe("600519", "MSFT", "AAPL", "no such")
        assert [entry["code"] for entry in ack["accepted"]] == ["600519.SH", "AAPL"]
        assert [(r["as"], r["error"]) for r in ack["rejected"]] == [("MSFT", "unknown_code"), ("no such", "bad_code")]
        assert ack["total"] == 2
        answer = await client.request("snapshot", codes=["MSFT", "AAPL"])
        assert [r["error"] for r in answer["rejected"]] == ["unknown_code"]
        await publish(own_redis, "MSFT", last=1)
        await publish(own_redis, "AAPL", last=1)
        await wait_until(lambda: client.last("AAPL") == 1)
        assert client.received == 1


async def test_codes_beyond_the_limit_are_rejected_one_by_one(start_server: StartServer) -> None:
    server = await start_server(workers=1, max_codes=3, codes_per_request=5)
    async with RecordingClient(server.ws_url) as client:
        assert client.hello["limits"]["codes"] == 3
        ack = await client.subscribe("A", "B")
        ack = await client.subscribe("B", "C", "b", "D", "E")
        assert [entry["code"] for entry in ack["accepted"]] == ["B", "C", "B"]
        assert [(r["as"], r["error"]) for r in ack["rejected"]] == [("D", "code_limit"), ("E", "code_limit")]
        assert (ack["total"], ack["limit"]) == (3, 3)
        await client.unsubscribe("A")
        assert (await client.subscribe("D"))["total"] == 3
        assert (await client.request("subscribe", codes=list("ABCDEF")))["error"] == "bad_request"


async def test_too_many_requests_are_refused_with_the_time_to_wait(start_server: StartServer) -> None:
    server = await start_server(workers=1, requests_per_s=5)
    async with RecordingClient(server.ws_url) as client:
        answers = await asyncio.gather(*(client.request("ping") for _ in range(30)))
        kinds = [answer["type"] for answer in answers]
        assert kinds[:5] == ["pong"] * 5
        assert "error" in kinds
        while (refused := await client.request("ping"))["type"] != "error":
            pass  # a slow machine has left time for one more
        assert (refused["error"], refused["retryable"]) == ("rate_limited", True)
        assert refused["action"] == "ping"
        assert 1 <= refused["retry_after_ms"] <= 200
        # What it was told to wait is enough.
        await asyncio.sleep(refused["retry_after_ms"] / 1000 + 0.01)
        await client.ping()


async def test_whoever_keeps_on_asking_too_often_is_closed(start_server: StartServer) -> None:
    server = await start_server(workers=1, requests_per_s=1)
    async with RecordingClient(server.ws_url) as client:
        with contextlib.suppress(ConnectionClosed):
            async with asyncio.timeout(60):
                while True:
                    await client.send_raw('{"action":"ping"}')
                    await asyncio.sleep(0.02)
        await wait_until(lambda: client.has_ended)
        assert (client.close_code, client.close_reason) == (4429, "rate_limited")


async def test_a_message_that_is_too_large_closes_with_1009(start_server: StartServer) -> None:
    server = await start_server(workers=1, message_bytes=2000)
    async with RawWebSocket(server.port) as ws:
        request = b'{"action":"ping","id":1}'
        await ws.send_frame(TEXT, request + b" " * (2000 - len(request)))
        await ws.read_message("pong")
        await ws.send_frame(TEXT, request + b" " * (2001 - len(request)))
        assert await ws.read_close() == (1009, "too_large")
    async with RawWebSocket(server.port) as ws:
        for _ in range(3):
            await ws.send_frame(0 if _ else TEXT, b" " * 900, fin=False)
        assert await ws.read_close() == (1009, "too_large")


async def test_a_binary_message_closes_with_1003(server: QuotepushServer) -> None:
    async with RawWebSocket(server.port) as ws:
        await ws.send_frame(BINARY, b'{"action":"ping"}')
        assert await ws.read_close() == (1003, "wrong_frame_kind")


@pytest.mark.parametrize("payload", [b'{"action":"\xff"}', b"\xed\xa0\x80", b"\xc0\xaf"])
async def test_bytes_that_are_no_utf8_close_with_1007(payload: bytes, server: QuotepushServer) -> None:
    async with RawWebSocket(server.port) as ws:
        await ws.send_frame(TEXT, payload)
        assert await ws.read_close() == (1007, "bad_utf8")


async def test_a_close_is_answered_with_its_own_code(server: QuotepushServer) -> None:
    async with RawWebSocket(server.port) as ws:
        await ws.send_frame(CLOSE, (1000).to_bytes(2, "big") + b"bye")
        assert (await ws.read_close())[0] == 1000
        assert await ws.is_cut()


# The door


async def test_the_subprotocol_that_a_client_offers_is_confirmed(server: QuotepushServer) -> None:
    async with connect(server.ws_url, proxy=None, subprotocols=["quotes.v9", "quotes.v1.json"]) as ws:  # type: ignore[list-item]
        assert ws.subprotocol == "quotes.v1.json"
    async with connect(server.ws_url, proxy=None) as ws:
        assert ws.subprotocol is None
        assert orjson.loads(await ws.recv())["type"] == "hello"


async def test_a_client_that_speaks_only_other_subprotocols_is_refused(server: QuotepushServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.ws_url, proxy=None, subprotocols=["quotes.v1.cbor"])  # type: ignore[list-item]
    assert refused.value.response.status_code == 400
    assert b"quotes.v1.json and quotes.v1.msgpack" in refused.value.response.body


async def test_compression_is_not_negotiated(server: QuotepushServer) -> None:
    async with connect(server.ws_url, proxy=None, compression="deflate") as ws:
        assert "Sec-WebSocket-Extensions" not in ws.response.headers
        assert orjson.loads(await ws.recv())["type"] == "hello"


async def test_beyond_the_connection_limit_the_door_is_shut_until_somebody_leaves(start_server: StartServer) -> None:
    server = await start_server(max_connections=4)
    async with connected_clients(server.ws_url, 4) as clients:
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.ws_url, proxy=None)
        assert refused.value.response.status_code == 503
        assert int(refused.value.response.headers["Retry-After"]) > 0

        async def is_counted() -> bool:
            return await server.metric("connections_refused", reason="overloaded") == 1

        await wait_until(is_counted)
        # Browsers do not see that status: they ask once more without an upgrade.
        async with aiohttp.ClientSession() as http, http.get(server.url + "/ws") as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
        await clients[0].close()

        async def is_free() -> bool:
            return bool((await server.admin("/readyz"))[1]["connections"] == 3)

        await wait_until(is_free)
        async with RecordingClient(server.ws_url) as late:
            await late.ping()
        for client in clients[1:]:
            await client.ping()


async def test_pages_of_other_origins_are_refused(server: QuotepushServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.ws_url, proxy=None, origin="https://evil.example")  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.ws_url, proxy=None, origin="null")  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    async with connect(server.ws_url, proxy=None, origin=server.url) as ws:  # type: ignore[arg-type]
        assert orjson.loads(await ws.recv())["type"] == "hello"


async def test_listed_origins_may_connect_and_no_others(start_server: StartServer) -> None:
    server = await start_server(workers=1, allowed_origins="https://quotes.example,https://other.example:8443")
    for origin in ("https://quotes.example", "https://Other.example:8443", server.url):
        async with connect(server.ws_url, proxy=None, origin=origin) as ws:  # type: ignore[arg-type]
            assert orjson.loads(await ws.recv())["type"] == "hello"
    for origin in ("http://quotes.example", "https://quotes.example.evil.example", "https://other.example"):
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.ws_url, proxy=None, origin=origin)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 403


async def test_a_plain_get_of_the_websocket_says_what_an_upgrade_would_get(server: QuotepushServer) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(server.url + "/ws") as response:
            assert response.status == 426
            assert response.headers["Upgrade"] == "websocket"
        async with http.get(server.url + "/ws", headers={"Origin": server.url}) as response:
            assert response.status == 426
            assert response.headers["Access-Control-Allow-Origin"] == server.url
        async with http.get(server.url + "/ws", headers={"Origin": "https://evil.example"}) as response:
            assert response.status == 403


async def test_what_is_not_there_or_is_private_is_not_found(server: QuotepushServer) -> None:
    async with aiohttp.ClientSession() as http:
        for path in ("/nothing", "/healthz", "/readyz", "/metrics", "/ws/"):
            async with http.get(server.url + path) as response:
                assert response.status == 404, path
        async with http.post(server.url + "/ws") as response:
            assert response.status == 405


# Redis


async def test_a_tick_published_through_another_database_number_is_heard(
    server: QuotepushServer, shared_redis: RedisServer
) -> None:
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code]) as client, shared_redis.client(db=5) as elsewhere:
        await publish(elsewhere, code, last=3)
        await wait_until(lambda: client.last(code) == 3)


async def test_a_tick_with_another_prefix_is_not_heard(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code]) as client:
        for channel in (f"other.{code}", f"quotes.{code}", f"xquote.{code}", code, f"qp:quote.{code}"):
            assert await redis.publish(channel, b'{"last":666}') == 0
        await publish(redis, code, last=1)
        await wait_until(lambda: client.last(code) == 1)
        assert client.received == 1


async def test_feed_channels_are_templates(start_server: StartServer, own_redis: Redis) -> None:
    server = await start_server(workers=1, feed_channels="pub.*.{code},ticks:all,pub.x.*")
    async with RecordingClient(server.ws_url, ["AAPL", "600519.SH"], history=True) as client:
        assert await own_redis.publish("quote.AAPL", b'{"last":666}') == 0
        await own_redis.publish("pub.nasdaq.AAPL", b'{"last":1}')
        await wait_until(lambda: client.last("AAPL") == 1)
        await own_redis.publish("pub.x.sh600519", b'{"last":2}')  # two patterns match: counts once
        await own_redis.publish("ticks:all", b'{"code":"AAPL","last":3}')
        await own_redis.publish("ticks:all", b'{"last":4}')
        await wait_until(lambda: client.last("AAPL") == 3)
        await client.ping()
        assert [(row["code"], row["seq"], row["last"]) for row in client.ticks or ()] == [
            ("AAPL", 1, 1), ("600519.SH", 1, 2), ("AAPL", 2, 3),
        ]  # fmt: skip
        await wait_until(lambda: server.metric("ticks_refused", reason="wrong_type"))


async def test_a_channel_that_yields_no_code_is_counted_and_ignored(server: QuotepushServer, redis: Redis) -> None:
    before = await server.metric("ticks_ignored")
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code]) as client:
        await redis.publish("quote.", b'{"last":1}')
        await redis.publish("quote.no such", b'{"last":1}')
        await redis.publish(b"quote.\xff\xfe", b'{"last":1}')
        await publish(redis, code, last=2)
        await wait_until(lambda: client.last(code) == 2)
    assert await server.metric("ticks_ignored") == before + 3


# Views, rates and formats


async def test_views_rates_formats_and_languages_meet_on_one_code(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    await publish_and_wait(server, redis, code, last=0, bid=0)
    async with contextlib.AsyncExitStack() as stack:
        clients: list[tuple[dict[str, Any], RecordingClient]] = []
        for msgpack in (False, True):
            for options in (
                {}, {"fields": ["last"]}, {"fields": ["bid", "bids"]}, {"max_rate": 20}, {"format": "rows"},
                {"fields": ["last"], "format": "rows", "max_rate": 20},
            ):  # fmt: skip
                client = RecordingClient(server.ws_url, msgpack=msgpack, history=True)
                await stack.enter_async_context(client)
                await client.subscribe(code, **options)
                clients.append((options, client))
        for n in range(1, 31):
            await publish(redis, code, **{"last" if n % 3 else "bid": n}, bids=[[n, 1]])
        await wait_until(lambda: all(client.rows[code]["seq"] >= 30 for _, client in clients))
        await asyncio.gather(*(wait_until(lambda c=c: c.last(code) in (29, None)) for _, c in clients))
        for options, client in clients:
            fields = options.get("fields", ["last", "bid"])
            newest = {"last": 29, "bid": 30, "bids": [[30, 1]]}
            expected = {name: newest[name] for name in fields}
            await wait_until(lambda c=client, e=expected: c.rows[code].items() >= e.items())
            assert client.ticks is not None
            for row in client.ticks:
                assert ("bids" in row) is ("bids" in fields)
            (listed,) = (await client.request("list"))["subscriptions"]
            assert listed["merged"] == client.merged
            assert client.received + client.merged == listed["seq"] - 1


async def test_every_message_can_be_messagepack(server: QuotepushServer, redis: Redis) -> None:
    (code,) = new_codes(1)
    async with RecordingClient(server.ws_url, [code], msgpack=True) as client:
        assert client.hello["version"] == "quotes.v1"
        await publish(redis, code, last=1.5, name="贵州茅台")
        await wait_until(lambda: client.last(code) == 1.5)
        assert client.rows[code]["name"] == "贵州茅台"
        assert (await client.snapshot(code))[0]["last"] == 1.5
        assert [entry["code"] for entry in (await client.request("list"))["subscriptions"]] == [code]
        error = await client.request("sell")
        assert (error["type"], error["error"]) == ("error", "unknown_action")
        assert (await client.unsubscribe(code))["removed"] == [code]
        await client.ping()
        await client.send_raw(b"\xc1")
        await wait_until(lambda: of_type(client, "error")[-1]["error"] == "bad_json")
        await client.send_raw(b"\x91" * 5000)
        await wait_until(lambda: [e["error"] for e in of_type(client, "error")][-2:] == ["bad_json"] * 2)
        await wait_until(lambda: client.heartbeat and client.heartbeat["feed"] == "ok", 20)
        await client.send_raw('{"action":"ping"}')
        await wait_until(lambda: client.has_ended)
        assert (client.close_code, client.close_reason) == (1003, "wrong_frame_kind")


async def test_a_message_of_the_server_that_ends_is_messagepack_too(
    start_server: StartServer, own_redis: Redis
) -> None:
    server = await start_server(workers=1)
    async with RecordingClient(server.ws_url, msgpack=True) as client:
        assert await server.stop() == 0
        await wait_until(lambda: client.has_ended)
        assert client.states() == ["closing"]
        assert client.close_code == 1012


async def test_fields_of_the_feed_may_be_named_where_the_setting_lists_them(
    start_server: StartServer, own_redis: Redis
) -> None:
    server = await start_server(workers=1, extra_fields="iv,greeks")
    async with RecordingClient(server.ws_url, history=True) as client:
        await client.subscribe("A", fields=["iv", "greeks"])
        await publish(own_redis, "A", last=1, iv=0.3)
        await wait_until(lambda: client.received)
        assert client.ticks is not None
        assert client.ticks[0]["iv"] == 0.3
        assert "last" not in client.ticks[0]
        assert (await client.request("subscribe", codes=["A"], fields=["vega"]))["error"] == "unknown_field"
