"""The HTTP API of a server with two workers: each call does what it says, and answers as it is described."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
import jsonschema
from yarl import URL

from quotepush.node.api import BODY_BYTES, PREFIX
from quotepush.node.api_routes import ROUTES
from tests.support.redis_server import RedisServer
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until
from tests.support.ws_client import RecordingClient, connected_clients

Start = Callable[..., Awaitable[QuotepushServer]]

TOKEN = "a token of the tests"[::-1].replace(" ", "-")


class Api:
    """Calls the API and holds each answer against the description.

    Attributes:
        called: the operations that were called, and the statuses they had.
    """

    def __init__(self, http: aiohttp.ClientSession, base: str, description: dict[str, Any]) -> None:
        self._http = http
        self._base = base
        self._description = description
        self.called: dict[str, set[int]] = {}

    async def __call__(
        self, method: str, template: str, *values: str, body: Any = None, raw: bytes | None = None, query: str = ""
    ) -> tuple[int, Any]:
        path = template
        for value in values:
            before, _, rest = path.partition("{")
            path = before + quote(value, safe="") + rest.partition("}")[2]
        sent = raw if raw is not None else None if body is None else json.dumps(body).encode()
        url = f"{self._base}{PREFIX}{path}{query}"
        async with self._http.request(method, URL(url, encoded=True), data=sent and io.BytesIO(sent)) as response:
            assert response.content_type == "application/json"
            status, answer = response.status, await response.json()
        operation = self._description["paths"][PREFIX + template][method.lower()]
        self.called.setdefault(operation["operationId"], set()).add(status)
        assert str(status) in operation["responses"], f"{method} {template} answers {status}, which is not described"
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer, {**schema, "components": self._description["components"]})
        if status == 200:
            named = self._description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
            assert answer.keys() <= named.keys(), "there is more than is described"
        return status, answer


@asynccontextmanager
async def api_of(server: QuotepushServer) -> AsyncIterator[Api]:
    timeout = aiohttp.ClientTimeout(total=30)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.get(server.admin_url + PREFIX + "/openapi.json") as response,
    ):
        assert response.status == 200, "the description asks for no token"
        description = await response.json()
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as http:
        yield Api(http, server.admin_url, description)


def fd(client: RecordingClient) -> str:
    name: str = client.hello["conn"]
    return name


def heard(client: RecordingClient) -> list[Any]:
    client.check()
    return [message["data"] for message in client.control if message["type"] == "message"]


async def test_each_call_does_what_it_says_and_answers_as_described(start_server: Start) -> None:
    server = await start_server(api_token=TOKEN)
    async with api_of(server) as api, connected_clients(server.ws_url, 4, lambda n: ["A"]) as clients:
        a, b, c, d = clients
        uid, group = "ann/b %", "a/b?c#d"

        assert await api("PUT", "/conns/{conn}/user", fd(a), body={"user": uid}) == (200, {"conn": fd(a), "user": uid})
        assert (await api("POST", "/send", body={"to": {"users": [uid, "eve"]}, "data": {"n": 1}})) == (
            200, {"delivered": 1, "nodes": {"test": 1}, "missing": [], "kept": 0},
        )  # fmt: skip
        for to in ({"conns": [fd(a)]}, {"all": True}):
            assert (await api("POST", "/send", body={"to": to, "data": "x", "exclude": [fd(b)]}))[0] == 200
        assert (await api("POST", "/send", body={"to": {"users": ["far"]}, "data": 1, "delivery": "kept"}))[1][
            "kept"
        ] == 1
        binary = {"to": {"conns": [fd(a)]}, "data": "AP8=", "encoding": "base64"}
        assert (await api("POST", "/send", body=binary))[1]["delivered"] == 1
        await wait_until(lambda: heard(a) == [{"n": 1}, "x", "x", "AP8="] and not heard(b))

        later = {"to": {"users": [uid]}, "data": {"n": 2}, "at": 4_000_000_000_000, "every": 60, "count": 2}
        status, answer = await api("POST", "/send", body=later)
        job = answer["job"]
        assert (status, answer["delivered"], job["at"], job["every"], job["left"], job["to"]) == (
            200, 0, 4_000_000_000_000, 60, 2, {"users": [uid]},
        )  # fmt: skip
        assert await api("GET", "/jobs", query="?limit=5") == (200, {"items": [job], "cursor": ""})
        assert (await api("DELETE", "/jobs/{job}", job["id"]))[1] == {"job": job["id"], "cancelled": True}
        assert (await api("DELETE", "/jobs/{job}", job["id"]))[1] == {"job": job["id"], "cancelled": False}
        assert (await api("POST", "/send", body={**later, "every": 0.5}))[0] == 400
        assert (await api("POST", "/send", body={**later, "at": 4_000_000_000}))[0] == 400

        assert (await api("GET", "/users/{user}", uid))[1] == {"user": uid, "online": True, "conns": 1}
        assert (await api("GET", "/users/{user}/conns", uid))[1] == {"items": [fd(a)], "cursor": ""}
        assert (await api("GET", "/users"))[1]["items"] == [uid]

        async def is_registered() -> bool:
            wanted = {"conn": fd(a), "online": True, "user": uid, "codes": ["A"]}
            return (await api("GET", "/conns/{conn}", fd(a)))[1] == wanted

        await wait_until(is_registered)
        assert (await api("GET", "/conns/{conn}", "test.0.5"))[1]["online"] is False

        joined = {"group": group, "conn": fd(a), "member": True}
        assert await api("PUT", "/groups/{group}/conns/{conn}", group, fd(a)) == (200, joined)
        assert (await api("PUT", "/groups/{group}/conns/{conn}", group, "test.0.5"))[1]["error"] == "not_online"
        assert (await api("POST", "/send", body={"to": {"group": group}, "data": 2}))[1]["delivered"] == 1
        assert (await api("GET", "/groups/{group}", group))[1] == {"group": group, "conns": 1}
        assert (await api("GET", "/groups"))[1]["items"] == [group]
        assert (await api("GET", "/groups/{group}/conns", group))[1]["items"] == [fd(a)]
        assert (await api("GET", "/groups/{group}/sessions", group))[1]["items"][0]["conn"] == fd(a)
        assert (await api("DELETE", "/groups/{group}/conns/{conn}", group, fd(a)))[1]["member"] is False
        assert (await api("DELETE", "/groups/{group}", group))[0] == 200

        assert (await api("PUT", "/conns/{conn}/session", fd(a), body={"x": 1, "y": 2}))[1]["data"] == {"x": 1, "y": 2}
        assert (await api("PATCH", "/conns/{conn}/session", fd(a), body={"y": None}))[1]["data"] == {"x": 1}
        assert (await api("GET", "/conns/{conn}/session", fd(a)))[1] == {"conn": fd(a), "data": {"x": 1}}
        assert (await api("PUT", "/conns/{conn}/session", fd(a), body={"x": "y" * 9000}))[0] == 413

        async def all_are_registered() -> bool:
            return len((await api("GET", "/codes/{code}/conns", "a"))[1]["items"]) == 4

        await wait_until(all_are_registered)
        assert (await api("GET", "/codes"))[1] == {"items": ["A"], "cursor": ""}
        stats = (await api("GET", "/stats"))[1]
        assert (stats["conns"], stats["codes"], stats["nodes"][0]["node"]) == (4, 1, "test")
        found, cursor, pages = [], "", 0
        while not pages or cursor:
            page = (await api("GET", "/sessions", query=f"?limit=1&cursor={quote(cursor, safe='')}"))[1]
            found += [session["conn"] for session in page["items"]]
            cursor, pages = page["cursor"], pages + 1
        # The sessions of two workers are never on one page of one; which worker has some is the kernel's choice.
        assert sorted(found) == sorted(map(fd, clients)) and pages >= len({client.worker for client in clients})

        assert (await api("POST", "/publish", body={"code": "a", "last": 1}))[1] == {"seqs": [1]}
        assert (await api("POST", "/publish", body=[{"code": "A", "last": 2}, {"code": "A", "last": 3}]))[1] == {
            "seqs": [2, 3]
        }
        assert (await api("POST", "/publish", body={"code": "A", "last": "x"}))[1]["error"] == "bad_tick"
        await wait_until(lambda: b.last("A") == 3)

        assert (await api("PUT", "/conns/{conn}/entitlement", fd(b), body={"max_codes": 1}))[1] == {
            "conn": fd(b), "claims": {"max_codes": 1},
        }  # fmt: skip
        assert (await api("PUT", "/users/{user}/entitlement", "nobody", body={"codes": ["A"]}))[1]["count"] == 0
        assert (await api("PUT", "/conns/{conn}/entitlement", fd(b), body={"codes": "A"}))[1]["error"] == "bad_request"
        assert (await api("DELETE", "/conns/{conn}/user", fd(a)))[1] == {"conn": fd(a), "user": None}
        assert (await api("POST", "/conns/{conn}/close", fd(a)))[1] == {"closed": True}
        assert (await api("POST", "/conns/{conn}/close", fd(a), body={}))[1] == {"closed": False}
        assert (await api("POST", "/conns/close", body={"conns": [fd(b)], "code": 4000}))[1]["count"] == 1
        await api("PUT", "/conns/{conn}/user", fd(c), body={"user": "cat"})
        assert (await api("POST", "/users/{user}/kick", "cat", body={"reason": "bye"}))[1]["count"] == 1
        await wait_until(lambda: [one.close_code for one in (a, b, c)] == [4403, 4000, 4403])
        assert d.close_code is None
        assert api.called.keys() == {route.name for route in ROUTES}, "a route that nobody tries"


async def test_wrong_calls_are_refused_in_json_and_change_nothing(start_server: Start) -> None:
    server = await start_server(api_token=TOKEN)
    async with api_of(server) as api, connected_clients(server.ws_url, 1) as (client,):
        for body in (
            {}, {"to": {}, "data": 1}, {"to": {"all": True, "users": []}, "data": 1}, {"to": {"all": True}}, [], 1,
            {"to": {"all": True}, "data": 1, "exlude": []}, {"to": {"all": True}, "data": 1, "delivery": "soon"},
            {"to": {"all": True}, "data": "no base64", "encoding": "base64"}, {"to": {"users": [""]}, "data": 1},
            {"to": {"all": True}, "data": {"x": 1}, "raw": True}, {"to": {"conns": ["x"]}, "data": 1},
        ):  # fmt: skip
            status, answer = await api("POST", "/send", body=body)
            assert (status, answer["error"]) == (400, "bad_request"), body
        for raw in (b"", b"{", b"\xff", b"[" * 100_000, b'{"to":{"all":true},"data":NaN}'):
            assert (await api("POST", "/send", raw=raw))[0] == 400
        status, answer = await api("POST", "/send", raw=b"x" * (BODY_BYTES + 1))
        assert (status, answer["error"]) == (413, "too_large")
        for query in ("?limit=0", "?limit=1001", "?limit=x", "?cursor=x", "?limt=1"):
            assert (await api("GET", "/sessions", query=query))[0] == 400
        assert (await api("GET", "/codes/{code}/conns", "no such"))[1]["error"] == "bad_code"
        assert (await api("PUT", "/conns/{conn}/user", fd(client), body={"user": "x" * 129}))[0] == 400
        assert (await api("GET", "/users/{user}", "a\nb"))[0] == 400
        assert (await api("POST", "/conns/{conn}/close", fd(client), body={"code": 1006}))[0] == 400
        assert (await api("POST", "/publish", body=[{"code": "A", "last": 1}] * 1001))[0] == 400
        assert not heard(client) and client.close_code is None


async def test_nothing_happens_without_the_token(start_server: Start) -> None:
    server = await start_server(api_token=TOKEN)
    wrong = [{}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "},
             {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": "Bearer t\u00f6ken"}]  # fmt: skip
    async with aiohttp.ClientSession() as http:
        for route in ROUTES:
            path = server.admin_url + PREFIX + route.path.replace("{", "").replace("}", "")
            for headers in wrong:
                async with http.request(route.method, path, headers=headers, data=b"{}") as response:
                    assert response.status == 401, f"{route.method} {route.path}"
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    assert (await response.json())["error"] == "not_authenticated"
        async with http.get(f"{server.admin_url}/api/v1/no/such") as response:
            assert response.status == 401
        headers = {"Authorization": f"bearer {TOKEN}"}
        async with http.get(f"{server.admin_url}/api/v1/no/such", headers=headers) as response:
            assert (response.status, (await response.json())["error"]) == (404, "not_found")
        async with http.put(f"{server.admin_url}/api/v1/send", headers=headers) as response:
            assert (response.status, (await response.json())["error"]) == (405, "method_not_allowed")
            assert response.headers["Allow"] == "POST"
    assert server.log().count("calls without the right token") == 1
    assert TOKEN not in server.log()


async def test_without_a_token_in_the_settings_there_is_no_api(start_server: Start) -> None:
    server = await start_server(workers=1)
    for route in ROUTES:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer "}) as http:
            path = server.admin_url + PREFIX + route.path.replace("{", "").replace("}", "")
            async with http.request(route.method, path, data=b"{}") as response:
                answer = await response.json()
                assert (response.status, answer["error"]) == (403, "no_api")
                assert "api_token" in answer["message"]
    assert (await server.admin(f"{PREFIX}/openapi.json"))[0] == 200
    assert (await server.admin("/healthz"))[0] == 200


async def test_a_redis_that_is_away_is_said_and_found_again(start_server: Start, redis_server: RedisServer) -> None:
    server = await start_server(api_token=TOKEN, workers=1)
    async with api_of(server) as api:
        assert (await api("GET", "/stats"))[0] == 200
        redis_server.kill()
        for method, path, body in (
            ("GET", "/stats", None), ("POST", "/send", {"to": {"all": True}, "data": 1}),
            ("POST", "/publish", {"code": "A", "last": 1}),
        ):  # fmt: skip
            status, answer = await api(method, path, body=body)
            assert (status, answer["error"]) == (503, "unavailable")
        assert (await server.admin("/healthz"))[0] == 200
        await asyncio.to_thread(redis_server.start)

        async def is_back() -> bool:
            return (await api("POST", "/publish", body={"code": "A", "last": 1}))[0] == 200

        await wait_until(is_back, 30)
