"""The HTTP API of the private listener: what backends without the Python library call.

Invariant: nothing of it happens, and no body is read, before the caller has shown the token; every answer, also a
refusal, is JSON of a described type.
"""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from aiohttp import web

from quotepush.backend import Backend
from quotepush.errors import BackendUnavailable, CallRefused, RedisUnavailable
from quotepush.node.api_routes import LARGEST_PAGE, PATH_WORDS, ROUTES, Ask, Error, Route
from quotepush.quote.tick import BadTick

__all__ = ["BODY_BYTES", "PREFIX", "STATUSES", "add_api", "openapi"]

log = logging.getLogger("quotepush.main")

PREFIX = "/api/v1"
BODY_BYTES = 1 << 20
_BODY_S = 10.0
_REPORT_EVERY_S = 60.0

# The status of each word of an error; other words that a node may say are 409.
STATUSES = {
    "bad_request": 400, "bad_tick": 400, "bad_code": 400, "not_authenticated": 401, "no_api": 403, "key_needed": 403,
    "wrong_key": 403,
    "not_found": 404, "not_online": 404, "method_not_allowed": 405, "too_slow": 408, "job_limit": 409,
    "too_large": 413, "internal": 500, "unavailable": 503,
}  # fmt: skip
# What every call may answer with.
_COMMON = ("bad_request", "not_authenticated", "no_api", "internal", "unavailable")
_OF_BODIES = ("too_large", "too_slow")
_NO_API = "there is no HTTP API here: set api_token or api_token_file and start again"


