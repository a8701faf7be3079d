"""Many WebSocket clients in one process: raw non-blocking sockets and epoll; a program of its own.

Speaks JSON lines: the job comes on standard input, then the words ``subscribe``, ``count`` and ``stop N`` (N rows are
due in all); events go to standard output. It ends when its standard input does.

Rows are counted by the publish time that each carries (``"pt":`` and 16 digits, microseconds). Of every read one row's
age is taken, at a place in the read that wanders evenly, and counted for as many rows as the read held.
"""

import contextlib
import errno
import gc
import json
import os
import select
import socket
import ssl
import sys
import time
from collections import Counter, deque
from typing import Any

MARK = b'"pt":'
_DIGITS = 16
_KEEP = len(MARK) - 1  # so much of a mark may stand at the end of a read
_BUFFER_BYTES = 1 << 18
_AGE_BITS = 4  # ages are counted in steps of 16 µs
_PONG = b"\x8a\x80\0\0\0\0"
_QUIET_S = 1.5
_REPORT_S = 0.5
_CLOSING_BRACE = ord("}")

# What a non-blocking socket says when there is nothing to read, without TLS and with it.
_NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError)

_CONNECTING, _SECURING, _SHAKING, _OPEN, _SUBSCRIBING, _COUNTING = range(6)


class Failed(Exception):
    """The run cannot go on; the text says why."""


class Client:
    """One connection."""

    __slots__ = ("number", "recv_into", "said", "sock", "state", "tail")

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number = number
        self.sock = sock
        self.recv_into = sock.recv_into
        self.state = _CONNECTING
        self.said = b""  # what came before the first row
        self.tail = b""  # of the last read, when it may hold the beginning of a mark


