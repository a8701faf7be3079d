"""The publishers' log, followed on a real Redis with a real publisher and a real board: nothing twice, nothing lost."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

import quotepush
from quotepush.ingest import log as log_module
from quotepush.ingest.keys import FeedKeys
from quotepush.ingest.log import LogFollower
from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote, TradingDays
from quotepush.quote.ring import Ring
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

KEYS = FeedKeys("qp:")


class SlowRedis:
    """A client of Redis in whose pipelines something happens between the answer and whoever has asked."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.after: list[Callable[[], Awaitable[None]]] = []  # what happens behind each of the next answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._redis, name)

    def pipeline(self, **options: Any) -> Any:
        pipeline = self._redis.pipeline(**options)
        execute = pipeline.execute

        async def execute_slowly(**more: Any) -> Any:
            answers = await execute(**more)
            if self.after:
                await self.after.pop(0)()
            return answers

        pipeline.execute = execute_slowly  # type: ignore[method-assign]
        return pipeline


class Follower:
    """A follower with all that it needs, and what became of the ticks.

    Attributes:
        news: code, epoch, seq and ``restated`` of every quote that was published.
        rests: how often the news was to be sent.
    """

    def __init__(self, server: RedisServer, *, url: str = "", **options: Any) -> None:
        # As main's: with a socket_timeout redis-py writes under asyncio.wait_for, which in Python 3.11 loses a cancel.
        client = Redis.from_url(url or server.url, socket_timeout=None)
        self.redis = SlowRedis(client)
        self.board = Board(epoch="main", days=TradingDays({}), **options)
        self.ring = Ring(max_bytes=1_000_000, max_code_bytes=100_000, max_age_ms=60_000)
        self.filled: list[str] = []
        self.news: list[tuple[str, str, int, int]] = []
        self.rests = 0
        self.log = LogFollower(
            self.redis, KEYS, self.board, self.ring, on_filled=self.filled.append, publish=self._publish,
            on_batch=self._rest, timeout_s=5,
        )  # fmt: skip

    def _publish(self, quote: Quote) -> None:
        self.news.append((quote.code, quote.epoch, quote.seq, quote.restated))
        self.ring.add(quote)
        quote.restated = 0

    def _rest(self) -> None:
        self.rests += 1

    def take_news(self) -> list[tuple[str, int, int]]:
        """Code, seq and ``restated`` of what was published since the last time."""
        news, self.news = self.news, []
        return [(code, seq, restated) for code, _, seq, restated in news]

    def row(self, code: str) -> dict[str, Any]:
        """The fields of a code that ticks have set."""
        return {k: v for k, v in self.board.quotes[code].row.items() if k not in ("code", "seq", "ts")}

    def places(self) -> dict[str, tuple[str, int]]:
        return {code: (quote.epoch, quote.seq) for code, quote in self.board.quotes.items()}

    async def in_step(self) -> None:
        await wait_until(lambda: self.log.is_in_step)


class Bench:
    """A Redis, a publisher, its messages on their way, and followers."""

    def __init__(self, server: RedisServer, redis: Redis, channel: PubSub, publisher: quotepush.Publisher) -> None:
        self.server = server
        self.redis = redis
        self.publisher = publisher
        self._channel = channel
        self._followers: list[Follower] = []
        self._tasks: dict[Follower, asyncio.Task[None]] = {}

    async def publish(self, *ticks: tuple[str, Any] | dict[str, Any]) -> list[int]:
        """Publish a batch; a pair is a code and its price."""
        return await self.publisher.publish(
            [tick if isinstance(tick, dict) else {"code": tick[0], "last": tick[1]} for tick in ticks]
        )

    async def message(self) -> bytes:
        """The next message of the channel."""
        message = await self._channel.get_message(ignore_subscribe_messages=True, timeout=5)
        while message is None:
            message = await self._channel.get_message(ignore_subscribe_messages=True, timeout=5)
        return bytes(message["data"])

    async def said(self, *ticks: tuple[str, Any] | dict[str, Any]) -> bytes:
        """Publish a batch; return its message, which nobody has taken yet."""
        await self.publish(*ticks)
        return await self.message()

    async def follower(self, *, runs: bool = True, **options: Any) -> Follower:
        follower = Follower(self.server, **options)
        self._followers.append(follower)
        await follower.log.begin()
        if runs:
            self.run(follower)
        return follower

    def run(self, follower: Follower) -> None:
        self._tasks[follower] = asyncio.create_task(follower.log.run())

    async def halt(self, follower: Follower) -> None:
        """It looks at nothing until :meth:`run`."""
        task = self._tasks.pop(follower)
        task.cancel()
        await asyncio.wait([task])

    async def catch_up(self, follower: Follower) -> None:
        """A new link: whatever was missed is read."""
        follower.log.lose_step()
        await follower.in_step()

    async def keep(self) -> dict[str, Any]:
        """All that Redis holds, for :meth:`go_back`."""
        return {key: await self.redis.dump(key) for key in await self.redis.keys("*")}

    async def go_back(self, kept: dict[str, Any]) -> None:
        """Redis has lost what came since, as with a torn file."""
        await self.redis.flushall()
        for key, value in kept.items():
            await self.redis.restore(key, 0, value)

    async def close(self) -> None:
        for task in self._tasks.values():
            assert not task.done(), "a follower has ended"
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        for follower in self._followers:
            await follower.redis.aclose()


