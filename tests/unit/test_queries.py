"""Questions over HTTP: what is asked of main, what is refused, and a main that does not answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from quotepush.auth import Verifier
from quotepush.entitlement import Codes, Entitlement
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.gate import Gate
from quotepush.push.queries import Queries
from quotepush.push.refusals import Refusals
from quotepush.push.subscriptions import Subscriptions
from quotepush.settings import load
from quotepush.token_keys import parse_key_set, secret_key
from tests.support.tokens import KEY, KeyPair, token

ROW = b'{"code":"A","seq":7,"ts":1,"last":2.5,"volume":9}'


class Bench:
    def __init__(self, key: str) -> None:
        self.is_answering = True
        self.refusals = Refusals()
        self.asked: list[tuple[Any, ...]] = []
        self.found: bytes | None = b"[]"
        self.http: aiohttp.ClientSession
        self.url = ""
        self.desk = Desk(
            subscriptions=Subscriptions(), limits=Limits(400, 1, 1, 1), server="0", epoch="e", heartbeat_ms=1,
            watch=self._never, look=self._never, unwatch=self._never, subscribed=self._never,
            clock_ms=lambda: 1_800_000_000_000, verifier=Verifier([secret_key(key)]) if key else None,
            read=self._read, find=self._find,
        )  # fmt: skip

    def _never(self, *_: Any) -> None:
        raise AssertionError("nothing is watched")

    def _read(self, codes: list[str], books: bool, then: Callable[[Answer], None]) -> None:
        self.asked.append((*codes, books))
        rows = {"A": (7, ROW, b'{"bids":[[1,2]]}' if books else None, "other"), "B": (0, None, None, "e")}
        if self.is_answering:
            then(Answer({c: rows[c] for c in codes if c in rows}, {c: "unknown_code" for c in codes if c not in rows}))

    def _find(self, text: str | None, limit: int, codes: Codes, then: Callable[[bytes | None], None]) -> None:
        self.asked.append((text, limit, *([] if codes.has_all else [codes.patterns])))
        then(self.found)

    async def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        async with self.http.get(self.url + path, headers=headers) as response:
            return response.status, response.headers, await response.json()


@asynccontextmanager
async def bench(key: str = "", **flags: Any) -> AsyncIterator[Bench]:
    found = Bench(key)
    queries = Queries(Gate(load(env={}, flags=flags), found.desk, found.refusals), found.desk)
    app = web.Application()
    app.router.add_get("/quotes", queries.quotes)
    app.router.add_get("/codes", queries.codes)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as found.http:
        yield found
    await runner.cleanup()


async def test_quotes_are_the_newest_rows_in_the_order_of_the_request() -> None:
    async with bench() as b:
        status, headers, body = await b.get("/quotes?codes=b,a,A,no%20such,zzz")
        assert status == 200
        assert headers["Cache-Control"] == "no-store"
        assert body["time"] == 1_800_000_000_000
        assert body["epoch"] == "e"
        assert body["quotes"] == [
            {"code": "B", "seq": 0},
            {"code": "A", "seq": 7, "ts": 1, "last": 2.5, "volume": 9, "epoch": "other"},
        ]
        assert [(r["as"], r["error"]) for r in body["rejected"]] == [("no such", "bad_code"), ("zzz", "unknown_code")]
        assert b.asked == [("B", "A", "ZZZ", False)]


async def test_quotes_of_a_view_with_the_book() -> None:
    async with bench() as b:
        _, _, body = await b.get("/quotes?codes=A&fields=last,bids")
        assert body["quotes"] == [{"code": "A", "seq": 7, "ts": 1, "last": 2.5, "bids": [[1, 2]], "epoch": "other"}]
        assert b.asked == [("A", True)]


async def test_of_no_good_code_main_is_not_asked() -> None:
    async with bench() as b:
        status, _, body = await b.get("/quotes?codes=no%20such")
        assert (status, body["quotes"], len(body["rejected"])) == (200, [], 1)
        assert b.asked == []


async def test_more_codes_than_a_stream_may_have_are_rejected() -> None:
    async with bench() as b:
        _, _, body = await b.get("/quotes?codes=" + ",".join(f"C{n}" for n in range(301)))
        assert body["rejected"][-1] == {
            "as": "C300", "error": "code_limit", "message": body["rejected"][-1]["message"],
        }  # fmt: skip
        assert len(b.asked[0]) == 301


@pytest.mark.parametrize(
    "path",
    [
        "/quotes", "/quotes?codes=", "/quotes?codes=A&fields=price", "/codes", "/codes?q=", "/codes?q=%20",
        "/codes?q=a&movers=1", "/codes?q=a&limit=0", "/codes?q=a&limit=51", "/codes?q=a&limit=x", "/codes?movers=",
        "/codes?movers=-1", "/codes?movers=1e1", "/codes?movers=99999999999999", "/codes?q=" + "x" * 65,
    ],
)  # fmt: skip
async def test_a_bad_question_is_refused(path: str) -> None:
    async with bench() as b:
        status, _, body = await b.get(path)
        assert status == 400
        assert body["error"] in ("bad_request", "unknown_field")
        assert b.asked == []


async def test_codes_are_asked_for_as_they_were_typed() -> None:
    async with bench() as b:
        b.found = b'[{"code":"A"}]'
        assert (await b.get("/codes?q=%20ap%20"))[2] == [{"code": "A"}]
        await b.get("/codes?q=ap&limit=50")
        await b.get("/codes?movers=10")
        assert b.asked == [("ap", 20), ("ap", 50), (None, 10)]


async def test_a_main_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quotepush.push.queries._PATIENCE_S", 0.05)
    async with bench() as b:
        b.is_answering = False
        status, headers, body = await b.get("/quotes?codes=A")
        assert (status, body["error"], headers["Retry-After"]) == (503, "overloaded", "5")
        b.found = None
        assert (await b.get("/codes?q=a"))[0] == 503


async def test_tokens_and_origins_are_those_of_the_websocket() -> None:
    async with bench(KEY, allowed_origins=["https://page.example"]) as b:
        for path in ("/quotes?codes=A", "/codes?q=a"):
            assert (await b.get(path))[0] == 401
            assert (await b.get(path, Authorization="Bearer nonsense"))[0] == 401
            good = {"Authorization": f"Bearer {token(sub='ann')}"}
            assert (await b.get(path, **good, Origin="https://evil.example"))[0] == 403
            status, headers, _ = await b.get(path, **good, Origin="https://page.example")
            assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://page.example")


async def test_an_answer_says_nothing_of_codes_outside_the_permission() -> None:
    async with bench(KEY) as b:
        some = {"Authorization": f"Bearer {token(sub='ann', codes=['A', '*.SH'], max_codes=2)}"}
        status, _, body = await b.get("/quotes?codes=b,B,a,600519,688001.SH", **some)
        assert status == 200
        assert [(r["as"], r["error"]) for r in body["rejected"]] == [
            ("b", "not_entitled"), ("B", "not_entitled"), ("600519", "unknown_code"), ("688001.SH", "code_limit")
        ]  # fmt: skip
        assert [row["code"] for row in body["quotes"]] == ["A"]
        assert b.asked.pop() == ("A", "600519.SH", False)
        await b.get("/codes?q=b", **some)
        await b.get("/codes?movers=3", **some)
        assert b.asked == [("b", 20, ("A", "*.SH")), (None, 3, ("A", "*.SH"))]


async def test_who_comes_without_a_token_has_what_the_anonymous_have() -> None:
    async with bench(KEY) as b:
        b.desk.anonymous = Entitlement(codes=Codes(["B"]))
        assert [r["as"] for r in (await b.get("/quotes?codes=A,B"))[2]["rejected"]] == ["A"]
        await b.get("/codes?q=b")
        assert b.asked[-1] == ("b", 20, ("B",))
        assert (await b.get("/quotes?codes=B", Authorization=f"Bearer {token('x' * 32)}"))[0] == 401


async def test_a_request_waits_for_keys_that_may_be_newer() -> None:
    async with bench(KEY) as b:
        pair = KeyPair("EdDSA")
        verifier = b.desk.verifier
        assert verifier is not None
        asked: list[None] = []

        def renew(then: Callable[[], None]) -> None:
            asked.append(None)
            if len(asked) == 2:
                verifier.renew(parse_key_set(pair.jwks(kid="new")))
            asyncio.get_running_loop().call_soon(then)

        b.desk.renew_keys = renew
        for expected in (401, 200, 200):
            assert (await b.get("/quotes?codes=A", Authorization=f"Bearer {pair.token(kid='new')}"))[0] == expected
        assert len(asked) == 2
        assert (await b.get("/quotes?codes=A", Authorization=f"Bearer {KeyPair('EdDSA').token(kid='new')}"))[0] == 401
        assert len(asked) == 2
