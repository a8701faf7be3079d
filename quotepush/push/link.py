"""The socket of a session, whatever is spoken on it: taken over from aiohttp, written to, looked after, cut off.

aiohttp keeps a task, a request and a response alive for as long as a response goes on (about 13 KiB) and awaits each
send. Nobody needs any of it, so the transport is handed to a :class:`SocketLink`, which writes ready bytes.

Law: nothing is written after the goodbye. Rows go straight from the outbox to the transport; closing the session, which
comes with every goodbye, cuts that way off.
"""

import asyncio
import fcntl
import struct
import termios
from abc import ABC, abstractmethod
from typing import Any, Protocol

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from quotepush.push.outbox import Outbox
from quotepush.push.session import Session

__all__ = ["Detached", "Floor", "SocketLink", "kernel_bytes", "take_over"]

# A peer that does not take, or answer, our goodbye is cut off after so long.
_CLOSE_TIMEOUT_S = 5.0

_INT = struct.Struct("i")


class Floor(Protocol):
    """What a worker does for its links."""

    def opened(self, link: "SocketLink") -> None:
        """A link is ready."""

    def unblocked(self, outbox: Outbox) -> None:
        """Its socket has taken everything."""

    def closed(self, link: "SocketLink") -> None:
        """It is gone; called exactly once."""


class SocketLink(asyncio.Protocol, ABC):
    """The socket of one session; what is spoken on it is for those who inherit from it.

    Attributes:
        session: whose it is.
        peer: address of the client, for the log.
        closed_by: ``client``, ``server`` or ``network``, once it is closing.
        reason: one word, once it is closing.
    """

    __slots__ = (
        "_floor", "_is_sealed", "_progress_bytes", "_progress_s", "_timer", "_transport", "closed_by", "peer", "reason",
        "session",
    )  # fmt: skip

    def __init__(self, floor: Floor, peer: str) -> None:
        self._floor = floor
        self.peer = peer
        self.session: Session = None  # type: ignore[assignment]  # set by the worker before the first byte
        self.closed_by = ""
        self.reason = ""
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._timer: asyncio.TimerHandle | None = None
        self._is_sealed = False  # the goodbye is out
        self._progress_s = 0.0  # loop time since when the socket has taken nothing; 0: it has nothing to take
        self._progress_bytes = 0

    def attach(self, transport: asyncio.Transport) -> None:
        """Take over a transport whose handshake is done."""
        self._transport = transport
        self.session.outbox.write = transport.write
        # pause_writing shall say that a write was not taken whole, resume_writing that all of it is. A TCP transport
        # pauses above its limit, a TLS one (uvloop 0.21, as asyncio's) already at it: with 0 it would at every write.
        transport.set_write_buffer_limits(high=1 if transport.get_extra_info("sslcontext") else 0, low=0)

    # From the socket

    def eof_received(self) -> bool:
        return False  # the transport closes itself

    def pause_writing(self) -> None:
        self.session.outbox.is_blocked = True

    def resume_writing(self) -> None:
        self._progress_s = 0.0
        self.session.outbox.is_blocked = False
        if not self._is_sealed:
            self._floor.unblocked(self.session.outbox)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing("network" if exc else "client", type(exc).__name__ if exc else "lost")
        self._is_sealed = True
        if self._timer is not None:
            self._timer.cancel()
        self._floor.closed(self)

    # To the socket

    @property
    def is_sealed(self) -> bool:
        """Whether nothing is written to it any more."""
        return self._is_sealed

    @property
    def unsent_bytes(self) -> int:
        """What its socket has not taken yet."""
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        if not self._is_sealed:
            self._transport.write(data)

    @abstractmethod
    def close(self, code: int, reason: str) -> None:
        """Say goodbye and close; nothing is written afterwards."""

    def hold_requests(self, hold: bool) -> None:
        """Stop, or go on, reading from the client."""

    @abstractmethod
    def check(self, now_s: float, stall_timeout_s: float, ping_interval_s: float, ping_timeout_s: float) -> bytes:
        """Look after the peer; return what is due to be sent to it, or nothing."""

    def abort(self, reason: str) -> None:
        """Cut the connection: closing would first try to flush the very bytes that this peer does not read."""
        self._is_closing("server", reason)
        self._is_sealed = True
        self.session.close()
        self._transport.abort()

    def _abort_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_CLOSE_TIMEOUT_S, self._transport.abort)

    def _is_closing(self, by: str, reason: str) -> None:
        if not self.closed_by:
            self.closed_by = by
            self.reason = reason


def kernel_bytes(transport: asyncio.Transport) -> int:
    """Return what the kernel holds of a connection's output that the peer has not acknowledged; 0 where unknown."""
    try:
        descriptor = transport.get_extra_info("socket").fileno()
        held: int = _INT.unpack(fcntl.ioctl(descriptor, termios.TIOCOUTQ, _INT.pack(0)))[0]  # tcp(7), SIOCOUTQ
    except (OSError, ValueError):
        return 0
    return held


class Detached(web.StreamResponse):
    """What aiohttp gets as a response when the socket is no longer its own: nothing to send, nothing to close."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: Any = b"") -> None:
        return None


def take_over(request: web.Request, link: SocketLink, parser: Any = None) -> asyncio.Transport:
    """Take the transport of ``request`` from aiohttp for ``link``.

    Args:
        parser: is handed what the client has sent behind its request; None: that is dropped.

    Raises:
        ConnectionResetError: the client has gone meanwhile.
    """
    transport = request.transport  # uvloop's: it only looks like an asyncio.Transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("client went away during the handshake")
    handler = request.protocol
    if parser is not None:
        handler.set_parser(parser)
    transport.set_protocol(link)
    handler.transport = None
    handler.connection_lost(None)  # aiohttp forgets the connection: its timers, its task, its place in the server
    return transport
