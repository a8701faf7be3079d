"""Ticks in from a real Redis, whatever happens to the link; run on uvloop, as main does."""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import uvloop
from redis.asyncio import Connection

from quotepush.ingest import listener
from quotepush.ingest.listener import ChannelTable, FeedListener
from quotepush.store.clients import Store
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on uvloop; no task and no exception may be left behind."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        faults: list[dict[str, Any]] = []

        async def body() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
            await test(*args, **kwargs)
            await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left: {left}"

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(body())
        assert not faults

    return run


# Channels


def codes_by(templates: list[str], *channels: str) -> dict[str, tuple[str, str | None]]:
    table = ChannelTable(templates)
    found = {}
    for channel in channels:
        pattern, code = table.look_up(channel.encode())
        found[channel] = pattern.decode(), code
    return found


@pytest.mark.parametrize(
    ("templates", "patterns"),
    [
        (["quote.{code}"], [b"quote.*"]),
        (["pub.*.{code}"], [b"pub.*.*"]),
        (["*"], [b"*"]),
        (["{code}"], [b"*"]),
        (["quote.{code}", "*", "quote.*"], [b"quote.*", b"*"]),
        (["{code}.last", "a"], [b"*.last", b"a"]),
    ],
)
def test_each_template_is_subscribed_to_once(templates: list[str], patterns: list[bytes]) -> None:
    assert ChannelTable(templates).patterns == patterns


@pytest.mark.parametrize(
    ("templates", "channel", "pattern", "code"),
    [
        (["quote.{code}"], "quote.sh600519", "quote.*", "600519.SH"),
        (["quote.{code}"], "quote.600519.SH", "quote.*", "600519.SH"),
        (["quote.{code}"], "quote.aapl", "quote.*", "AAPL"),
        (["quote.{code}"], "quote.", "", None),
        (["quote.{code}"], "quote.no such", "", None),
        (["quote.{code}"], "quote.茅台", "", None),
        (["quote.{code}"], "quote." + "A" * 33, "", None),
        (["quote.{code}"], "quote.A\nB", "", None),
        (["pub.*.{code}"], "pub.sse.600519.SH", "pub.*.*", "600519.SH"),
        (["pub.*.{code}"], "pub.a.BRK.B", "pub.*.*", "BRK.B"),
        (["pub.*.{code}"], "pub..AAPL", "pub.*.*", "AAPL"),
        (["{code}.last"], "600519.SH.last", "*.last", "600519.SH"),
        (["{code}.*"], "AAPL.x", "*.*", "AAPL"),
        (["quote-{code}-v1"], "quote-BTC-USDT-v1", "quote-*-v1", "BTC-USDT"),
        (["*"], "anything at all", "*", None),
        (["ticks"], "ticks", "ticks", None),
        (["quote.+.{code}"], "quote.+.AAPL", "quote.+.*", "AAPL"),  # no letter of a template is a pattern of ours
        (["quote.+.{code}"], "quote..AAPL", "", None),
        (["quote.{code}", "*"], "quote.AAPL", "quote.*", "AAPL"),
        (["quote.{code}", "*"], "other", "*", None),
        (["*", "quote.{code}"], "quote.AAPL", "*", None),  # the first one counts
        (["quote.{code}", "*"], "quote.no such", "", None),  # also where it yields no code
    ],
)
def test_a_channel_yields_a_code(templates: list[str], channel: str, pattern: str, code: str | None) -> None:
    assert codes_by(templates, channel) == {channel: (pattern, code)}


def test_a_channel_is_looked_up_once() -> None:
    table = ChannelTable(["quote.{code}"])
    table.look_up(b"quote.AAPL")
    assert table.routes[b"quote.AAPL"] == (b"quote.*", "AAPL")
    table.look_up(b"quote.no such")
    assert b"quote.no such" in table.routes


def test_inventing_channels_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quotepush.ingest.listener._MAX_CHANNELS", 100)
    table = ChannelTable(["quote.{code}"])
    for n in range(1000):
        table.look_up(b"quote.X%d" % n)
        assert len(table.routes) <= 100


def test_a_channel_in_no_known_encoding_yields_no_code() -> None:
    assert ChannelTable(["quote.{code}"]).look_up(b"quote.\xff\xfe") == (b"", None)


# The link


