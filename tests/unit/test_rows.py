"""Plain rows outlive the server: in a real Redis, in rounds, and never an older one over a newer one."""

import logging
from collections.abc import AsyncIterator

import orjson
import pytest
import redis.asyncio as aioredis

from quotepush.ingest.keys import FeedKeys
from quotepush.ingest.rows import RowStore
from quotepush.quote.board import Board, TradingDays
from tests.support.redis_server import RedisServer

NOW_MS = 1_800_000_000_000


def make_board(epoch: str = "life") -> Board:
    return Board(epoch=epoch, days=TradingDays({}))


def keep(client: aioredis.Redis, board: Board, max_age_s: int = 10**9) -> RowStore:
    return RowStore(client, FeedKeys(), board, interval_s=1, max_age_s=max_age_s, timeout_s=5)


@pytest.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[aioredis.Redis]:
    client = aioredis.Redis.from_url(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


async def test_the_next_life_begins_with_the_rows_of_the_last(client: aioredis.Redis) -> None:
    board = make_board()
    board.apply("AAPL", b'{"last":2.5,"prev_close":2,"name":"Apple, Inc.","vendor":[1,{"a":null}],"ts":5}', NOW_MS)
    board.apply("AAPL", b'{"bids":[[2.4,100]],"volume":9007199254740993}', NOW_MS + 1)
    await keep(client, board).flush()

    after = make_board("next life")
    assert await keep(client, after).load() == 1
    quote = after.quotes["AAPL"]
    assert (quote.epoch, quote.seq, quote.arrived_ms, quote.restated) == ("next life", 1, NOW_MS + 1, 0)
    before = board.quotes["AAPL"]
    assert {**quote.row, "seq": 2} == before.row
    assert quote.book == before.book


async def test_a_round_writes_only_what_has_changed(client: aioredis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    board, now_ms = make_board(), NOW_MS
    monkeypatch.setattr("quotepush.ingest.rows._now_ms", lambda: now_ms)
    store = keep(client, board)
    board.apply("A", b'{"last":1}', now_ms)
    now_ms += 1
    await store.flush()
    await client.delete("qp:row:A")
    now_ms += 1000
    board.apply("B", b'{"last":1}', now_ms)
    await store.flush()
    assert sorted(await client.keys("qp:row:*")) == [b"qp:row:B"]


async def test_of_two_servers_the_newer_row_wins(client: aioredis.Redis) -> None:
    slow, quick = make_board(), make_board()
    quick.apply("A", b'{"last":2}', NOW_MS + 5)
    slow.apply("A", b'{"last":1}', NOW_MS)
    await keep(client, quick).flush()
    await keep(client, slow).flush()
    assert orjson.loads(await client.hget("qp:row:A", "@row"))["last"] == 2  # type: ignore[misc, arg-type]


async def test_rows_of_the_publishers_log_are_left_to_the_publishers(client: aioredis.Redis) -> None:
    board = make_board()
    board.log_epoch = "log"
    board.apply_numbered("A", 7, {"last": 1}, NOW_MS)
    await keep(client, board).flush()
    assert await client.keys("*") == []
    await client.hset("qp:row:B", mapping={"@": "7 log 1", "last": "1"})  # type: ignore[misc]
    assert await keep(client, board).load() == 0


async def test_old_rows_and_what_is_no_row_stay_behind(client: aioredis.Redis) -> None:
    board = make_board()
    board.apply("OLD", b'{"last":1}', 10**12)
    await keep(client, board).flush()
    await client.zadd("qp:rows", {"GONE": 10**14, "ODD": 10**14})
    await client.hset("qp:row:ODD", mapping={"@plain": "5", "@row": "[]", "@book": "{}"})  # type: ignore[misc]
    assert await keep(client, make_board(), max_age_s=60).load() == 0


async def test_what_is_on_the_board_is_not_replaced(client: aioredis.Redis) -> None:
    board = make_board()
    board.apply("A", b'{"last":1}', NOW_MS)
    await keep(client, board).flush()
    after = make_board()
    after.apply("A", b'{"last":9}', NOW_MS + 1)
    assert await keep(client, after).load() == 0
    assert after.quotes["A"].row["last"] == 9


async def test_many_rows_go_in_slices(client: aioredis.Redis) -> None:
    board = make_board()
    for number in range(1001):
        board.apply(f"C{number}", b'{"last":%d}' % number, NOW_MS)
    await keep(client, board).flush()
    after = make_board()
    assert await keep(client, after).load() == 1001
    assert all(after.quotes[f"C{number}"].row["last"] == number for number in range(1001))


async def test_a_redis_that_refuses_is_tried_again_and_told_of_once(
    client: aioredis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    board = make_board()
    store = keep(client, board)
    board.apply("A", b'{"last":1}', NOW_MS * 2)
    await client.set("qp:rows", "no sorted set")
    with caplog.at_level(logging.WARNING):
        await store.flush()
        await store.flush()
    assert caplog.text.count("rows cannot be kept in Redis") == 1
    await client.delete("qp:rows")
    await store.flush()
    assert await client.exists("qp:row:A")
    assert await keep(client, make_board()).load() == 1
