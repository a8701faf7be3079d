"""A WebSocket client made of bytes: it can break every rule, and answers nothing by itself."""

import asyncio
import base64
import os
import socket
import struct
from types import TracebackType
from typing import Any

import orjson

__all__ = ["RawWebSocket", "client_frame"]

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
_PATIENCE_S = 15.0


def client_frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, bits: int = 0, is_masked: bool = True
) -> bytes:
    """Return one frame as a client sends it (RFC 6455 §5.2).

    Args:
        bits: reserved ones, e.g. 0x40.
    """
    head = bytearray([(0x80 if fin else 0) | bits | opcode])
    mask_bit = 0x80 if is_masked else 0
    if len(payload) < 126:
        head.append(mask_bit | len(payload))
    elif len(payload) < 65_536:
        head += struct.pack("!BH", mask_bit | 126, len(payload))
    else:
        head += struct.pack("!BQ", mask_bit | 127, len(payload))
    if not is_masked:
        return bytes(head) + payload
    mask = os.urandom(4)
    return bytes(head) + mask + bytes(byte ^ mask[n & 3] for n, byte in enumerate(payload))


class RawWebSocket:
    """One connection. ``async with RawWebSocket(port) as ws`` has shaken hands and not read anything more.

    Args:
        receive_buffer_bytes: of the socket; small, to be slow soon.
        path: of the WebSocket.
        behind: bytes sent in one piece with the handshake.
    """

    def __init__(
        self, port: int, *, receive_buffer_bytes: int | None = None, path: str = "/ws", behind: bytes = b""
    ) -> None:
        self._port = port
        self._receive_buffer_bytes = receive_buffer_bytes
        self._path = path
        self._behind = behind
        self._buffer = b""
        self.socket: socket.socket

    async def __aenter__(self) -> "RawWebSocket":
        loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        if self._receive_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        self.socket.setblocking(False)
        try:
            await self._shake_hands(loop)
        except BaseException:
            self.socket.close()
            raise
        return self

    async def _shake_hands(self, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        key = base64.b64encode(os.urandom(16)).decode()
        await self.send_bytes(
            f"GET {self._path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            + self._behind
        )
        head = await self._until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Cut the connection off with an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.socket, data), _PATIENCE_S)

    async def send_frame(self, opcode: int, payload: bytes = b"", **rest: Any) -> None:
        await self.send_bytes(client_frame(opcode, payload, **rest))

    async def request(self, action: str, **fields: Any) -> None:
        """Send a request; its answer has to be read."""
        await self.send_frame(TEXT, orjson.dumps({"action": action, **fields}))

    async def read_frame(self) -> tuple[int, bytes]:
        """Return opcode and payload of the next frame.

        Raises:
            EOFError: the connection is closed; ConnectionError: it was cut off.
        """
        first, length = await self._exactly(2)
        assert not length & 0x80, "a server masks nothing"
        if length == 126:
            (length,) = struct.unpack("!H", await self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self._exactly(8))
        return first & 15, await self._exactly(length)

    async def read_message(self, kind: str) -> dict[str, Any]:
        """Return the next text message of this ``type``; others are passed over."""
        while True:
            opcode, payload = await self.read_frame()
            assert opcode != CLOSE, f"closed: {payload!r}"
            if opcode == TEXT and (message := orjson.loads(payload))["type"] == kind:
                return message

    async def read_close(self) -> tuple[int, str]:
        """Return code and reason of the close frame that ends the connection."""
        while True:
            opcode, payload = await self.read_frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    async def is_cut(self) -> bool:
        """Read whatever still comes until the end; True if no close frame was among it."""
        try:
            while True:
                opcode, _ = await self.read_frame()
                if opcode == CLOSE:
                    return False
        except (EOFError, ConnectionError):
            return True

    async def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += await self._some()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._buffer += await self._some()
        data, _, self._buffer = self._buffer.partition(end)
        return data

    async def _some(self) -> bytes:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.socket, 65_536), _PATIENCE_S)
        if not data:
            raise EOFError("closed")
        return data