@asynccontextmanager
async def bench_on(server: RedisServer) -> AsyncIterator[Bench]:
    redis = server.client(decode_responses=False)
    channel = redis.pubsub()
    await channel.subscribe(KEYS.channel)
    async with quotepush.Publisher(server.url) as publisher:
        bench = Bench(server, redis, channel, publisher)
        try:
            yield bench
        finally:
            await bench.close()
            await channel.aclose()
            await redis.aclose()


@pytest.fixture
async def bench(redis_server: RedisServer) -> AsyncIterator[Bench]:
    async with bench_on(redis_server) as bench:
        yield bench


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# In step


async def test_batches_are_taken_in_order_as_they_come(bench: Bench) -> None:
    follower = await bench.follower()
    await bench.publish(("A", 1))
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", 1, NEW_EPOCH)]
    await bench.message()
    follower.log.take(await bench.said(("A", 2), ("B", 1), ("A", 3)))
    follower.log.take(await bench.said(("B", 2)))
    assert follower.take_news() == [("A", 2, 0), ("B", 1, NEW_EPOCH), ("A", 3, 0), ("B", 2, 0)]
    assert follower.log.caught_up == 1
    assert follower.places() == {"A": (bench.publisher.epoch, 3), "B": (bench.publisher.epoch, 2)}