class Heard:
    """A listener with everything that it was told."""

    def __init__(self, url: str, *templates: str, **options: Any) -> None:
        self.ticks: list[tuple[str | None, bytes]] = []
        self.published: list[bytes] = []
        self.arrivals: list[int] = []
        self.batches: list[int] = []
        self.links: list[bool] = []
        self.listener = FeedListener(
            Store(url, timeout_s=2, name="feed").links(),
            list(templates) or ["quote.{code}"],
            merge=self.merge,
            publish=self.published.append,
            on_batch=lambda: self.batches.append(len(self.ticks)),
            on_link=self.links.append,
            **{"probe_interval_s": 0.05, "probe_timeout_s": 5.0, "timeout_s": 5.0, **options},
        )

    def merge(self, code: str | None, payload: bytes, now_ms: int) -> bytes | None:
        if payload == b"a bug":
            raise RuntimeError("a bug")
        self.ticks.append((code, payload))
        self.arrivals.append(now_ms)
        return None if payload == b"no news" else payload

    @property
    def codes(self) -> list[str | None]:
        return [code for code, _ in self.ticks]

    async def up(self, links: int = 1) -> None:
        await wait_until(lambda: self.listener.is_up and self.listener.links >= links, what=f"link {links} is up")

    async def down(self) -> None:
        await wait_until(lambda: not self.listener.is_up, what="the link is down")

    async def count(self, ticks: int) -> None:
        await wait_until(lambda: len(self.ticks) >= ticks, what=f"{ticks} ticks")


@asynccontextmanager
async def listening(url: str, *templates: str, is_up: bool = True, **options: Any) -> AsyncIterator[Heard]:
    heard = Heard(url, *templates, **options)
    task = asyncio.create_task(heard.listener.run())
    try:
        if is_up:
            await heard.up()
        yield heard
        assert not task.done(), "the listener has ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def publish(server: RedisServer, *messages: tuple[str, str], db: int = 0) -> None:
    async with server.client(db=db) as redis:
        for channel, payload in messages:
            await redis.publish(channel, payload)


@on_uvloop
async def test_ticks_arrive_in_order_with_their_codes(redis_server: RedisServer) -> None:
    async with listening(redis_server.url) as heard:
        await publish(redis_server, *[("quote.sh600519", str(n)) for n in range(50)], ("quote.AAPL", "no news"))
        await heard.count(51)
    assert heard.ticks == [("600519.SH", str(n).encode()) for n in range(50)] + [("AAPL", b"no news")]
    assert heard.published == [str(n).encode() for n in range(50)]
    assert heard.batches[-1] == 51
    assert heard.links == [True]
    assert (heard.listener.ignored, heard.listener.bugs) == (0, 0)
    assert all(abs(ms - heard.arrivals[0]) < 60_000 for ms in heard.arrivals)


@on_uvloop
async def test_a_tick_through_another_database_is_heard_and_another_prefix_is_not(redis_server: RedisServer) -> None:
    async with listening(redis_server.url) as heard:
        await publish(redis_server, ("other.AAPL", "x"), ("quot.AAPL", "x"), ("quotes.AAPL", "x"))
        await publish(redis_server, ("quote.AAPL", "heard"), db=7)
        await heard.count(1)
    assert heard.ticks == [("AAPL", b"heard")]


@on_uvloop
async def test_a_message_that_several_patterns_match_counts_once(redis_server: RedisServer) -> None:
    async with listening(redis_server.url, "quote.{code}", "*.AAPL", "*", "quote.*") as heard:
        await publish(redis_server, ("quote.AAPL", "1"), ("x.AAPL", "2"), ("quote.MSFT", "3"), ("quote.no such", "4"))
        await publish(redis_server, ("end", "5"))
        await heard.count(4)
    assert heard.ticks == [("AAPL", b"1"), (None, b"2"), ("MSFT", b"3"), (None, b"5")]
    assert heard.listener.ignored == 1


@on_uvloop
async def test_a_channel_without_a_code_is_counted_and_ignored_by_whichever_pattern(redis_server: RedisServer) -> None:
    async with listening(redis_server.url, "quote.{code}", "pub.*.{code}") as heard:
        await publish(redis_server, ("quote.no such", "x"), ("quote.", "x"), ("pub.a.no such", "x"), ("quote.A", "end"))
        await heard.count(1)
    assert heard.ticks == [("A", b"end")]
    assert heard.listener.ignored == 3


@on_uvloop
async def test_with_a_star_the_tick_names_its_code(redis_server: RedisServer) -> None:
    async with listening(redis_server.url, "*") as heard:
        await publish(redis_server, ("anything", '{"code":"AAPL"}'), ("no such", "x"))
        await heard.count(2)
    assert heard.codes == [None, None]


@on_uvloop
async def test_large_and_binary_payloads_arrive_whole(redis_server: RedisServer) -> None:
    payloads = [b"x" * size for size in (0, 1, 65_535, 1_000_000)] + [bytes(range(256)), b"\r\n$5\r\n"]
    async with listening(redis_server.url) as heard:
        async with redis_server.client(decode_responses=False) as redis:
            for payload in payloads:
                await redis.publish("quote.A", payload)
        await heard.count(len(payloads))
    assert [payload for _, payload in heard.ticks] == payloads


