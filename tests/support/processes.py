"""The processes of a server, looked at from outside."""

from pathlib import Path

from tests.support.server import QuotepushServer

__all__ = ["command_line", "is_alive", "proportional_bytes", "resident_bytes", "worker_pid"]


def command_line(pid: int) -> str:
    """What ``ps`` shows of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resident_bytes(pid: int) -> int:
    """The memory that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def proportional_bytes(server: QuotepushServer) -> int:
    """The memory of all its processes, what they share counted once (PSS)."""
    total = 0
    for pid in [server.pid, *server.worker_pids()]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def worker_pid(server: QuotepushServer, worker: str) -> int:
    """The pid of a worker by its number."""
    (pid,) = (pid for pid in server.worker_pids() if command_line(pid).endswith(f": worker {worker}"))
    return pid