async def test_a_batch_is_taken_once_however_often_it_comes(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    messages = [await bench.said(("A", price)) for price in (2, 3)]
    for message in [messages[0], messages[0], *messages, *messages]:
        follower.log.take(message)
    assert [seq for _, seq, _ in follower.take_news()][1:] == [2, 3]
    assert follower.log.is_in_step


async def test_a_missed_message_is_read_from_the_log_before_the_next_one(bench: Bench) -> None:
    await bench.said(("A", 1), ("B", 1))
    follower = await bench.follower()
    follower.take_news()
    await bench.said(("A", 2))
    await bench.said(("B", 2), ("A", 3))
    follower.log.take(await bench.said(("A", 4)))
    assert follower.take_news() == []
    await follower.in_step()
    assert follower.take_news() == [("A", 2, 0), ("B", 2, 0), ("A", 3, 0), ("A", 4, 0)]
    follower.log.take(await bench.said(("A", 5)))
    assert follower.take_news() == [("A", 5, 0)]
    assert follower.log.gaps == 0


async def test_more_pages_than_one_are_caught_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_PAGE", 3)
    await bench.said(("A", 0))
    follower = await bench.follower()
    follower.take_news()
    rests = follower.rests
    for price in range(1, 11):
        await bench.publish(("A", price))
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", seq, 0) for seq in range(2, 12)]
    assert follower.rests - rests >= 4  # rows do not pile up until the end


async def test_several_publishers_number_one_code_together(bench: Bench) -> None:
    follower = await bench.follower()
    publishers = [quotepush.Publisher(bench.server.url) for _ in range(3)]

    async def publish(number: int) -> None:
        for n in range(20):
            await publishers[number].publish(
                [{"code": "A", "last": n + number / 10}, {"code": f"B{number}", "last": n}]
            )

    await asyncio.gather(*(publish(number) for number in range(3)))
    for _ in range(60):
        follower.log.take(await bench.message())
    await follower.in_step()
    seqs = [seq for code, seq, _ in follower.take_news() if code == "A"]
    assert seqs == list(range(seqs[0], 61))
    assert follower.places() == {
        "A": (follower.log.epoch, 60), **{f"B{n}": (follower.log.epoch, 20) for n in range(3)}
    }  # fmt: skip
    assert follower.log.gaps == 0
    for publisher in publishers:
        await publisher.aclose()


async def test_copies_for_other_readers_are_not_taken_twice(bench: Bench) -> None:
    async with quotepush.Publisher(bench.server.url, copies="quote.{code}") as publisher:
        await publisher.publish([{"code": "A", "last": 1}])
        await bench.message()
        follower = await bench.follower()
        other = bench.redis.pubsub()
        await other.subscribe("quote.A")
        await publisher.publish([{"code": "A", "last": 2}])
        while (copy := await other.get_message(ignore_subscribe_messages=True, timeout=5)) is None:
            pass
        assert follower.board.apply("A", copy["data"], 1000) is None
        follower.log.take(await bench.message())
        assert follower.board.apply("A", copy["data"], 1000) is None
        assert follower.board.copies == 2
        assert follower.places() == {"A": (publisher.epoch, 2)}
        await other.aclose()


# Begin


async def test_the_newest_rows_are_there_before_anybody_asks(bench: Bench) -> None:
    await bench.publish({"code": "A", "last": 1, "name": "Ay"}, ("B", 5))
    await bench.publish({"code": "A", "last": 2, "bids": [[1, 100]]})
    follower = await bench.follower()
    assert follower.log.is_in_step
    assert follower.row("A") == {"last": 2, "name": "Ay"}
    assert follower.board.quotes["A"].book == {"bids": [[1, 100]]}
    assert follower.places() == {"A": (bench.publisher.epoch, 2), "B": (bench.publisher.epoch, 1)}
    assert follower.board.log_epoch == bench.publisher.epoch


async def test_rows_of_before_are_kept_for_clients_that_come_back(bench: Bench) -> None:
    for price in (1, 2, 3):
        await bench.publish(("A", price), {"code": "A", "volume": price})
    await bench.publish(("B", 1))
    follower = await bench.follower()
    assert sorted(follower.filled) == ["A", "B"]
    quote = follower.board.quotes["A"]
    missed = follower.ring.since(quote, bench.publisher.epoch, 2)
    assert missed is not None
    rows = [orjson.loads(text) for _, text in missed]
    assert [(row["seq"], row["last"], row["volume"]) for row in rows] == [(3, 2, 1), (4, 2, 2), (5, 3, 2), (6, 3, 3)]
    assert follower.ring.since(quote, bench.publisher.epoch, 6) == []


async def test_what_is_published_while_the_ring_is_filled_does_not_spoil_it(bench: Bench) -> None:
    await bench.said(("A", 1), ("A", 2))
    follower = Follower(bench.server)
    fill = follower.log._fill_ring

    async def fill_late() -> None:
        await bench.publish(("A", 3))
        await fill()

    follower.log._fill_ring = fill_late  # type: ignore[method-assign]
    await follower.log.begin()
    missed = follower.ring.since(follower.board.quotes["A"], bench.publisher.epoch, 0)
    assert missed is not None
    assert [seq for seq, _ in missed] == [1, 2]
    follower.log.take(await bench.message())
    missed = follower.ring.since(follower.board.quotes["A"], bench.publisher.epoch, 0)
    assert missed is not None
    assert [seq for seq, _ in missed] == [1, 2, 3]
    await follower.redis.aclose()


async def test_without_a_log_there_is_nothing_to_follow(bench: Bench) -> None:
    follower = await bench.follower()
    assert (follower.log.epoch, follower.log.state, follower.log.is_in_step) == ("", "none", True)
    assert await bench.redis.keys("*") == []


async def test_a_log_that_begins_while_we_run_adds_to_the_rows_of_plain_ticks(bench: Bench) -> None:
    follower = await bench.follower()
    quote = follower.board.apply("A", b'{"last":1,"name":"Ay"}', 1000)
    assert quote is not None
    follower.log.take(await bench.said(("A", 2)))
    await follower.in_step()
    follower.log.take(await bench.said(("A", 3)))
    assert follower.row("A") == {"last": 3, "name": "Ay"}
    assert follower.take_news() == [("A", 1, NEW_EPOCH), ("A", 2, 0)]


async def test_a_begin_that_fails_half_way_is_no_gap(bench: Bench) -> None:
    await bench.said(("A", 1), ("B", 1))
    await bench.said(("A", 2))
    await bench.redis.xtrim(KEYS.log, maxlen=0, approximate=False)
    await bench.redis.execute_command("ACL", "SETUSER", "half", "on", ">x", "+@all", "~qp:epoch", "~qp:seq", "~qp:log")
    follower = await bench.follower(url=f"redis://half:x@127.0.0.1:{bench.server.port}/0")
    assert follower.log.state == "unreadable"
    assert follower.board.quotes == {}
    await bench.redis.execute_command("ACL", "SETUSER", "half", "~*")
    await bench.catch_up(follower)
    assert sorted(follower.take_news()) == [("A", 2, NEW_EPOCH), ("B", 1, NEW_EPOCH)]
    assert follower.log.gaps == 0


# Gaps


async def test_a_log_that_is_too_short_is_bridged_by_whole_rows_that_say_so(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.said({"code": "A", "last": 1, "name": "Ay"}, ("B", 1), ("C", 1))
    follower = await bench.follower()
    follower.take_news()
    await bench.said({"code": "A", "open": 7})
    await bench.said(("A", 3), {"code": "B", "last": None, "high": 2})
    await bench.redis.xtrim(KEYS.log, maxlen=0, approximate=False)
    await bench.catch_up(follower)
    assert sorted(follower.take_news()) == [("A", 3, GAP), ("B", 2, GAP)]
    assert follower.row("A") == {"last": 3, "name": "Ay", "open": 7}
    assert follower.row("B") == {"high": 2}
    assert follower.log.gaps == 2
    assert len(warnings_in(caplog)) == 1
    follower.log.take(await bench.said(("A", 4), ("C", 2)))
    assert follower.take_news() == [("A", 4, 0), ("C", 2, 0)]


async def test_what_the_log_still_has_behind_a_gap_is_taken_once(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    follower.take_news()
    for price in (2, 3, 4):
        last = await bench.said(("A", price))
    await bench.redis.xtrim(KEYS.log, minid="4-0", approximate=False)
    follower.log.take(last)
    await follower.in_step()
    assert follower.take_news() == [("A", 4, GAP)]
    follower.log.take(last)
    follower.log.take(await bench.said(("A", 5)))
    assert follower.take_news() == [("A", 5, 0)]


async def test_a_batch_that_comes_while_the_log_is_read_is_no_gap(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    follower.take_news()
    await bench.said(("A", 2))
    late: list[bytes] = []

    async def publish() -> None:
        late.append(await bench.said(("A", 3 + len(late))))
        follower.log.take(late[-1])

    follower.redis.after = [publish, publish, publish]
    await bench.catch_up(follower)
    await bench.catch_up(follower)
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", seq, 0) for seq in (2, 3, 4, 5)]
    assert follower.log.gaps == 0


async def test_a_link_that_is_lost_again_while_the_log_is_read_is_caught_up_at_once(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    follower.take_news()

    async def be_cut() -> None:
        await bench.said(("A", 2))  # nobody hears it
        follower.log.lose_step()

    follower.redis.after = [be_cut]
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", 2, 0)]
    assert follower.places()["A"][1] == 2


# Other lives


async def test_an_emptied_redis_begins_a_new_epoch_and_takes_nothing_from_the_rows(bench: Bench) -> None:
    await bench.said({"code": "A", "last": 1, "name": "Ay"}, ("B", 9))
    follower = await bench.follower()
    before = follower.log.epoch
    follower.take_news()
    await bench.redis.flushall()
    message = await bench.said(("A", 2), ("A", 3))
    follower.log.take(message)
    await follower.in_step()
    assert follower.take_news() == [("A", 1, NEW_EPOCH), ("A", 2, 0)]
    assert follower.log.epoch == bench.publisher.epoch != before
    assert follower.row("A") == {"last": 3, "name": "Ay"}
    assert follower.places() == {"A": (bench.publisher.epoch, 2), "B": (before, 1)}
    follower.log.take(message)
    assert follower.take_news() == []


async def test_an_emptied_redis_without_a_publisher_leaves_the_rows_as_they_are(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    before = follower.places()
    await bench.redis.flushall()
    await bench.catch_up(follower)
    assert (follower.log.epoch, follower.places()) == ("", before)
    follower.log.take(await bench.said(("A", 2)))
    await follower.in_step()
    assert follower.places() == {"A": (bench.publisher.epoch, 1)}


async def test_a_new_life_whose_begin_is_not_in_the_log_any_more_is_a_gap(bench: Bench) -> None:
    await bench.said(("A", 1), ("B", 1))
    follower = await bench.follower()
    follower.take_news()
    await bench.redis.flushall()
    await bench.said(("A", 2))
    await bench.said(("A", 3), ("B", 2))
    await bench.redis.xtrim(KEYS.log, minid="2-0", approximate=False)
    await bench.catch_up(follower)
    assert sorted(follower.take_news()) == [("A", 2, GAP), ("B", 1, GAP)]
    assert follower.row("A") == {"last": 3}


@pytest.mark.parametrize("first", ["follower", "publisher"])
async def test_a_store_that_has_gone_back_gets_a_new_epoch_whoever_sees_it_first(bench: Bench, first: str) -> None:
    await bench.said(("A", 1), ("B", 1))
    kept = await bench.keep()
    follower = await bench.follower()
    for price in (2, 3, 4):
        follower.log.take(await bench.said(("A", price)))
    before = follower.log.epoch
    follower.take_news()
    await bench.go_back(kept)
    if first == "follower":
        await bench.catch_up(follower)
        assert follower.take_news() == []  # what we hold is newer, and not numbered anew before its next tick
        assert follower.log.epoch not in ("", before)
        assert follower.places()["A"] == (before, 4)
    follower.log.take(await bench.said(("A", 5)))
    await follower.in_step()
    follower.log.take(await bench.said(("A", 6), ("B", 6)))
    assert bench.publisher.epoch == follower.log.epoch != before
    assert follower.take_news() == [("A", 2, NEW_EPOCH), ("A", 3, 0), ("B", 2, NEW_EPOCH)]
    assert follower.row("A") == {"last": 6}


async def test_a_replica_that_is_behind_is_waited_for(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.said(("A", 1))
    behind = await bench.keep()
    await bench.said(("A", 2))
    follower = await bench.follower()
    ahead = await bench.keep()
    follower.take_news()
    await bench.go_back(behind)
    await bench.redis.execute_command("REPLICAOF", "127.0.0.1", "1")  # nobody is there: it stays as it is
    follower.log.lose_step()
    await wait_until(lambda: follower.log._is_waiting)
    assert follower.log.state == "behind"
    for _ in range(3):
        follower.log.lose_step()
        await asyncio.sleep(0.02)
    assert len(warnings_in(caplog)) == 1

    await bench.halt(follower)  # it looks again and again, and must not find a master that is behind
    await bench.redis.execute_command("REPLICAOF", "NO", "ONE")
    await bench.go_back(ahead)
    await bench.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    bench.run(follower)
    await bench.catch_up(follower)
    assert follower.places() == {"A": (bench.publisher.epoch, 2)}
    assert follower.take_news() == []
    await bench.redis.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("first", ["follower", "publisher"])
async def test_a_store_that_goes_back_twice_never_returns_to_an_epoch(bench: Bench, first: str) -> None:
    await bench.said(("A", 1), ("B", 1))
    kept = await bench.keep()
    follower = await bench.follower()
    epochs = [follower.log.epoch]
    follower.log.take(await bench.said(("A", 2)))
    for price in (10, 20):
        await bench.go_back(kept)
        follower.take_news()
        if first == "follower":
            await bench.catch_up(follower)
            assert follower.take_news() == []  # nobody is shown what was before
        # Whoever publishes now knows of no other life than the one that Redis shows.
        async with quotepush.Publisher(bench.server.url) as publisher:
            if first == "publisher":
                publisher = bench.publisher
            await publisher.publish([{"code": "A", "last": price}])
            follower.log.take(await bench.message())
            await follower.in_step()
            follower.log.take(await bench.said(("A", price + 1), ("B", price)))
            await follower.in_step()
        assert follower.take_news() == [("A", 2, NEW_EPOCH), ("A", 3, 0), ("B", 2, NEW_EPOCH)]
        assert (follower.row("A"), follower.row("B")) == ({"last": price + 1}, {"last": price})
        assert follower.log.epoch not in epochs
        epochs.append(follower.log.epoch)


async def test_an_older_state_that_is_put_back_into_an_emptied_store_is_another_life(bench: Bench) -> None:
    await bench.said(("A", 1))
    kept = await bench.keep()
    follower = await bench.follower()
    before = follower.log.epoch
    follower.log.take(await bench.said(("A", 2), ("A", 3)))
    follower.take_news()
    await bench.redis.flushall()
    await bench.catch_up(follower)
    await bench.go_back(kept)
    await bench.catch_up(follower)
    async with quotepush.Publisher(bench.server.url) as publisher:
        await publisher.publish([{"code": "A", "last": 4}])
    follower.log.take(await bench.message())
    await follower.in_step()
    assert follower.take_news() == [("A", 2, NEW_EPOCH)]
    assert follower.row("A") == {"last": 4}
    assert follower.log.epoch not in ("", before)


async def test_two_servers_agree_on_the_new_epoch_of_a_store_that_has_gone_back(bench: Bench) -> None:
    await bench.said(("A", 1))
    kept = await bench.keep()
    followers = [await bench.follower() for _ in range(2)]
    message = await bench.said(("A", 2))
    for follower in followers:
        follower.log.take(message)
    before = followers[0].log.epoch
    await bench.go_back(kept)
    await asyncio.gather(*(bench.catch_up(follower) for follower in followers))
    assert followers[0].log.epoch == followers[1].log.epoch != before


async def test_a_server_that_starts_behind_a_store_that_has_gone_back_has_every_row(bench: Bench) -> None:
    await bench.said(("QUIET", 1), ("A", 1))
    kept = await bench.keep()
    follower = await bench.follower()
    follower.log.take(await bench.said(("A", 2)))
    await bench.go_back(kept)
    await bench.catch_up(follower)
    await bench.said(("A", 3))

    second = await bench.follower()

    assert second.log.epoch == follower.log.epoch == bench.publisher.epoch
    assert second.row("QUIET") == {"last": 1}
    assert second.places() == {"QUIET": (second.log.epoch, 1), "A": (second.log.epoch, 2)}
    second.take_news()
    second.log.take(await bench.said(("QUIET", 2)))
    assert second.take_news() == [("QUIET", 2, 0)]


async def test_a_server_that_has_only_read_of_an_epoch_does_not_return_to_it(bench: Bench) -> None:
    await bench.said(("A", 1))
    kept = await bench.keep()
    await bench.said(("A", 2))
    await bench.go_back(kept)
    await bench.said(("A", 3))
    follower = await bench.follower()
    before = bench.publisher.epoch
    follower.take_news()
    await bench.go_back(kept)
    await bench.catch_up(follower)
    assert follower.take_news() == []
    assert follower.log.epoch != before
    follower.log.take(await bench.said(("A", 4)))
    await follower.in_step()
    assert follower.take_news() == [("A", 2, NEW_EPOCH)]
    assert follower.log.epoch == bench.publisher.epoch


async def test_messages_of_another_life_that_come_late_do_no_harm(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    old = await bench.said(("A", 2))
    await bench.redis.flushall()
    new = await bench.said(("A", 3))
    follower.log.take(new)
    follower.log.take(old)
    await follower.in_step()
    follower.log.take(old)
    await follower.in_step()
    assert follower.places() == {"A": (bench.publisher.epoch, 1)}
    assert follower.row("A") == {"last": 3}


# What harms nothing else


JUNK = [
    b"", b"null", b"[]", b"{}", b"not JSON", b"\xff",
    b'{"epoch":"E","n":1,"at":1}', b'{"epoch":1,"n":1,"at":1,"ticks":[]}',
    b'{"epoch":"E","n":"1","at":1,"ticks":[]}', b'{"epoch":"E","n":1,"at":1,"ticks":[[1,"A"]]}',
    b'{"epoch":"E","n":1,"at":1,"ticks":[[1,"A",7]]}', b'{"epoch":"E","n":1,"at":1,"ticks":7}',
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
async def test_a_message_that_is_no_batch_is_refused(bench: Bench, junk: bytes) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    follower.take_news()
    follower.log.take(junk)
    assert follower.log.is_in_step
    follower.log.take(await bench.said(("A", 2)))

    async def come_late() -> None:
        follower.log.take(junk)

    follower.redis.after = [come_late]
    await bench.catch_up(follower)
    follower.log.take(await bench.said(("A", 3)))
    assert follower.take_news() == [("A", 2, 0), ("A", 3, 0)]
    assert follower.board.refused == {"bad_batch": 2}


@pytest.mark.parametrize("junk", JUNK)
async def test_an_entry_of_the_log_that_is_no_batch_is_a_gap_and_no_more(bench: Bench, junk: bytes) -> None:
    await bench.said(("A", 1), ("B", 1))
    follower = await bench.follower()
    follower.take_news()
    # Batch 2 is lost, batch 3 is whole.
    await bench.redis.xadd(KEYS.log, {"batch": junk}, id="2-0")
    await bench.redis.hset(KEYS.seq, "#", "2")
    await bench.said(("A", 2))
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", 2, GAP)]
    assert follower.board.refused["bad_batch"] == 1
    follower.log.take(await bench.said(("A", 3), ("B", 2)))
    assert follower.take_news() == [("A", 3, 0), ("B", 2, 0)]


async def test_an_entry_without_a_batch_or_between_two_numbers_is_passed_over(bench: Bench) -> None:
    await bench.said(("A", 1))
    await bench.redis.xadd(KEYS.log, {"something": "else"}, id="1-1")
    await bench.redis.xadd(KEYS.log, {"batch": "x"}, id="1-2")
    follower = await bench.follower()
    follower.take_news()
    await bench.said(("A", 2))
    await bench.redis.xadd(KEYS.log, {"batch": "x"}, id="2-1")
    await bench.catch_up(follower)
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", 2, 0)]
    assert follower.log.gaps == 0


async def test_a_page_full_of_junk_does_not_stop_the_reading(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_PAGE", 2)
    await bench.said(("A", 1))
    for n in range(1, 6):
        await bench.redis.xadd(KEYS.log, {"batch": "x"}, id=f"1-{n}")
    follower = await bench.follower()
    await bench.said(("A", 2))
    await bench.catch_up(follower)
    assert follower.places() == {"A": (bench.publisher.epoch, 2)}


async def batch_of(bench: Bench, ticks: Iterable[tuple[int, str, Any]]) -> bytes:
    """Write a batch into the log as a publisher of another make does; return its message."""
    n = int(await bench.redis.hincrby(KEYS.seq, "#", 1))
    epoch = (await bench.redis.get(KEYS.epoch)).decode()
    message = orjson.dumps({"epoch": epoch, "n": n, "at": 1000, "ticks": list(ticks)})
    await bench.redis.xadd(KEYS.log, {"batch": message}, id=f"{n}-0")
    for seq, code, _ in ticks:
        await bench.redis.hset(KEYS.seq, code, str(seq))
    return message


@pytest.mark.parametrize("is_missed", [False, True])
async def test_a_bad_tick_in_a_batch_harms_no_other_and_leaves_no_gap(bench: Bench, is_missed: bool) -> None:
    await bench.said(("A", 1), ("B", 1))
    follower = await bench.follower()
    follower.take_news()
    ticks = [
        (2, "A", {"last": -1}),
        (2, "B", {"last": 2}),
        (3, "A", {"last": "3"}),
        (4, "A", {"last": 4}),
        (1, "C", {"bid": []}),
    ]
    message = await batch_of(bench, ticks)
    if is_missed:
        await bench.catch_up(follower)
    else:
        follower.log.take(message)
    assert follower.take_news() == [("B", 2, 0), ("A", 4, 0)]
    assert follower.row("A") == {"last": 4}
    assert follower.board.refused == {"negative": 1, "wrong_type": 2}
    assert "C" not in follower.board.quotes
    assert follower.log.gaps == 0


async def test_a_tick_that_hits_a_bug_is_lost_and_no_other(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    follower.take_news()
    apply = follower.board.apply_numbered

    def has_a_bug(code: str, *rest: Any) -> Quote | None:
        if code == "BUG":
            raise KeyError("as bugs do")
        return apply(code, *rest)

    follower.board.apply_numbered = has_a_bug  # type: ignore[method-assign]
    follower.log.take(await bench.said(("BUG", 1), ("A", 2)))
    await bench.said(("A", 3), ("BUG", 2))
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", 2, 0), ("A", 3, 0)]
    assert follower.log.bugs == 2
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda redis: redis.hset("qp:row:BAD", "@", "x"),
        lambda redis: redis.hset("qp:row:BAD", "@", b"\xff \xff \xff"),
        lambda redis: redis.hset("qp:row:BAD", "last", "not JSON"),
        lambda redis: redis.hset("qp:row:BAD", "last", "-1"),
        lambda redis: redis.hset("qp:row:BAD", "deep", "[" * 300 + "]" * 300),
        lambda redis: redis.hset("qp:row:BAD", "long", '"' + "x" * 20_000 + '"'),
        lambda redis: redis.hdel("qp:row:BAD", "@"),
        lambda redis: redis.delete("qp:row:BAD"),
        lambda redis: redis.execute_command("SET", "qp:row:BAD", "x"),
    ],
)
async def test_a_bad_row_harms_no_other(bench: Bench, spoil: Callable[[Redis], Awaitable[Any]]) -> None:
    await bench.said(("BAD", 1), ("A", 1))
    await spoil(bench.redis)
    follower = await bench.follower()
    assert list(follower.board.quotes) == ["A"]
    follower.take_news()
    await bench.redis.delete("qp:row:BAD")
    follower.log.take(await bench.said(("BAD", 2)))
    assert follower.take_news() == [("BAD", 2, NEW_EPOCH)]


# When Redis does not let us


async def test_redis_is_away_while_we_catch_up(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    redis_server.stop()
    redis_server.aof = True
    redis_server.start()
    async with bench_on(redis_server) as bench:
        await bench.publish(("A", 1))
        follower = await bench.follower()
        follower.take_news()
        await bench.publish(("A", 2))
        redis_server.kill()
        follower.log.lose_step()
        await wait_until(lambda: follower.log.state == "unreadable")
        assert follower.board.apply("P", b'{"last":1}', 1000) is not None
        await asyncio.to_thread(redis_server.start)
        await bench.publish(("A", 3))
        await bench.catch_up(follower)
        assert follower.take_news() == [("A", 2, 0), ("A", 3, 0)]
        assert len(warnings_in(caplog)) == 1
        assert (follower.log.state, follower.log.gaps) == ("in step", 0)


async def test_redis_goes_away_between_two_pages(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_PAGE", 2)
    redis_server.stop()
    redis_server.aof = True
    redis_server.start()
    async with bench_on(redis_server) as bench:
        await bench.publish(("A", 1))
        follower = await bench.follower()
        follower.take_news()
        for price in range(2, 8):
            await bench.publish(("A", price))

        async def go_away() -> None:
            redis_server.kill()

        follower.redis.after = [go_away]
        follower.log.lose_step()
        await wait_until(lambda: follower.log.state == "unreadable")
        assert follower.take_news() == [("A", 2, 0), ("A", 3, 0)]
        await asyncio.to_thread(redis_server.start)
        await follower.in_step()
        assert follower.take_news() == [("A", seq, 0) for seq in range(4, 8)]


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        ("qp:log", ("SET", "qp:log", "x")),
        ("qp:seq", ("SET", "qp:seq", "x")),
        ("qp:epoch", ("HSET", "qp:epoch", "x", "y")),
    ],
)
async def test_keys_of_another_kind_cost_one_warning_and_plain_ticks_go_on(
    bench: Bench, caplog: pytest.LogCaptureFixture, key: str, spoil: tuple[str, ...]
) -> None:
    await bench.said(("A", 1))
    kept = await bench.redis.dump(key)
    await bench.redis.delete(key)
    await bench.redis.execute_command(*spoil)
    follower = await bench.follower()
    for _ in range(3):
        follower.log.lose_step()
        await asyncio.sleep(0.02)
    assert follower.log.state == "unreadable"
    assert len(warnings_in(caplog)) == 1
    assert follower.board.apply("P", b'{"last":1}', 1000) is not None
    await bench.redis.restore(key, 0, kept, replace=True)
    await follower.in_step()
    assert follower.places()["A"] == (bench.publisher.epoch, 1)


@pytest.mark.parametrize("spoil", [("HSET", "qp:seq", "#", "x"), ("HSET", "qp:seq", "A", "x")])
async def test_numbers_that_are_none_cost_one_warning(
    bench: Bench, caplog: pytest.LogCaptureFixture, spoil: tuple[str, ...]
) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower()
    await bench.said(("B", 1))
    await bench.redis.xtrim(KEYS.log, maxlen=0, approximate=False)
    await bench.redis.execute_command(*spoil)
    follower.log.lose_step()
    await wait_until(lambda: follower.log.state == "unreadable")
    for _ in range(3):
        follower.log.lose_step()
        await asyncio.sleep(0.02)
    assert follower.log.state == "unreadable"
    assert len([w for w in warnings_in(caplog) if "cannot be read" in w]) == 1


@pytest.mark.parametrize(
    "lacks", [("-eval",), ("-hget",), ("-hgetall",), ("-xrange",), ("resetkeys", "~qp:epoch"), ("-@all",)]
)
async def test_a_user_without_rights_costs_one_warning_and_plain_ticks_go_on(
    bench: Bench, caplog: pytest.LogCaptureFixture, lacks: tuple[str, ...]
) -> None:
    await bench.said(("A", 1))
    await bench.redis.execute_command("ACL", "SETUSER", "feed", "on", ">x", "~*", "&*", "+@all", *lacks)
    follower = await bench.follower(url=f"redis://feed:x@127.0.0.1:{bench.server.port}/0")
    for _ in range(3):
        follower.log.lose_step()
        await asyncio.sleep(0.02)
    assert (follower.log.state, follower.log.is_forbidden) == ("unreadable", True)
    assert len(warnings_in(caplog)) == 1
    assert follower.board.apply("P", b'{"last":1}', 1000) is not None
    await bench.redis.execute_command("ACL", "SETUSER", "feed", "~*", "+@all")
    await bench.catch_up(follower)
    assert follower.places()["A"] == (bench.publisher.epoch, 1)


async def test_a_ring_that_cannot_be_filled_is_no_reason_not_to_start(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.said(("A", 1))
    await bench.redis.execute_command("ACL", "SETUSER", "feed", "on", ">x", "~*", "&*", "+@all", "-xrevrange")
    follower = await bench.follower(url=f"redis://feed:x@127.0.0.1:{bench.server.port}/0")
    assert follower.log.is_in_step
    assert follower.filled == []
    assert len(warnings_in(caplog)) == 1


# What waits


async def test_what_comes_while_we_catch_up_is_taken_once_and_in_order(bench: Bench) -> None:
    await bench.said(("A", 1))
    follower = await bench.follower(runs=False)
    follower.take_news()
    follower.log.lose_step()
    await bench.said(("A", 2))
    for price in range(3, 8):
        follower.log.take(await bench.said(("A", price)))
    assert follower.take_news() == []
    bench.run(follower)
    await follower.in_step()
    assert follower.take_news() == [("A", seq, 0) for seq in range(2, 8)]


async def test_what_waits_is_bounded_and_what_was_dropped_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "_MOST_WAITING_BYTES", 1000)
    await bench.said(("A", 0))
    follower = await bench.follower(runs=False)
    follower.take_news()
    follower.log.lose_step()
    for price in range(1, 60):
        message = await bench.said(("A", price))
        follower.log.take(message)
        assert sum(map(len, follower.log._waiting)) <= 1000 + len(message)
    bench.run(follower)
    await follower.in_step()
    assert follower.take_news() == [("A", seq, 0) for seq in range(2, 61)]


async def test_what_overflows_while_the_log_is_read_is_read_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_MOST_WAITING_BYTES", 1000)
    await bench.said(("A", 0))
    follower = await bench.follower()
    follower.take_news()

    async def flood() -> None:
        for price in range(1, 60):
            follower.log.take(await bench.said(("A", price)))

    follower.redis.after = [flood]
    await bench.catch_up(follower)
    assert follower.take_news() == [("A", seq, 0) for seq in range(2, 61)]
