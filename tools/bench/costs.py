#!/usr/bin/env python3
"""What the single steps of a row cost on this machine, each measured alone: the small figures of docs/performance.md.

    python tools/bench/costs.py

CPU time of this process per step, the best of several rounds; nothing here is asserted anywhere.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis
import msgspec
import uvloop
from redis.asyncio import Redis

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.loads import LOADS
from bench.publisher import commands, filled
from quotepush.private_redis import private_redis
from quotepush.push.hub import Hub
from quotepush.push.outbox import Outbox
from quotepush.push.subscriptions import Subscriptions
from quotepush.quote.board import Board, TradingDays

_ROUNDS = 7
_CONNECTIONS = 500
_MESSAGES = 20_000
_SINK = """
import select, socket, sys
listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
print(listening.getsockname()[1], flush=True)
poll, peers = select.epoll(), {}
for _ in range(int(sys.argv[1])):
    peer, _ = listening.accept()
    peers[peer.fileno()] = peer
    poll.register(peer, select.EPOLLIN)
while peers:
    for fd, _ in poll.poll():
        if not peers[fd].recv(1 << 18):
            poll.unregister(fd)
            peers.pop(fd).close()
"""


def best_us(steps: int, work: Callable[[], Any]) -> float:
    """Return CPU microseconds per step in the best round."""
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best / steps * 1e6


def say(what: str, us: float) -> None:
    """Print one line."""
    print(f"{what:76}{us:8.3f} µs", flush=True)


async def cost_of_write() -> None:
    """A frame to each of many sockets, whose readers are another process."""
    loop = asyncio.get_running_loop()
    sink = await asyncio.create_subprocess_exec(sys.executable, "-c", _SINK, str(_CONNECTIONS), stdout=subprocess.PIPE)
    assert sink.stdout is not None
    port = int(await sink.stdout.readline())
    transports = []
    for _ in range(_CONNECTIONS):
        transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transports.append(transport)
    for size in (150, 1_500, 15_000):
        frame = b"x" * size
        best = float("inf")
        for _ in range(_ROUNDS * 4):
            begin = time.process_time()
            for transport in transports:
                transport.write(frame)
            best = min(best, time.process_time() - begin)
            await asyncio.sleep(0.05)
        say(f"transport.write of {size:,} bytes (uvloop, loopback)", best / _CONNECTIONS * 1e6)
    for transport in transports:
        transport.close()
    async with asyncio.timeout(10):
        await sink.wait()


def cost_of_fan_out() -> None:
    """The work of a row for each subscriber, without the socket."""
    subscriptions = Subscriptions()
    hub = Hub(
        subscriptions, max_delay_s=0.005, max_rows=1000, max_bytes=1 << 20, on_merging=lambda outbox: None,
        on_caught_up=lambda outbox: None, on_failed=lambda outbox: None, clock_ms=lambda: 0,
    )  # fmt: skip
    outboxes = [Outbox(None, lambda data: None) for _ in range(1000)]
    channel = subscriptions.open("600000.SH", 0, b"{}")
    for outbox in outboxes:
        subscriptions.add(channel, outbox, base=0)
    row = filled((LOADS["market"].payload() % "600000.SH").encode(), 1_000_000_000, time.time_ns() // 1000)
    seq = 0

    def offer(count: int) -> None:
        nonlocal seq
        for _ in range(count):
            seq += 1
            hub.offer(channel.code, seq, row)

    def clear() -> None:
        for outbox in outboxes:
            outbox.clear()

    for count in (1, 20):
        offered = taken = float("inf")
        for _ in range(_ROUNDS * 3):
            begin = time.process_time()
            offer(count)
            middle = time.process_time()
            for outbox in outboxes:
                outbox.take(1)
            offered = min(offered, middle - begin)
            taken = min(taken, time.process_time() - middle)
            clear()
        rows = count * len(outboxes)
        say(f"row to an outbox (list append), audience of 1,000, {count} of a kind", offered / rows * 1e6)
        say(f"row from an outbox into a message of {count}", taken / rows * 1e6)


def cost_of_board() -> None:
    """A tick into its code's row."""
    for name in ("market", "real"):
        load = LOADS[name]
        template = (load.payload() % "sh600000").encode()
        ticks = [filled(template, 1_000_000_000 + i, 1_700_000_000_000_000 + i) for i in range(5000)]
        for is_watched in (False, True):
            watched = {"600000.SH"} if is_watched else set()
            board = Board(days=TradingDays({}), watched=watched)

            def apply_all(board: Board = board, ticks: list[bytes] = ticks) -> None:
                apply = board.apply
                for tick in ticks:
                    quote = apply("600000.SH", tick, 1_700_000_000_000)
                    if quote is not None:
                        quote.encoded()

            what = "watched, row encoded" if is_watched else "nobody watches"
            say(f"board: tick of {len(ticks[0])} bytes, {what}", best_us(len(ticks), apply_all))


