"""One main per lock file.

The lock is a ``flock`` on a file that is never unlinked: unlinking would let two mains lock
two files of one name. Its descriptor is close-on-exec, so no worker holds the lock after main
has died. The file says who holds it: pid, then the address of the private listener.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass

from quotepush.errors import AlreadyRunning, LockError

__all__ = ["Holder", "Lock", "hold", "read_holder"]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock: ``pid``, 0 if unknown; ``admin``, ``host:port`` or empty."""

    pid: int
    admin: str


class Lock:
    """A lock that is held."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self.path = path

    def write(self, admin: str) -> None:
        """Say in the file who we are and where our private listener is."""
        text = f"{os.getpid()}\n{admin}\n".encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))


@contextlib.contextmanager
def hold(path: str) -> Iterator[Lock]:
    """Hold the lock of ``path``.

    Raises:
        AlreadyRunning: somebody else does.
        LockError: the file cannot be created or opened.
    """
    try:
        # O_NOFOLLOW: in a shared /tmp somebody else's link must not decide what we write to.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as e:
        raise LockError(path, e.strerror or str(e)) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(path, read_holder(path).pid) from None
        except OSError as e:
            raise LockError(path, e.strerror or str(e)) from None
        lock = Lock(descriptor, path)
        lock.write("")
        try:
            yield lock
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def read_holder(path: str) -> Holder:
    """Return what the lock file says; zero and empty where it says nothing."""
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            lines = f.read(512).splitlines()
    except OSError:
        lines = []
    pid = lines[0] if lines else ""
    return Holder(int(pid) if pid.isdigit() else 0, lines[1] if len(lines) > 1 else "")
