"""A WebSocket that comes back: what the Python client knows of connecting, and nothing of quotes.

Law: one task owns the connection. It ends when it is closed or refused for good, and says so exactly once, through
``on_state``; every loss before that is followed by a pause and a new attempt, for ever.
"""

import asyncio
import errno
import logging
import os
import random
import ssl as ssl_module
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Literal, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from quotepush.client_errors import Refused, WrongUrl
from quotepush.client_messages import BadMessage, Message, decode_frame
from quotepush.client_token import NoToken, TokenSource, renewal_in_s
from quotepush.together import together
from quotepush.wire.formats import JSON

__all__ = ["ClientLink", "StateChange", "pause_s"]

log = logging.getLogger("quotepush.client")

_Socket: TypeAlias = "aiohttp.ClientWebSocketResponse[Literal[False]]"

# Close codes after which coming back is pointless: not authenticated, kicked or forbidden, replaced by a newer one.
_NO_TOKEN = 4401
_PERMANENT_CLOSES = frozenset((_NO_TOKEN, 4403, 4409))
_PERMANENT_STATUSES = frozenset((400, 401, 403))
_BUSY_STATUSES = frozenset((429, 503))
_PASSING_STATUSES = frozenset((408, 425, 429))
# A link is dead after 2.5 heartbeats without a message. They are counted in this many checks, not measured: a loop
# that was itself held up has proved nothing.
_SILENT_CHECKS = 10
_SILENT_HEARTBEATS = 2.5
_CLOSE_TIMEOUT_S = 1.0
# A snapshot of 1,000 rows of the largest size (16 KiB) fits in; nothing larger is ever held.
_MAX_MESSAGE_BYTES = 32 << 20
# No server can keep us away for longer than this by a number in a header.
_MAX_TOLD_S = 300.0


@dataclass(frozen=True, slots=True)
class StateChange:
    """What the ``state`` event tells.

    Attributes:
        state: ``connecting``, ``open``, ``waiting`` (for the next attempt) or ``closed`` (for good).
        reason: why the last connection ended or could not be made; empty if there was none.
        attempt: attempts since a connection last stood for a heartbeat.
        retry_in_s: when ``waiting``, how long.
    """

    state: str
    reason: str = ""
    attempt: int = 0
    retry_in_s: float | None = None


class _Lost(Exception):
    """The connection is over; the argument says why."""


