#!/usr/bin/env python3
"""What many jobs that are due at once do to the rows: the lines of docs/performance.md.

    python tools/bench/jobs.py [JOBS ...]

A private Redis, a server with two workers, 200 clients with a user each, and one that watches a code with 200 ticks a
second. JOBS messages, each a job of its own to one of the users, are due in the same moment. Measured are the time
until the last one has arrived, and the age of a row when the watching client has it, before and meanwhile.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.backend import nearest, timed
from bench.children import BenchError, running_server
from bench.measure import quotepush
from quotepush import Backend, QuoteClient
from quotepush.private_redis import private_redis

USERS = 200
JOBS = (200, 2_000, 10_000)
CODE = "A"
TICK_EVERY_S = 0.005
QUIET_S = 3.0
SET_PER_S = 400  # jobs; they must have been set before they are due
PATIENCE_S = 120.0


@contextlib.asynccontextmanager
async def ticking(redis: Redis) -> AsyncIterator[None]:
    """Publish ticks whose price is the time."""

    async def tick() -> None:
        while True:
            await redis.publish(f"quote.{CODE}", b'{"last":%.6f}' % time.time())
            await asyncio.sleep(TICK_EVERY_S)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def bound_users(backend: Backend) -> list[str]:
    """Bind each connection to a user; return their names."""
    deadline_s = time.monotonic() + PATIENCE_S
    while len(sessions := await backend.sessions()) < USERS:
        if time.monotonic() > deadline_s:
            raise BenchError("not all connections are in the registry")
        await asyncio.sleep(0.1)
    names = [f"user-{n}" for n in range(USERS)]
    pairs = [(session["conn"], name) for session, name in zip(sessions, names, strict=True)]
    await timed(((lambda pair=pair: backend.bind_user(*pair)) for pair in pairs), USERS)
    return names


def shown(ages_s: Sequence[float]) -> str:
    return f"{nearest(ages_s, 0.5) * 1000:.1f} | {nearest(ages_s, 0.99) * 1000:.1f}" if ages_s else "none | none"


async def measure(jobs: int) -> str:
    arrived_s: list[float] = []
    rows: list[tuple[float, float]] = []  # when, and how old

    def note_row(row: dict[str, Any]) -> None:
        now_s = time.time()
        rows.append((now_s, now_s - row["last"]))

    async with contextlib.AsyncExitStack() as stack:
        redis = await stack.enter_async_context(private_redis())
        # With a timeout redis-py can lose the cancellation of a task that writes.
        client = await stack.enter_async_context(Redis.from_url(redis.url, socket_timeout=None))
        backend = await stack.enter_async_context(Backend(redis.url, timeout_s=PATIENCE_S, jobs_max=2 * jobs))
        command = [word.replace("{redis}", redis.url) for word in quotepush(2, []).command]
        server = await stack.enter_async_context(running_server("quotepush", command, {}, None))
        for _ in range(USERS):
            quotes = await stack.enter_async_context(QuoteClient(f"http://127.0.0.1:{server.port}"))
            quotes.on("message", lambda message: arrived_s.append(time.time()))
        names = await bound_users(backend)
        watching = await stack.enter_async_context(QuoteClient(f"http://127.0.0.1:{server.port}"))
        watching.on("row", note_row)
        await watching.subscribe(CODE)
        due = datetime.now(UTC) + timedelta(seconds=QUIET_S + jobs / SET_PER_S)
        await timed(
            ((lambda n=n: backend.send_to_user(names[n % USERS], {"alert": n}, at=due)) for n in range(jobs)), 50
        )
        due_s = due.timestamp()
        if time.time() > due_s - 1:
            raise BenchError("setting the jobs took too long")
        rows.clear()  # those that came while the jobs were set
        async with ticking(client):
            while len(arrived_s) < jobs:
                if time.time() > due_s + PATIENCE_S:
                    raise BenchError(f"{len(arrived_s)} of {jobs} messages have arrived")
                await asyncio.sleep(0.05)
    last_s = max(arrived_s)
    before = [age_s for at_s, age_s in rows if at_s < due_s]
    meanwhile = [age_s for at_s, age_s in rows if due_s <= at_s <= last_s]
    return f"| {jobs:,} | {last_s - due_s:.2f} | {shown(before)} | {shown(meanwhile)} |"


async def main(numbers: Sequence[int]) -> None:
    print("| jobs | last one after s | before: row's age p50 ms | p99 ms | meanwhile: p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    for jobs in numbers:
        print(await measure(jobs), flush=True)


if __name__ == "__main__":
    asyncio.run(main([int(word) for word in sys.argv[1:]] or JOBS))
