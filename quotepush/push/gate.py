"""Who may come in at the public HTTP side, and how everybody else is told.

Law: no answer repeats a token; a page gets nothing that its origin may not have; limits of an address are those of the
client, not of a trusted proxy before it.
"""

import asyncio
import math
import time
from typing import Any
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from quotepush.auth import Identity, UnknownKey
from quotepush.errors import PeerError
from quotepush.push.addresses import UNKNOWN, Proxies, counted_by
from quotepush.push.desk import Desk
from quotepush.push.rates import Rates
from quotepush.push.refusals import Refusals
from quotepush.settings import Settings

__all__ = ["Gate", "Refusal", "answer", "cross_origin", "refuse"]

# A token that cannot be taken counts as so many more attempts.
_BAD_TOKEN_COSTS = 5


class Refusal(web.Response):
    """An answer that says why not.

    Attributes:
        error: the word for programs.
    """

    error = ""


# For main, which fetches keys of tokens that may be newer.
_KEYS_PATIENCE_S = 10.0


class Gate:
    """Checks where a request comes from, whom it names, and how often it is heard.

    Args:
        refusals: where it counts whom it has refused.
    """

    def __init__(self, settings: Settings, desk: Desk, refusals: Refusals) -> None:
        self._desk = desk
        self._refusals = refusals
        self._proxies = Proxies(settings.trusted_proxies, settings.proxy_header)
        self._connects = Rates(settings.connects_per_ip_s)
        self._questions = Rates(settings.questions_per_ip_s)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allowed_origins)

    # Where it comes from

    def seen(self, request: web.Request) -> web.Request:
        """Return the request with the client's address as its ``remote``, whatever proxies stand between."""
        said = request.headers.getall(self._proxies.header, ())
        client = self._proxies.client_of(request.remote, said)
        return request if client == request.remote else request.clone(remote=client)

    def _hold_back(self, request: web.Request, *, is_connection: bool) -> web.Response | None:
        """Return what an address is told that asks too often; None: it does not, and this time is counted.

        A question is not welcome either as long as a connection would not be: it is how browsers look.
        """
        who, now_s = counted_by(request.remote or UNKNOWN), time.monotonic()
        wait_s = self._connects.wait_s(who, now_s)
        if not is_connection:
            wait_s = max(wait_s, self._questions.wait_s(who, now_s))
        if wait_s:
            return refuse(request, 429, "rate_limited", "this address asks too often", retry_after_s=math.ceil(wait_s))
        (self._connects if is_connection else self._questions).charge(who, now_s)
        return None

    def note(self, request: web.Request, said: web.StreamResponse, *, is_connection: bool) -> web.StreamResponse:
        """Count an answer, if it is a refusal, and return it."""
        if isinstance(said, Refusal):
            who, now_s = request.remote or UNKNOWN, time.monotonic()
            advice = ""
            if said.status == 429 and self._proxies.header in request.headers:
                advice = f", which sends {self._proxies.header}: list it in trusted_proxies if it is a proxy of yours"
            self._refusals.note(said.error, who, now_s, is_connection=is_connection, advice=advice)
            if said.error == "auth_failed":
                for rates in (self._connects, self._questions):
                    rates.charge(counted_by(who), now_s, _BAD_TOKEN_COSTS)
        return said

    async def let_in(self, request: web.Request, *, is_connection: bool) -> Identity | web.Response | None:
        """Return whom a request without a handshake names, as :meth:`identify` does, or why it is refused."""
        refusal = self.refusal(request, is_connection=is_connection)
        return refusal if refusal is not None else await self.identify(request, is_needed=True)

    def refusal(self, request: web.Request, *, is_connection: bool) -> web.Response | None:
        """Return what a page of an origin that may not come in is told, and who asks too often; None: it is welcome.

        Such a page uses up nothing of what its visitor's address may ask.
        """
        if not self._is_allowed(request):
            return refuse(request, 403, "forbidden_origin", "pages of this origin may not connect")
        return self._hold_back(request, is_connection=is_connection)

    async def identify(self, request: web.Request, *, is_needed: bool) -> Identity | web.Response | None:
        """Return whom the request's token names (None: it brings none, or this server takes none), or the refusal.

        Args:
            is_needed: refuse also who brings no token, where this server wants one.
        """
        try:
            try:
                identity = self._identify(request)
            except UnknownKey:
                await self._renew_keys()
                identity = self._identify(request)
        except PeerError as e:
            headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # RFC 6750 §3
            return refuse(request, 401, "auth_failed", e.message, headers=headers)
        if identity is None and is_needed and self._desk.needs_identity:
            headers = {"WWW-Authenticate": "Bearer"}
            return refuse(request, 401, "not_authenticated", "this server wants a token", headers=headers)
        return identity

    async def _renew_keys(self) -> None:
        """Wait until main has looked for newer keys of tokens; no longer than it can take."""
        renewed = asyncio.Event()
        self._desk.renew_keys(renewed.set)
        try:
            async with asyncio.timeout(_KEYS_PATIENCE_S):
                await renewed.wait()
        except TimeoutError:
            pass

    def _identify(self, request: web.Request) -> Identity | None:
        """Return whom the handshake's token names; None: it brings none, or this server takes none.

        Raises:
            PeerError: ``auth_failed``.
        """
        desk = self._desk
        tokens = request.query.getall("token", [])
        for header in request.headers.getall("Authorization", []):
            scheme, _, token = header.partition(" ")
            if scheme.lower() == "bearer":  # others may be for a proxy before us
                tokens.append(token.strip())
        if desk.verifier is None or not tokens:
            return None
        if len(tokens) > 1:  # RFC 6750 §2; which one counts must not depend on who reads it
            raise PeerError("auth_failed", "the handshake brings more than one token")
        return desk.identify(tokens[0])

    def _is_allowed(self, request: web.Request) -> bool:
        """Pages of our own host, pages that are listed, and whatever is no page at all."""
        origins = request.headers.getall("Origin", ())
        if not origins or "*" in self._origins:
            return True
        if len(origins) > 1:  # no browser says two; which one counts must not depend on who reads them
            return False
        (origin,) = origins
        if origin.lower() in self._origins:
            return True
        try:
            host = urlsplit(origin).netloc
        except ValueError:
            return False
        return bool(host) and host.lower() == request.host.lower()


def cross_origin(request: web.Request) -> dict[str, str]:
    """Return the headers with which a page that was let in, of whatever origin, may read the answer."""
    headers = {"Cache-Control": "no-store", "Vary": "Origin"}
    origin = request.headers.get("Origin")
    if origin is not None:
        headers |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After"}
    return headers


def answer(request: web.Request, said: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a JSON answer; ``said`` may be encoded already."""
    body = said if isinstance(said, bytes) else orjson.dumps(said)
    headers = cross_origin(request) | (headers or {})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def refuse(
    request: web.Request,
    status: int,
    error: str,
    message: str,
    *,
    retry_after_s: int | None = None,
    headers: dict[str, str] | None = None,
) -> Refusal:
    """Return an answer that says why not; ``error`` is the word for programs."""
    headers = cross_origin(request) | (headers or {})
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    body = orjson.dumps({"error": error, "message": message})
    refusal = Refusal(status=status, body=body, content_type="application/json", headers=headers)
    refusal.error = error
    return refusal