class ClientLink:
    """One connection at a time, made again whenever it is lost.

    Args:
        url: of the server; ``/ws`` is appended when it has no path.
        on_message: takes each message; what it raises as :class:`BadMessage` costs the connection.
        on_lost: a connection is over.
        on_state: takes each change of state.
        on_token: takes each token that the open connection is to be renewed with.

    Raises:
        WrongUrl: the URL cannot be one of a server.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        tokens: TokenSource,
        ssl: ssl_module.SSLContext | bool,
        open_timeout_s: float,
        min_backoff_s: float,
        max_backoff_s: float,
        on_message: Callable[[Message], None],
        on_lost: Callable[[], None],
        on_state: Callable[[StateChange], None],
        on_token: Callable[[str], None],
    ) -> None:
        self._url = _websocket_url(url)
        self._headers = dict(headers)
        self._tokens = tokens
        self._token: str | None = None  # the one that this connection brought, or was given later
        self._ssl = ssl
        self._open_timeout_s = open_timeout_s
        self._min_backoff_s = min_backoff_s
        self._max_backoff_s = max_backoff_s
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_state = on_state
        self._on_token = on_token
        self.state = StateChange("closed")
        self.failure: Exception | None = None  # why it has ended by itself
        self._task: asyncio.Task[None] | None = None
        self._http: aiohttp.ClientSession | None = None
        self._was_open = False  # at least once
        self._attempt = 0
        self._told_s = 0.0  # how long the server asked us to stay away
        self._outgoing: asyncio.Queue[bytes] | None = None
        self._greeted: asyncio.Future[float] | None = None  # done with what the server's clock is ahead of ours
        self._silent_checks = 0
        self._silence_limit_s = open_timeout_s

    @property
    def url(self) -> str:
        """Where it connects to, without user, password and query."""
        return _shown(self._url)

    def open(self) -> None:
        """Start connecting; once."""
        if self._task is not None:
            raise RuntimeError("a client is opened once")
        # Each attempt has a timeout of its own, where it is made.
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self._task = asyncio.create_task(self._run(), name="quotepush client")

    async def close(self) -> None:
        """End it; harmless twice."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})  # bounded: its last act is the closing handshake, with a timeout
        if self._http is not None:
            await self._http.close()

    def say(self, request: bytes) -> None:
        """Send a request on the connection that is open."""
        assert self._outgoing is not None, "there is a hello only where there is a connection"
        self._outgoing.put_nowait(request)

    def greeted(self, hello: Message) -> None:
        """The server has said ``hello``: from now on its heartbeats are expected.

        Raises:
            Refused: it wants a token, and there is none.
        """
        assert self._greeted is not None
        if hello.get("auth") in ("required", "optional"):
            if self._token is not None:
                self._on_token(self._token)  # something on the way has taken it out of the handshake
            elif hello["auth"] == "required":
                raise Refused(self.url, "auth_failed: it wants a token", close_code=_NO_TOKEN)
        told_ms = hello.get("time")
        now_ms = time.monotonic() * 1000
        self._greeted.set_result((told_ms if isinstance(told_ms, int) else time.time() * 1000) - now_ms)
        self._silence_limit_s = _SILENT_HEARTBEATS * hello["heartbeat_ms"] / 1000
        self._was_open = True
        self._change_state(StateChange("open", attempt=self._attempt))

    def settled(self) -> None:
        """The connection has stood for a while, so its loss is a new story."""
        self._attempt = 0

    def stay_away(self, seconds: float) -> None:
        """The server asks for a pause before the next attempt."""
        self._told_s = min(seconds, _MAX_TOLD_S)

    async def _run(self) -> None:
        """Connect, live, wait; for ever, or until somebody refuses us for good."""
        reason = ""
        try:
            while True:
                self._told_s = 0.0
                self._change_state(StateChange("connecting", reason, self._attempt))
                reason = await self._live()
                wait_s = pause_s(self._attempt, self._told_s, self._min_backoff_s, self._max_backoff_s, random.random())
                self._attempt += 1
                self._change_state(StateChange("waiting", reason, self._attempt, wait_s))
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            reason = "closed by the client"
            raise
        except Refused as e:
            self.failure = e
            reason = e.reason
        except Exception as e:
            # A bug of ours: whoever uses the client gets it, and the log too, for nobody may be using it.
            log.exception("the client has failed")
            self.failure = e
            reason = type(e).__name__
        finally:
            self._change_state(StateChange("closed", reason, self._attempt))

    async def _live(self) -> str:
        """Make one connection and live on it until it is lost; return why it was.

        Raises:
            Refused: it must not be tried again.
        """
        try:
            self._token = await self._tokens.next()
            async with asyncio.timeout(self._open_timeout_s):
                socket = await self._connect()
        except NoToken as e:
            return str(e)
        except aiohttp.WSServerHandshakeError as e:
            return self._turned_away(e)
        except aiohttp.InvalidURL:
            raise Refused(self.url, "this is no address") from None
        except TimeoutError:
            return f"no answer within {self._open_timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as e:
            return _reason_of(e)
        self._outgoing = asyncio.Queue()
        self._greeted = asyncio.get_running_loop().create_future()
        self._silent_checks = 0
        self._silence_limit_s = self._open_timeout_s
        lives = [self._read(socket), self._send(socket, self._outgoing), self._watch()]
        if self._tokens.can_renew:
            lives.append(self._renew(self._greeted))
        try:
            await together(*lives, name="quotepush client: link")
        except _Lost as e:
            return str(e)
        finally:
            self._outgoing = self._greeted = None
            self._on_lost()
            await _hang_up(socket)
        raise AssertionError("what reads has ended without a reason")

    async def _connect(self) -> _Socket:
        assert self._http is not None
        return await self._http.ws_connect(
            self._url,
            protocols=(JSON.subprotocol,),
            headers=self._headers
            if self._token is None
            else {**self._headers, "Authorization": f"Bearer {self._token}"},
            ssl=self._ssl,
            compress=0,
            autoping=True,
            max_msg_size=_MAX_MESSAGE_BYTES,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_TIMEOUT_S),
            decode_text=False,
        )

    async def _read(self, socket: _Socket) -> None:
        while True:
            frame = await socket.receive()  # no timeout of its own: _watch has it
            self._silent_checks = 0
            if frame.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                try:
                    self._on_message(decode_frame(frame.data, is_text=frame.type is aiohttp.WSMsgType.TEXT))
                except BadMessage as e:
                    raise _Lost(f"the server does not speak {JSON.subprotocol}: {e}") from None
            elif frame.type is aiohttp.WSMsgType.CLOSE:
                code, said = frame.data, str(frame.extra or "")
                if code in _PERMANENT_CLOSES and not (code == _NO_TOKEN and self._tokens.can_renew):
                    raise Refused(self.url, said, close_code=code)
                raise _Lost(f"closed by the server: {code} {said}".rstrip())
            else:
                error = socket.exception()
                raise _Lost(_reason_of(error) if error else "connection lost")

    async def _send(self, socket: _Socket, outgoing: "asyncio.Queue[bytes]") -> None:
        while True:
            text = await outgoing.get()  # no timeout: there may be nothing to say for ever
            try:
                await socket.send_str(text.decode())  # a server that reads nothing is the watchdog's
            except (aiohttp.ClientError, OSError) as e:
                raise _Lost(_reason_of(e)) from None

    async def _renew(self, greeted: "asyncio.Future[float]") -> None:
        """Bring a new token before the old one ends; when there is none, the server ends the connection."""
        ahead_ms = await greeted  # no timeout: the watchdog ends a connection without hello
        assert self._token is not None
        while (due_s := renewal_in_s(self._token, time.monotonic() * 1000 + ahead_ms)) is not None:
            await asyncio.sleep(due_s)
            try:
                token = await self._tokens.next()
            except NoToken:
                continue
            if token is not None and token != self._token:
                self._token = token
                self._on_token(token)

    async def _watch(self) -> None:
        while self._silent_checks < _SILENT_CHECKS:
            await asyncio.sleep(self._silence_limit_s / _SILENT_CHECKS)
            self._silent_checks += 1
        raise _Lost(f"no message within {self._silence_limit_s:g} s")

    def _turned_away(self, answer: aiohttp.WSServerHandshakeError) -> str:
        """Return why the handshake failed; raise what must not be tried again."""
        status = answer.status
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        # Before there ever was a connection an answer like 404 or 200 says that the address is wrong;
        # later it is a proxy whose server is away.
        is_wrong_address = not self._was_open and status < 500 and status not in (401, *_PASSING_STATUSES)
        if status in _PERMANENT_STATUSES and not (status == 401 and self._tokens.can_renew):
            raise Refused(self.url, phrase, status=status)
        if is_wrong_address:
            raise Refused(self.url, f"{phrase}: no quotepush server there", status=status)
        if status in _BUSY_STATUSES and answer.headers is not None:
            self.stay_away(_retry_after_s(answer.headers.get("Retry-After", "")))
        return f"HTTP {status} {phrase}".rstrip()

    def _change_state(self, change: StateChange) -> None:
        self.state = change
        self._on_state(change)


