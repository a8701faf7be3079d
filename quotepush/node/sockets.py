"""Listening sockets: opened once by main, inherited by the workers."""

import os
import socket

__all__ = ["inherited_sockets", "open_sockets"]

# What the kernel may hold of one client's unsent bytes (tcp(7)); accepted sockets inherit it. Beyond that a
# write is not taken, and rows wait where a newer one can still replace them.
_NOTSENT_BYTES = 65_536


def open_sockets(host: str, port: int, count: int, backlog: int) -> list[socket.socket]:
    """Return ``count`` listening sockets on one address, shared by SO_REUSEPORT; port 0 takes a free one.

    Raises:
        OSError: somebody listens there already, or the address is not ours.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, socket.SOCK_STREAM) as test:
        # SO_REUSEPORT would let us share the port with a stranger of the same user; without it the kernel says no.
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        test.bind(address)
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            s = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(s)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOTSENT_BYTES)
            s.bind(address)
            address = (address[0], s.getsockname()[1], *address[2:])
            s.listen(backlog)
            s.setblocking(False)
    except OSError:
        for s in sockets:
            s.close()
        raise
    return sockets


def inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd passed to this process (sd_listen_fds(3)); often none."""
    count = os.environ.pop("LISTEN_FDS", "")
    pid = os.environ.pop("LISTEN_PID", "")
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=3 + i) for i in range(int(count))]
    for s in sockets:
        s.setblocking(False)
        s.set_inheritable(False)
    return sockets