def cost_of_bus() -> None:
    """A row from main to a worker as MessagePack, both ways."""
    row = filled((LOADS["market"].payload() % "600000.SH").encode(), 1_000_000_000, time.time_ns() // 1000)
    rows = [("600000.SH", i, row) for i in range(100)]
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(list[tuple[str, int, bytes]])
    text = encoder.encode(rows)
    say(
        "bus: a row encoded, in batches of 100",
        best_us(len(rows) * 50, lambda: [encoder.encode(rows) for _ in range(50)]),
    )
    say(
        "bus: a row decoded, in batches of 100",
        best_us(len(rows) * 50, lambda: [decoder.decode(text) for _ in range(50)]),
    )


def cost_of_parsing() -> None:
    """A pub/sub message out of bytes."""
    load = LOADS["market"]
    tick = filled((load.payload() % "sh600000").encode(), 1_000_000_000, time.time_ns() // 1000)
    words = (b"pmessage", b"quote.*", b"quote.sh600000", tick)
    message = b"*4\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    chunk = message * 500

    def parse() -> None:
        reader = hiredis.Reader()
        reader.feed(chunk)
        while reader.gets() is not False:
            pass

    say("hiredis.Reader: a pub/sub message", best_us(500, parse))


async def cost_of_listening() -> None:
    """A pub/sub message from the socket to Python, with redis-py's pub/sub and with hiredis on a stream."""
    load = LOADS["market"]
    (command,) = commands([load.code(0)], load.payload())
    publish = filled(command, 1_000_000_000, time.time_ns() // 1000) * _MESSAGES

    async with private_redis() as server:

        async def publish_all() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(publish)
            await writer.drain()
            answers = 0
            while answers < _MESSAGES:
                answers += (await reader.read(1 << 16)).count(b"\n")
            writer.close()

        async with Redis.from_url(server.url) as redis, redis.pubsub() as pubsub:
            await pubsub.psubscribe("quote.*")
            await pubsub.get_message(timeout=1)
            await publish_all()
            begin = time.process_time()
            seen = 0
            async for _ in pubsub.listen():
                seen += 1
                if seen == _MESSAGES:
                    break
            say("redis-py pub/sub: a message (listen)", (time.process_time() - begin) / _MESSAGES * 1e6)

        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 24)
        writer.write(b"*2\r\n$10\r\nPSUBSCRIBE\r\n$7\r\nquote.*\r\n")
        parser = hiredis.Reader()
        parser.feed(await reader.read(1 << 16))
        parser.gets()
        await publish_all()
        begin = time.process_time()
        seen = 0
        while seen < _MESSAGES:
            parser.feed(await reader.read(1 << 18))
            while parser.gets() is not False:
                seen += 1
        say("asyncio stream and hiredis.Reader: a message", (time.process_time() - begin) / _MESSAGES * 1e6)
        writer.close()


async def main() -> None:
    """Measure everything."""
    cost_of_parsing()
    await cost_of_listening()
    cost_of_board()
    cost_of_bus()
    cost_of_fan_out()
    await cost_of_write()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
