"""Ticks at a fixed rate into Redis: RESP written by hand, many in one send; a program of its own.

The job comes as a JSON line on standard input, then the word ``go``; events go to standard output as JSON lines. It
ends when its standard input does. A tick's ``pt`` is the time at which it is handed to the kernel, in microseconds.
"""

import gc
import json
import random
import select
import socket
import sys
import time
from itertools import accumulate
from typing import Any

_TURN_S = 0.001  # ticks that are due within so long share a send
_STAMPED_TOGETHER = 500  # at most so many ticks carry the same time
_PENDING_BYTES = 8 << 20  # with so much unsent the publisher waits for Redis
_FIRST_NUMBER = 1_000_000_000  # numbers keep their length
_PICKS = 100_000
_FLUSH_S = 10.0


def commands(codes: list[str], payload: str) -> list[bytes]:
    """Return a PUBLISH per code with holes for what :func:`filled` fills in."""
    made = []
    for code in codes:
        template = (payload % code).encode()
        channel = f"quote.{code}".encode()
        size = len(filled(template, _FIRST_NUMBER, time.time_ns() // 1000))
        made.append(b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(channel), channel, size, template))
    return made


def filled(template: bytes, number: int, now_us: int) -> bytes:
    """Return a tick or command with its last price, its number and its time."""
    return template % (10 + number // 100 % 10, number % 100, number, now_us)


def picks(codes: int, zipf: float) -> list[int]:
    """Return which codes tick, in order; from its end it begins again."""
    if not zipf:
        return list(range(codes))
    weights = list(accumulate(1 / (rank + 1) ** zipf for rank in range(codes)))
    return random.Random(1).choices(range(codes), cum_weights=weights, k=_PICKS)


def publish(redis: socket.socket, job: dict[str, Any]) -> None:
    """Publish for ``job["seconds"]``; say what was sent (``ended``), then what Redis has taken (``taken``)."""
    made = commands(job["codes"], job["payload"])
    order = picks(len(made), job["zipf"])
    rate, burst, seconds = job["rate"], job["burst"], job["seconds"]
    ticks = [0] * len(made)
    pending = bytearray()
    poll = select.poll()
    poll.register(redis, select.POLLOUT)
    sent = answered = 0
    behind_s = refused_s = 0.0
    cpu = time.process_time()
    begin = time.perf_counter()
    while True:
        now = time.perf_counter() - begin
        due = int(min(now, seconds) * rate) - sent
        due -= due % burst
        while due > 0 and len(pending) < _PENDING_BYTES:
            count = min(due, _STAMPED_TOGETHER)
            now_us = time.time_ns() // 1000
            for number in range(sent, sent + count):
                code = order[number % len(order)]
                ticks[code] += 1
                pending += filled(made[code], _FIRST_NUMBER + number, now_us)
            sent += count
            due -= count
            _send(redis, pending)
        answered += _answers(redis)
        if now >= seconds:
            break
        behind_s = max(behind_s, now - (sent + burst) / rate)
        if pending:
            began = time.perf_counter()
            poll.poll(1)
            refused_s += time.perf_counter() - began
            _send(redis, pending)
        else:
            next_s = (sent + burst) / rate - (time.perf_counter() - begin)
            time.sleep(max(_TURN_S, min(next_s, seconds - now)))
    took = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    due = int(rate * seconds) // burst * burst
    say(
        "ended", sent=sent, ticks=ticks, due=due, seconds=took, behind_s=behind_s, refused_share=refused_s / took,
        cpu_share=cpu / took,
    )  # fmt: skip
    began = time.perf_counter()
    give_up = began + _FLUSH_S
    while (pending or answered < sent) and time.perf_counter() < give_up:
        _send(redis, pending)
        answered += _answers(redis)
        time.sleep(_TURN_S)
    say("taken", unanswered=sent - answered, seconds=time.perf_counter() - began)


def _send(redis: socket.socket, pending: bytearray) -> None:
    while pending:
        try:
            taken = redis.send(pending)
        except BlockingIOError:
            return
        del pending[:taken]


def _answers(redis: socket.socket) -> int:
    count = 0
    while True:
        try:
            chunk = redis.recv(65_536)
        except BlockingIOError:
            return count
        if not chunk or b"-" in chunk:
            raise ConnectionError(f"Redis refuses to publish: {chunk[:80].decode(errors='replace') or 'it hung up'}")
        count += chunk.count(b"\n")


def say(event: str, **facts: Any) -> None:
    """Tell the parent."""
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> int:
    """Do one job."""
    job = json.loads(sys.stdin.buffer.readline())
    gc.disable()
    try:
        redis = socket.create_connection(("127.0.0.1", job["redis_port"]), 5)
        redis.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        redis.setblocking(False)
        say("ready")
        if not sys.stdin.buffer.readline():
            return 0
        publish(redis, job)
    except OSError as e:
        say("failed", why=f"the publisher: {e}")
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
