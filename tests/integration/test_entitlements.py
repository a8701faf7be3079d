"""Permissions and keys on a real server: by every route and spelling, against attackers, changed while it runs."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake

from tests.support.event_source import EventReader
from tests.support.key_site import KeySite, key_site
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.steady_feed import publish
from tests.support.tokens import KEY, KeyPair, b64, sign, token
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient

SPELLINGS = ["600519.SH", "sh600519", "SH600519", "Sh600519", "600519.SS", "600519.xshg", "SSE.600519", "600519"]
FIRST, SECOND, FOREIGN = KeyPair("RS256"), KeyPair("EdDSA"), KeyPair("RS256")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    async with redis_server.client() as client:
        yield client


@pytest.fixture
async def site() -> AsyncIterator[KeySite]:
    async with key_site(FIRST.jwks(kid="first")) as found:
        yield found


@pytest.fixture
async def server(
    start_server: Callable[..., Awaitable[QuotepushServer]], site: KeySite, tmp_path: Path
) -> QuotepushServer:
    """Two workers, a secret in a file, public keys from an address, and anonymous clients who may see little."""
    (tmp_path / "token.key").write_text(KEY)
    return await start_server(
        workers=2, token_key_file=str(tmp_path / "token.key"), token_jwks_url=site.url, token_leeway_s=0,
        token_audience="quotes", anonymous="yes", anonymous_codes="FREE*", anonymous_max_codes=2, heartbeat_ms=200,
        questions_per_ip_s=0,  # who asks again until a key has come asks often
    )  # fmt: skip


def mine(**claims: Any) -> str:
    return token(sub="ann", aud="quotes", exp=int(time.time()) + 3600, **claims)


def header(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


async def get(server: QuotepushServer, path: str, text: str | None = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.get(server.url + path, headers=header(text) if text is not None else {}) as response,
    ):
        return response.status, await response.json()


async def stream(server: QuotepushServer, path: str, text: str, **headers: str) -> EventReader:
    """A stream up to the first heartbeat behind its ack; there may be one before that."""
    reader = EventReader()
    reader.connect()
    async with (
        aiohttp.ClientSession() as http,
        http.get(
            server.url + path, headers=header(text) | headers, timeout=aiohttp.ClientTimeout(total=20)
        ) as response,
    ):
        assert response.status == 200
        while not has_settled(reader):
            reader.feed(await response.content.readany())
    return reader


def has_settled(reader: EventReader) -> bool:
    kinds = [message["type"] for message in reader.messages]
    return "ack" in kinds and "heartbeat" in kinds[kinds.index("ack") :]


def words(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(r["as"], r["error"]) for r in message["rejected"]]


async def test_a_code_outside_the_permission_cannot_be_had_by_any_route_or_spelling(
    server: QuotepushServer, redis: Redis
) -> None:
    for code, name in (
        ("600519.SH", "Secret Liquor"),
        ("600000.SH", "Bank"),
        ("FREE1", "Free"),
        ("AAPL", "Apple Liquor"),
    ):
        await publish(redis, code, last=11.0, prev_close=10.0, name=name)
    text = mine(codes=["AAPL", "600000.SH", "6005190*"])
    refused = [(spelling, "not_entitled") for spelling in SPELLINGS]
    asked = ",".join(SPELLINGS)
    async with RecordingClient(server.ws_url, additional_headers=header(text)) as client:
        for action in ("subscribe", "snapshot"):
            assert words(await client.request(action, codes=SPELLINGS)) == refused
        epoch = client.hello["epoch"]
        since = dict.fromkeys(SPELLINGS, 0)
        assert words(await client.request("subscribe", codes=SPELLINGS, epoch=epoch, since=since)) == refused
        await client.subscribe("AAPL")
        await publish(redis, "600519.SH", last=12.0)
        await publish(redis, "AAPL", last=12.0)
        await wait_until(lambda: client.last("AAPL") == 12.0)
        assert set(client.rows) == {"AAPL"}
    assert not await redis.exists("qp:code:600519.SH")
    status, body = await get(server, f"/quotes?codes={asked},aapl", text)
    assert (status, words(body), [row["code"] for row in body["quotes"]]) == (200, refused, ["AAPL"])
    reader = await stream(server, f"/stream?codes={asked},AAPL", text)
    ack = next(message for message in reader.messages if message["type"] == "ack")
    assert words(ack) == refused and set(reader.rows) == {"AAPL"}
    again = await stream(server, f"/stream?codes={asked},AAPL", text, **{"Last-Event-ID": reader.last_id})
    assert set(again.rows) <= {"AAPL"}
    for path, codes in (
        ("/codes?q=60", ["600000.SH"]), ("/codes?q=liquor", ["AAPL"]), ("/codes?q=sh600519", []),
        ("/codes?q=a", ["AAPL", "600000.SH"]),
    ):  # fmt: skip
        assert [entry["code"] for entry in (await get(server, path, text))[1]] == [*codes], path
    movers = (await get(server, "/codes?movers=50", text))[1]
    assert {entry["code"] for entry in movers["up"]} == {"AAPL", "600000.SH"}
    # Nor by who has no token at all.
    assert words((await get(server, f"/quotes?codes={asked}"))[1]) == refused
    assert (await get(server, "/codes?q=60"))[1] == []
    assert [entry["code"] for entry in (await get(server, "/codes?movers=50"))[1]["up"]] == ["FREE1"]


async def test_a_token_opens_more_and_a_newer_one_takes_codes_away_while_rows_come(
    server: QuotepushServer, redis: Redis
) -> None:
    async with RecordingClient(server.ws_url) as client:
        assert (client.hello["auth"], client.hello["limits"]["codes"]) == ("optional", 2)
        answer = await client.request("subscribe", codes=["AAPL", "free1", "FREE2", "FREE3"])
        assert words(answer) == [("AAPL", "not_entitled"), ("FREE3", "code_limit")]
        assert (await client.request("auth", token=mine(max_rate=5)))["limits"]["max_rate"] == 5
        assert words(await client.request("subscribe", codes=["AAPL", "FREE3"])) == []
    async with RecordingClient(server.ws_url, additional_headers=header(mine())) as client:
        await client.subscribe("AAPL", "MSFT")
        for code in ("AAPL", "MSFT"):
            await publish(redis, code, last=1)
        await wait_until(lambda: client.last("AAPL") == client.last("MSFT") == 1)
        await client.request("auth", token=mine(codes=["AAPL"]))
        await wait_until(lambda: any(m.get("state") == "not_entitled" for m in client.control))
        lost = [m for m in client.control if m.get("state") == "not_entitled"]
        assert [m["codes"] for m in lost] == [["MSFT"]]
        for code in ("MSFT", "AAPL"):
            await publish(redis, code, last=2)
        await wait_until(lambda: client.last("AAPL") == 2)
        assert client.last("MSFT") == 1
        await wait_until(lambda: is_gone(redis, "qp:code:MSFT"))


async def is_gone(redis: Redis, key: str) -> bool:
    return not await redis.exists(key)


def attacks() -> dict[str, str]:
    """Tokens that nobody with a key has made."""
    claims = {"sub": "root", "aud": "quotes"}
    body = json.dumps(claims).encode()
    pem = FIRST.public_pem
    jwk = FOREIGN.jwk(kid="first")
    good = FIRST.token(kid="first", **claims)
    return {
        "forged": token("another secret of thirty-two bytes", **claims),
        "unsigned": ".".join((b64(b'{"alg":"none"}'), b64(body), "")),
        "unsigned, in capitals": ".".join((b64(b'{"alg":"NONE"}'), b64(body), good.split(".")[2])),
        "signed with a public key": token(pem, **claims),
        "signed with a public key, named": token(pem, header={"kid": "first"}, **claims),
        "signed with a key set": token(FIRST.jwks(kid="first"), header={"kid": "first"}, **claims),
        "of a foreign key": FOREIGN.token(kid="first", **claims),
        "of a key that it brings along": FOREIGN.token(header={"jwk": jwk}, **claims),
        "of a key elsewhere": FOREIGN.token(
            header={"jku": "http://127.0.0.1:1/k", "x5u": "http://127.0.0.1:1/"}, **claims
        ),
        "of a key in a file": token("", header={"kid": "../../../../dev/null"}, **claims),
        "with a header to be understood": FIRST.token(kid="first", header={"crit": ["exp"]}, **claims),
        "for somebody else": token(sub="root", aud="mail"),
        "for nobody": token(sub="root"),
        "expired": token(exp=1, **claims),
        "early": token(nbf=int(time.time()) + 3600, **claims),
        "oversized": mine(x="x" * 8200),
        "deep": sign(b'{"alg":"HS256"}', b'{"aud":"quotes","x":' + b"[" * 3000 + b"]" * 3000 + b"}"),
        "delayed": mine(delay_s=901),
        "of a wrong type": mine(codes="*"),
        "of two": f"{mine()}.{mine()}",
    }


async def test_no_token_of_an_attacker_opens_a_door(server: QuotepushServer) -> None:
    async with aiohttp.ClientSession() as http:
        for what, text in attacks().items():
            for path, headers in (("/quotes?codes=AAPL", header(text)), (f"/quotes?codes=AAPL&token={text}", {})):
                async with http.get(server.url + path, headers=headers) as response:
                    # aiohttp takes no line above 8 KiB.
                    assert response.status == 401 or (what == "oversized" and response.status == 400), what
                    assert text.split(".")[-1][:20] == "" or text.split(".")[-1][:20] not in await response.text()
            with pytest.raises(InvalidHandshake):
                await connect(server.ws_url, proxy=None, additional_headers=header(text))
            async with RecordingClient(server.ws_url) as client:
                answer = await client.request("auth", token=text)
                assert (answer["type"], answer["error"]) == ("error", "auth_failed"), what
                await wait_until(lambda client=client: client.has_ended)
                assert client.close_code == 4401
        async with http.get(server.url + "/quotes?codes=AAPL&token=" + mine(), headers=header(mine())) as response:
            assert response.status == 401  # two tokens
    assert (await server.admin("/readyz"))[0] == 200


async def opens(server: QuotepushServer, text: str) -> bool:
    """Whether both workers take it, as far as some connections tell."""
    return {(await get(server, "/quotes?codes=AAPL", text))[0] for _ in range(8)} == {200}


async def test_keys_change_while_the_server_runs(server: QuotepushServer, site: KeySite, tmp_path: Path) -> None:
    claims = {"sub": "ann", "aud": "quotes", "exp": int(time.time()) + 3600}
    old, new = FIRST.token(kid="first", **claims), SECOND.token(kid="second", **claims)
    assert await opens(server, old) and not await opens(server, new)
    async with RecordingClient(server.ws_url, additional_headers=header(old)) as client:
        # An address: an unknown key is looked for, not more often than every five seconds.
        site.text = json.dumps({"keys": [FIRST.jwk(kid="first"), SECOND.jwk(kid="second")]})
        await wait_until(lambda: opens(server, new), 30)
        site.status = 500
        site.text = SECOND.jwks(kid="second")
        assert await opens(server, old)
        # A file: its old key is gone as soon as main has seen the new one.
        assert await opens(server, mine())
        (tmp_path / "new.key").write_text(KEY[::-1])
        os.replace(tmp_path / "new.key", tmp_path / "token.key")
        other = token(KEY[::-1], **claims)
        await wait_until(lambda: opens(server, other), 30)
        assert not await opens(server, mine())
        assert await opens(server, new)
        (tmp_path / "new.key").write_text("broken")
        os.replace(tmp_path / "new.key", tmp_path / "token.key")  # an empty file would be another trouble
        await wait_until(lambda: "32 bytes" in server.log())
        assert await opens(server, other)
        assert client.is_open
        pids = server.worker_pids()
        os.kill(pids[0], 9)  # a new worker has the newest keys
        await wait_until(lambda: len(server.worker_pids()) == 2 and server.worker_pids() != pids)
        await wait_until(lambda: opens(server, other), 30)
        assert not await opens(server, mine())
    log = server.log()
    assert log.count("keys of tokens have changed") == 2
    assert not any(secret in log for secret in (KEY, KEY[::-1], "s3cret", old.split(".")[2]))


async def test_a_server_without_keys_yet_says_so_and_takes_them_when_they_come(
    start_server: Callable[..., Awaitable[QuotepushServer]], site: KeySite
) -> None:
    site.status = 503
    server = await start_server(workers=1, token_jwks_url=site.url, token_jwks_refresh_s=10)
    status, body = await server.admin("/readyz")
    assert (status, body["reasons"]) == (503, ["the keys of tokens cannot be fetched"])
    text = FIRST.token(kid="first", sub="ann")
    assert (await get(server, "/quotes?codes=AAPL", text))[0] == 401
    site.status = 200

    async def is_taken() -> bool:
        await asyncio.sleep(0)
        return (await get(server, "/quotes?codes=AAPL", text))[0] == 200

    await wait_until(is_taken, 30)
    assert (await server.admin("/readyz"))[0] == 200
