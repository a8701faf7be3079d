"""What quotepush counts itself: the figures of its private listener."""

import asyncio
from collections import defaultdict

__all__ = ["ask_server", "parse"]

_TIMEOUT_S = 10.0
_PREFIX = "quotepush_"


def parse(text: str) -> dict[str, float]:
    """Return the figures of a ``/metrics`` page, without prefix; those with labels summed up."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line.startswith(_PREFIX):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0].removeprefix(_PREFIX)] += float(value)
    return dict(found)


async def ask_server(address: str) -> dict[str, float]:
    """Return the figures of the private listener at ``http://HOST:PORT``.

    Raises:
        OSError, EOFError: it does not answer, or not in ten seconds.
    """
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(b"GET /metrics HTTP/1.0\r\nHost: bench\r\n\r\n")
            head, _, page = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
    if not head.startswith(b"HTTP/1.") or b" 200 " not in head.split(b"\r\n")[0]:
        raise EOFError(f"the private listener says {head[:80]!r}")
    return parse(page.decode())
