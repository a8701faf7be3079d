"""Bytes on a client's WebSocket (RFC 6455 §5.2): frames are made once and shared by everybody.

A server's frames are not masked, so the same bytes go to every subscriber.
permessage-deflate is not negotiated: its state belongs to one connection, and a
shared frame would have to be compressed again for each.
"""

import base64
import hashlib
import struct

__all__ = ["BINARY", "TEXT", "accept_key", "close_frame", "frame_header", "ping_frame", "pong_frame", "text_frame"]

TEXT, BINARY = 0x81, 0x82  # FIN and the opcode
_CLOSE, _PING, _PONG = 0x88, 0x89, 0x8A
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3

_pack_16 = struct.Struct("!BBH").pack
_pack_64 = struct.Struct("!BBQ").pack


def frame_header(length: int, first_byte: int = TEXT) -> bytes:
    """Return the header of an unmasked frame with ``length`` bytes of payload."""
    if length < 126:
        return bytes((first_byte, length))
    if length < 65_536:
        return _pack_16(first_byte, 126, length)
    return _pack_64(first_byte, 127, length)


def text_frame(payload: bytes) -> bytes:
    """Return ``payload`` (UTF-8) as one text frame."""
    return frame_header(len(payload)) + payload


def ping_frame(payload: bytes = b"") -> bytes:
    """Return a ping with at most 125 bytes of payload."""
    return frame_header(len(payload), _PING) + payload


def pong_frame(payload: bytes) -> bytes:
    """Return the answer to a ping that carried ``payload``."""
    return frame_header(len(payload), _PONG) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame; the reason is cut at 123 bytes, between characters (RFC 6455 §5.5)."""
    payload = code.to_bytes(2, "big") + reason.encode()[:123].decode(errors="ignore").encode()
    return frame_header(len(payload), _CLOSE) + payload


def accept_key(key: str) -> str:
    """Return ``Sec-WebSocket-Accept`` for a client's ``Sec-WebSocket-Key`` (RFC 6455 §4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()
