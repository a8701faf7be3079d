"""One client's WebSocket: aiohttp shakes hands, then the socket is ours.

aiohttp keeps a task, a request and a response alive for as long as a WebSocket is open
(about 13 KiB) and awaits each send. After the upgrade nobody needs any of it, so the
transport is handed to a :class:`WebSocketLink`, which reads with aiohttp's own frame
reader and writes ready bytes. ``test_websocket.py`` keeps watch over the hand-over.

Law: nothing is written after the close frame. Rows go straight from the outbox to the
transport; closing the session, which comes with every close frame, cuts that way off.
"""

import asyncio
import fcntl
import logging
import struct
import termios
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import WSMsgType, web
from aiohttp._websocket.reader import WebSocketDataQueue  # the reader accepts no other queue (aiohttp 3.14)
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import WebSocketError, WebSocketReader, WSCloseCode

from quotepush.push.outbox import Outbox
from quotepush.push.session import Session
from quotepush.wire.frames import accept_key, close_frame, ping_frame, pong_frame
from quotepush.wire.messages import CLOSE_CODES

__all__ = ["Detached", "Floor", "WebSocketLink", "upgrade"]

log = logging.getLogger("quotepush.session")

# A peer that does not answer our close frame is cut off after so long.
_CLOSE_TIMEOUT_S = 5.0
# With so much unsent output nothing more is read: answers to requests stay bounded.
_MAX_UNSENT_BYTES = 262_144

_INT = struct.Struct("i")
_WORDS = {code: word for word, code in CLOSE_CODES.items()}


class Floor(Protocol):
    """What a worker does for its links."""

    def opened(self, link: "WebSocketLink") -> None:
        """A link is ready."""

    def unblocked(self, outbox: Outbox) -> None:
        """Its socket has taken everything."""

    def closed(self, link: "WebSocketLink") -> None:
        """It is gone; called exactly once."""


class _Inbound(WebSocketDataQueue):
    """Hands what the reader has read to the link at once, instead of keeping it."""

    link: "WebSocketLink"

    def feed_data(self, data: Any, size: int = 0) -> None:
        self.link._received(data)

    def set_exception(self, exc: BaseException, exc_cause: BaseException = ...) -> None:  # type: ignore[assignment]
        self.link._broken(exc)


