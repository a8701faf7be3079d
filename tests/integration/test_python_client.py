"""The Python client over everything that can happen between it and a server: not a row twice, lost or out of order."""

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quotepush import Backend, Publisher, QuoteClient
from quotepush.client import Gap, StateChange
from tests.support.door import Door, door_to
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until

StartServer = Callable[..., Awaitable[QuotepushServer]]

_CODES = ["A", "B", "C"]
_QUICK: dict[str, Any] = {"min_backoff_s": 0.01, "max_backoff_s": 0.1}


class Steady:
    """A publisher that numbers what it says, and a client that takes it.

    Attributes:
        seqs: numbers of the rows that the client yielded, by code.
        gaps: what it was told to be missing.
        newest: number of the newest tick, by code.
        is_late: main has merged rows, as it should when it is late.
    """

    def __init__(self, quotes: QuoteClient, publisher: Publisher) -> None:
        self.seqs: defaultdict[str, list[int]] = defaultdict(list)
        self.gaps: list[Gap] = []
        self.states: list[StateChange] = []
        self.newest: dict[str, int] = {}
        self.is_late = False
        self._quotes = quotes
        self._publisher = publisher
        self._is_over = False
        quotes.on("gap", self.gaps.append)
        quotes.on("state", self.states.append)

    async def publish(self) -> None:
        n = 0
        while not self._is_over:
            n += 1
            seqs = await self._publisher.publish([{"code": code, "last": n, "name": "x" * 50} for code in _CODES])
            self.newest = dict(zip(_CODES, seqs, strict=True))
            await asyncio.sleep(0.005)

    async def take(self) -> None:
        async for row in self._quotes:
            seqs = self.seqs[row["code"]]
            assert not seqs or row.get("prev", seqs[-1]) == seqs[-1]
            seqs.append(row["seq"])

    def end(self) -> None:
        self._is_over = True

    async def goes_on(self) -> None:
        """Return when rows have come that were published after the call."""
        newest = dict(self.newest)
        await wait_until(lambda: all(self.has(code, newest[code] + 5) for code in _CODES), 60)

    def has(self, code: str, seq: int) -> bool:
        return bool(self.seqs[code]) and self.seqs[code][-1] >= seq

    def opened(self) -> int:
        return [change.state for change in self.states].count("open")

    async def look_at(self, server: QuotepushServer) -> None:
        """Note whether main has merged rows; what it has counted ends with it."""
        self.is_late |= bool(await server.merged_by_main())

    def check(self) -> None:
        """Every number is there once and in order, from the first one that came, but for those that main has merged."""
        assert self.gaps == []
        merged = self._quotes.merged
        for code in _CODES:
            seqs = self.seqs[code]
            assert seqs == sorted(set(seqs))
            assert seqs[-1] == self.newest[code]
            assert len(seqs) + merged[code] == seqs[-1] - seqs[0] + 1
        assert self.is_late or not merged.total()
        assert (self._quotes.merged_locally, self._quotes.gaps.total()) == (0, 0)


@asynccontextmanager
async def steady(server: QuotepushServer, redis_server: RedisServer, url: str = "") -> AsyncIterator[Steady]:
    """Publish and take for as long as the context, and then until everything has come.

    Args:
        url: of a way to the server; else its own.
    """
    async with Publisher(redis_server.url) as publisher, QuoteClient(url or server.url, **_QUICK) as quotes:
        feed = Steady(quotes, publisher)
        taking = asyncio.create_task(feed.take())
        await quotes.subscribe(_CODES)
        publishing = asyncio.create_task(feed.publish())
        try:
            await wait_until(lambda: feed.newest, 30)
            await feed.goes_on()
            yield feed
            feed.end()
            await publishing
            await wait_until(lambda: all(feed.has(code, feed.newest[code]) for code in _CODES), 60)
            await feed.look_at(server)
        finally:
            feed.end()
            publishing.cancel()
            taking.cancel()
            await asyncio.wait({publishing, taking})
        feed.check()


