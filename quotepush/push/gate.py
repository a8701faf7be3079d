"""Who may come in at the public HTTP side, and how everybody else is told.

Law: no answer repeats a token; a page gets nothing that its origin may not have.
"""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from quotepush.auth import Identity, UnknownKey
from quotepush.errors import PeerError
from quotepush.push.desk import Desk
from quotepush.settings import Settings

__all__ = ["Gate", "answer", "cross_origin", "refuse"]

# For main, which fetches keys of tokens that may be newer.
_KEYS_PATIENCE_S = 10.0


class Gate:
    """Checks where a request comes from and whom it names."""

    def __init__(self, settings: Settings, desk: Desk) -> None:
        self._desk = desk
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allowed_origins)

    async def let_in(self, request: web.Request) -> Identity | web.Response | None:
        """Return whom a request without a handshake names, as :meth:`identify` does, or why it is refused."""
        refusal = self.refusal(request)
        return refusal if refusal is not None else await self.identify(request, is_needed=True)

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return what a page of an origin that may not come in is told; None: it may."""
        if self._is_allowed(request):
            return None
        return refuse(request, 403, "forbidden_origin", "pages of this origin may not connect")

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
        origin = request.headers.get("Origin")
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
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
) -> web.Response:
    """Return an answer that says why not; ``error`` is the word for programs."""
    headers = dict(headers or {})
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return answer(request, {"error": error, "message": message}, status, headers)
