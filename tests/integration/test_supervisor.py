"""Slots and their sockets, with real workers."""

import asyncio
import os
import re
import signal
from pathlib import Path

import orjson
from websockets.asyncio.client import connect

from tests.support.processes import command_line
from tests.support.server import QuotepushServer
from tests.support.waiting import wait_until


async def hello_of(server: QuotepushServer) -> str:
    """Connect, and return the fd that the server gave us."""
    async with connect(server.ws_url, compression=None, open_timeout=20) as socket:
        fd: str = orjson.loads(await socket.recv())["conn"]
        return fd


async def kill_worker(server: QuotepushServer, index: str, before: int = 0) -> int:
    """Kill the worker in a slot as soon as it has a name; return its pid."""

    def is_there() -> int:
        named = [p for p in server.worker_pids() if command_line(p).endswith(f": worker {index}") and p != before]
        return named[0] if named else 0

    pid: int = await wait_until(is_there, 20)
    os.kill(pid, signal.SIGKILL)
    return pid


async def hold_worker(server: QuotepushServer, index: str, before: int) -> int:
    """Stop the next worker of a slot before it is ready, so that the slot stays empty; return its pid."""

    def is_there() -> int:
        # Main itself would stand still if it were stopped before it is executed; at first it has its arguments for a
        # name, and imports what it needs.
        new = [
            p for p in server.worker_pids()
            if p != before and re.search(rf" --index={index} |: worker {index}$", command_line(p))
        ]  # fmt: skip
        return new[0] if new else 0

    while True:
        pid: int = await wait_until(is_there, 20)
        os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        if await server.metric("workers_ready") == 1:
            return pid
        os.kill(pid, signal.SIGKILL)  # we came too late
        before = pid


async def test_an_empty_slot_lends_its_socket_to_a_sibling_and_gets_it_back(
    quotepush_server: QuotepushServer,
) -> None:
    pid = 0
    for _ in range(4):  # until main waits 0.8 s before the next one
        pid = await kill_worker(quotepush_server, "0", pid)
    pid = await hold_worker(quotepush_server, "0", pid)

    # The kernel still hands about half of all connections to the socket of slot 0.
    served_by = [fd.split(".")[1] for fd in await asyncio.gather(*(hello_of(quotepush_server) for _ in range(40)))]
    assert set(served_by) == {"1"}
    assert await quotepush_server.metric("workers_ready") == 1

    os.kill(pid, signal.SIGCONT)

    async def is_back() -> bool:
        return await quotepush_server.metric("workers_ready") == 2

    await wait_until(is_back, 30)

    async def is_shared() -> bool:
        return {fd.split(".")[1] for fd in [await hello_of(quotepush_server) for _ in range(20)]} == {"0", "1"}

    await wait_until(is_shared, 20)
