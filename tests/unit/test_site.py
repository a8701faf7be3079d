"""The public HTTP side: who is let in, what a refused one is told, and the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from quotepush.auth import Identity, Verifier
from quotepush.push.desk import Desk, Limits
from quotepush.push.gate import address_of
from quotepush.push.refusals import Refusals
from quotepush.push.site import STATIC, make_app
from quotepush.push.subscriptions import Subscriptions
from quotepush.settings import load
from quotepush.token_keys import secret_key
from tests.support.tokens import KEY, token

HANDSHAKE = {
    "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}  # fmt: skip


class FakeWorker:
    """Takes every request that is let through, and answers it in its own way."""

    def __init__(self, key: str) -> None:
        self.is_draining = False
        self.accepted: list[str | None] = []
        self.identities: list[Identity | None] = []
        self.refusals = Refusals()
        self.peers: list[str | None] = []
        self.fault: Exception | None = None
        self.desk = Desk(
            subscriptions=Subscriptions(), limits=Limits(1, 1, 1, 1), server="0", epoch="e", heartbeat_ms=1,
            watch=self._never, look=self._never, unwatch=self._never, subscribed=self._never,
            clock_ms=lambda: 1_800_000_000_000, verifier=Verifier([secret_key(key)]) if key else None,
        )  # fmt: skip

    def _never(self, *_: Any) -> None:
        raise AssertionError("the door asks nobody for codes")

    def accept(
        self, request: web.Request, subprotocol: str | None, identity: Identity | None, data: dict[str, str]
    ) -> web.StreamResponse:
        if self.fault is not None:
            raise self.fault
        self.data = data
        self.accepted.append(subprotocol)
        self.peers.append(address_of(request))
        self.identities.append(identity)
        return web.Response(status=299, text="accepted")


class Site:
    def __init__(self, key: str) -> None:
        self.worker = FakeWorker(key)
        self.has_room = True
        self.crowded: set[str] = set()  # addresses that have as many connections as they may
        self.asked: list[bool] = []
        self.addresses: list[str] = []
        self.places = 0
        self.base = URL()
        self.http: aiohttp.ClientSession

    async def admit(self, address: str, take: bool) -> str:
        self.asked.append(take)
        self.addresses.append(address)
        if address in self.crowded:
            return "too_many_connections"
        self.places += take and self.has_room
        return "" if self.has_room else "overloaded"

    def leave(self, address: str) -> None:
        assert address == self.addresses[-1]
        self.places -= 1

    @property
    def host(self) -> str:
        return f"{self.base.host}:{self.base.port}"

    async def get(self, path: str = "/ws", method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
        """Return status, headers and body; underscores in the names of headers stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        path, _, query = path.partition("?")
        url = self.base.with_path(path, encoded=True).with_query(query)
        async with self.http.request(method, url, headers=named, allow_redirects=False) as response:
            is_json = response.content_type == "application/json" and method != "HEAD"
            return response.status, response.headers, await (response.json() if is_json else response.text())

    async def upgrade(self, path: str = "/ws", **headers: str) -> tuple[int, Any, Any]:
        """A WebSocket's handshake; a header of "-" is left out."""
        merged = {**{k.replace("-", "_"): v for k, v in HANDSHAKE.items()}, **headers}
        return await self.get(path, **{name: value for name, value in merged.items() if value != "-"})


@asynccontextmanager
async def site(*, key: str = "", **flags: Any) -> AsyncIterator[Site]:
    found = Site(key)
    app = make_app(load(env={}, flags=flags), found.worker, found.admit, found.leave)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.base = URL(f"http://127.0.0.1:{runner.addresses[0][1]}")
    async with aiohttp.ClientSession() as found.http:
        yield found
    await runner.cleanup()


# The WebSocket's door


async def test_a_handshake_is_let_through_and_takes_a_place() -> None:
    async with site() as s:
        assert (await s.upgrade())[0] == 299
        assert (s.asked, s.places, s.worker.accepted) == ([True], 1, [None])


