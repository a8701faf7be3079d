"""One client's stream of Server-Sent Events: a session whose client has said all that it wants in its request.

Law: whatever rows a client has got, its last event id is either the position behind exactly these rows, or empty. So a
stream that goes on from it repeats no row, and leaves none out that main still has.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from quotepush.push.hub import Hub
from quotepush.push.link import Detached, Floor, SocketLink, kernel_bytes, take_over
from quotepush.wire.events import position, stamped
from quotepush.wire.messages import Request

__all__ = ["MAX_STREAM_CODES", "Asked", "StreamLink", "begin_stream"]

# More do not fit in the address of a request anyway.
MAX_STREAM_CODES = 300
# How soon a browser comes back to a stream that was cut: between these, by chance.
_RETRY_MS = (500, 4000)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the client of a stream wants.

    Attributes:
        request: as a message would have said it.
        selection: what its positions hold for; empty: it gets none, for it could not go on from them.
    """

    request: Request
    selection: str


class StreamLink(SocketLink):
    """The socket of one stream. What the client sends is of no interest, only that it is there."""

    __slots__ = ("_hub", "_is_exact", "_life", "_selection", "_taken_bytes", "_written_bytes")

    def __init__(self, floor: Floor, peer: str, hub: Hub, life: str, selection: str) -> None:
        super().__init__(floor, peer)
        self._hub = hub
        self._life = life
        self._selection = selection
        self._is_exact = True  # the client knows a position, or has nothing yet
        self._written_bytes = 0
        self._taken_bytes = 0

    def attach(self, transport: asyncio.Transport) -> None:
        super().attach(transport)
        self.session.outbox.write = self._write_rows

    # From the socket

    def data_received(self, data: bytes) -> None: ...

    # To the socket

    def write(self, data: bytes) -> None:
        self._written_bytes += len(data)
        super().write(data)

    def _write_rows(self, events: bytes) -> None:
        self.write(stamped(events, self._place()) if self._selection else events)

    def _place(self) -> str:
        """Return the position behind the rows that are being written; empty: there is none."""
        outbox = self.session.outbox
        replayed, outbox.replayed = outbox.replayed, 0
        if self.session.entitlement.max_rate is not None:
            ordinal = 0  # a newer row than those sent may be held back
        elif not outbox.pending:
            ordinal = self._hub.ordinal
        else:
            ordinal = replayed if self._is_exact else 0
        self._is_exact = bool(ordinal)
        return position(self._life, ordinal, self._selection) if ordinal else ""

    def close(self, code: int, reason: str) -> None:
        """End the stream behind what has been written; there is no frame for the code."""
        if self._is_sealed:
            return
        self._is_closing("server", reason)
        self._is_sealed = True
        self.session.close()
        self._transport.close()
        self._abort_later()

    # Now and then, from the worker's wheel

    def check(self, now_s: float, stall_timeout_s: float, ping_interval_s: float, ping_timeout_s: float) -> bytes:
        """Abort a socket that has taken nothing for ``stall_timeout_s``, or whose peer is gone.

        No ping is needed: a peer that is gone does not acknowledge the heartbeats.
        """
        if self._is_sealed:
            return b""
        unsent = self._transport.get_write_buffer_size() + kernel_bytes(self._transport)
        taken = self._written_bytes - unsent
        if not unsent:
            self._progress_s = 0.0
        elif not self._progress_s or taken > self._taken_bytes:
            self._progress_s = now_s
        elif now_s - self._progress_s >= stall_timeout_s:
            self.abort("stalled")
        self._taken_bytes = taken
        return b""


def begin_stream(
    request: web.Request, link: StreamLink, headers: Mapping[str, str], start: Callable[[], None]
) -> Detached:
    """Answer 200 and hand the transport of ``request`` to ``link``; its end is the end of the response.

    Args:
        headers: besides those that every stream has.
        start: called when the link can be written to.

    Raises:
        ConnectionResetError: the client has gone meanwhile.
    """
    transport = take_over(request, link)
    link.attach(transport)
    said = {"Content-Type": "text/event-stream; charset=utf-8", "Connection": "close", **headers}
    # No Transfer-Encoding: a chunk around each event would cost every write, and HTTP/1.0 has none (RFC 9112 §6.3).
    head = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    # A browser comes back after this time to the millisecond, so each stream of a server that dies has another one.
    retry_ms = random.randrange(*_RETRY_MS)
    link.write(f"HTTP/1.1 200 OK\r\n{head}\r\nretry: {retry_ms}\n\n".encode("latin-1"))
    start()
    return Detached()
