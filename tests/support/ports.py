"""Ports for the servers of one test process, which no other process takes meanwhile.

A port that the kernel has just called free can be anybody's a moment later: another test process's, or that of a
connection that goes out. So ports are taken from below the range of outgoing connections, in blocks; a block belongs
to the process that holds its lock file, which ends with the process. A restarted server finds its port free again.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

__all__ = ["own_port"]

# A browser connects to no 10080; a cluster node of Redis listens on port + 10,000 too.
_FIRST, _LAST = 11_000, 19_999
_BLOCK = 200

_holder = -1
_holder_pid = 0
_ports: list[int] = []


def own_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on; the same one again only after some hundred others."""
    global _holder, _holder_pid, _ports
    if _holder < 0 or _holder_pid != os.getpid():
        _holder, _ports = _take_block()
        _holder_pid = os.getpid()
    for _ in range(_BLOCK):
        port = _ports.pop(0)
        _ports.append(port)
        if all(map(_is_free, (port, port + 10_000))):
            return port
    raise AssertionError("every port of our block is taken")


def _take_block() -> tuple[int, list[int]]:
    blocks = list(range(_FIRST, _LAST + 1, _BLOCK))
    random.SystemRandom().shuffle(blocks)
    for first in blocks:
        holder = os.open(Path(tempfile.gettempdir()) / f"quotepush-tests-ports-{first}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(holder)
        else:
            return holder, list(range(first, first + _BLOCK))
    raise AssertionError("other test processes hold all blocks of ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
