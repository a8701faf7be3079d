"""The Python client without asyncio, against a real server."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from quotepush import BlockingQuoteClient
from quotepush.client import ClientClosed, Refused, Row, WrongUrl
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer

_QUICK: dict[str, Any] = {"min_backoff_s": 0.01, "max_backoff_s": 0.05}


async def publish(server: RedisServer, code: str, *lasts: float) -> None:
    async with server.client() as redis:
        for last in lasts:
            await redis.publish(f"quote.{code}", orjson.dumps({"last": last}))


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "quotepush client"]


async def test_a_script_gets_every_row(quotepush_server: QuotepushServer, redis_server: RedisServer) -> None:
    loop = asyncio.get_running_loop()

    def publish_now(*lasts: float) -> None:
        asyncio.run_coroutine_threadsafe(publish(redis_server, "A", *lasts), loop).result(30)

    def script() -> None:
        heard: list[Row] = []
        with BlockingQuoteClient(quotepush_server.url) as quotes:
            quotes.on("row", heard.append)
            result = quotes.subscribe(["a", "no such"], fields=["last"], timeout=30)
            assert (result.codes, len(result.rejected)) == (("A",), 1)
            with pytest.raises(TimeoutError):
                quotes.next_row(timeout=0.01)
            for last in (1, 2):  # one after the other: a server that is late merges them
                publish_now(last)
                assert quotes.next_row(timeout=30)["last"] == last
            publish_now(3)
            for row in quotes:
                assert row["last"] == 3
                break
            assert quotes.rows == {"A": row}
            assert (quotes.state, quotes.merged.total(), quotes.gaps.total(), quotes.merged_locally) == (
                "open",
                0,
                0,
                0,
            )
            assert [entry["fields"] for entry in quotes.list()] == [["last"]]
            assert quotes.snapshot("A").rows["A"]["last"] == 3
            assert quotes.ping() >= 0
            assert quotes.hello is not None
            assert list(quotes.listen(0)) == []
            publish_now(4)
            assert quotes.next_row(timeout=30)["last"] == 4
            publish_now(5)
            assert quotes.unsubscribe("A") == ("A",)
            assert list(quotes.listen(0.05)) == []
        assert [row["last"] for row in heard] == [1, 2, 3, 4, 5][: len(heard)]
        with pytest.raises(ClientClosed):
            quotes.subscribe("A")
        with pytest.raises(ClientClosed):
            quotes.next_row()
        assert list(quotes) == []
        quotes.close()

    await asyncio.to_thread(script)
    assert client_threads() == []


async def test_it_works_where_a_loop_runs_already(quotepush_server: QuotepushServer) -> None:
    quotes = BlockingQuoteClient(quotepush_server.url).open()
    assert quotes.subscribe("A", timeout=30).codes == ("A",)
    with pytest.raises(RuntimeError, match="once"):
        quotes.open()
    quotes.close()
    assert client_threads() == []


async def test_a_frame_holds_the_newest_rows(quotepush_server: QuotepushServer, redis_server: RedisServer) -> None:
    pytest.importorskip("pandas")
    with BlockingQuoteClient(quotepush_server.url) as quotes:
        quotes.subscribe(["A", "B"], timeout=30)
        await publish(redis_server, "A", 1, 2)
        while quotes.next_row(timeout=30)["last"] != 2:
            pass
        assert quotes.frame()["last"].to_dict() == {"A": 2}


async def test_waiting_in_a_callback_is_told_to_be_a_mistake(quotepush_server: QuotepushServer) -> None:
    mistakes: list[BaseException] = []

    def ask(_: Any) -> None:
        try:
            quotes.ping()
        except RuntimeError as e:
            mistakes.append(e)

    quotes = BlockingQuoteClient(quotepush_server.url)
    quotes.on("state", ask)
    with quotes:
        quotes.subscribe("A", timeout=30)
    assert mistakes


async def test_an_unreachable_server_is_waited_for_no_longer_than_wished() -> None:
    with BlockingQuoteClient("http://127.0.0.1:1", **_QUICK) as quotes:
        with pytest.raises(TimeoutError):
            quotes.subscribe("A", timeout=0.05)
        assert list(quotes.listen(0.05)) == []
    assert client_threads() == []


async def test_a_refusal_is_raised_and_leaves_no_thread(
    start_server: Callable[..., Awaitable[QuotepushServer]],
) -> None:
    server = await start_server(workers=1, token_key="a secret of the tests, thirty-two bytes and more")
    with BlockingQuoteClient(server.url) as quotes:
        with pytest.raises(Refused, match="it wants a token") as refused:
            quotes.subscribe("A", timeout=30)
        assert refused.value.is_about_token
        with pytest.raises(Refused):
            list(quotes)
    assert client_threads() == []
    with pytest.raises(WrongUrl):
        BlockingQuoteClient("nowhere")
