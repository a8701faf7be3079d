"""The public HTTP side of a worker: the WebSocket's door, the ticker page, the browser client.

Law: whoever is refused is refused before the upgrade, with the status that says why; no answer repeats a token.
Browsers do not show that status to scripts, so a plain ``GET`` of the WebSocket's path
answers with it too (426 when an upgrade would be welcome).
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from quotepush.auth import Identity
from quotepush.errors import PeerError
from quotepush.push.websocket import Detached
from quotepush.push.worker import PushWorker
from quotepush.settings import Settings
from quotepush.wire.formats import CODECS

__all__ = ["Admit", "make_app"]

# Asks main for a place: True takes it, False only looks. Answers whether there is one.
Admit = Callable[[bool], Awaitable[bool]]

STATIC = Path(__file__).parent.parent / "static"
_FILES = {f"/{name}": name for name in ("quotepush.js", "page.js", "page.css")}
_RETRY_AFTER_S = 5
_SUBPROTOCOLS = tuple(codec.subprotocol for codec in CODECS)

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(settings: Settings, worker: PushWorker, admit: Admit, leave: Callable[[], None]) -> web.Application:
    """Return the application of the public listener.

    Args:
        admit: asks main whether this machine takes one more connection.
        leave: gives a place back that was taken and not used.
    """
    door = _Door(settings, worker, admit, leave)
    app = web.Application()
    app.router.add_get(settings.ws_url_path, door.handle)
    for path, name in _FILES.items():
        app.router.add_get(settings.base_path + path, _file_handler(STATIC / name))
    app.router.add_get(settings.base_path + "/", _page_handler(settings.ws_path.lstrip("/")))
    if settings.base_path:
        # Without the slash the page's relative links would miss.
        app.router.add_get(settings.base_path, _slash_handler(settings.base_path + "/"))
    return app


def _file_handler(path: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(path, headers=_PAGE_HEADERS)

    return handle


def _page_handler(ws_path: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    # The page finds the WebSocket by this attribute, relative to itself. ws_path has no letter that HTML would mind.
    page = (STATIC / "index.html").read_text(encoding="utf-8").replace('data-ws="ws"', f'data-ws="{ws_path}"')

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text=page, content_type="text/html", headers=_PAGE_HEADERS)

    return handle


def _slash_handler(target: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        raise web.HTTPPermanentRedirect(target)

    return handle


class _Door:
    """The WebSocket's path."""

    def __init__(self, settings: Settings, worker: PushWorker, admit: Admit, leave: Callable[[], None]) -> None:
        self._worker = worker
        self._admit = admit
        self._leave = leave
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allowed_origins)
        self._handshake = web.WebSocketResponse(protocols=_SUBPROTOCOLS)  # only says whether a request is one

    async def handle(self, request: web.Request) -> web.StreamResponse:
        wants_upgrade = request.headers.get("Upgrade", "").strip().lower() == "websocket"
        if not self._is_allowed(request):
            return _refuse(request, 403, "forbidden_origin", "pages of this origin may not connect")
        if wants_upgrade and not self._handshake.can_prepare(request).ok:
            return _refuse(request, 400, "bad_handshake", "not a WebSocket handshake of version 13")
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
        subprotocol = next((p for p in offered if p in _SUBPROTOCOLS), None)
        if offered and subprotocol is None:
            return _refuse(request, 400, "bad_subprotocol", f"this server speaks {' and '.join(_SUBPROTOCOLS)}")
        try:
            identity = self._identify(request)
        except PeerError as e:
            headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # RFC 6750 §3
            return _refuse(request, 401, "auth_failed", e.message, headers=headers)
        if not await self._admit(wants_upgrade):
            return _refuse(request, 503, "overloaded", "this server holds all it can", retry_after_s=_RETRY_AFTER_S)
        if self._worker.is_draining:  # asked last: it may have begun while main was asked
            if wants_upgrade:
                self._leave()
            return _refuse(request, 503, "restart", "this server is about to restart", retry_after_s=1)
        if not wants_upgrade:
            headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
            return _refuse(request, 426, "upgrade_required", "connect with a WebSocket", headers=headers)
        try:
            return self._worker.accept(request, subprotocol, identity)
        except ConnectionResetError:  # it went away while main was asked: nobody is left to answer
            self._leave()
            return Detached()
        except BaseException:
            self._leave()
            raise

    def _identify(self, request: web.Request) -> Identity | None:
        """Return whom the handshake's token names; None: it brings none, or this server takes none.

        Raises:
            PeerError: ``auth_failed``.
        """
        desk = self._worker.desk
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


def _refuse(
    request: web.Request,
    status: int,
    error: str,
    message: str,
    *,
    retry_after_s: int | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    headers = {"Cache-Control": "no-store", "Vary": "Origin", **(headers or {})}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    origin = request.headers.get("Origin")
    if origin is not None:
        headers |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After"}
    body = orjson.dumps({"error": error, "message": message})
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