class WebSocketLink(asyncio.Protocol):
    """The socket of one session.

    Attributes:
        session: whose it is.
        peer: address of the client, for the log.
        closed_by: ``client``, ``server`` or ``network``, once it is closing.
        reason: one word, once it is closing.
    """

    __slots__ = (
        "_floor", "_inbound", "_is_held", "_is_paused", "_is_sealed", "_progress_bytes", "_progress_s", "_reader",
        "_timer", "_transport", "closed_by", "heard_s", "peer", "pinged_s", "reason", "session",
    )  # fmt: skip

    def __init__(self, floor: Floor, peer: str) -> None:
        self._floor = floor
        self.peer = peer
        self.session: Session = None  # type: ignore[assignment]  # set by the worker before the first byte
        self.closed_by = ""
        self.reason = ""
        self.heard_s = 0.0  # loop time of the last bytes from the client
        self.pinged_s = 0.0  # loop time of a ping that nothing has answered yet; 0: none
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._reader: WebSocketReader | None = None
        self._inbound: _Inbound | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_held = False  # the session waits for main
        self._is_paused = False
        self._is_sealed = False  # the close frame is out
        self._progress_s = 0.0  # loop time since when the socket has taken nothing; 0: it has nothing to take
        self._progress_bytes = 0

    def attach(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, max_message_bytes: int) -> None:
        """Take over a transport whose handshake is done."""
        self._transport = transport
        self.session.outbox.write = transport.write
        # pause_writing shall say that a write was not taken whole, resume_writing that all of it is. A TCP transport
        # pauses above its limit, a TLS one (uvloop 0.21, as asyncio's) already at it: with 0 it would at every write.
        transport.set_write_buffer_limits(high=1 if transport.get_extra_info("sslcontext") else 0, low=0)
        self._inbound = _Inbound(_NO_PROTOCOL, 0, loop=loop)
        self._inbound.link = self
        # The reader refuses a message of its limit or more.
        self._reader = WebSocketReader(self._inbound, max_message_bytes + 1, compress=False, decode_text=True)
        self.heard_s = loop.time()

    # From the socket

    def data_received(self, data: bytes) -> None:
        self.heard_s = asyncio.get_running_loop().time()
        self.pinged_s = 0.0
        if self._reader is not None:
            self._reader.feed_data(data)
            self._brake()

    def _received(self, message: Any) -> None:
        kind = message.type
        if self._is_sealed:
            if kind is WSMsgType.CLOSE:
                self._transport.close()
            return
        if kind is (WSMsgType.BINARY if self.session.codec.is_binary else WSMsgType.TEXT):
            try:
                self.session.receive(message.data)
            except Exception:
                # A bug in one session is that session's end and nobody else's.
                log.exception("%s: a message could not be handled", self.session.fd)
                self.close(CLOSE_CODES["internal"], "internal")
        elif kind is WSMsgType.PING:
            self.write(pong_frame(bytes(message.data)))
        elif kind is WSMsgType.CLOSE:
            self._is_closing("client", "closed")
            self.write(close_frame(message.data) if message.data else close_frame(1000))
            self._is_sealed = True
            self.session.close()
            self._transport.close()
            self._abort_later()  # closing waits for what this peer has not read, and perhaps never will
        elif kind in (WSMsgType.BINARY, WSMsgType.TEXT):
            self.close(CLOSE_CODES["wrong_frame_kind"], "wrong_frame_kind")

    def _broken(self, error: BaseException) -> None:
        code = int(error.code) if isinstance(error, WebSocketError) else int(WSCloseCode.PROTOCOL_ERROR)
        self.close(code, _WORDS.get(code, "protocol_error"))
        # The reader reads no further, not even the answer to our close: the end of the stream must do
        # (RFC 6455 §7.1.7).
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def pause_writing(self) -> None:
        self.session.outbox.is_blocked = True

    def resume_writing(self) -> None:
        self._progress_s = 0.0
        self.session.outbox.is_blocked = False
        if self._is_paused:
            self._brake()
        if not self._is_sealed:
            self._floor.unblocked(self.session.outbox)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing("network" if exc else "client", type(exc).__name__ if exc else "lost")
        self._is_sealed = True
        if self._timer is not None:
            self._timer.cancel()
        self._reader = self._inbound = None
        self._floor.closed(self)

    # To the socket

    def write(self, data: bytes) -> None:
        if not self._is_sealed:
            self._transport.write(data)

    def close(self, code: int, reason: str) -> None:
        if self._is_sealed:
            return
        self._is_closing("server", reason)
        self.write(close_frame(code, reason))
        self._is_sealed = True
        self.session.close()
        if self._is_paused:
            self._transport.resume_reading()  # for the peer's close frame
        self._abort_later()

    def abort(self, reason: str) -> None:
        """Cut the connection: closing would first try to flush the very bytes that this peer does not read."""
        self._is_closing("server", reason)
        self._is_sealed = True
        self.session.close()
        self._transport.abort()

    def _abort_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_CLOSE_TIMEOUT_S, self._transport.abort)

    def hold_requests(self, hold: bool) -> None:
        self._is_held = hold
        self._brake()

    def _brake(self) -> None:
        """Read from the client only while it takes what it is sent."""
        if self._transport.is_closing() or self._is_sealed:
            return
        pause = self._is_held or self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES
        if pause is not self._is_paused:
            self._is_paused = pause
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    def _is_closing(self, by: str, reason: str) -> None:
        if not self.closed_by:
            self.closed_by = by
            self.reason = reason

    # Now and then, from the worker's wheel

    def check(self, now_s: float, stall_timeout_s: float, ping_interval_s: float, ping_timeout_s: float) -> bytes:
        """Look after the peer; return the ping that is due, or nothing.

        Aborts a socket that has taken nothing for ``stall_timeout_s``, and a peer that has said
        nothing for ``ping_timeout_s`` after a ping, unless our own output is what hinders it.
        """
        if self._is_sealed:
            return b""
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            unsent += _kernel_bytes(self._transport)  # a slow peer may take long until the kernel wants more of us
            if not self._progress_s or unsent < self._progress_bytes:
                self._progress_s = now_s
            elif now_s - self._progress_s >= stall_timeout_s:
                self.abort("stalled")
                return b""
            self._progress_bytes = unsent
            if self.pinged_s:
                self.pinged_s = now_s  # the ping may stand behind what the peer has not read
            return b""
        if self.pinged_s:
            if now_s - self.pinged_s >= ping_timeout_s:
                self.abort("no_pong")
            return b""
        if now_s - self.heard_s >= ping_interval_s:
            self.pinged_s = now_s
            return ping_frame()
        return b""


def _kernel_bytes(transport: asyncio.Transport) -> int:
    """Return what the kernel holds of a connection's output that the peer has not acknowledged; 0 where unknown."""
    try:
        descriptor = transport.get_extra_info("socket").fileno()
        held: int = _INT.unpack(fcntl.ioctl(descriptor, termios.TIOCOUTQ, _INT.pack(0)))[0]  # tcp(7), SIOCOUTQ
    except (OSError, ValueError):
        return 0
    return held


class _NoProtocol:
    """Stands where the queue expects the protocol that it would pause; ours never fills."""

    _reading_paused = False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


_NO_PROTOCOL: Any = _NoProtocol()


class _Tail:
    """Catches what a client sent right behind its handshake."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None: ...


class Detached(web.StreamResponse):
    """What aiohttp gets as a response when the socket is no longer its own: nothing to send, nothing to close."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: Any = b"") -> None:
        return None


def upgrade(
    request: web.Request,
    link: WebSocketLink,
    subprotocol: str | None,
    max_message_bytes: int,
    start: Callable[[], None],
) -> Detached:
    """Answer 101 and hand the transport of ``request`` to ``link``.

    Args:
        start: called when the link can be written to, before any byte of the client is looked at.

    Raises:
        ConnectionResetError: the client has gone meanwhile.
    """
    transport = request.transport  # uvloop's: it only looks like an asyncio.Transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("client went away during the handshake")
    handler = request.protocol
    tail = _Tail()
    handler.set_parser(tail)  # type: ignore[arg-type]  # hands over what came behind the handshake
    transport.set_protocol(link)
    handler.transport = None
    handler.connection_lost(None)  # aiohttp forgets the connection: its timers, its task, its place in the server
    link.attach(transport, asyncio.get_running_loop(), max_message_bytes)
    head = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(request.headers['Sec-WebSocket-Key'])}\r\n"
        + (f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else "")
        + "\r\n"
    )
    transport.write(head.encode())
    start()
    if tail.data:
        link.data_received(tail.data)
    return Detached()
