#!/usr/bin/env python3
"""What messages of backends cost: the table of docs/performance.md.

    python tools/bench/backend.py [USERS [CALLS]]

A private Redis, a server with one worker, and USERS clients in a process of their own, each bound to a user. Measured
are the time of a ``send_to_user`` until its answer, one after the other and fifty at a time; the time from the call of
``send_to_all`` until the last client has the message; and what Redis holds for it all.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from redis.asyncio import Redis

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.children import Child, running_child, running_server
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


async def send_to_all(backend: Backend, audience: Child, users: int) -> str:
    until_last, until_answer = [], []
    for _ in range(ROUNDS):
        audience.tell(f"expect {users}")
        await audience.expect("expecting", PATIENCE_S)
        begin_s = time.monotonic()
        sent = await backend.send_to_all(DATA)
        until_answer.append((time.monotonic() - begin_s) * 1000)
        reached = await audience.expect("reached", PATIENCE_S)
        assert sent.delivered == users, sent
        until_last.append((reached["at_s"] - begin_s) * 1000)
    return (
        f"| `send_to_all` until the last client has it | {median(until_last):.0f} | "
        f"{max(until_last):.0f} (slowest of {ROUNDS}) | "
        f"answer after {median(until_answer):.0f} ms |"
    )


async def main(users: int, calls: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        redis = await stack.enter_async_context(private_redis())
        command = [word.replace("{redis}", redis.url) for word in quotepush(1, ["heartbeat_ms=600000"]).command]
        server = await stack.enter_async_context(running_server("quotepush", command, {}, None))
        client = await stack.enter_async_context(Redis.from_url(redis.url))
        backend = await stack.enter_async_context(Backend(redis.url, timeout_s=PATIENCE_S))
        empty_mib = await used_mib(client)
        audience = await stack.enter_async_context(running_child("audience", {"port": server.port, "clients": users}))
        conns = (await audience.expect("connected", PATIENCE_S))["conns"]
        connected_mib = await used_mib(client)
        names = [f"user-{n:05}" for n in range(users)]
        pairs = list(zip(conns, names, strict=True))
        _, bound_s = await timed(((lambda pair=pair: backend.bind_user(*pair)) for pair in pairs), 200)
        bound_mib = await used_mib(client)
        lines = [
            await send_to_users(backend, names, calls, 1),
            await send_to_users(backend, names, calls * 2, AT_ONCE),
            await send_to_all(backend, audience, users),
        ]
    print("| call | p50 ms | p99 ms | |\n|---|---|---|---|")
    print("\n".join(lines))
    print(
        f"\n{users:,} connections: {max(0.0, connected_mib - empty_mib):.1f} MiB in Redis; with a user each "
        f"{bound_mib - connected_mib:.1f} MiB more, {(bound_mib - empty_mib) * 1024 / users:.2f} KiB per user in all; "
        f"{users / bound_s:,.0f} binds/s, 200 at a time"
    )


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:3]]
    asyncio.run(main(*given, *(USERS, CALLS)[len(given) :]))
