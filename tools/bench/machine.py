"""What the kernel knows: this machine, its cores, the CPU time and memory of processes. Linux only."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "allowed_cores", "busy_s", "cpu_s", "describe", "family", "memory_kib", "on_cores", "raise_file_limit",
    "resident_kib", "wanted_s",
]  # fmt: skip

_PACKAGES = ("quotepush", "aiohttp", "uvloop", "redis", "hiredis", "orjson", "msgspec", "websockets")
_CHECKOUT = Path(__file__).resolve().parent.parent.parent


def family(pid: int) -> list[int]:
    """Return a process and everything below it that lives."""
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += family(int(child))
    except OSError:
        pass
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU time of one process, all its threads; 0.0 when it is gone."""
    total = 0.0
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            # Nanoseconds on a core; stat counts in hundredths of a second.
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        pass
    return total


def wanted_s(pid: int) -> float:
    """Return for how long the threads of one process ran or waited for a core, in seconds; 0.0 when it is gone."""
    total = 0.0
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            ran, waited, _ = Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()
            total += (int(ran) + int(waited)) / 1e9
    return total


def memory_kib(pid: int) -> float:
    """Return the proportional set size of a process and everything below it."""
    total = 0.0
    for one in family(pid):
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += float(text.split("\nPss:")[1].split()[0])
    return total


def resident_kib(pid: int) -> float:
    """Return the resident set of a process and everything below it: counts shared pages often, costs nothing to ask.

    Looking at the proportional set walks all pages and stops the process for milliseconds.
    """
    pages = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def busy_s() -> float:
    """Return the CPU time of everything on this machine, and what its host took from it."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def allowed_cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def on_cores(cores: list[int] | None) -> Iterator[None]:
    """Processes started in this context may use only ``cores``; None: all that we may."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_file_limit() -> int:
    """Raise the limit of open files as far as allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def describe() -> dict[str, str]:
    """Return what a reader of the figures has to know of this machine and what is installed on it."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(allowed_cores())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {cores} {'core' if cores == 1 else 'cores'}, {memory_gib:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "commit": _commit(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "load_average": " ".join(f"{one:.2f}" for one in os.getloadavg()),
    }


def _processor() -> str:
    name, is_virtual = platform.machine(), False
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            is_virtual |= key.strip() == "flags" and " hypervisor" in value
    return f"{name}{' (virtual)' if is_virtual else ''}"


def _commit() -> str:
    """Return the commit of this checkout, marked when the package was changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(_CHECKOUT), *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--", "quotepush")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (commit or "unknown") + (" and uncommitted changes" if changed else "")


if sys.platform != "linux":
    raise SystemExit("bench: needs Linux: it reads /proc and uses epoll")
