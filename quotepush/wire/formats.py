"""How rows and messages are spelled: JSON or MessagePack, rows as objects or as arrays.

Law: a row is encoded once per view and format, however many are sent it. Only ``prev`` differs
from subscriber to subscriber, so it stands first in a row and is spliced before bytes that are
shared; a message is the joined bytes of its rows between a head and a tail.

A *codec* is the language of a connection (its subprotocol), a *format* is how rows look in it,
a *view* is which fields they have.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import msgspec
import orjson

from quotepush.quote.tick import BOOK_FIELDS, KNOWN_FIELDS
from quotepush.wire.frames import BINARY, TEXT, frame_header

__all__ = [
    "CODECS", "DEFAULT_FIELDS", "DEFAULT_VIEW", "FIRST_FIELDS", "JSON", "MSGPACK", "Codec", "Format", "JsonCodec",
    "View",
]  # fmt: skip

# They come in every row, whatever the view.
FIRST_FIELDS = ("code", "seq", "ts")

# What a client gets that names no fields, in this order; the book is heavy and has to be named.
DEFAULT_FIELDS = tuple(name for name in KNOWN_FIELDS if name not in BOOK_FIELDS)


class View:
    """Which fields a subscription's rows have, besides ``code``, ``seq``, ``ts`` and ``prev``.

    Views are shared: :meth:`of` returns the same one for the same fields, as long as somebody holds it.

    Attributes:
        fields: as the client named them; None: every field but the book, unknown ones too.
        columns: of a row as an array, ``prev`` first.
        cols: what this list of columns is called in messages, unique in this process.
    """

    __slots__ = ("__weakref__", "cols", "columns", "fields", "has_book")

    _shared: ClassVar["WeakValueDictionary[tuple[str, ...] | None, View]"] = WeakValueDictionary()
    _numbers: ClassVar = count(1)

    def __init__(self, fields: tuple[str, ...] | None) -> None:
        self.fields = fields
        self.columns = ("prev", *FIRST_FIELDS, *(DEFAULT_FIELDS if fields is None else fields))
        self.cols = next(self._numbers)
        self.has_book = fields is not None and not set(BOOK_FIELDS).isdisjoint(fields)

    @classmethod
    def of(cls, fields: Iterable[str] | None) -> "View":
        """Return the view with these fields; named twice or always there, a field counts once."""
        named = None if fields is None else tuple(f for f in dict.fromkeys(fields) if f not in (*FIRST_FIELDS, "prev"))
        view = cls._shared.get(named)
        if view is None:
            view = cls._shared[named] = cls(named)
        return view

    def pick(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a whole row (its book included) that this view shows."""
        if self.fields is None:
            return {name: value for name, value in row.items() if name not in BOOK_FIELDS}
        picked = {name: row[name] for name in FIRST_FIELDS if name in row}
        for name in self.fields:
            if name in row:
                picked[name] = row[name]
        return picked


DEFAULT_VIEW = View.of(None)


class Format:
    """How one row looks.

    Attributes:
        codec: in which language.
        is_array: a row is an array in the order of the view's columns, else an object.
        is_mains: main's own text of a row is one in this format and the default view.
    """

    def __init__(self, codec: "Codec", is_array: bool) -> None:
        self.codec = codec
        self.is_array = is_array
        self.is_mains = not is_array and not codec.is_binary

    def encode(self, row: Mapping[str, Any], view: View) -> bytes:
        """Return a whole row as one of ``view`` without ``prev`` (in an array it is null)."""
        if self.is_array:
            return self.codec.encode([None, *map(row.get, view.columns[1:])])
        return self.codec.encode(view.pick(row))

    def with_prev(self, bare: bytes, prev: int) -> bytes:
        """Return a row made by :meth:`encode` with ``prev`` before the shared bytes."""
        return (self.codec.array_with_prev if self.is_array else self.codec.object_with_prev)(bare, prev)

    def without_prev(self, text: bytes) -> bytes:
        """Undo :meth:`with_prev`."""
        return (self.codec.array_without_prev if self.is_array else self.codec.object_without_prev)(text)

    def with_epoch(self, bare: bytes, epoch: str) -> bytes:
        """Return a row for a snapshot that says in which epoch it counts; of an array the message says it."""
        return bare if self.is_array else self.codec.object_with_epoch(bare, epoch)


class Codec(ABC):
    """The language of one connection.

    Attributes:
        subprotocol: its name in the handshake.
        language: its name for people.
        is_binary: whether its messages are binary frames.
        objects: the format of rows as objects.
        arrays: the format of rows as arrays.
    """

    subprotocol: str
    language: str
    is_binary: bool

    def __init__(self) -> None:
        self.objects = Format(self, is_array=False)
        self.arrays = Format(self, is_array=True)

    def format(self, name: str) -> Format:
        """Return the format that the protocol calls ``objects`` or ``rows``."""
        return self.arrays if name == "rows" else self.objects

    def frame(self, message: Mapping[str, Any]) -> bytes:
        """Return a message as a whole WebSocket frame."""
        payload = self.encode(message)
        return frame_header(len(payload), BINARY if self.is_binary else TEXT) + payload

    def bare_frame(self, payload: str | bytes) -> bytes | None:
        """Return a text or bytes alone as a whole frame of its kind; None: this connection cannot be sent that."""
        body = payload.encode() if isinstance(payload, str) else payload
        return frame_header(len(body), TEXT if isinstance(payload, str) else BINARY) + body

    def binary(self, data: bytes) -> Mapping[str, Any]:
        """Return the fields of a message that carry bytes."""
        if self.is_binary:
            return {"data": data}
        return {"data": base64.b64encode(data).decode(), "encoding": "base64"}

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes | str], Any]

    @abstractmethod
    def rows_frame(
        self, kind: str, time_ms: int, rows: Sequence[bytes], cols: int | None = None, **facts: Any
    ) -> bytes:
        """Return a ``tick`` or ``snapshot`` message as a whole WebSocket frame.

        Args:
            rows: each as bytes of this codec.
            cols: of rows that are arrays.
            facts: what else it says: ``replay``, ``gap``, ``epochs`` (code to epoch, for rows that are arrays).
        """

    @abstractmethod
    def object_with_epoch(self, bare: bytes, epoch: str) -> bytes: ...

    @abstractmethod
    def object_with_prev(self, bare: bytes, prev: int) -> bytes: ...

    @abstractmethod
    def object_without_prev(self, text: bytes) -> bytes: ...

    @abstractmethod
    def array_with_prev(self, bare: bytes, prev: int) -> bytes: ...

    @abstractmethod
    def array_without_prev(self, text: bytes) -> bytes: ...


