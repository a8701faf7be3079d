#!/usr/bin/env python3
"""What messages of backends cost: the table of docs/performance.md.

    python tools/bench/backend.py [USERS [CALLS [NODES]]]

A private Redis, a server with one worker (or several of them, each a node), and USERS clients in processes of their
own, each bound to a user. Measured are the time of a ``send_to_user`` until its answer, one after the other and fifty
at a time; the time from the call of ``send_to_all`` until the last client has the message; what Redis holds for it all;
and, with several nodes, how long the state of one that is killed stays.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from redis.asyncio import Redis

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.children import BenchError, Child, Server, ServerEnded, running_child, running_server
from bench.measure import quotepush
from quotepush import Backend
from quotepush.private_redis import private_redis

USERS, CALLS = 10_000, 2_000
AT_ONCE = 50
ROUNDS = 5
DATA = {"title": "Order filled", "order": 4711, "price": 1688.2}
PATIENCE_S = 120.0


async def timed(calls: Iterable[Callable[[], Awaitable[object]]], at_once: int) -> tuple[list[float], float]:
    """Make the calls, so many at a time; return how long each took, in milliseconds, and all of them, in seconds."""
    took: list[float] = []
    rest = iter(calls)

    async def make() -> None:
        for call in rest:
            begin_s = time.perf_counter()
            await call()
            took.append((time.perf_counter() - begin_s) * 1000)

    begin_s = time.perf_counter()
    await asyncio.gather(*(make() for _ in range(at_once)))
    return took, time.perf_counter() - begin_s


def nearest(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def used_mib(redis: Redis) -> float:
    """The memory of Redis, when it stands still."""
    before = -1.0
    while True:
        now = int((await redis.info("memory"))["used_memory"]) / (1 << 20)
        if abs(now - before) < 0.05:
            return now
        before = now
        await asyncio.sleep(1)


async def send_to_users(backend: Backend, users: list[str], calls: int, at_once: int) -> str:
    some = [users[n * 7919 % len(users)] for n in range(calls)]
    delivered = 0

    async def send(user: str) -> None:
        nonlocal delivered
        sent = await backend.send_to_user(user, DATA)
        delivered += sent.delivered

    took, all_s = await timed(((lambda user=user: send(user)) for user in some), at_once)
    assert delivered == calls, f"{delivered} of {calls} were delivered"
    what = "one after the other" if at_once == 1 else f"{at_once} at a time"
    p50, p99 = nearest(took, 0.5), nearest(took, 0.99)
    return f"| `send_to_user`, {what} | {p50:.2f} | {p99:.2f} | {calls / all_s:,.0f} calls/s |"


async def send_to_all(backend: Backend, audiences: Sequence[Child], users: int) -> str:
    until_last, until_answer = [], []
    for _ in range(ROUNDS):
        for audience in audiences:
            audience.tell(f"expect {users // len(audiences)}")
        for audience in audiences:
            await audience.expect("expecting", PATIENCE_S)
        begin_s = time.monotonic()
        sent = await backend.send_to_all(DATA)
        until_answer.append((time.monotonic() - begin_s) * 1000)
        reached_s = [(await audience.expect("reached", PATIENCE_S))["at_s"] for audience in audiences]
        assert sent.delivered == users, sent
        until_last.append((max(reached_s) - begin_s) * 1000)
    return (
        f"| `send_to_all` until the last client has it | {median(until_last):.0f} | "
        f"{max(until_last):.0f} (slowest of {ROUNDS}) | "
        f"answer after {median(until_answer):.0f} ms |"
    )


async def until_cleared(redis: Redis, pid: int, node: str, left: int) -> str:
    """Kill a node; say how long it takes until nothing of it is in the registry."""
    os.kill(pid, signal.SIGKILL)
    begin_s = time.monotonic()
    while await redis.exists(f"qp:node:{node}") or await redis.scard("qp:members") > left:
        if time.monotonic() - begin_s > PATIENCE_S:
            raise BenchError("the state of a dead node is not cleared")
        await asyncio.sleep(0.05)
    return (
        f"| until nothing of a killed node is in the registry | {1000 * (time.monotonic() - begin_s):,.0f} | | once |"
    )


async def main(users: int, calls: int, node_count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        redis = await stack.enter_async_context(private_redis())
        client = await stack.enter_async_context(Redis.from_url(redis.url))
        backend = await stack.enter_async_context(Backend(redis.url, timeout_s=PATIENCE_S))
        empty_mib = await used_mib(client)
        of_each = users // node_count
        users = of_each * node_count
        pids, audiences, conns = [], [], []
        for number in range(node_count):
            settings = ["heartbeat_ms=600000", f"node=n{number}"]
            command = [word.replace("{redis}", redis.url) for word in quotepush(1, settings).command]
            server = await stack.enter_async_context(running_node(command))
            pids.append(server.pid)
            job = {"port": server.port, "clients": of_each}
            audiences.append(await stack.enter_async_context(running_child("audience", job)))
            conns += (await audiences[-1].expect("connected", PATIENCE_S))["conns"]
        connected_mib = await used_mib(client)
        names = [f"user-{n:05}" for n in range(users)]
        pairs = list(zip(conns, names, strict=True))
        _, bound_s = await timed(((lambda pair=pair: backend.bind_user(*pair)) for pair in pairs), 200)
        bound_mib = await used_mib(client)
        lines = [
            await send_to_users(backend, names, calls, 1),
            await send_to_users(backend, names, calls * 2, AT_ONCE),
            await send_to_all(backend, audiences, users),
        ]
        if node_count > 1:
            lines.append(await until_cleared(client, pids[-1], f"n{node_count - 1}", users - of_each))
    print("| call | p50 ms | p99 ms | |\n|---|---|---|---|")
    print("\n".join(lines))
    print(
        f"\n{users:,} connections on {node_count} nodes: {max(0.0, connected_mib - empty_mib):.1f} MiB in Redis; with "
        f"a user each {bound_mib - connected_mib:.1f} MiB more, {(bound_mib - empty_mib) * 1024 / users:.2f} KiB per "
        f"user in all; {users / bound_s:,.0f} binds/s, 200 at a time"
    )


@contextlib.asynccontextmanager
async def running_node(command: list[str]) -> AsyncIterator[Server]:
    """Run a server that may be killed."""
    with contextlib.suppress(ServerEnded):
        async with running_server("quotepush", command, {}, None) as server:
            yield server


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:4]]
    asyncio.run(main(*given, *(USERS, CALLS, 1)[len(given) :]))