async def test_a_plain_get_hears_that_it_would_be_welcome() -> None:
    async with site() as s:
        status, headers, body = await s.get()
        assert (status, body["error"]) == (426, "upgrade_required")
        assert headers["Upgrade"] == "websocket"
        assert headers["Cache-Control"] == "no-store"
        assert "Retry-After" not in headers
        assert (s.asked, s.places, s.worker.accepted) == ([False], 0, [])


async def test_a_head_hears_the_same_and_a_post_is_no_way_in() -> None:
    async with site() as s:
        assert (await s.get(method="HEAD"))[0] == 426
        assert (await s.get(method="POST"))[0] == 405


@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_a_full_machine_says_when_to_come_back(wants_upgrade: bool) -> None:
    async with site() as s:
        s.has_room = False
        status, headers, body = await (s.upgrade if wants_upgrade else s.get)(Origin=f"http://{s.host}")
        assert (status, body["error"], headers["Retry-After"]) == (503, "overloaded", "5")
        assert (s.asked, s.places) == ([wants_upgrade], 0)


@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_a_draining_worker_takes_nobody_and_keeps_no_place(wants_upgrade: bool) -> None:
    async with site() as s:
        s.worker.is_draining = True
        status, headers, body = await (s.upgrade if wants_upgrade else s.get)()
        assert (status, body["error"], headers["Retry-After"]) == (503, "restart", "1")
        assert (s.places, s.worker.accepted) == (0, [])


async def test_a_page_can_read_the_refusal_and_when_to_come_back() -> None:
    async with site(allowed_origins=["https://example.com"]) as s:
        for s.has_room, expected in ((True, 426), (False, 503)):
            status, headers, _ = await s.get(Origin="https://example.com")
            assert status == expected
            assert headers["Access-Control-Allow-Origin"] == "https://example.com"
            assert "Retry-After" in headers["Access-Control-Expose-Headers"]
            assert headers["Vary"] == "Origin"


async def test_without_an_origin_there_are_no_headers_for_pages() -> None:
    async with site() as s:
        _, headers, _ = await s.get()
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"Sec_WebSocket_Key": "-"}, "bad_handshake"), ({"Sec_WebSocket_Key": "short"}, "bad_handshake"),
        ({"Sec_WebSocket_Key": "not base64 at all, no"}, "bad_handshake"),
        ({"Sec_WebSocket_Version": "12"}, "bad_handshake"),
        ({"Sec_WebSocket_Version": "-"}, "bad_handshake"), ({"Connection": "keep-alive"}, "bad_handshake"),
        ({"Sec_WebSocket_Protocol": "graphql-ws"}, "bad_subprotocol"),
        ({"Sec_WebSocket_Protocol": "quotes.v1.cbor, quotes.v2.json"}, "bad_subprotocol"),
    ],
)  # fmt: skip
async def test_a_faulty_handshake_is_refused_before_a_place_is_taken(changes: dict[str, str], error: str) -> None:
    async with site() as s:
        status, headers, body = await s.upgrade(**changes)
        assert (status, body["error"]) == (400, error)
        assert "Retry-After" not in headers
        assert (s.asked, s.places, s.worker.accepted) == ([], 0, [])


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [("quotes.v1.json", "quotes.v1.json"), ("other, quotes.v1.json", "quotes.v1.json"),
     (" quotes.v1.json ,x", "quotes.v1.json"), ("quotes.v1.msgpack", "quotes.v1.msgpack"),
     ("x, quotes.v1.msgpack,quotes.v1.json", "quotes.v1.msgpack"), ("", None)],
)  # fmt: skip
async def test_the_subprotocol_is_chosen_among_those_that_are_offered(offered: str, chosen: str | None) -> None:
    async with site() as s:
        assert (await s.upgrade(Sec_WebSocket_Protocol=offered))[0] == 299
        assert s.worker.accepted == [chosen]