class Loader:
    """All connections of this process.

    Args:
        job: ``port``, ``path``, ``is_tls``, ``first`` and ``clients`` (numbers of the clients), ``codes`` (per client),
            ``slow`` (clients below this number never read), ``at_once`` (handshakes under way),
            ``subscribes_by_itself``.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._tls = _tls() if job["is_tls"] else None
        self._poll = select.epoll()
        self._poll.register(0, select.EPOLLIN)
        os.set_blocking(0, False)
        self._words: deque[str] = deque()
        self._heard = b""
        self._clients: dict[int, Client] = {}
        self._under_way = 0
        self._acked = 0
        self._buffer = bytearray(_KEEP + _BUFFER_BYTES)
        self._space = memoryview(self._buffer)[_KEEP:]
        self._ages: Counter[int] = Counter()
        self._wander = 0
        self.rows = 0
        self.reads = 0
        self.bytes = 0
        self.closed = 0
        host = f"127.0.0.1:{job['port']}"
        self._request = (
            f"GET {job['path']} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()

    def connect(self, timeout_s: float) -> float:
        """Open every connection; return how long it took until all had shaken hands."""
        begin = time.monotonic()
        numbers = deque(range(self._job["first"], self._job["first"] + self._job["clients"]))
        while numbers or self._under_way:
            while numbers and self._under_way < self._job["at_once"]:
                self._dial(numbers.popleft())
            self._turn(0.1)
            if time.monotonic() - begin > timeout_s:
                open_now = len(self._clients) - self._under_way
                raise Failed(f"only {open_now:,} of {self._job['clients']:,} clients connected in {timeout_s:g} s")
        return time.monotonic() - begin

    def subscribe(self, timeout_s: float) -> float:
        """Subscribe on every connection; return how long it took until all were answered."""
        begin = time.monotonic()
        for client in self._clients.values():
            if client.state == _OPEN:
                self._ask(client)
                if client.number % 32 == 31:
                    self._turn(0)
        while self._acked < self._job["clients"]:
            self._turn(0.1)
            if time.monotonic() - begin > timeout_s:
                raise Failed(
                    f"only {self._acked:,} of {self._job['clients']:,} subscribes were answered in {timeout_s:g} s"
                )
        return time.monotonic() - begin

    def wait_for(self, word: str) -> str:
        """Serve the connections until ``word`` is said; return what stands behind it."""
        while True:
            while self._words:
                said, _, rest = self._words.popleft().partition(" ")
                if said == word:
                    return rest
            self._turn(1.0)

    def leave_slow_ones(self) -> None:
        """From now on the slow clients' sockets are not read any more."""
        for fd, client in self._clients.items():
            if client.number < self._job["slow"]:
                self._poll.unregister(fd)

    def count(self) -> dict[str, Any]:
        """Count rows until told how many are due and these have come, or nothing has for a while."""
        began = time.time()
        cpu, waited = _cpu_s()
        report_at = time.monotonic() + _REPORT_S
        due: int | None = None
        result: dict[str, Any] = {}
        last_rows, last_s, deadline_s = 0, time.monotonic(), 0.0
        while True:
            self._turn(0.05 if due is None else 0.005)
            now = time.monotonic()
            if now >= report_at:
                report_at = now + _REPORT_S
                say("rows", rows=self.rows)
            if due is None and self._words:
                _, due_text, patience_text = self._words.popleft().split()
                due = int(due_text)
                deadline_s = now + float(patience_text)
                cpu_then, waited_then = _cpu_s()
                took = max(1e-6, time.time() - began)
                result = {
                    "in_time": self.rows,
                    "cpu_share": (cpu_then - cpu) / took,
                    "wanted_share": (cpu_then - cpu + waited_then - waited) / took,
                }
            if self.rows != last_rows:
                last_rows, last_s = self.rows, now
            if due is not None and (self.rows >= due or now - last_s > _QUIET_S or now > deadline_s):
                ended = time.time() - (now - last_s)
                return result | {
                    "rows": self.rows, "reads": self.reads, "bytes": self.bytes, "closed": self.closed,
                    "began": began, "ended": ended, "ages": dict(self._ages),
                }  # fmt: skip

    # One connection

    def _dial(self, number: int) -> None:
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as e:
            raise Failed(f"client {number:,} gets no socket: {e.strerror}; raise the limit with ulimit -n") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if number < self._job["slow"]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        status = sock.connect_ex(("127.0.0.1", self._job["port"]))
        if status not in (0, errno.EINPROGRESS):
            raise Failed(f"client {number:,} cannot connect: {os.strerror(status)}")
        self._clients[sock.fileno()] = Client(number, sock)
        self._under_way += 1
        self._poll.register(sock.fileno(), select.EPOLLOUT)

    def _ask(self, client: Client) -> None:
        codes = self._job["codes"][client.number - self._job["first"]]
        request = json.dumps({"action": "subscribe", "codes": codes, "snapshot": False}, separators=(",", ":")).encode()
        size = len(request)
        head = bytes([0x81, 0x80 | size]) if size < 126 else b"\x81\xfe" + size.to_bytes(2)
        client.state = _SUBSCRIBING
        client.said = b""
        client.sock.send(head + b"\0\0\0\0" + request)  # a new connection's buffer takes it whole

    def _turn(self, timeout_s: float) -> None:
        clients = self._clients
        for fd, _ in self._poll.poll(timeout_s, 512):
            client = clients.get(fd)
            if client is None:
                if fd == 0:
                    self._hear()
            elif client.state == _COUNTING:
                self._take(client)
            else:
                self._advance(client)

    def _hear(self) -> None:
        try:
            chunk = os.read(0, 65_536)
        except BlockingIOError:
            return
        if not chunk:
            raise EOFError
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        self._words.extend(line.decode() for line in lines)

    def _advance(self, client: Client) -> None:
        """One step on the way to the first row."""
        if client.state == _CONNECTING:
            status = client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                raise Failed(f"client {client.number:,} cannot connect: {os.strerror(status)}")
            self._poll.modify(client.sock.fileno(), select.EPOLLIN)
            if self._tls is None:
                self._shake_hands(client)
                return
            client.sock = self._tls.wrap_socket(client.sock, do_handshake_on_connect=False)
            client.recv_into = client.sock.recv_into
            client.state = _SECURING
        if client.state == _SECURING:
            self._secure(client)
            return
        try:
            chunk = client.sock.recv(65_536)
        except _NOTHING_YET:
            return
        except OSError:
            chunk = b""
        if not chunk:
            raise Failed(f"the server closed the connection of client {client.number:,} before its first row")
        client.said += chunk
        if client.state == _SHAKING:
            head, end, rest = client.said.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                status_line = head.split(b"\r\n")[0].decode("latin-1")
                raise Failed(f"the server refused client {client.number:,}: {status_line}")
            self._under_way -= 1
            client.state, client.said = _OPEN, rest
            if self._job["subscribes_by_itself"]:
                self._ask(client)
        elif client.state == _SUBSCRIBING and b'"ack"' in client.said:
            self._acked += 1
            client.state = _COUNTING
            self.rows += client.said.count(MARK)
            client.said = b""

    def _secure(self, client: Client) -> None:
        """One step of the TLS handshake; what it writes is so little that it never waits for room."""
        assert isinstance(client.sock, ssl.SSLSocket)
        try:
            client.sock.do_handshake()
        except ssl.SSLWantReadError:
            return
        except OSError as e:
            raise Failed(f"client {client.number:,} cannot speak TLS: {e}") from None
        self._shake_hands(client)

    def _shake_hands(self, client: Client) -> None:
        client.sock.send(self._request)
        client.state = _SHAKING

    def _take(self, client: Client) -> None:
        """Count the rows of one read; with TLS that is a record, and what is behind it wakes us again."""
        try:
            size = client.recv_into(self._space)
        except _NOTHING_YET:
            return
        except OSError:
            size = 0
        if not size:
            self._lose(client)
            return
        buffer = self._buffer
        start, end = _KEEP, _KEEP + size
        if client.tail:
            start -= len(client.tail)
            buffer[start:_KEEP] = client.tail
            client.tail = b""
        if buffer[end - 1] != _CLOSING_BRACE:  # not the end of a message
            client.tail = bytes(buffer[max(start, end - _KEEP) : end])
        rows = buffer.count(MARK, start, end)
        self.reads += 1
        self.bytes += size
        if rows:
            self.rows += rows
            now_us = time.time_ns() // 1000
            at = -1
            if rows > 1:
                self._wander = (self._wander + 40_503) & 0xFFFF
                at = buffer.find(MARK, start + ((end - start) * self._wander >> 16), end)
            if at < 0 or at + len(MARK) + _DIGITS > end:
                at = buffer.find(MARK, start, end)
            at += len(MARK)
            if at + _DIGITS <= end:
                self._ages[max(0, now_us - int(buffer[at : at + _DIGITS])) >> _AGE_BITS] += rows
        if buffer.find(0x89, start, end) >= 0 and buffer.find(b"\x89\0", start, end) >= 0:
            # A ping, or at worst two bytes of a length that look like one: a pong too many does no harm.
            with contextlib.suppress(OSError):
                client.sock.send(_PONG)

    def _lose(self, client: Client) -> None:
        self.closed += 1
        self._poll.unregister(client.sock.fileno())
        del self._clients[client.sock.fileno()]
        client.sock.close()


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it was made for this run
    return context


