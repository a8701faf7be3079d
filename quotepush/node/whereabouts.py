"""Where this process runs, and whether another one that ran here still does.

A place is a host since its last boot and, on Linux, a namespace of pids: in two containers on one host a pid names two
processes. Law: who may be alive is not called dead.
"""

import os
import socket
from pathlib import Path

__all__ = ["birth_of", "here", "is_running"]


def here() -> str:
    """Return the name of this place: ``<host>/<what tells it from others>``."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return f"{socket.gethostname()}/{boot}/{space}"


def birth_of(pid: int) -> str:
    """Return what tells a process from another one that had its pid before; empty where the system does not say."""
    try:
        # Field 22 (proc(5)): ticks since boot; the second one is the name, which may have spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_running(pid: int, birth: str) -> bool:
    """Say whether the process that had ``birth`` of :func:`birth_of` may still run here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    found = birth_of(pid)
    if _is_zombie(pid):
        return False
    return not (birth and found) or found == birth


def _is_zombie(pid: int) -> bool:
    """It has ended, and its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
