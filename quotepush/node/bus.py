"""What main and a worker say to each other over their socketpair.

A frame is a 4-byte length and a MessagePack list of messages: one frame per loop turn and
direction. Interest, the rows of codes and their later ticks travel in this one ordered
stream, so a row that answers a question can never be older than a tick behind it.

Both sides come from the same installation; ``Setup`` carries a version all the same, for
the moment in which an upgrade has replaced the files under a running main: a worker that
finds another version than its own ends with 3.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import Any, cast

import msgspec

__all__ = [
    "BUS_VERSION", "Answered", "Ask", "BusEnd", "Carried", "ClientSend", "Doubt", "Drain", "Feed", "Figures",
    "Find", "Found", "Freshness", "Happened", "Hello", "KeysWanted", "Lend", "Listed", "Order", "PlacesBack",
    "PlacesGranted", "PlacesWanted", "Ready", "RegistryClient", "Rows", "Sent", "Setup", "ToMain", "ToWorker",
    "TokenKeys", "Unwatch", "UsersCame",
]  # fmt: skip

BUS_VERSION = 7
_LENGTH = struct.Struct("!I")
_READ_MAX = 1 << 28


class _Message(msgspec.Struct, array_like=True, gc=False):
    """One message; told apart by its tag."""


# From main


class Setup(_Message, tag="setup"):
    """The first message to a worker: everything it must know.

    ``start_us`` is when it begins, by the clock of Redis, in microseconds: later than any worker before it.
    """

    version: int
    settings: dict[str, Any]
    node: str
    epoch: str
    server: str
    life: str = ""
    keys: list[tuple[str, bool]] = []
    start_us: int = 0


class TokenKeys(_Message, tag="keys"):
    """The keys of tokens: texts, and whether each is public (``token_keys``); None: those that the worker has.

    ``is_answer``: to :class:`KeysWanted`.
    """

    keys: list[tuple[str, bool]] | None
    is_answer: bool = False


class Rows(_Message, tag="rows"):
    """Newest rows, in order: code, seq, JSON text without ``prev`` and without the book.

    Where this worker has asked for a code's book, it follows as a JSON object (else None or nothing). Of a row that is
    restated the code's epoch and the reason (``quote.board``) follow too. Up to ``ordinal`` (``quote.ring``) the worker
    has now been sent everything that it wants; 0: nobody knows.
    """

    rows: list[tuple[Any, ...]]
    ordinal: int = 0


class Answered(_Message, tag="answered"):
    """The answer to :class:`Ask`; ``stale`` names the codes that are stale, and is kept true by :class:`Freshness`.

    ``behind`` is, of codes that were asked with an ordinal, the seq of the row before, and rows (seq, text, ordinal).
    """

    question: int
    rows: list[tuple[str, int, bytes | None, bytes | None, str]]
    refused: dict[str, str]
    missed: dict[str, list[tuple[int, bytes]]]
    stale: list[str] = []
    behind: dict[str, tuple[int | None, list[tuple[int, bytes, int]]]] = {}
    ordinal: int = 0


class Freshness(_Message, tag="freshness"):
    """These codes, which the worker watches, have become stale, and those are fresh again."""

    stale: list[str]
    fresh: list[str]


class Found(_Message, tag="found"):
    """The answer to :class:`Find` as JSON text; None: too many ask."""

    question: int
    text: bytes | None


class PlacesGranted(_Message, tag="granted"):
    """The answer to the oldest :class:`PlacesWanted`, with a word for each of its addresses; empty: it has a place."""

    count: int
    words: list[str] = []


class Feed(_Message, tag="feed"):
    """How the feed is, and the epoch that ``hello`` names."""

    state: str
    last_tick_ms: int
    epoch: str


class Doubt(_Message, tag="doubt"):
    """What the registry says about the sessions of this worker may have been removed: write all of it again."""


class Lend(_Message, tag="lend"):
    """Accept at the socket of this empty slot too, or (``is_lent`` false) no longer."""

    slot: int
    is_lent: bool


class Order(_Message, tag="order"):
    """A command of the cluster (``cluster.commands``) that is about sessions of this worker."""

    question: int
    command: bytes


class Sent(_Message, tag="sent"):
    """The answer to :class:`ClientSend`: how many took it and for how many it waits, or why it was not sent."""

    question: int
    delivered: int
    kept: int = 0
    error: str = ""
    message: str = ""
    is_retryable: bool = False


class Drain(_Message, tag="drain"):
    """Close every session, clear the registry and end."""

    timeout_s: float
    retry_after_ms: int


# From a worker


class Hello(_Message, tag="hello"):
    """The first message of a worker: what its life is called in the registry."""

    life: str


class Ready(_Message, tag="ready"):
    """It accepts connections."""


class Ask(_Message, tag="ask"):
    """The newest rows of these codes, with their epochs.

    With ``watch`` also their later ticks; with ``books`` both with their books. ``since`` names codes whose rows
    behind a seq in an epoch are asked for, or behind an ordinal in a life of main: its name has an ``@`` before it.
    """

    question: int
    codes: list[str]
    watch: bool
    books: bool
    since: dict[str, tuple[str, int]]


class Find(_Message, tag="find"):
    """Which codes begin so, or have this in their names; without a text: which have moved most.

    Only those that fit the patterns ``codes``; None: all. As they were ``delay_s`` ago.
    """

    question: int
    text: str | None
    limit: int
    codes: tuple[str, ...] | None = None
    delay_s: int = 0


class KeysWanted(_Message, tag="keys_wanted"):
    """A token names a key that is not known: are there newer ones?"""


class Unwatch(_Message, tag="unwatch"):
    """Nobody here watches these codes any more."""

    codes: list[str]


class PlacesWanted(_Message, tag="wanted"):
    """So many connections need a place now, and so many more places are welcome.

    Where addresses are counted, one for a connection of each of these is wanted instead; an empty one is not counted.
    """

    needed: int
    spare: int
    addresses: list[str] = []


class PlacesBack(_Message, tag="back"):
    """So many places are free again, and one of each of these addresses besides."""

    count: int
    addresses: list[str] = []


class RegistryClient(_Message, tag="registry_client"):
    """The CLIENT ID through which this worker writes one of its lives into the registry, before the first write."""

    client_id: int
    life: str = ""


class Carried(_Message, tag="carried"):
    """The answer to :class:`Order`: a reply of the cluster (``cluster.commands``)."""

    question: int
    reply: bytes


class UsersCame(_Message, tag="users_came"):
    """These users have got a connection here, and Redis knows of it.

    ``limited``: those of them who may have so many in the cluster, and whether the newest of these stay.
    """

    users: list[str]
    limited: list[tuple[str, int, bool]] = []


class ClientSend(_Message, tag="client_send"):
    """A client speaks: a command ``send`` with the client as its sender, who may send it."""

    question: int
    command: bytes


class Happened(_Message, tag="happened"):
    """What those hear who want to know who comes and goes: JSON texts."""

    events: list[bytes]


class Listed(_Message, tag="listed"):
    """Codes that nobody in the cluster watched before, and codes that nobody in it watches any more."""

    came: list[str]
    left: list[str]


class Figures(_Message, tag="figures"):
    """Sign of life with what the worker has counted."""

    figures: dict[str, Any]


ToWorker = (
    Setup | TokenKeys | Rows | Answered | Found | Freshness | PlacesGranted | Feed | Doubt | Lend | Order | Sent | Drain
)
ToMain = (
    Hello | Ready | Ask | Find | KeysWanted | Unwatch | PlacesWanted | PlacesBack | RegistryClient | Figures
    | Carried | UsersCame | ClientSend | Happened | Listed
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()


class BusEnd(asyncio.Protocol):
    """One end of the socketpair.

    Args:
        inbound: the type of message that comes in (:data:`ToMain` or :data:`ToWorker`).
        on_message: called for each, in order.
        on_turn: called after the messages of one read.
        on_lost: called once when the other side is gone.
        on_drained: called when everything written has been taken.
    """

    def __init__(
        self,
        inbound: Any,
        on_message: Callable[[Any], None],
        on_lost: Callable[[], None],
        on_turn: Callable[[], None] = lambda: None,
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[inbound])
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_turn = on_turn
        self._on_drained = on_drained
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._queue: list[Any] = []
        self._is_scheduled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports only look like one

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        while len(received) - at >= 4:
            (length,) = _LENGTH.unpack_from(received, at)
            if length > _READ_MAX:
                raise ValueError(f"a bus frame of {length} bytes")
            if len(received) - at - 4 < length:
                break
            frame = bytes(memoryview(received)[at + 4 : at + 4 + length])
            at += 4 + length
            for message in self._decoder.decode(frame):
                self._on_message(message)
        if at:
            del received[:at]
            self._on_turn()

    def resume_writing(self) -> None:
        self._on_drained()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    @property
    def unsent_bytes(self) -> int:
        """What the other side has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def send(self, message: Any) -> None:
        """Send with everything else of this loop turn."""
        self._queue.append(message)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)

    def send_now(self, message: Any) -> None:  # hot
        """Send now, behind what is queued."""
        self._queue.append(message)
        self.flush()

    def flush(self) -> None:
        """Send what is queued now."""
        self._is_scheduled = False
        queue = self._queue
        if not queue:
            return
        self._queue = []
        if self._transport is not None:
            body = _encoder.encode(queue)
            self._transport.write(_LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        """Send what is queued and close."""
        self.flush()
        if self._transport is not None:
            self._transport.close()