class JsonCodec(Codec):
    """JSON in text frames."""

    subprotocol = "quotes.v1.json"
    language = "JSON"
    is_binary = False
    encode = staticmethod(orjson.dumps)
    decode = staticmethod(orjson.loads)

    def __init__(self) -> None:
        super().__init__()
        self._head_ms = 0
        self._head = b""

    def rows_frame(  # hot
        self, kind: str, time_ms: int, rows: Sequence[bytes], cols: int | None = None, **facts: Any
    ) -> bytes:
        body = b",".join(rows)
        if kind == "tick" and cols is None and not facts:
            if time_ms != self._head_ms:
                self._head_ms = time_ms
                self._head = b'{"type":"tick","time":%d,"data":[' % time_ms
            head = self._head
        else:
            said = {"type": kind, "time": time_ms, **({} if cols is None else {"cols": cols}), **facts}
            head = orjson.dumps(said)[:-1] + b',"data":['
        return b"".join((frame_header(len(head) + len(body) + 2), head, body, b"]}"))

    def object_with_epoch(self, bare: bytes, epoch: str) -> bytes:
        return b'%b,"epoch":%b}' % (bare[:-1], orjson.dumps(epoch))

    def object_with_prev(self, bare: bytes, prev: int) -> bytes:
        return b'{"prev":%d,%b' % (prev, bare[1:])

    def object_without_prev(self, text: bytes) -> bytes:
        return b"{" + text[text.index(b",") + 1 :]

    def array_with_prev(self, bare: bytes, prev: int) -> bytes:
        return b"[%d%b" % (prev, bare[5:])  # in place of null

    def array_without_prev(self, text: bytes) -> bytes:
        return b"[null" + text[text.index(b",") :]


class _MessagePack(Codec):
    subprotocol = "quotes.v1.msgpack"
    language = "MessagePack"
    is_binary = True
    encode = staticmethod(msgspec.msgpack.Encoder().encode)
    decode = staticmethod(msgspec.msgpack.decode)  # type: ignore[assignment]

    def rows_frame(
        self, kind: str, time_ms: int, rows: Sequence[bytes], cols: int | None = None, **facts: Any
    ) -> bytes:
        encode = self.encode
        said: dict[str, Any] = {"type": kind, "time": time_ms}
        if cols is not None:
            said["cols"] = cols
        said |= facts
        head = encode(said)
        body = b"".join(rows)
        # One field more than was encoded: data, an array.
        start = b"%c%b\xa4data%b" % (head[0] + 1, head[1:], _array_head(len(rows)))
        return b"".join((frame_header(len(start) + len(body), BINARY), start, body))

    def object_with_epoch(self, bare: bytes, epoch: str) -> bytes:
        fields, body = _map_start(bare)
        return b"%b%b\xa5epoch%b" % (_map_head(fields + 1), bare[body:], self.encode(epoch))

    def object_with_prev(self, bare: bytes, prev: int) -> bytes:
        fields, body = _map_start(bare)
        return b"%b\xa4prev%b%b" % (_map_head(fields + 1), self.encode(prev), bare[body:])

    def object_without_prev(self, text: bytes) -> bytes:
        fields, body = _map_start(text)
        prev = body + 5  # behind its name
        return _map_head(fields - 1) + text[prev + _int_size(text[prev]) :]

    def array_with_prev(self, bare: bytes, prev: int) -> bytes:
        body = _array_start(bare)
        return bare[:body] + self.encode(prev) + bare[body + 1 :]  # in place of nil

    def array_without_prev(self, text: bytes) -> bytes:
        body = _array_start(text)
        return b"%b\xc0%b" % (text[:body], text[body + _int_size(text[body]) :])


# MessagePack's heads: https://github.com/msgpack/msgpack/blob/master/spec.md


def _map_head(fields: int) -> bytes:
    return bytes((0x80 | fields,)) if fields < 16 else b"\xde" + fields.to_bytes(2, "big")


def _map_start(text: bytes) -> tuple[int, int]:
    """Return how many fields a map has, and where the first begins."""
    return (text[0] & 15, 1) if text[0] < 0x90 else (int.from_bytes(text[1:3], "big"), 3)


def _array_head(items: int) -> bytes:
    if items < 16:
        return bytes((0x90 | items,))
    return b"\xdc" + items.to_bytes(2, "big") if items < 65_536 else b"\xdd" + items.to_bytes(4, "big")


def _array_start(text: bytes) -> int:
    return 1 if text[0] < 0xA0 else 3


def _int_size(first: int) -> int:
    """Return how many bytes a whole number takes that is not negative."""
    return 1 if first < 0x80 else 1 + (1 << (first - 0xCC))


JSON = JsonCodec()
MSGPACK = _MessagePack()

# In the order of preference.
CODECS: tuple[Codec, ...] = (JSON, MSGPACK)
