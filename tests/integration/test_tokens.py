"""Tokens on a real server: who gets in, who may stay, and that nothing of a token is left behind."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from quotepush import QuoteClient
from quotepush.client import Refused
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.tokens import KEY, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

HEARTBEAT_MS = 200


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def server(start_server: Callable[..., Awaitable[QuotepushServer]], tmp_path: Path) -> QuotepushServer:
    """One that wants tokens; the key comes from a file."""
    (tmp_path / "token.key").write_text(KEY + "\n")
    return await start_server(
        workers=1, token_key_file=str(tmp_path / "token.key"), token_leeway_s=0, auth_timeout_s=3,
        heartbeat_ms=HEARTBEAT_MS,
    )  # fmt: skip


def in_seconds(seconds: int) -> int:
    """An ``exp`` that is more than ``seconds - 1`` and at most ``seconds`` away."""
    return int(time.time()) + seconds


def header(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def errors(client: RecordingClient) -> list[str]:
    return [message["error"] for message in client.control if message["type"] == "error"]


async def ended(client: RecordingClient) -> tuple[int | None, str]:
    """Wait until the server has closed it; return how."""
    await wait_until(lambda: client.has_ended, what="the server closes the connection")
    return client.close_code, client.close_reason


async def test_a_token_may_come_in_the_header_in_the_query_or_by_auth(server: QuotepushServer, redis: Redis) -> None:
    good = token(sub="ann", exp=in_seconds(3600))
    by_header = RecordingClient(server.ws_url, ["AAPL"], additional_headers=header(good))
    by_query = RecordingClient(f"{server.ws_url}?token={good}", ["AAPL"])
    by_auth = RecordingClient(server.ws_url)
    async with by_header, by_query, by_auth:
        assert [client.hello["auth"] for client in (by_header, by_query, by_auth)] == ["ok", "ok", "required"]
        assert (await by_auth.request("subscribe", codes=["AAPL"]))["error"] == "not_authenticated"
        assert (await by_auth.request("auth", token=good))["expires"] % 1000 == 0
        await by_auth.subscribe("AAPL")
        await publish(redis, "AAPL", last=199.5)
        for client in (by_header, by_query, by_auth):
            await wait_until(lambda client=client: client.last("AAPL") == 199.5)


async def test_a_connection_ends_with_its_token_and_leaves_nothing(server: QuotepushServer, redis: Redis) -> None:
    async with RecordingClient(server.ws_url) as client:
        await client.request("auth", token=token(sub="ann", exp=in_seconds(4)))
        await client.subscribe("AAPL")
        await wait_until(lambda: redis.exists("qp:code:AAPL"))
        assert await ended(client) == (4401, "auth_failed")
        assert errors(client) == ["auth_failed"]
        assert "expired" in client.control[-1]["message"]

    async def is_gone() -> bool:
        return not await redis.exists("qp:code:AAPL", "qp:codes")

    await wait_until(is_gone)
    assert "closed by server: auth_failed" in server.log()


async def test_a_newer_token_keeps_the_connection_and_its_rows(server: QuotepushServer, redis: Redis) -> None:
    first = in_seconds(4)
    async with RecordingClient(server.ws_url, history=True) as client:
        await client.request("auth", token=token(sub="ann", exp=first))
        await client.subscribe("AAPL")
        await publish(redis, "AAPL", last=1)
        await wait_until(lambda: client.last("AAPL") == 1)
        answer = await client.request("auth", token=token(sub="bob", exp=in_seconds(3600)))
        assert answer["error"] == "already_authenticated"
        assert (await client.request("auth", token=token(sub="ann", exp=in_seconds(3600))))["type"] == "ack"
        late_ms = first * 1000 + 3 * HEARTBEAT_MS
        await wait_until(lambda: client.heartbeat is not None and client.heartbeat["time"] > late_ms)
        await publish(redis, "AAPL", last=2)
        await wait_until(lambda: client.last("AAPL") == 2)
        assert client.is_open
        assert [row["prev"] for row in client.ticks or ()] == [0, 1]


async def test_who_sends_no_token_or_a_bad_one_is_closed(server: QuotepushServer) -> None:
    async with RecordingClient(server.ws_url) as silent, RecordingClient(server.ws_url) as wrong:
        await silent.ping()
        assert (await wrong.request("auth", token=token("another key of 32 bytes and more", sub="ann")))["id"]
        assert await ended(wrong) == (4401, "auth_failed")
        assert await ended(silent) == (4408, "auth_timeout")
        assert errors(silent) == ["auth_timeout"]


async def test_a_bad_token_in_the_handshake_is_refused_and_costs_no_place(server: QuotepushServer) -> None:
    old = token(sub="ann", exp=in_seconds(-60))
    for url, headers in ((server.ws_url, header(old)), (f"{server.ws_url}?token={old}", {})):
        with pytest.raises(InvalidStatus) as refused:
            await connect(url, proxy=None, additional_headers=headers)
        assert refused.value.response.status_code == 401
        assert refused.value.response.headers["WWW-Authenticate"].startswith("Bearer")
        async with aiohttp.ClientSession() as http, http.get(url.replace("ws:", "http:"), headers=headers) as response:
            assert response.status == 401
            assert (await response.json())["error"] == "auth_failed"
    assert (await server.admin("/readyz"))[1]["connections"] == 0


async def test_the_python_client_brings_its_token(server: QuotepushServer, redis: Redis) -> None:
    async with QuoteClient(server.url, token=token(sub="ann", exp=in_seconds(3600))) as quotes:
        await quotes.subscribe("AAPL")
        assert quotes.hello is not None and quotes.hello["auth"] == "ok"
    async with QuoteClient(server.url, token=token(sub="ann", exp=in_seconds(4))) as quotes:
        await quotes.subscribe("AAPL")
        with pytest.raises(Refused) as over:
            await asyncio.wait_for(anext(quotes), 20)
        assert (over.value.close_code, over.value.reason) == (4401, "auth_failed")
    async with QuoteClient(server.url, token="a-secret") as quotes:
        with pytest.raises(Refused) as refused:
            await quotes.subscribe("AAPL")
        assert refused.value.status == 401
        assert "a-secret" not in str(refused.value)


async def raw_request(server: QuotepushServer, text: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(text.encode("latin-1"))
    answer = await asyncio.wait_for(reader.read(65536), 10)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_no_token_and_no_key_is_in_the_log_or_in_redis(server: QuotepushServer, redis: Redis) -> None:
    """Also not of handshakes that aiohttp itself refuses; the log is at its most talkative."""
    good = token(sub="ann", exp=in_seconds(3600))
    bad = token("another key of 32 bytes and more", sub="mallory")
    async with RecordingClient(f"{server.ws_url}?token={good}", ["AAPL"]) as client:
        await client.request("auth", token=good)
        await wait_until(lambda: redis.exists("qp:code:AAPL"))
        kept: list[Any] = [await redis.keys("*")]
        for key in kept[0]:
            kept.append(await redis.dump(key))
        await client.request("auth", token=bad)
        await ended(client)
    async with RecordingClient(server.ws_url, additional_headers=header(good)) as client:
        await client.send_raw('{"action":"auth","token":"' + good)  # not even JSON
        await client.send_raw('{"action":"auth","token":["' + good + '"]}')
        await client.ping()
    for line in (
        f"GET /ws?token={bad} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        f"GET /ws?token={good}\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /ws?token={good} HTTP/9.9\r\nHost: x\r\n\r\n",
        f"GET /ws?token={good}{'x' * 9000} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /ws HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {good}\x00\r\n\r\n",
        f"GET /ws HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {good}{'x' * 9000}\r\n\r\n",
    ):
        assert (await raw_request(server, line)).partition(b" ")[2].startswith(b"40")
    assert await server.stop() == 0
    log = server.log()
    assert "closed by server: auth_failed" in log
    assert "Traceback" not in log
    for secret in (KEY, *good.split(".")[1:], *bad.split(".")[1:]):
        assert secret not in log
        assert secret not in str(kept)
