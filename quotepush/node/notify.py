"""What systemd is told (sd_notify(3)): ready, stopping, status, and the watchdog's sign of life."""

import os
import socket

__all__ = ["notify", "watchdog_interval_s"]


def notify(**facts: str) -> bool:
    """Send e.g. ``READY="1"``, ``STATUS="..."``; return False when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    text = "\n".join(f"{name}={value}" for name, value in facts.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.sendto(text.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """Return how often systemd wants a sign of life: half of its limit; None: not at all."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2_000_000