async def test_the_words_of_the_handshake_are_read_in_any_case() -> None:
    async with site() as s:
        assert (await s.upgrade(Upgrade="WebSocket", Connection="keep-alive, upgrade"))[0] == 299


async def test_a_place_is_given_back_when_the_upgrade_fails() -> None:
    async with site() as s:
        s.worker.fault = RuntimeError("a bug")
        assert (await s.upgrade())[0] == 500
        assert s.places == 0


# Origins

OWN = "http://{host}"
SAME = [OWN, "https://{host}", "HTTP://{host}"]
FOREIGN = [
    "http://example.com", "https://127.0.0.1", "http://127.0.0.1:1", "null", "", "file://", "http://", "http://[::1",
    "http://]", "garbage", "http://evil@{host}", "http://{host}.example.com", "http://example.com/{host}", "//",
    "chrome-extension://abcdef", "http://{host}@example.com",
]  # fmt: skip


@pytest.mark.parametrize("origin", SAME)
@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_pages_of_the_own_host_may_connect(origin: str, wants_upgrade: bool) -> None:
    async with site() as s:
        status, _, _ = await (s.upgrade if wants_upgrade else s.get)(Origin=origin.format(host=s.host))
        assert status == (299 if wants_upgrade else 426)


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_pages_of_other_hosts_may_not(origin: str, wants_upgrade: bool) -> None:
    async with site() as s:
        status, headers, body = await (s.upgrade if wants_upgrade else s.get)(Origin=origin.format(host=s.host))
        assert (status, body["error"]) == (403, "forbidden_origin")
        assert headers["Access-Control-Allow-Origin"] == origin.format(host=s.host)  # it may read why, and no more
        assert (s.asked, s.places) == ([], 0)


async def test_programs_without_an_origin_may_connect() -> None:
    async with site(allowed_origins=["https://example.com"]) as s:
        assert (await s.upgrade())[0] == 299


async def test_listed_origins_may_connect_and_others_may_not() -> None:
    async with site(allowed_origins=["https://Example.com/", "http://other.test:8080"]) as s:
        for origin in ("https://example.com", "https://EXAMPLE.com", "http://other.test:8080", f"http://{s.host}"):
            assert (await s.upgrade(Origin=origin))[0] == 299
        for origin in ("http://example.com", "https://example.com:444", "http://other.test", "https://a.example.com"):
            assert (await s.upgrade(Origin=origin))[0] == 403


@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_star_lets_every_origin_in(origin: str) -> None:
    async with site(allowed_origins=["*"]) as s:
        assert (await s.upgrade(Origin=origin.format(host=s.host)))[0] == 299


@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_of_several_origins_none_is_let_in(wants_upgrade: bool) -> None:
    async with site(allowed_origins=["https://example.com"]) as s:
        for origins in (["https://example.com"] * 2, [f"http://{s.host}", "https://example.com"]):
            headers = CIMultiDict([("Origin", origin) for origin in origins])
            if wants_upgrade:
                headers.extend(HANDSHAKE)
            async with s.http.get(s.base / "ws", headers=headers) as response:
                assert (response.status, (await response.json())["error"]) == (403, "forbidden_origin")


# Addresses


def names_of(address: str) -> dict[str, str]:
    return {"X_Forwarded_For": address}


async def test_a_client_is_known_by_the_address_that_a_trusted_proxy_names() -> None:
    async with site(trusted_proxies=["127.0.0.0/8"]) as s:
        assert (await s.upgrade(X_Forwarded_For="6.6.6.6, 192.0.2.1"))[0] == 299
        assert (await s.upgrade(Forwarded="for=192.0.2.2"))[0] == 299  # the other header, which is not read
        assert (await s.upgrade(X_Forwarded_For="2001:db8::1:2:3:4"))[0] == 299
        assert s.worker.peers == ["192.0.2.1", "127.0.0.1", "2001:db8::1:2:3:4"]
        assert s.addresses == ["192.0.2.1", "127.0.0.1", "2001:db8::/64"]
    async with site(trusted_proxies=["127.0.0.0/8"], proxy_header="forwarded") as s:
        assert (await s.upgrade(Forwarded='for="[2001:db8::7]:1";proto=https', X_Forwarded_For="6.6.6.6"))[0] == 299
        assert s.worker.peers == ["2001:db8::7"]


