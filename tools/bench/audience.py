"""Many silent WebSocket clients in one process, for messages of backends: raw sockets and epoll; a program of its own.

Speaks JSON lines as ``loader.py`` does: the job (``port``, ``clients``) comes on standard input, then ``expect N``:
tell when N messages in all have come since the last word. Times are those of the monotonic clock, which all processes
share.
"""

import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a program of its own: its package stands beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.machine import raise_file_limit

_HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Protocol: quotes.v1.json\r\n\r\n"
)
_CONN = re.compile(rb'"conn":"([^"]+)"')
_MESSAGE = b'"type":"message"'
_CONNECT_S = 10.0


def say(event: str, **words: Any) -> None:
    print(json.dumps({"event": event, **words}), flush=True)


def connect(port: int) -> tuple[socket.socket, str]:
    """Open one connection; return it with its name."""
    client = socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_S)
    client.sendall(_HANDSHAKE.format(port=port).encode())
    heard = b""
    while True:
        piece = client.recv(65_536)
        heard += piece
        if found := _CONN.search(heard):
            client.setblocking(False)
            return client, found[1].decode()
        if not piece or b" 101 " not in heard[:16]:
            raise OSError(f"no hello: {heard[:80]!r}")


def listen(clients: list[socket.socket]) -> None:
    """Count messages as they come, and answer ``expect``, until standard input ends."""
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for client in clients:
        selector.register(client, selectors.EVENT_READ)
        tails[client] = b""
    selector.register(sys.stdin, selectors.EVENT_READ)
    count, expected = 0, 0
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                word = sys.stdin.readline()
                if not word:
                    return
                expected = int(word.split()[1])
                count = 0
                say("expecting")
                continue
            client = key.fileobj
            assert isinstance(client, socket.socket)
            piece = client.recv(65_536)
            if not piece:
                say("failed", why="the server has closed a connection")
                return
            heard = tails[client] + piece
            count += heard.count(_MESSAGE)
            tails[client] = heard[-len(_MESSAGE) + 1 :]  # shorter than the word: nothing is counted twice
        if expected and count >= expected:
            say("reached", at_s=time.monotonic(), count=count)
            expected = 0


def main() -> None:
    job = json.loads(sys.stdin.readline())
    raise_file_limit()
    say("ready")
    opened = []
    try:
        opened = [connect(job["port"]) for _ in range(job["clients"])]
    except OSError as e:
        say("failed", why=f"client {len(opened) + 1} cannot connect: {e}")
        return
    say("connected", conns=[name for _, name in opened])
    listen([client for client, _ in opened])


if __name__ == "__main__":
    main()