class FakeTransport:
    """Remembers whether it is read from."""

    is_reading = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


@on_uvloop
async def test_ticks_that_come_in_quick_succession_gather_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_REST_S", 3600.0)
    transport, taken = FakeTransport(), []
    link = listener._Link(transport, taken.append)  # type: ignore[arg-type]
    link.data_received(b"1")
    assert transport.is_reading  # the first after a quiet time waits for nothing
    link.data_received(b"2")
    assert not transport.is_reading
    link._go_on()
    assert transport.is_reading
    link.data_received(b"3")
    assert not transport.is_reading
    link.connection_lost(None)
    link._go_on()
    assert not transport.is_reading  # nobody is there any more
    assert taken == [b"1", b"2", b"3"]


@on_uvloop
async def test_a_tick_that_hits_a_bug_is_lost_and_the_next_one_is_not(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(redis_server.url) as heard:
        await publish(redis_server, ("quote.A", "a bug"), ("quote.A", "a bug"), ("quote.A", "fine"))
        await heard.count(1)
    assert heard.ticks == [("A", b"fine")]
    assert (heard.listener.bugs, heard.listener.links) == (2, 1)
    assert caplog.text.count("a tick could not be taken") == 1


@on_uvloop
async def test_a_link_that_redis_cuts_is_made_again(redis_server: RedisServer) -> None:
    async with listening(redis_server.url) as heard:
        for links in (2, 3):
            async with redis_server.client() as redis:
                await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await heard.up(links)
        await publish(redis_server, ("quote.A", "x"))
        await heard.count(1)
    assert heard.links == [True, False, True, False, True]


@on_uvloop
async def test_a_link_that_is_lost_while_it_is_asked_for_a_sign_of_life_is_made_again(
    redis_server: RedisServer,
) -> None:
    """uvloop raises RuntimeError at a write to a transport that was lost in the same turn."""
    failures = [RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")]

    class JustLost(Connection):
        async def send_command(self, *command: Any, **options: Any) -> None:
            if command[0] == "PING" and failures and heard.listener.is_up:
                raise failures.pop()
            await super().send_command(*command, **options)

    heard = Heard(redis_server.url)
    heard.listener._links._pool.connection_class = JustLost
    task = asyncio.create_task(heard.listener.run())
    try:
        await heard.up(2)
        assert not failures
        await publish(redis_server, ("quote.A", "x"))
        await heard.count(1)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_uvloop
async def test_it_can_be_stopped_in_the_turn_in_which_the_link_is_lost(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_lost = asyncio.Event()

    async def lose(self: FeedListener, connection: Connection) -> None:
        await is_lost.wait()
        raise ConnectionError

    monkeypatch.setattr(FeedListener, "_keep_looking", lose)
    heard = Heard(redis_server.url)
    task = asyncio.create_task(heard.listener.run())
    await heard.up()
    is_lost.set()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=10)
    task.cancel()
    assert done


@on_uvloop
async def test_a_link_that_is_silently_dead_is_noticed(redis_server: RedisServer) -> None:
    async with listening(redis_server.url, probe_timeout_s=0.5) as heard:
        redis_server.pause()
        try:
            await wait_until(lambda: heard.listener.lag_s > 0.1, what="the lag grows while nothing is answered")
            await heard.down()
            assert heard.listener.lag_s == 0.0
            heard.listener._probe_timeout_s = 30.0  # the next link outlives a Redis that is late on a busy machine
        finally:
            redis_server.resume()
        await heard.up(2)
        await publish(redis_server, ("quote.A", "x"))
        await heard.count(1)
    assert heard.links == [True, False, True]


@on_uvloop
async def test_a_redis_that_restarts_is_found_again(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quotepush.feed")
    async with listening(redis_server.url) as heard:
        redis_server.kill()
        await heard.down()
        await asyncio.to_thread(redis_server.start)
        await heard.up(2)
        await publish(redis_server, ("quote.A", "x"))
        await heard.count(1)
    assert caplog.text.count("feed link lost") == 1
    assert caplog.text.count("feed link is back") == 1


@on_uvloop
async def test_a_redis_that_is_not_there_yet_is_waited_for(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.kill()
    async with listening(redis_server.url, is_up=False) as heard:
        await wait_until(lambda: "feed link lost" in caplog.text, what="a first attempt has failed")
        assert heard.links == []
        await asyncio.to_thread(redis_server.start)
        await heard.up()
        assert heard.links == [True]


@on_uvloop
async def test_a_listener_that_is_cancelled_leaves_redis(redis_server: RedisServer) -> None:
    async with listening(redis_server.url), redis_server.client() as redis:
        assert [c["name"] for c in await redis.client_list(_type="pubsub")] == ["feed"]
    async with redis_server.client() as redis:

        async def has_left() -> bool:
            return not await redis.client_list(_type="pubsub")

        await wait_until(has_left)


@on_uvloop
async def test_a_password_is_used_and_never_logged(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with redis_server.client() as redis:
        await redis.config_set("requirepass", "open-sesame")
    address = redis_server.url.removeprefix("redis://")
    async with listening(f"redis://:open-sesame@{address}") as heard:
        async with redis_server.client(password="open-sesame") as redis:
            await redis.publish("quote.A", "x")
        await heard.count(1)
    async with listening(f"redis://:wrong-words@{address}", is_up=False) as heard:
        await wait_until(lambda: "feed link lost" in caplog.text, what="the refusal is logged")
        assert not heard.listener.is_up
    assert "open-sesame" not in caplog.text
    assert "wrong-words" not in caplog.text


# A Redis that misbehaves as no real one can be made to


class FakeRedis:
    """Answers the few commands of a listener, in the way of the test."""

    def __init__(self, behave: Callable[[int, list[bytes]], bytes | None]) -> None:
        self._behave = behave
        self.connections = 0
        self._server: asyncio.Server

    async def __aenter__(self) -> "FakeRedis":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        commands = hiredis.Reader()
        try:
            while chunk := await reader.read(65_536):
                commands.feed(chunk)
                while (command := commands.gets()) is not False:
                    answer = self._behave(number, command)  # type: ignore[arg-type]
                    if answer is None:
                        return
                    writer.write(answer)
        except ConnectionError:
            pass
        finally:
            writer.close()


def well_behaved(command: list[bytes]) -> bytes:
    name = command[0].upper()
    if name == b"PSUBSCRIBE":
        return b"*3\r\n$10\r\npsubscribe\r\n$7\r\nquote.*\r\n:1\r\n"
    if name == b"PING":
        return b"*2\r\n$4\r\npong\r\n$%d\r\n%b\r\n" % (len(command[1]), command[1])
    return b"+OK\r\n"


MESSAGE = b"*4\r\n$8\r\npmessage\r\n$7\r\nquote.*\r\n$7\r\nquote.A\r\n$4\r\ntick\r\n"


@pytest.mark.parametrize("at", [1, 10, 30, len(MESSAGE) - 1])
@on_uvloop
async def test_half_a_message_of_a_lost_link_does_not_spoil_the_next_one(at: int) -> None:
    def behave(connection: int, command: list[bytes]) -> bytes | None:
        if connection == 1 and command[0] == b"PING":
            return None  # and the connection is closed
        if command[0] == b"PSUBSCRIBE":
            return well_behaved(command) + (MESSAGE[:at] if connection == 1 else MESSAGE)
        return well_behaved(command)

    async with FakeRedis(behave) as redis, listening(redis.url, is_up=False) as heard:
        await heard.up(2)
        await heard.count(1)
    assert heard.ticks == [("A", b"tick")]


@on_uvloop
async def test_a_redis_that_refuses_the_subscription_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    def behave(connection: int, command: list[bytes]) -> bytes | None:
        if command[0] == b"PSUBSCRIBE" and connection < 3:
            return b"-NOPERM this user has no permissions to access one of the channels\r\n"
        return well_behaved(command)

    async with FakeRedis(behave) as redis, listening(redis.url, is_up=False) as heard:
        await heard.up()
        assert redis.connections == 3
    assert heard.links == [True]
    assert "NOPERM" in caplog.text


@on_uvloop
async def test_a_redis_that_talks_nonsense_is_left_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    def behave(connection: int, command: list[bytes]) -> bytes | None:
        if command[0] == b"PSUBSCRIBE" and connection == 1:
            return b"HTTP/1.1 400 Bad Request\r\n\r\n"
        return well_behaved(command)

    async with FakeRedis(behave) as redis, listening(redis.url, is_up=False) as heard:
        await heard.up()
        assert redis.connections == 2
    assert "feed link lost" in caplog.text


@on_uvloop
async def test_a_redis_that_accepts_and_says_nothing_is_left() -> None:
    def behave(connection: int, command: list[bytes]) -> bytes | None:
        if connection == 1 and command[0] in (b"PSUBSCRIBE", b"PING"):
            return b""
        return well_behaved(command)

    async with FakeRedis(behave) as redis, listening(redis.url, is_up=False, probe_timeout_s=0.5) as heard:
        await heard.up()
        assert redis.connections == 2