async def test_what_others_say_of_addresses_is_not_heard() -> None:
    for trusted in ([], ["10.0.0.0/8", "::1"]):
        async with site(trusted_proxies=trusted) as s:
            assert (await s.upgrade(X_Forwarded_For="192.0.2.1", Forwarded="for=192.0.2.1"))[0] == 299
            assert (s.worker.peers, s.addresses) == (["127.0.0.1"], ["127.0.0.1"])


@pytest.mark.parametrize("wants_upgrade", [True, False])
async def test_an_address_with_as_many_connections_as_it_may_have_is_told_when_to_come_back(
    wants_upgrade: bool,
) -> None:
    async with site(trusted_proxies=["127.0.0.1"]) as s:
        s.crowded = {"192.0.2.1"}
        status, headers, body = await (s.upgrade if wants_upgrade else s.get)(**names_of("192.0.2.1"))
        assert (status, body["error"], headers["Retry-After"]) == (429, "too_many_connections", "5")
        assert (s.places, s.worker.accepted) == (0, [])
        assert (await s.upgrade(**names_of("192.0.2.2")))[0] == 299
        assert s.worker.refusals.connections == ({"too_many_connections": 1} if wants_upgrade else {})


# Rates


async def test_an_address_that_connects_too_often_is_held_back_before_its_token_is_looked_at_and_others_are_not() -> (
    None
):
    async with site(trusted_proxies=["127.0.0.1"], connects_per_ip_s=0.001, key=KEY) as s:
        assert (await s.upgrade(**names_of("192.0.2.1")))[0] == 299
        for brought in ({}, {"path": "/ws?token=bad"}):
            for ask in (s.upgrade, s.get):  # a look tells why
                status, headers, body = await ask(**names_of("192.0.2.1"), **brought)
                assert (status, body["error"]) == (429, "rate_limited")
                assert 900 < int(headers["Retry-After"]) <= 1000
        assert (await s.get("/stream?codes=AAPL", **names_of("192.0.2.1")))[0] == 429
        assert (await s.upgrade(**names_of("192.0.2.2")))[0] == 299
        assert (await s.get(**names_of("192.0.2.3")))[0] == 426
        assert s.worker.refusals.connections == {"rate_limited": 3}


async def test_a_look_uses_up_no_connection_but_is_a_question() -> None:
    async with site(connects_per_ip_s=0.001, questions_per_ip_s=0.2) as s:
        assert [(await s.get())[0] for _ in range(3)] == [426, 426, 429]
        assert (await s.upgrade())[0] == 299


async def test_questions_are_held_back_before_main_is_asked() -> None:
    async with site(questions_per_ip_s=0.0001) as s:
        assert (await s.get("/codes"))[0] == 400
        for path in ("/codes?q=A", "/quotes?codes=AAPL", "/codes"):  # main would not answer here
            status, headers, body = await s.get(path)
            assert (status, body["error"]) == (429, "rate_limited")
            assert int(headers["Retry-After"]) > 9000
        assert (await s.upgrade())[0] == 299
        assert s.worker.refusals.questions == {"bad_request": 1, "rate_limited": 3}


async def test_bad_tokens_are_dearer_than_good_ones() -> None:
    async with site(connects_per_ip_s=0.7, key=KEY) as s:  # seven at once, and then none for seconds
        said = [(await s.upgrade(Authorization="Bearer bad"))[0] for _ in range(3)]
        assert said == [401, 401, 429]


async def test_a_page_of_another_origin_uses_up_nothing_of_its_visitors_address() -> None:
    async with site(connects_per_ip_s=0.001, questions_per_ip_s=0.001) as s:
        for path in ("/ws", "/stream?codes=AAPL", "/quotes?codes=AAPL"):
            for _ in range(3):
                assert (await s.upgrade(path, Origin="http://evil.example"))[0] == 403
        assert (await s.upgrade())[0] == 299