@pytest.mark.fault
async def test_every_row_comes_once_over_a_killed_worker_and_a_restarted_server(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    # However long the starts take, all that was missed fits in.
    server = await start_server(workers=1, ring_age_s=600, ring_code_bytes=4_000_000, replay_bytes=20_000_000)
    async with steady(server, redis_server) as feed:
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: feed.opened() >= 2, 60)
        await feed.goes_on()
        await feed.look_at(server)
        await server.stop()
        await server.start(60)
        await feed.goes_on()
        await feed.look_at(server)
        await server.kill()
        await server.start(60)
        await feed.goes_on()


def door_of(server: QuotepushServer) -> Any:
    return door_to(server, "http://127.0.0.1:{port}")


@pytest.mark.fault
async def test_every_row_comes_once_over_a_link_that_is_cut_stalls_and_trickles(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=2, heartbeat_ms=400, ring_age_s=600, ring_code_bytes=1_000_000)
    async with door_of(server) as door:
        assert isinstance(door, Door)
        async with steady(server, redis_server, door.url) as feed:
            for _ in range(5):
                door.cut()
                await feed.goes_on()

            before = feed.opened()
            door.stall()
            await wait_until(lambda: any("no message within" in change.reason for change in feed.states), 60)
            door.cut()
            door.flow()
            await feed.goes_on()
            assert feed.opened() > before

            door.piece_bytes = 100
            await feed.goes_on()
            door.cut()
            await feed.goes_on()
            door.piece_bytes = 0


@pytest.mark.fault
async def test_rows_that_were_not_kept_are_told_to_be_missing(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1, ring_code_bytes=0)
    gaps: list[Gap] = []
    async with (
        door_of(server) as door,
        Publisher(redis_server.url) as publisher,
        QuoteClient(door.url, **_QUICK) as quotes,
    ):
        quotes.on("gap", gaps.append)
        await quotes.subscribe("A")
        (first,) = await publisher.publish([{"code": "A", "last": 1}])
        await wait_until(lambda: quotes.rows.get("A", {}).get("last") == 1, 30)
        door.shut()
        await wait_until(lambda: quotes.state != "open", 30)
        await publisher.publish([{"code": "A", "last": last} for last in (2, 3, 4)])

        async def are_taken() -> bool:
            return await server.metric("ticks_accepted") == 4

        await wait_until(are_taken, 30)
        door.open()
        await wait_until(lambda: quotes.rows["A"]["last"] == 4, 30)
        (gap,) = gaps
        assert (gap.reason, gap.first, gap.last, gap.missing) == ("away", first + 1, first + 2, 2)
        assert (quotes.gaps, quotes.merged) == ({"A": 1}, {})
        rows = await quotes.next_rows()
        assert [row["last"] for row in rows] == [1, 4]


async def test_options_change_on_the_open_connection_and_are_kept_over_the_next(
    start_server: StartServer, redis_server: RedisServer
) -> None:
    server = await start_server(workers=1)
    async with (
        door_of(server) as door,
        Publisher(redis_server.url) as publisher,
        QuoteClient(door.url, **_QUICK) as quotes,
    ):
        await publisher.publish([{"code": "A", "last": 1, "volume": 5}])
        await wait_until(lambda: server.metric("ticks_accepted"))
        await quotes.subscribe("A")
        await wait_until(lambda: quotes.rows.get("A", {}).get("volume") == 5, 30)
        assert (await quotes.subscribe("A", fields=["last"], max_rate=500)).codes == ("A",)
        await wait_until(lambda: "volume" not in quotes.rows["A"], 30)
        refused = await quotes.subscribe("A", fields=["price"])
        assert [refusal.error for refusal in refused.rejected] == ["unknown_field"]
        for attempt in range(2):
            (listed,) = await quotes.list()
            assert (listed["fields"], listed["max_rate"]) == (["last"], 500)
            await publisher.publish([{"code": "A", "last": 2 + attempt, "volume": 6 + attempt}])
            await wait_until(lambda attempt=attempt: quotes.rows["A"].get("last") == 2 + attempt, 30)
            assert "volume" not in quotes.rows["A"]
            if not attempt:
                passed = door.passed
                door.cut()
                await wait_until(lambda passed=passed: door.passed > passed and quotes.state == "open", 30)
                await wait_until(quotes.list, 30)