def _cpu_s() -> tuple[float, float]:
    """CPU time of this process, and how long it waited for a core."""
    try:
        with open("/proc/self/schedstat") as file:
            ran, waited, _ = file.read().split()
        return int(ran) / 1e9, int(waited) / 1e9
    except (OSError, ValueError):
        return time.process_time(), 0.0


def say(event: str, **facts: Any) -> None:
    """Tell the parent."""
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> int:
    """Do one job."""
    job = json.loads(sys.stdin.buffer.readline())
    gc.disable()  # nothing here makes cycles, and a pause would look like the server's
    loader = Loader(job)
    try:
        say("ready")
        loader.wait_for("connect")
        began = time.time()
        connected_s = loader.connect(job["timeout_s"])
        say("connected", began=began, seconds=connected_s)
        if not job["subscribes_by_itself"]:
            loader.wait_for("subscribe")
        began_subscribing = time.time()
        seconds = loader.subscribe(job["timeout_s"])
        say("subscribed", began=began_subscribing, seconds=seconds)
        if not job["subscribes_by_itself"]:
            loader.wait_for("count")
            loader.leave_slow_ones()
        say("counted", **loader.count())
        loader.wait_for("end")
    except (EOFError, KeyboardInterrupt):
        return 0
    except Failed as e:
        say("failed", why=str(e))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