async def test_who_is_refused_is_counted_by_the_word_that_he_is_told() -> None:
    async with site(key=KEY) as s:
        await s.upgrade(Origin="http://evil.example")
        await s.upgrade(Sec_WebSocket_Version="12")
        await s.upgrade(Sec_WebSocket_Protocol="graphql-ws")
        await s.upgrade(Authorization="Bearer bad")
        await s.get("/stream?codes=AAPL")
        await s.get()  # no more than a look
        s.has_room = False
        await s.upgrade()
        await s.upgrade()
        assert s.worker.refusals.connections == {
            "forbidden_origin": 1, "bad_handshake": 1, "bad_subprotocol": 1, "auth_failed": 1, "not_authenticated": 1,
            "overloaded": 2,
        }  # fmt: skip
        await s.get("/quotes?codes=AAPL")
        assert s.worker.refusals.questions == {"not_authenticated": 1}


async def test_the_log_says_when_a_proxy_that_is_held_back_may_not_be_trusted_yet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with site(connects_per_ip_s=0.001) as s:
        for _ in range(3):
            await s.upgrade(X_Forwarded_For="192.0.2.1")
        assert [record.getMessage() for record in caplog.records] == [
            "rate_limited: 1 refused, the newest from 127.0.0.1, which sends x-forwarded-for: list it in "
            "trusted_proxies if it is a proxy of yours"
        ]


# Tokens

GOOD = token(sub="ann", exp=1_800_000_060)
BAD = [
    "a-secret", "", token("another key of thirty-two bytes and more", sub="ann"), token(sub="ann", exp=1_799_999_995),
    token(sub="ann", header={"alg": "none"}), token(sub=7), "x" * 7000,
]  # fmt: skip


@pytest.mark.parametrize(
    "brought",
    [
        {"Authorization": f"Bearer {GOOD}"}, {"Authorization": f"bearer {GOOD}"}, {"Authorization": f"BEARER  {GOOD} "},
        {"path": f"/ws?token={GOOD}"}, {"path": f"/ws?x=1&token={GOOD}&y=2"},
        {"path": f"/ws?token={GOOD}", "Authorization": "Basic YW5uOnNlY3JldA=="},
    ],
)  # fmt: skip
async def test_a_good_token_may_come_with_the_handshake(brought: dict[str, str]) -> None:
    async with site(key=KEY) as s:
        assert (await s.upgrade(**brought))[0] == 299
        assert s.worker.identities == [Identity("ann", 1_800_000_060_000)]
        assert (await s.get(**brought))[0] == 426


@pytest.mark.parametrize("brought", [{}, {"path": "/ws?x=1"}, {"Authorization": "Basic YW5uOnNlY3JldA=="}])
async def test_without_a_token_the_door_is_open_all_the_same(brought: dict[str, str]) -> None:
    async with site(key=KEY) as s:
        assert (await s.upgrade(**brought))[0] == 299
        assert s.worker.identities == [None]
        assert (await s.get(**brought))[0] == 426


@pytest.mark.parametrize("wants_upgrade", [True, False])
@pytest.mark.parametrize("in_header", [True, False])
@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
async def test_a_bad_token_is_refused_before_the_upgrade(bad: str, in_header: bool, wants_upgrade: bool) -> None:
    brought = {"Authorization": f"Bearer {bad}"} if in_header else {"path": f"/ws?token={bad}"}
    async with site(key=KEY) as s:
        status, headers, body = await (s.upgrade if wants_upgrade else s.get)(Origin=f"http://{s.host}", **brought)
        assert (status, body["error"]) == (401, "auth_failed")
        assert headers["WWW-Authenticate"].partition(" ")[0] == "Bearer"
        assert headers["Access-Control-Allow-Origin"] == f"http://{s.host}"
        assert "Retry-After" not in headers
        assert len(bad) < 5 or bad not in f"{headers}{body}"
        assert (s.asked, s.places, s.worker.accepted) == ([], 0, [])


