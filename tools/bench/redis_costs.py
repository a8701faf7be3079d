#!/usr/bin/env python3
"""What Redis pays for a tick that many nodes hear, and for the registry: figures of docs/scaling.md.

    python tools/bench/redis_costs.py

A private Redis, and subscribers in a process of their own; half a minute. CPU is Redis' own, user and system; nothing
here is asserted anywhere.
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate

from redis.asyncio import Redis

from quotepush.cluster.registry import RegistryMirror, registry_client
from quotepush.private_redis import private_redis
from quotepush.publisher import Publisher

SUBSCRIBERS = (0, 1, 10, 100)
SIZES = (136, 693, 13_600)
PIPELINE = 50
FDS, CODES = 10_000, 1_000
BATCHES = (1, 10, 100, 1_000)
LARGE_SET = 100_000

# Takes what comes on every connection.
_HEARERS = """
import select, socket, sys
port, count = map(int, sys.argv[1:])
poll, peers = select.epoll(), {}
for _ in range(count):
    peer = socket.create_connection(("127.0.0.1", port))
    peer.sendall(b"PSUBSCRIBE quote.*\\r\\n")
    assert b"psubscribe" in peer.recv(4096)
    peers[peer.fileno()] = peer
    poll.register(peer, select.EPOLLIN)
print("here", flush=True)
while peers:
    for fd, _ in poll.poll():
        if not peers[fd].recv(1 << 18):
            poll.unregister(fd)
            peers.pop(fd).close()
"""


async def cpu_s(redis: "Redis") -> float:
    """CPU seconds that Redis has used."""
    found = await redis.info("cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


async def cost_of_publish(port: int, redis: "Redis", hearers: int, size: int) -> float:
    """CPU microseconds of Redis for a message of ``size`` bytes to so many subscribers."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _HEARERS, str(port), str(hearers), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        messages = max(2_000, min(50_000, 2_000_000 // max(1, hearers) // max(1, size // 400)))
        payload = b"x" * size
        begin = await cpu_s(redis)
        for _ in range(messages // PIPELINE):
            pipeline = redis.pipeline(transaction=False)
            for _ in range(PIPELINE):
                pipeline.publish("quote.600519.SH", payload)
            await pipeline.execute()
        return (await cpu_s(redis) - begin) / messages * 1e6
    finally:
        if process.returncode is None:  # without connections it has ended by itself
            process.kill()
        await process.wait()


async def cost_of_batch(port: int, redis: "Redis", size: int) -> float:
    """CPU microseconds of Redis for a tick in a publisher's batch of so many ticks."""
    batches = max(10, min(1_000, 20_000 // size))
    codes = [f"{600_000 + i}.SH" for i in range(CODES)]
    async with Publisher(f"redis://127.0.0.1:{port}/0") as publisher:
        begin = await cpu_s(redis)
        for n in range(batches):
            await publisher.publish(
                {"code": codes[(n * size + i) % CODES], "last": 16.88 + i, "volume": 51_200 + n, "n": n, "x": "x" * 60}
                for i in range(size)
            )
        return (await cpu_s(redis) - begin) / batches / size * 1e6


async def cost_of_scan(redis: "Redis") -> float:
    """CPU microseconds of Redis for a member of a large set that is read page by page."""
    await redis.flushall()
    for first in range(0, LARGE_SET, 1_000):
        await redis.sadd("large", *(f"n1.0.{1_795_761_013_541_457 + n}" for n in range(first, first + 1_000)))
    begin = await cpu_s(redis)
    cursor, seen = -1, 0
    while cursor:
        cursor, page = await redis.sscan("large", max(0, cursor), count=1_000)
        seen += len(page)
    return (await cpu_s(redis) - begin) / seen * 1e6


def watched(count: int, each: int) -> list[list[str]]:
    """Different codes for each of so many connections, by Zipf's law with exponent 1."""
    dice = random.Random(1)
    names = [f"{600_000 + i}.SH" for i in range(CODES)]
    sums = list(accumulate(1 / (i + 1) for i in range(CODES)))
    found: list[list[str]] = []
    for _ in range(count):
        some: set[str] = set()
        while len(some) < each:
            some.update(dice.choices(names, cum_weights=sums))
        found.append(list(some)[:each])
    return found


async def commands_of(redis: "Redis") -> tuple[int, float]:
    """How many commands Redis has carried out, and the CPU seconds for it, since they were last reset."""
    stats = {k: v for k, v in (await redis.info("commandstats")).items() if k not in ("cmdstat_info",)}
    return sum(v["calls"] for v in stats.values()), await cpu_s(redis)


async def cost_of_registry(port: int, redis: "Redis", at_once: int, each: int) -> None:
    """Connect, look at, and disconnect; ``at_once`` connections between two flushes, with so many codes each."""
    await redis.flushall()
    client = registry_client(f"redis://127.0.0.1:{port}/0")
    mirror = RegistryMirror(client, prefix="qp:", node="n1", life="0.1")
    await mirror._begin()
    memory = (await redis.info("memory"))["used_memory"]
    fds = {f"n1.0.{n + 1}": codes for n, codes in enumerate(watched(FDS, each))}

    async def measured(what: str, names: Sequence[str], doing: Callable[[str], None]) -> None:
        await redis.config_resetstat()
        _, begin = await commands_of(redis)
        for first in range(0, len(names), at_once):
            for fd in names[first : first + at_once]:
                doing(fd)
            await mirror._flush()
        calls, end = await commands_of(redis)
        per = f"{calls / len(names):6.2f} commands and {(end - begin) / len(names) * 1e6:6.1f} µs of Redis each"
        print(f"{what:44}{per}", flush=True)

    title = f"{each} of {CODES:,} codes, {at_once} at once"
    await measured(f"a connection comes: {title}", list(fds), lambda fd: mirror.open(fd, fds[fd]))
    held = (await redis.info("memory"))["used_memory"] - memory
    print(f"{'memory':44}{held / FDS / 1024:6.2f} KiB a connection with {each} codes")
    await redis.config_resetstat()
    _, begin = await commands_of(redis)
    await mirror._check()
    calls, end = await commands_of(redis)
    print(f"{'a round of comparing':44}{calls:6} commands and {(end - begin) * 1e3:6.2f} ms of Redis")
    await measured(f"a connection goes: {title}", list(fds), mirror.close)
    await client.aclose()


async def main() -> None:
    """Print all of it."""
    async with private_redis() as server, Redis(port=server.port) as redis:
        about = await redis.info("server")
        print(f"{server.program} {about['redis_version']}")
        for size in SIZES:
            none = 0.0
            for hearers in SUBSCRIBERS:
                us = await cost_of_publish(server.port, redis, hearers, size)
                none = none if hearers else us
                each = f"   {(us - none) / hearers:6.2f} µs each" if hearers else ""
                what = f"PUBLISH of {size:,} bytes to {hearers} subscribers"
                print(f"{what:44}{us:8.2f} µs of Redis{each}", flush=True)
        for size in BATCHES:
            us = await cost_of_batch(server.port, redis, size)
            print(f"{f'a tick in a batch of {size:,} of a publisher':44}{us:8.2f} µs of Redis", flush=True)
        print(f"{'a member of a large set, read by SSCAN':44}{await cost_of_scan(redis):8.3f} µs of Redis", flush=True)
        for at_once, each in ((1, 10), (10, 10), (1_000, 10), (1_000, 1), (1_000, 50)):
            await cost_of_registry(server.port, redis, at_once, each)


if __name__ == "__main__":
    asyncio.run(main())
