"""The door of a worker: takes new connections from its listening sockets.

Law: a storm of connections never holds the loop. In one turn at most :data:`TAKEN_PER_TURN`
connections are taken, whatever waits at the door; the others stay in the kernel's queue, and rows
are pushed in between. Nothing that goes wrong with one connection, or with taking it, ends the taking.
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
import ssl
from collections.abc import Callable

__all__ = ["TAKEN_PER_TURN", "Acceptor"]

log = logging.getLogger("quotepush.worker")

# A handshake with hello and a subscribe takes about 0.2 ms, in TLS some more: one to two milliseconds a turn, no more
# than a slice of a flush.
TAKEN_PER_TURN = 8
_TAKEN_PER_TURN_TLS = 2

# Until the kernel shows a connection that says nothing; whoever speaks is shown as soon as it has spoken (tcp(7)).
_SILENT_S = 1
_REST_S = 1.0
_TLS_TIMEOUT_S = 60.0
_COMPLAINT_S = 60.0

# The connection that was to be taken has failed, and only that one (accept(2)). Not every system knows every word.
_LOST = frozenset(
    getattr(errno, word, errno.ECONNABORTED)
    for word in (
        "ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENONET", "ENOPROTOOPT",
        "EOPNOTSUPP", "EPERM", "EPROTO", "ETIMEDOUT",
    )
)  # fmt: skip


class Acceptor:
    """Takes connections and gives each a protocol.

    Args:
        make_protocol: called once for each connection.
        tls: context of the handshake that comes first, or None.
        tls_timeout_s: a peer that has not finished that handshake is cut off.
        rest_s: how long nothing is taken when the process can hold no more.
    """

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        *,
        tls: ssl.SSLContext | None = None,
        tls_timeout_s: float = _TLS_TIMEOUT_S,
        rest_s: float = _REST_S,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._tls = tls
        self._tls_timeout_s = None if tls is None else tls_timeout_s
        self._rest_s = rest_s
        self._sockets: dict[int, socket.socket] = {}
        self._arriving: set[asyncio.Task[None]] = set()
        self._resting: asyncio.TimerHandle | None = None
        self._complained_s = float("-inf")

    def open(self, descriptor: int, backlog: int) -> None:
        """Take the connections that come to a listening socket.

        Works on a duplicate: the socket stays open for its owner when it is closed here.
        """
        listening = socket.socket(fileno=os.dup(descriptor))
        listening.setblocking(False)
        listening.listen(backlog)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for all that are taken from it
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            # Else a storm is taken while it is silent, and then all of it speaks in one turn.
            with contextlib.suppress(OSError):  # no TCP, or a kernel that does without
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _SILENT_S)
        self._sockets[descriptor] = listening
        if self._resting is None:
            self._loop.add_reader(listening, self._take, listening)

    def close(self, descriptor: int) -> None:
        """Take nothing more there; what waits in the kernel's queue stays for somebody else."""
        listening = self._sockets.pop(descriptor)
        self._loop.remove_reader(listening)
        listening.close()

    @property
    def is_resting(self) -> bool:
        """Whether nothing is taken at the moment, because the process can hold no more."""
        return self._resting is not None

    def __contains__(self, descriptor: int) -> bool:
        return descriptor in self._sockets

    async def stop(self) -> None:
        """Take nothing more anywhere, and cut off who has not been handed to its protocol yet."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        for descriptor in list(self._sockets):
            self.close(descriptor)
        for task in self._arriving:
            task.cancel()
        await asyncio.gather(*self._arriving, return_exceptions=True)

    def _take(self, listening: socket.socket) -> None:
        """Take the share of a turn from a socket at which somebody waits."""
        most = TAKEN_PER_TURN if self._tls is None else _TAKEN_PER_TURN_TLS
        for _ in range(max(1, most // len(self._sockets))):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError):
                return  # nobody is left, or a sibling that shares the socket was faster
            except OSError as e:
                if e.errno not in _LOST:
                    self._rest(e)
                    return
            else:
                task = self._loop.create_task(self._welcome(connection))
                self._arriving.add(task)
                task.add_done_callback(functools.partial(self._arrived, connection))

    async def _welcome(self, connection: socket.socket) -> None:
        await self._loop.connect_accepted_socket(
            self._make_protocol, connection, ssl=self._tls, ssl_handshake_timeout=self._tls_timeout_s
        )

    def _arrived(self, connection: socket.socket, task: "asyncio.Task[None]") -> None:
        self._arriving.discard(task)
        fault = None if task.cancelled() else task.exception()
        if task.cancelled() or fault is not None:
            connection.close()  # when it ended early, nobody else does
        if isinstance(fault, OSError):
            log.debug("a connection was lost before it could say anything: %r", fault)
        elif fault is not None:
            # A bug met with one connection is that connection's end and nobody else's.
            log.error("a connection could not be handed to its protocol", exc_info=fault)

    def _rest(self, why: OSError) -> None:
        """Take nothing for a moment: out of files or memory, each attempt would fail, and the socket stay ready."""
        if self._resting is not None:
            return
        for listening in self._sockets.values():
            self._loop.remove_reader(listening)
        self._resting = self._loop.call_later(self._rest_s, self._go_on)
        now_s = self._loop.time()
        if now_s - self._complained_s >= _COMPLAINT_S:
            self._complained_s = now_s
            log.error("no new connection can be taken, trying again every %g s: %s", self._rest_s, why)

    def _go_on(self) -> None:
        self._resting = None
        for listening in self._sockets.values():
            self._loop.add_reader(listening, self._take, listening)