# Tokens


def in_seconds(seconds: int) -> int:
    return int(time.time()) + seconds


@pytest.fixture
async def guarded(start_server: StartServer) -> QuotepushServer:
    """A server that wants tokens; its clients take it for dead after 2.5 heartbeats, and a busy one is not."""
    return await start_server(workers=1, token_key=KEY, token_leeway_s=0, heartbeat_ms=1500)


async def test_a_token_is_renewed_on_the_open_connection(guarded: QuotepushServer) -> None:
    given: list[str] = []

    async def newest() -> str:
        given.append(token(sub="ann", exp=in_seconds(11), n=len(given)))
        return given[-1]

    beats: list[int] = []
    async with QuoteClient(guarded.url, token=newest) as quotes:
        quotes.on("heartbeat", lambda beat: beats.append(beat["time"]))
        await quotes.subscribe("A")
        conn = (quotes.hello or {})["conn"]
        end_ms = (time.time() + 13) * 1000  # by then the first one has ended, and its server has looked
        await wait_until(lambda: beats and beats[-1] > end_ms, 60)
        assert (quotes.hello or {})["conn"] == conn
        assert quotes.state == "open"
    assert len(given) >= 2
    assert not any(part in guarded.log() for text in given for part in text.split(".")[1:])


async def test_a_token_that_is_refused_is_asked_for_anew(guarded: QuotepushServer) -> None:
    tokens = [
        token(sub="ann", exp=in_seconds(-60)),
        token("another key of 32 bytes and more", sub="ann"),
        token(sub="ann", exp=in_seconds(3600)),
    ]
    asked: list[str] = []

    def newest() -> str:
        asked.append(tokens[min(len(asked), 2)])
        return asked[-1]

    async with QuoteClient(guarded.url, token=newest, **_QUICK) as quotes:
        states: list[StateChange] = []
        quotes.on("state", states.append)
        assert (await quotes.subscribe("A")).codes == ("A",)
        assert asked == tokens
        assert [change.reason for change in states if change.state == "waiting"] == ["HTTP 401 Unauthorized"] * 2


async def test_a_connection_that_ends_with_its_token_is_made_again_with_the_next(guarded: QuotepushServer) -> None:
    first = token(sub="ann", exp=in_seconds(6))
    given = [first]
    async with QuoteClient(guarded.url, token=lambda: given[-1], **_QUICK) as quotes:
        states: list[StateChange] = []
        quotes.on("state", states.append)
        await quotes.subscribe("A")
        conn = (quotes.hello or {})["conn"]
        await wait_until(lambda: any("4401" in change.reason for change in states), 60)
        given.append(token(sub="ann", exp=in_seconds(3600)))
        await wait_until(lambda: quotes.state == "open" and (quotes.hello or {})["conn"] != conn, 60)
        assert [entry["code"] for entry in await quotes.list()] == ["A"]


async def test_a_backends_bare_frames_are_told_and_cost_no_connection(
    quotepush_server: QuotepushServer, redis_server: RedisServer
) -> None:
    async with Backend(redis_server.url) as backend, QuoteClient(quotepush_server.url) as quotes:
        heard: list[Any] = []
        states: list[StateChange] = []
        quotes.on("raw", lambda message: heard.append(message["data"]))
        quotes.on("message", lambda message: heard.append(message["data"]))
        await quotes.ping()
        quotes.on("state", states.append)
        for payload, is_raw in (("Good morning", True), (b"\0\xff", True), ('{"alert":1}', True), ("a word", False)):
            await backend.send_to_all(payload, raw=is_raw)
        await wait_until(lambda: len(heard) == 4)
        assert heard == ["Good morning", b"\0\xff", '{"alert":1}', "a word"]
        assert not states
