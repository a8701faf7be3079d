"""The public HTTP side of a worker: the doors of WebSocket and stream, the ticker page, the browser client.

Law: whoever is refused is refused before the upgrade, with the status that says why; no answer repeats a token.
Browsers do not show that status to scripts, so a plain ``GET`` of the WebSocket's path
answers with it too (426 when an upgrade would be welcome).
"""

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from aiohttp import web

from quotepush.auth import Identity
from quotepush.errors import PeerError
from quotepush.push.addresses import UNKNOWN, counted_by
from quotepush.push.gate import Gate, cross_origin, refuse
from quotepush.push.link import Detached
from quotepush.push.members import check_data
from quotepush.push.queries import Queries
from quotepush.push.questions import asked_of
from quotepush.push.worker import PushWorker
from quotepush.settings import Settings
from quotepush.wire.formats import CODECS

__all__ = ["Admit", "make_app"]

# Asks main for a place for a connection of an address (as ``counted_by`` says it): True takes it, False only looks.
# Answers why there is none, as a word; empty: there is one.
Admit = Callable[[str, bool], Awaitable[str]]

STATIC = Path(__file__).parent.parent / "static"
_FILES = [STATIC / "quotepush.js", *STATIC.glob("page*.js"), *STATIC.glob("page*.css")]
_RETRY_AFTER_S = 5
_SUBPROTOCOLS = tuple(codec.subprotocol for codec in CODECS)

# What the server itself reads of a query: no session data.
_OWN_PARAMS = ("token", "codes", "fields", "format", "max_rate", "snapshot", "last_event_id")

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; connect-src 'self' ws: wss:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(settings: Settings, worker: PushWorker, admit: Admit, leave: Callable[[str], None]) -> web.Application:
    """Return the application of the public listener.

    Args:
        admit: asks main whether this machine takes one more connection.
        leave: gives a place of an address back that was taken and not used.
    """
    gate = Gate(settings, worker.desk, worker.refusals)
    door = _Door(gate, worker, admit, leave, settings.secret_params)
    queries = Queries(gate, worker.desk)
    app = web.Application()
    app.router.add_get(settings.ws_url_path, door.handle)
    app.router.add_get(settings.base_path + "/stream", door.stream)
    app.router.add_get(settings.base_path + "/quotes", queries.quotes)
    app.router.add_get(settings.base_path + "/codes", queries.codes)
    for path in _FILES:
        app.router.add_get(f"{settings.base_path}/{path.name}", _file_handler(path))
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
    """The paths at which a connection begins: the WebSocket's and the stream's."""

    def __init__(
        self, gate: Gate, worker: PushWorker, admit: Admit, leave: Callable[[str], None], secret_params: Iterable[str]
    ) -> None:
        self._worker = worker
        self._admit = admit
        self._leave = leave
        self._gate = gate
        self._own_params = frozenset((*_OWN_PARAMS, *secret_params))
        self._handshake = web.WebSocketResponse(protocols=_SUBPROTOCOLS)  # only says whether a request is one

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET`` of the WebSocket's path, with an upgrade or without."""
        request = self._gate.seen(request)
        wants_upgrade = request.headers.get("Upgrade", "").strip().lower() == "websocket"
        said = await self._open_websocket(request, wants_upgrade)
        return self._gate.note(request, said, is_connection=True) if wants_upgrade else said

    async def _open_websocket(self, request: web.Request, wants_upgrade: bool) -> web.StreamResponse:
        refusal = self._gate.refusal(request, is_connection=wants_upgrade)
        if refusal is not None:
            return refusal
        if wants_upgrade and not self._handshake.can_prepare(request).ok:
            return refuse(request, 400, "bad_handshake", "not a WebSocket handshake of version 13")
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
        subprotocol = next((p for p in offered if p in _SUBPROTOCOLS), None)
        if offered and subprotocol is None:
            return refuse(request, 400, "bad_subprotocol", f"this server speaks {' and '.join(_SUBPROTOCOLS)}")
        identity = await self._gate.identify(request, is_needed=False)
        if isinstance(identity, web.Response):
            return identity
        try:
            data = self._first_data(request, identity)
        except PeerError as e:
            return refuse(request, 400, e.error, e.message)
        refusal = await self._find_place(request, wants_upgrade)
        if refusal is not None:
            return refusal
        if not wants_upgrade:
            headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
            return refuse(request, 426, "upgrade_required", "connect with a WebSocket", headers=headers)
        return self._hand_over(request, lambda: self._worker.accept(request, subprotocol, identity, data))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET`` of the stream, or refuse it before the response has begun."""
        request = self._gate.seen(request)
        is_wanted = request.method == "GET"
        return self._gate.note(request, await self._open_stream(request, is_wanted), is_connection=is_wanted)

    async def _open_stream(self, request: web.Request, is_wanted: bool) -> web.StreamResponse:
        identity = await self._gate.let_in(request, is_connection=is_wanted)
        if isinstance(identity, web.Response):
            return identity
        try:
            asked = asked_of(request, self._worker.desk)
            data = self._first_data(request, identity)
        except PeerError as e:
            return refuse(request, 400, e.error, e.message)
        refusal = await self._find_place(request, is_wanted)
        if refusal is not None:
            return refusal
        headers = cross_origin(request) | {"X-Accel-Buffering": "no"}  # nginx would hold the events back
        if not is_wanted:
            return web.Response(headers=headers, content_type="text/event-stream", charset="utf-8")
        return self._hand_over(request, lambda: self._worker.accept_stream(request, asked, identity, headers, data))

    def _first_data(self, request: web.Request, identity: Identity | None) -> dict[str, str]:
        """Return the session data that a connection begins with; of a parameter that comes twice the last one counts.

        Raises:
            PeerError: ``too_large``, together with the claims of the token.
        """
        data = {name: value for name, value in request.query.items() if name not in self._own_params}
        if data:
            check_data({**data, **(identity.claims if identity is not None else {})})
        return data

    async def _find_place(self, request: web.Request, take: bool) -> web.Response | None:
        """Return why there is no place for one more connection; None: there is, and with ``take`` it is taken."""
        address = counted_by(request.remote or UNKNOWN)
        error = await self._admit(address, take)
        if error == "too_many_connections":
            message = "this address has as many connections as one may have"
            return refuse(request, 429, "too_many_connections", message, retry_after_s=_RETRY_AFTER_S)
        if error:
            return refuse(request, 503, "overloaded", "this server holds all it can", retry_after_s=_RETRY_AFTER_S)
        if self._worker.is_draining:  # asked last: it may have begun while main was asked
            if take:
                self._leave(address)
            return refuse(request, 503, "restart", "this server is about to restart", retry_after_s=1)
        return None

    def _hand_over(self, request: web.Request, accept: Callable[[], Detached]) -> Detached:
        """Make a connection of a request that has a place, or give the place back."""
        try:
            return accept()
        except ConnectionResetError:  # it went away while main was asked: nobody is left to answer
            self._leave(counted_by(request.remote or UNKNOWN))
            return Detached()
        except BaseException:
            self._leave(counted_by(request.remote or UNKNOWN))
            raise