def add_api(
    app: web.Application,
    backend: Backend | None,
    token: str,
    version: str,
    *,
    is_kept: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Give an application the routes of the API.

    Args:
        backend: carries the calls out; None: there is no API, which every route then says.
        token: what callers have to show.
        version: of quotepush, for the description.
        is_kept: a message that does not say how it is delivered waits for who is away.
    """
    description = msgspec.json.encode(openapi(version))
    knocks = _Knocks(clock)

    async def describe(request: web.Request) -> web.Response:
        return web.Response(body=description, content_type="application/json")

    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        path = request.path
        if not path.startswith("/api/") or path == f"{PREFIX}/openapi.json":
            return await handler(request)
        if backend is None:
            return _refusal("no_api", _NO_API)
        if not _shows(request, token):
            knocks.count(request.remote)
            return _refusal("not_authenticated", "show the api_token as: Authorization: Bearer …")
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _refusal("too_large", f"a body has at most {BODY_BYTES} bytes")
        except web.HTTPMethodNotAllowed as e:
            return _refusal("method_not_allowed", f"{e.method} is not for this path", Allow=e.headers["Allow"])
        except web.HTTPNotFound:
            return _refusal("not_found", f"there is no such path; {PREFIX}/openapi.json describes all")

    app.middlewares.append(guard)
    app.router.add_get(f"{PREFIX}/openapi.json", describe)
    for route in ROUTES:
        # Of the name of a user or a group everything may stand in a path, if it is percent-encoded.
        path = re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", PREFIX + route.path)
        app.router.add_route(route.method, path, _handler(route, backend, "kept" if is_kept else "now"))


def openapi(version: str) -> dict[str, Any]:
    """Return the description of the API (OpenAPI 3.1)."""
    types = [t for route in ROUTES for t in (route.body, route.answer) if t is not None]
    schemas, components = msgspec.json.schema_components([*types, Error], ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(map(id, types), schemas, strict=False))
    for schema in components.values():  # of what is written for readers of the code the first sentence
        schema["description"] = schema.get("description", "").partition("\n\n")[0]
    paths: dict[str, Any] = {}
    for route in ROUTES:
        words = dict.fromkeys((*route.refusals, *_COMMON, *(() if route.body is None else _OF_BODIES)))
        by_status: dict[int, list[str]] = {}
        for word in words:
            by_status.setdefault(STATUSES[word], []).append(word)
        operation: dict[str, Any] = {
            "operationId": route.name,
            "summary": route.summary,
            "parameters": _parameters(route),
            "responses": {
                "200": {"description": "Done.", "content": _json_of(schema_of[id(route.answer)])},
                **{
                    str(status): {"description": ", ".join(some), "content": _json_of(schemas[-1])}
                    for status, some in sorted(by_status.items())
                },
            },
        }
        if route.body is not None:
            operation["requestBody"] = {
                "required": not route.is_body_optional, "content": _json_of(schema_of[id(route.body)]),
            }  # fmt: skip
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "quotepush", "version": version,
            "description": "Send to connections, users and groups, look after them, and publish ticks.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "The api_token."}},
        },
    }  # fmt: skip


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": PATH_WORDS[name], "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    if route.is_paged:
        limit = {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": Ask({}).limit}
        found += [
            {"name": "cursor", "in": "query", "description": "Of the page before.", "schema": {"type": "string"}},
            {"name": "limit", "in": "query", "description": "About how many.", "schema": limit},
        ]
    return found


def _json_of(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _handler(
    route: Route, backend: Backend | None, delivery: Literal["now", "kept"]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        assert backend is not None  # the guard lets nobody in
        try:
            cursor, limit = _page_of(request, route)
            ask = Ask(dict(request.match_info), cursor, limit, await _body_of(request, route), delivery)
            return _json(200, await route.do(backend, ask))
        except CallRefused as e:
            return _refusal(e.error, e.message)
        except BadTick as e:
            return _refusal("bad_tick", f"{e.reason}: {e}")
        except (BackendUnavailable, RedisUnavailable) as e:
            return _refusal("unavailable", str(e), **{"Retry-After": "1"})
        except web.HTTPException:
            raise
        except Exception:
            log.exception("a call of the HTTP API met a bug: %s %s", route.method, route.path)
            return _refusal("internal", "this is a bug of the server; its log has the traceback")

    return handle


def _page_of(request: web.Request, route: Route) -> tuple[str, int]:
    query = request.query
    unknown = sorted(query.keys() - ({"cursor", "limit"} if route.is_paged else set()))
    if unknown:
        raise CallRefused("bad_request", f"nothing is called {unknown[0][:60]!r} in the query of this path")
    limit = query.get("limit", str(Ask({}).limit))
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        raise CallRefused("bad_request", f"limit must be from 1 to {LARGEST_PAGE}")
    return query.get("cursor", ""), int(limit)


async def _body_of(request: web.Request, route: Route) -> Any:
    if route.body is None:
        return None
    try:
        async with asyncio.timeout(_BODY_S):
            body = await request.read()
    except TimeoutError:
        raise CallRefused("too_slow", f"the body has not come within {_BODY_S:g} s") from None
    if not body and route.is_body_optional:
        body = b"{}"
    try:
        return msgspec.json.decode(body, type=route.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise CallRefused("bad_request", f"the body is not as described: {e}") from None


def _shows(request: web.Request, token: str) -> bool:
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    shown_bytes = shown.strip().encode("utf-8", "surrogateescape")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown_bytes, token.encode())


class _Knocks:
    """Says in the log that callers show no token, or a wrong one, at most once a minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0
        self._told_s = -_REPORT_EVERY_S

    def count(self, remote: str | None) -> None:
        self._count += 1
        now = self._clock()
        if now - self._told_s >= _REPORT_EVERY_S:
            log.warning("HTTP API: %d calls without the right token; the newest from %s", self._count, remote)
            self._told_s, self._count = now, 0


def _refusal(word: str, message: str, **headers: str) -> web.Response:
    if word == "not_authenticated":
        headers["WWW-Authenticate"] = "Bearer"
    return _json(STATUSES.get(word, 409), Error(word, message), headers)


def _json(status: int, answer: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(answer), content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )  # fmt: skip