def pause_s(attempt: int, told_s: float, min_backoff_s: float, max_backoff_s: float, chance: float) -> float:
    """Return how long to wait before an attempt: what the server asks for, and then full jitter.

    Clients that lost one server together must not come back together: each waits a time that chance spreads evenly
    between 0 and a bound, which doubles with each failure.

    Args:
        attempt: attempts before this one.
        told_s: what the server asks for.
        chance: at least 0, below 1.
    """
    bound_s: float = min(max_backoff_s, min_backoff_s * 2 ** min(attempt, 16))
    return told_s + chance * bound_s


async def _hang_up(socket: _Socket) -> None:
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await socket.close()
    except TimeoutError:
        pass  # aiohttp has cut it


def _websocket_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
        if scheme is None:
            raise WrongUrl(_shown(url), "it must begin with http://, https://, ws:// or wss://")
        if not parts.hostname or any(c.isspace() for c in parts.netloc):
            raise WrongUrl(_shown(url), "it names no host")
        if parts.port == 0:
            raise WrongUrl(_shown(url), "0 is no port to connect to")
    except ValueError as e:
        raise WrongUrl(_shown(url), str(e)) from None
    path = parts.path if parts.path not in ("", "/") else "/ws"
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


def _shown(url: str) -> str:
    """Return a URL that may be printed: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.rpartition("@")[2]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _retry_after_s(text: str) -> float:
    """Return the seconds of a ``Retry-After`` header (RFC 9110 §10.2.3: a number or a date), 0 without one."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _reason_of(error: BaseException) -> str:
    """Return what an error says in one line."""
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        error = error.os_error
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        return os.strerror(error.errno)  # asyncio's own text repeats the address
    return " ".join(str(error).split()) or type(error).__name__
