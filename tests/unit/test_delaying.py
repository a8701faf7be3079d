"""The board shown with a delay, with the publishers' log of a real Redis behind it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from redis.asyncio import Redis

import quotepush
from quotepush.ingest.keys import FeedKeys
from quotepush.ingest.log import LogFollower
from quotepush.node.delaying import Delaying
from quotepush.quote.board import Board, Quote, TradingDays
from quotepush.quote.delay import DelayLine
from quotepush.quote.ring import Ring
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


class Node:
    """What main has of all this."""

    def __init__(self, url: str, delay_s: int = 1) -> None:
        self.redis = Redis.from_url(url, socket_timeout=None)
        self.board = Board(epoch="main", days=TradingDays({}), watched=())
        self.line = DelayLine([delay_s], epoch="main", max_bytes=1 << 20)
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.batches = 0
        self.follower = LogFollower(
            self.redis, FeedKeys("qp:"), self.board, Ring(max_bytes=1 << 20, max_code_bytes=1 << 16, max_age_ms=60_000),
            on_filled=lambda code: None, publish=lambda quote: None, on_batch=lambda: None, timeout_s=5,
        )  # fmt: skip
        self.delaying = Delaying(self.line, self.board, self.follower, publish=self._publish, on_batch=self._end_batch)

    def _publish(self, quote: Quote) -> None:
        self.published.append((quote.code, orjson.loads(quote.encoded())))
        quote.restated = 0

    def _end_batch(self) -> None:
        self.batches += 1


@asynccontextmanager
async def node(url: str, **options: Any) -> AsyncIterator[Node]:
    made = Node(url, **options)
    await made.follower.begin()
    await made.delaying.begin()
    running = asyncio.create_task(made.delaying.run())
    try:
        yield made
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await made.redis.aclose()


async def test_what_comes_on_the_board_is_published_with_its_delay(redis_server: RedisServer) -> None:
    async with node(redis_server.url) as made:
        made.board.apply("AAPL", b'{"last":1.5}', 1_000)
        await wait_until(lambda: made.published)
        assert made.batches
        assert made.published[0][0] == "AAPL~1"
        assert made.published[0][1]["last"] == 1.5


async def test_rows_of_before_the_start_are_made_of_the_log(redis_server: RedisServer) -> None:
    async with quotepush.Publisher(redis_server.url) as publisher:
        await publisher.publish([{"code": "AAPL", "last": 1.0, "name": "Apple"}, {"code": "OTHER", "last": 7.0}])
        await asyncio.sleep(1.2)  # of another interval than the next one: this is what is tested
        await publisher.publish([{"code": "AAPL", "last": 2.0}])
        await asyncio.sleep(1.2)
        await publisher.publish([{"code": "AAPL", "last": 3.0}])

    async with node(redis_server.url, delay_s=4) as made:
        await wait_until(lambda: ("AAPL~4", 3.0) in [(name, row["last"]) for name, row in made.published])

    assert [row["last"] for name, row in made.published if name == "AAPL~4"] == [1.0, 2.0, 3.0]
    assert [row["name"] for name, row in made.published if name == "AAPL~4"] == ["Apple"] * 3
    assert [row["last"] for name, row in made.published if name == "OTHER~4"] == [7.0]
