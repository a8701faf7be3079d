"""What of a batch is in a real Redis afterwards, and which batches are none."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from quotepush import BlockingPublisher, Publisher
from quotepush.batches import Batches
from quotepush.ingest.keys import FeedKeys
from quotepush.quote.tick import BadTick
from tests.support.redis_server import RedisServer
from tests.support.store import heard, hearing, logged, prices, row

# --- what is in Redis afterwards --------------------------------------------------------------------------------------


async def test_seq_of_a_code_rises_by_one_whoever_publishes_it(store: RedisServer) -> None:
    async with Publisher(store.url) as first, Publisher(store.url) as second:
        assert await first.publish([{"code": "sh600519", "last": 1}, {"code": "AAPL", "last": 1}]) == [1, 1]
        assert await second.publish([{"code": "600519.SH", "last": 2}]) == [2]
        assert await first.publish([{"code": "aapl", "last": 2}, {"code": "SSE.600519", "last": 3}]) == [2, 3]
        assert first.epoch == second.epoch != ""

    batches = await logged(store)
    assert [batch["n"] for batch in batches] == [1, 2, 3]
    assert {batch["epoch"] for batch in batches} == {first.epoch}
    assert batches[2]["ticks"] == [[2, "AAPL", {"last": 2}], [3, "600519.SH", {"last": 3}]]


async def test_several_ticks_of_a_code_in_one_batch_are_numbered_in_their_order(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher:
        await publisher.publish([{"code": "A", "last": 1}])
        ticks = [{"code": c, "last": n} for n, c in enumerate("ABAAB")]

        assert await publisher.publish(ticks) == [2, 1, 3, 4, 2]

    assert await prices(store) == [1, 0, 2, 3]
    assert await row(store, "A") == {"last": "3"}
    async with store.client() as client:
        assert await client.hgetall("qp:seq") == {"#": "2", "A": "4", "B": "2"}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (FeedKeys("qp:"), []),
        (FeedKeys("qp:", is_cluster=True), ["{qp:}row:A", "{qp:}row:B"]),
        (FeedKeys("{qp}:"), ["{qp}:row:A", "{qp}:row:B"]),  # by the plain address of one of its nodes
    ],
)
def test_where_all_keys_are_in_one_slot_of_a_cluster_each_is_named(keys: FeedKeys, rows: list[str]) -> None:
    batches = Batches(keys, 10, "")
    batch = batches.spell([{"code": code, "last": 1} for code in "ABA"])
    assert batch is not None
    count, *arguments = batches.arguments(batches.next_number(), batch)
    assert arguments[4:count] == rows


async def test_message_on_the_channel_is_the_entry_of_the_log(store: RedisServer) -> None:
    before_ms = time.time_ns() // 1_000_000
    async with Publisher(store.url) as publisher, hearing(store, "qp:feed") as pubsub:
        await publisher.publish([{"code": "A", "last": 1, "name": "贵州茅台"}, {"code": "B"}])
        _, message = await heard(pubsub)

    assert [message] == await logged(store)
    assert before_ms <= message.pop("at") <= time.time_ns() // 1_000_000
    ticks = [[1, "A", {"last": 1, "name": "贵州茅台"}], [1, "B", {}]]
    assert message == {"epoch": publisher.epoch, "n": 1, "ticks": ticks}


async def test_row_holds_the_newest_fields_with_their_number_and_time(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher, store.client() as client:
        await publisher.publish([{"code": "A", "last": 1.5, "bid": 1, "name": "a, b"}])
        await publisher.publish([{"code": "A", "last": 2.0, "bid": None}, {"code": "A", "ask": 3, "gone": None}])

        assert await row(store, "A") == {"last": "2.0", "name": '"a, b"', "ask": "3"}
        about = await client.hget("qp:row:A", "@")  # type: ignore[misc]
        assert about == f"3 {publisher.epoch} {(await logged(store))[-1]['at']}"

        await publisher.publish([{"code": "A", "reset": True, "last": 7, "open": None}])
        assert await row(store, "A") == {"last": "7"}
        await publisher.publish([{"code": "A", "reset": False, "open": 8}, {"code": "B", "reset": True}])
        assert await row(store, "A") == {"last": "7", "open": "8"}
        assert await row(store, "B") == {}
    assert (await logged(store))[2]["ticks"] == [[4, "A", {"reset": True, "last": 7, "open": None}]]


async def test_values_go_through_untouched(store: RedisServer) -> None:
    fields = {
        "volume": 2**46,
        "id": 9_007_199_254_740_993,
        "most": 2**64 - 1,
        "least": -(2**63),
        "tiny": 5e-324,
        "third": 1 / 3,
        "tags": [],
        "bids": [],
        "more": {},
        "nested": {"a": [1, [], {}, None, "null"]},
        "yes": True,
        "text": 'null "quoted", \\ 茅台 \u2028 \x00 %d {code}',
        "nullable": "null",
        "": "nameless",
        "% 茅\"": 1,
        "whole": 3.0,
    }  # fmt: skip
    async with Publisher(store.url) as publisher:
        await publisher.publish([{"code": "A", **fields}])
        for name, value in fields.items():  # also one by one: that is another way through
            await publisher.publish([{"code": "B", name: value}])

    (_, _, tick), *_ = (await logged(store))[0]["ticks"]
    expected = {name: orjson.dumps(value).decode() for name, value in fields.items()}
    assert tick == fields
    assert await row(store, "A") == await row(store, "B") == expected | {"whole": "3.0"}


async def test_fields_that_the_server_makes_are_not_published(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher:
        own = {"seq": 7, "prev": 6, "epoch": "x", "change": 1, "change_pct": 1}
        assert await publisher.publish([{**own, "code": "A", "last": 1}]) == [1]

    assert await row(store, "A") == {"last": "1"}
    assert (await logged(store))[0]["ticks"] == [[1, "A", {"last": 1}]]


async def test_copies_go_to_the_channel_of_each_code(store: RedisServer) -> None:
    async with (
        Publisher(store.url, copies="quote.{code}") as publisher,
        hearing(store, "quote.600519.SH", "quote.A") as pubsub,
    ):
        await publisher.publish([{"code": "sh600519", "last": 1}, {"code": "A"}, {"code": "A", "tags": []}])
        epoch = publisher.epoch

        assert [await heard(pubsub) for _ in range(3)] == [
            ("quote.600519.SH", {"epoch": epoch, "seq": 1, "last": 1}),
            ("quote.A", {"epoch": epoch, "seq": 1}),
            ("quote.A", {"epoch": epoch, "seq": 2, "tags": []}),
        ]


async def test_without_copies_nothing_goes_to_the_channels_of_codes(redis_server: RedisServer) -> None:
    async with Publisher(redis_server.url) as publisher, hearing(redis_server, "quote.A", "end") as pubsub:
        await publisher.publish([{"code": "A", "last": 1}])
        async with redis_server.client() as client:
            await client.publish("end", "1")

        assert await heard(pubsub) == ("end", 1)


async def test_prefixes_keep_deployments_apart(redis_server: RedisServer) -> None:
    async with (
        Publisher(redis_server.url, prefix="one:") as one,
        Publisher(redis_server.url, prefix="") as other,
        redis_server.client() as client,
    ):
        await one.publish([{"code": "A", "last": 1}])
        assert await other.publish([{"code": "A", "last": 2}]) == [1]

        assert one.epoch != other.epoch
        assert await client.hget("one:row:A", "last") == "1"  # type: ignore[misc]
        assert await client.hget("row:A", "last") == "2"  # type: ignore[misc]


async def test_log_is_bounded_and_publishers_are_forgotten(store: RedisServer) -> None:
    async with Publisher(store.url, log_batches=100) as publisher, store.client() as client:
        for n in range(450):
            await publisher.publish([{"code": "A", "last": n}])

        # Redis cuts whole nodes of 100 entries.
        assert 100 <= await client.xlen("qp:log") <= 200
        assert (await logged(store))[-1]["n"] == 450
        (name,) = [key async for key in client.scan_iter("qp:publisher:*")]
        assert 0 < await client.ttl(name) <= 86_400


async def test_rows_without_a_tick_go_in_the_end(store: RedisServer) -> None:
    async with Publisher(store.url) as publisher, store.client() as client:
        await publisher.publish([{"code": "A", "last": 1}])
        await client.persist("qp:row:A")
        await publisher.publish([{"code": "A", "last": 2}])
        assert 0 < await client.ttl("qp:row:A") <= 864_000


async def test_nothing_at_all_may_be_published(redis_server: RedisServer) -> None:
    async with Publisher(redis_server.url) as publisher:
        assert await publisher.publish([]) == []

    assert await logged(redis_server) == []


# --- what is refused --------------------------------------------------------------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
BAD_TICKS: list[tuple[Any, str]] = [
    ({"code": "A", "last": NAN}, "wrong_type"),
    ({"code": "A", "last": INFINITY}, "wrong_type"),
    ({"code": "A", "bids": [[NAN, 100]]}, "wrong_type"),
    ({"code": "A", "asks": [[1.5, INFINITY]]}, "wrong_type"),
    ({"code": "A", "mine": -INFINITY}, "wrong_type"),
    ({"code": "A", "mine": {"deep": [1, (2, NAN)]}}, "wrong_type"),
    ({"code": "A", "last": -1}, "negative"),
    ({"code": "A", "last": -0.5}, "negative"),
    ({"code": "A", "bids": [[1, -1]]}, "negative"),
    ({"code": "A", "last": "1"}, "wrong_type"),
    ({"code": "A", "last": True}, "wrong_type"),
    ({"code": "A", "volume": 1.5}, "wrong_type"),
    ({"code": "A", "ts": 10**15}, "wrong_type"),
    ({"code": "A", "mine": object()}, "wrong_type"),
    ({"code": "A", "mine": 2**64}, "wrong_type"),
    ({"code": "A", "last": 10**5000}, "wrong_type"),
    ({"code": "A", "mine": "\ud800"}, "wrong_type"),
    ({"code": "A", "\ud800": 1}, "wrong_type"),
    ({"code": "A", 1: 2}, "wrong_type"),
    ({"code": "A", "@": 1}, "wrong_type"),
    ({"code": "A", "@row": 1}, "wrong_type"),
    ({"code": "no such"}, "bad_code"),
    ({"code": ""}, "bad_code"),
    ({"code": None}, "wrong_type"),
    ({"code": 7}, "wrong_type"),
    ({"code": ["A"]}, "wrong_type"),
    ({"code": b"A"}, "wrong_type"),
    ({"last": 1}, "wrong_type"),
    ("A", "wrong_type"),
    (None, "wrong_type"),
    ({"code": "A", "name": "x" * (1 << 20)}, "too_large"),
    ({"code": "A", **{f"f{n}": n for n in range(1000)}}, "too_large"),
]


@pytest.fixture
def both(redis_server: RedisServer) -> Iterator[Callable[[list[Any]], None]]:
    """Publishes with either publisher; both must refuse with the same error."""
    with BlockingPublisher(redis_server.url) as blocking:

        def publish(ticks: list[Any]) -> None:
            with pytest.raises(BadTick) as said:
                blocking.publish(ticks)

            async def again() -> None:
                async with Publisher(redis_server.url) as publisher:
                    with pytest.raises(BadTick) as error:
                        await publisher.publish(ticks)
                assert str(error.value) == str(said.value)

            asyncio.run(again())
            raise said.value

        yield publish


def test_a_batch_with_a_bad_tick_is_refused_whole(both: Callable[[list[Any]], None], redis_server: RedisServer) -> None:
    for bad, reason in BAD_TICKS:
        with pytest.raises(BadTick) as error:
            both([{"code": "A", "last": 1}, bad])
        assert error.value.reason == reason, bad
        assert error.value.message.startswith("tick 2: "), error.value
    with pytest.raises(BadTick, match="at most 1,000 ticks"):
        both([{"code": "A", "last": 1}] * 1001)
    with pytest.raises(BadTick, match="at most 16,777,216 bytes"):
        both([{"code": "A", "name": "x" * 100_000}] * 100)

    assert asyncio.run(logged(redis_server)) == []


async def test_the_largest_batch_and_the_widest_tick_are_taken(store: RedisServer) -> None:
    wide = {f"f{n}": n for n in range(999)}
    async with Publisher(store.url) as publisher:
        assert await publisher.publish([{"code": "A", **wide}]) == [1]
        assert await publisher.publish([{"code": "A", **dict.fromkeys(wide)}]) == [2]
        assert await row(store, "A") == {}
        assert len(await publisher.publish([{"code": f"C{n}", "last": n} for n in range(1000)])) == 1000