@pytest.mark.parametrize(
    "brought",
    [
        {"path": f"/ws?token={GOOD}&token={GOOD}"}, {"path": f"/ws?token={GOOD}", "Authorization": f"Bearer {GOOD}"},
        {"path": "/ws?token=", "Authorization": f"Bearer {GOOD}"}, {"path": f"/ws?token={GOOD}&token=x"},
    ],
)  # fmt: skip
async def test_of_several_tokens_none_is_taken(brought: dict[str, str]) -> None:
    async with site(key=KEY) as s:
        status, _, body = await s.upgrade(**brought)
        assert (status, body["error"]) == (401, "auth_failed")


async def test_a_page_of_another_host_is_refused_before_its_token_is_looked_at() -> None:
    async with site(key=KEY) as s:
        assert (await s.upgrade(f"/ws?token={GOOD}", Origin="http://evil.example"))[0] == 403


@pytest.mark.parametrize("bad", [*BAD, GOOD], ids=range(len(BAD) + 1))
async def test_without_a_key_nobody_looks_at_tokens(bad: str) -> None:
    async with site() as s:
        assert (await s.upgrade(f"/ws?token={bad}"))[0] == 299
        assert (await s.upgrade(Authorization=f"Bearer {bad}"))[0] == 299
        assert s.worker.identities == [None, None]


# The page


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/quotepush.js", "text/javascript"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
    ],
)
async def test_the_page_comes_with_headers_that_keep_strangers_out(path: str, kind: str) -> None:
    async with site() as s:
        status, headers, body = await s.get(path)
        assert status == 200
        assert headers["Content-Type"].partition(";")[0] in (kind, "application/javascript")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-cache"
        assert body.strip()


async def test_files_that_have_not_changed_are_not_sent_again() -> None:
    async with site() as s:
        _, headers, _ = await s.get("/page.js")
        status, _, body = await s.get("/page.js", If_None_Match=headers["ETag"])
        assert (status, body) == (304, "")


@pytest.mark.parametrize(
    "path", ["/nothing", "/index.html", "/static/page.js", "/../settings.py", "/%2e%2e/settings.py", "/quotes/", "/ws/"]
)
async def test_nothing_else_is_served(path: str) -> None:
    async with site() as s:
        assert (await s.get(path))[0] == 404


async def test_nothing_of_the_private_listener_is_public() -> None:
    async with site() as s:
        for path in ("/metrics", "/healthz", "/readyz"):
            assert (await s.get(path))[0] == 404


async def test_everything_moves_below_the_base_path() -> None:
    async with site(base_path="/quotes") as s:
        for path in ("/quotes/", "/quotes/page.js", "/quotes/quotepush.js", "/quotes/page.css"):
            assert (await s.get(path))[0] == 200
        assert (await s.upgrade("/quotes/ws"))[0] == 299
        for path in ("/", "/page.js", "/ws"):
            assert (await s.get(path))[0] == 404


async def test_the_base_path_without_its_slash_leads_to_the_page() -> None:
    async with site(base_path="/quotes") as s:
        status, headers, _ = await s.get("/quotes")
        assert (status, headers["Location"]) == (308, "/quotes/")


async def test_the_page_knows_where_the_websocket_is() -> None:
    async with site(ws_path="/live/stream", base_path="/quotes") as s:
        assert (await s.upgrade("/quotes/live/stream"))[0] == 299
        _, _, page = await s.get("/quotes/")
        assert 'data-ws="live/stream"' in page
    async with site() as s:
        _, _, page = await s.get("/")
        assert 'data-ws="ws"' in page


async def test_the_page_has_no_script_of_its_own_that_its_policy_would_forbid() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    for part in page.split("<script")[1:]:
        assert "src=" in part.partition(">")[0]
    assert " onclick=" not in page and " style=" not in page and "<style" not in page
