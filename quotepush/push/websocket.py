"""One client's WebSocket: aiohttp shakes hands, then the socket is ours.

After the upgrade the transport is handed to a :class:`WebSocketLink`, which reads with
aiohttp's own frame reader. ``test_websocket.py`` keeps watch over the hand-over.

Law: nothing is written after the close frame.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp._websocket.reader import WebSocketDataQueue  # the reader accepts no other queue (aiohttp 3.14)
from aiohttp.http import WebSocketError, WebSocketReader, WSCloseCode

from quotepush.push.link import Detached, Floor, SocketLink, kernel_bytes, take_over
from quotepush.wire.frames import accept_key, close_frame, ping_frame, pong_frame
from quotepush.wire.messages import CLOSE_CODES

__all__ = ["WebSocketLink", "upgrade"]

log = logging.getLogger("quotepush.session")

# With so much unsent output nothing more is read: answers to requests stay bounded.
_MAX_UNSENT_BYTES = 262_144

_WORDS = {code: word for word, code in CLOSE_CODES.items()}


class _Inbound(WebSocketDataQueue):
    """Hands what the reader has read to the link at once, instead of keeping it."""

    link: "WebSocketLink"

    def feed_data(self, data: Any, size: int = 0) -> None:
        self.link._received(data)

    def set_exception(self, exc: BaseException, exc_cause: BaseException = ...) -> None:  # type: ignore[assignment]
        self.link._broken(exc)


class WebSocketLink(SocketLink):
    """The WebSocket of one session."""

    __slots__ = ("_inbound", "_is_held", "_is_paused", "_reader", "heard_s", "pinged_s")

    def __init__(self, floor: Floor, peer: str) -> None:
        super().__init__(floor, peer)
        self.heard_s = 0.0  # loop time of the last bytes from the client
        self.pinged_s = 0.0  # loop time of a ping that nothing has answered yet; 0: none
        self._reader: WebSocketReader | None = None
        self._inbound: _Inbound | None = None
        self._is_held = False  # the session waits for main
        self._is_paused = False

    def read_with(self, loop: asyncio.AbstractEventLoop, max_message_bytes: int) -> None:
        """Begin to understand what comes."""
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

    def resume_writing(self) -> None:
        if self._is_paused:
            self.session.outbox.is_blocked = False
            self._brake()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reader = self._inbound = None
        super().connection_lost(exc)

    # To the socket

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
            unsent += kernel_bytes(self._transport)  # a slow peer may take long until the kernel wants more of us
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
    tail = _Tail()
    transport = take_over(request, link, tail)
    link.attach(transport)
    link.read_with(asyncio.get_running_loop(), max_message_bytes)
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
