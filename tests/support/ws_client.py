"""A client of somebody else's make (the ``websockets`` package) that checks each promise of the protocol as it reads.

It is lean enough for hundreds of them in one process: one task each, one dictionary entry per code.
"""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import msgspec
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

__all__ = ["RecordingClient", "Violation", "connected_clients"]

_PATIENCE_S = 40.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.05, 0.5
_OPENED_AT_ONCE = 50


class Violation(AssertionError):
    """The server broke a promise of its protocol."""


class _View:
    """What one connection has been sent, and what it may be sent next."""

    def __init__(self) -> None:
        self.hello: dict[str, Any] = {}
        # Subscribed code to the seq of the last row; None before the first one without a snapshot.
        self.bases: dict[str, int | None] = {}
        self.due: deque[set[str]] = deque()  # codes of each snapshot that an ack has announced
        self.awaited: set[str] = set()  # codes whose snapshot must come before their next tick
        self.columns: dict[int, list[str]] = {}  # of rows that are arrays
        self.highest: dict[str, int] = {}
        self.epochs: dict[str, str] = {}


class RecordingClient:
    """One client. Any broken promise is raised by whatever is called next, and when the client is closed.

    Args:
        url: ``ws://…`` or ``wss://…``.
        codes: subscribed to at each connection.
        snapshot: whether those subscriptions want a snapshot.
        reconnects: connect and subscribe anew whenever the connection is lost.
        history: keep every tick row in ``ticks``.
        msgpack: speak MessagePack.
        receive_buffer_bytes: of the socket; a small one makes a client that stops reading felt soon.
        on_ticks: called with this client and the rows of each tick message, when they have been found right.
        options: for ``websockets.connect``, e.g. ``ssl``.

    Attributes:
        rows: newest row per code, from snapshots and ticks, over all connections.
        ticks: all tick rows, with ``history``.
        received: tick rows so far.
        merged: rows that the server says it merged into others.
        restated: rows of snapshots that nobody asked for: their code is numbered anew, or rows before them were lost.
        passed_over: how many rows of the new numbering at most came before those.
        control: the last messages that are neither rows nor heartbeats.
        heartbeat: the newest one.
        lives: connections that were made.
        losses: connections that were lost without our asking.
    """

    def __init__(
        self,
        url: str,
        codes: Iterable[str] = (),
        *,
        snapshot: bool = True,
        reconnects: bool = False,
        history: bool = False,
        msgpack: bool = False,
        receive_buffer_bytes: int | None = None,
        on_ticks: "Callable[[RecordingClient, Sequence[dict[str, Any]]], None] | None" = None,
        **options: Any,
    ) -> None:
        self._url = url
        self._codes = list(codes)
        self._snapshot = snapshot
        self._reconnects = reconnects
        self._receive_buffer_bytes = receive_buffer_bytes
        self._on_ticks = on_ticks
        self._is_binary = msgpack
        self._options = {"subprotocols": ["quotes.v1.msgpack"]} | options if msgpack else options
        self._socket: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._view = _View()
        self._asked: dict[Any, tuple[asyncio.Future[dict[str, Any]], dict[str, Any]]] = {}
        self._next_id = 0
        self._is_leaving = False
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._greeted = asyncio.Event()
        self._ended = asyncio.Event()
        self._fault: BaseException | None = None
        self.rows: dict[str, dict[str, Any]] = {}
        self.ticks: list[dict[str, Any]] | None = [] if history else None
        self.received = 0
        self.merged = 0
        self.restated = 0
        self.passed_over = 0
        self.control: deque[dict[str, Any]] = deque(maxlen=500)
        self.heartbeat: dict[str, Any] | None = None
        self.heartbeats = 0
        self.lives = 0
        self.losses = 0
        self.close_code: int | None = None
        self.close_reason = ""

    # The life of the connection

    async def open(self) -> "RecordingClient":
        """Connect, wait for ``hello`` and subscribe."""
        await self._connect()
        self._reader = asyncio.create_task(self._read())
        await self._hear_hello()
        if self._codes:
            await self.subscribe(*self._codes, snapshot=self._snapshot)
        return self

    async def close(self) -> None:
        """Close in order; raise what was found broken."""
        self._is_leaving = True
        self._may_read.set()
        if self._socket is not None:
            await self._socket.close()
        if self._reader is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 10)
            self._reader.cancel()
            await asyncio.wait([self._reader])
        self.check()

    def abort(self) -> None:
        """Cut the connection off (RST), as a machine that loses power does."""
        self._is_leaving = True
        assert self._socket is not None
        raw = self._socket.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self._socket.transport.abort()

    async def __aenter__(self) -> "RecordingClient":
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def check(self) -> None:
        """Raise what was found broken so far."""
        if self._fault is not None:
            raise self._fault

    async def _connect(self) -> None:
        self._view = _View()
        self._greeted.clear()
        options = dict(self._options)
        if self._receive_buffer_bytes is not None:
            options["sock"] = await self._small_socket(self._receive_buffer_bytes)
        self._socket = await connect(
            self._url, compression=None, max_size=None, max_queue=1, ping_interval=None, open_timeout=_PATIENCE_S,
            close_timeout=5, proxy=None, **options,
        )  # fmt: skip
        self.lives += 1
        self.close_code = None

    async def _small_socket(self, size: int) -> socket.socket:
        parts = urlsplit(self._url)
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        s.setblocking(False)
        await asyncio.get_running_loop().sock_connect(s, (parts.hostname, parts.port))
        return s

    async def _hear_hello(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._greeted.wait(), _PATIENCE_S)
        self.check()
        if not self._view.hello:
            raise AssertionError(f"no hello; closed with {self.close_code} {self.close_reason!r}")

    async def _read(self) -> None:
        try:
            while True:
                await self._read_connection()
                if self._is_leaving or not self._reconnects:
                    return
                self.losses += 1
                if not await self._return():
                    return
        except Violation as e:
            self._fault = e
            assert self._socket is not None
            self._socket.transport.abort()
        finally:
            self._ended.set()
            self._greeted.set()
            self._forget_asked()

    async def _read_connection(self) -> None:
        socket = self._socket
        assert socket is not None
        try:
            while True:
                text = await socket.recv()
                if not self._may_read.is_set():
                    await self._may_read.wait()
                self._expect(isinstance(text, bytes) is self._is_binary, "a message of the wrong kind")
                self._take(msgspec.msgpack.decode(text) if isinstance(text, bytes) else orjson.loads(text))
        except ConnectionClosed:
            self.close_code, self.close_reason = socket.close_code, socket.close_reason or ""
        self._forget_asked()

    async def _return(self) -> bool:
        backoff_s = _BACKOFF_FIRST_S
        while not self._is_leaving:
            await asyncio.sleep(backoff_s)
            backoff_s = min(_BACKOFF_MOST_S, backoff_s * 2)
            try:
                await self._connect()
            except (OSError, InvalidHandshake, TimeoutError, EOFError):
                continue
            if self._codes:
                # Its ack is read by the very task that we are.
                await self._send("subscribe", {"codes": self._codes, "snapshot": self._snapshot})
            return True
        return False

    def _forget_asked(self) -> None:
        for future, _ in self._asked.values():
            if not future.done():
                future.set_exception(ConnectionError("the connection was lost before the answer"))
                future.exception()  # whoever still waits gets it; nobody has to
        self._asked.clear()

    # What it is

    @property
    def hello(self) -> dict[str, Any]:
        return self._view.hello

    @property
    def fd(self) -> str:
        """The connection's name in the cluster."""
        return str(self._view.hello["conn"])

    @property
    def worker(self) -> str:
        """The worker that serves it."""
        return self.fd.split(".")[1]

    @property
    def codes(self) -> set[str]:
        """The codes that the server has acknowledged."""
        return set(self._view.bases)

    @property
    def is_open(self) -> bool:
        """Connected, greeted, and every snapshot that was announced is here."""
        view = self._view
        return bool(
            view.hello
            and not self._ended.is_set()
            and self._socket is not None
            and self._socket.close_code is None
            and not view.due
            and (not self._codes or view.bases)
        )

    @property
    def has_ended(self) -> bool:
        """The connection is gone and will not be made again."""
        return self._ended.is_set()

    def states(self) -> list[str]:
        """The states of the connection that it was told, in order."""
        return [m["state"] for m in self.control if m["type"] == "status" and m["scope"] == "connection"]

    def last(self, code: str) -> Any:
        """The last price of ``code``; None before the first one."""
        return self.rows.get(code, {}).get("last")

    # Requests

    async def request(self, action: str, **fields: Any) -> dict[str, Any]:
        """Send a request; return its answer, be it an ack, a pong or an error."""
        self.check()
        future = await self._send(action, fields)
        try:
            return await asyncio.wait_for(asyncio.shield(future), _PATIENCE_S)
        except TimeoutError:
            self.check()
            raise AssertionError(f"no answer to {action} {str(fields)[:200]}") from None
        except ConnectionError:
            self.check()
            raise

    async def subscribe(self, *codes: str, **fields: Any) -> dict[str, Any]:
        """Subscribe; return the ack when the snapshot is here too."""
        answer = await self.request("subscribe", codes=list(codes), **fields)
        assert answer["type"] == "ack", answer
        await self._settle()
        return answer

    async def unsubscribe(self, *codes: str) -> dict[str, Any]:
        answer = await self.request("unsubscribe", codes=list(codes))
        assert answer["type"] == "ack", answer
        return answer

    async def snapshot(self, *codes: str) -> list[dict[str, Any]]:
        """Ask for the newest rows; return them."""
        answer = await self.request("snapshot", codes=list(codes))
        assert answer["type"] == "ack", answer
        await self._settle()
        return [m for m in self.control if m["type"] == "snapshot"][-1]["data"]

    async def ping(self) -> None:
        """Wait until the server has answered everything that was asked before."""
        answer = await self.request("ping")
        assert answer["type"] == "pong", answer

    async def send_raw(self, message: str | bytes) -> None:
        """Send anything."""
        assert self._socket is not None
        await self._socket.send(message)

    async def _settle(self) -> None:
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while self._view.due:
            self.check()
            if self._ended.is_set() or asyncio.get_running_loop().time() > deadline:
                raise AssertionError("an announced snapshot did not come")
            await asyncio.sleep(0.001)

    async def _send(self, action: str, fields: dict[str, Any]) -> "asyncio.Future[dict[str, Any]]":
        self._next_id += 1
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[self._next_id] = future, fields
        assert self._socket is not None
        try:
            said = {"action": action, "id": self._next_id, **fields}
            await self._socket.send(msgspec.msgpack.encode(said) if self._is_binary else orjson.dumps(said).decode())
        except ConnectionClosed:
            self._asked.pop(self._next_id, None)
            future.set_exception(ConnectionError("the connection is closed"))
            future.exception()
        return future

    # Reading, and not

    def stop_reading(self) -> None:
        """Take nothing more from the socket until :meth:`go_on_reading`."""
        self._may_read.clear()

    def go_on_reading(self) -> None:
        self._may_read.set()

    # What the server says

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        view = self._view
        if not view.hello:
            self._expect(kind == "hello", f"the first message is {kind}")
        if "cols" in message and kind != "ack":
            message = {**message, "data": self._objects(message)}
        if kind == "tick":
            self._take_ticks(message["data"])
            return
        if kind == "heartbeat":
            self.heartbeat = message
            self.heartbeats += 1
            return
        self.control.append(message)
        if kind == "hello":
            self._expect(not view.hello, "a second hello")
            view.hello = message
            self._greeted.set()
        elif kind == "snapshot":
            self._take_snapshot(message["data"], message.get("gap", False))
        elif kind in ("ack", "pong", "error"):
            future, fields = self._asked.pop(message.get("id"), (None, {}))
            if kind == "ack":
                self._expect(future is not None, f"an ack that nobody asked for: {message}")
                self._take_ack(message, fields)
            if future is not None and not future.done():
                future.set_result(message)

    def _objects(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows that are arrays, as objects."""
        columns = self._view.columns.get(message["cols"])
        if columns is None:
            raise Violation(f"rows whose columns no ack has named: {message}")
        rows = [dict(zip(columns, row, strict=True)) for row in message["data"]]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def _take_ack(self, message: dict[str, Any], fields: dict[str, Any]) -> None:
        view = self._view
        action = message["action"]
        if action == "subscribe":
            self._expect(("cols" in message) is (fields.get("format") == "rows"), f"columns of objects: {message}")
            if "cols" in message:
                view.columns[message["cols"]] = message["columns"]
            codes = {entry["code"] for entry in message["accepted"]}
            spelled = [entry["as"] for entry in message["accepted"]]
            self._expect(set(spelled) <= set(fields["codes"]), "the ack accepts what was not asked for")
            if not fields.get("snapshot", True):
                for code in codes:
                    view.bases.setdefault(code, None)
            elif codes:
                for code in codes:
                    view.bases.setdefault(code, None)
                view.awaited |= codes
                view.due.append(codes)
        elif action == "snapshot":
            view.due.append({entry["code"] for entry in message["accepted"]})
        elif action == "unsubscribe":
            for code in message["removed"]:
                self._expect(code in view.bases, f"{code} was removed, but not subscribed")
                del view.bases[code]
                view.awaited.discard(code)

    def _take_snapshot(self, rows: Sequence[dict[str, Any]], has_gap: bool) -> None:
        view = self._view
        codes = {row["code"] for row in rows}
        self._expect(len(rows) == len(codes), f"a snapshot of {rows}")
        is_asked = bool(view.due) and view.due[0] == codes
        if is_asked:
            view.due.popleft()
        for row in rows:
            code, seq = row["code"], row["seq"]
            epoch = row.get("epoch") or view.hello["epoch"]
            is_new = epoch != view.epochs.get(code)
            self._expect("prev" not in row, f"prev in a snapshot row: {row}")
            if not is_asked:
                self._expect(
                    code in view.bases and code not in view.awaited, f"a snapshot that nobody waits for: {row}"
                )
                self._expect(has_gap or is_new, f"{code} is restated for nothing: {row}")
                self.restated += 1
                self.passed_over += seq - 1
            self._expect(
                is_new or seq >= view.highest.get(code, 0), f"{code}: a snapshot of seq {seq} after a newer row"
            )
            view.highest[code] = seq
            view.epochs[code] = epoch
            if code in view.bases:
                view.bases[code] = seq
                view.awaited.discard(code)
            if seq:
                self.rows[code] = row

    def _take_ticks(self, rows: Sequence[dict[str, Any]]) -> None:
        view = self._view
        bases, highest = view.bases, view.highest
        for row in rows:
            code, seq = row["code"], row["seq"]
            if code not in bases or code in view.awaited:
                self._expect(code in bases, f"a row of {code}, which is not subscribed")
                self._expect(False, f"a tick of {code} before its snapshot")
            base = bases[code]
            if row.get("prev") != base or (base is not None and next(iter(row)) != "prev"):
                self._expect(False, f"after seq {base} of {code} came {row}")
            if seq <= highest.get(code, 0):
                self._expect(False, f"{code}: seq {seq} after {highest[code]}")
            if base is not None:
                self.merged += seq - base - 1
            bases[code] = highest[code] = seq
            self.rows[code] = row
        self.received += len(rows)
        if self.ticks is not None:
            self.ticks.extend(rows)
        if self._on_ticks is not None:
            self._on_ticks(self, rows)

    def _expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            raise Violation(f"{self._view.hello.get('conn', '?')}: {otherwise}")


@contextlib.asynccontextmanager
async def connected_clients(
    url: str, count: int, codes_of: Callable[[int], Iterable[str]] = lambda n: (), **options: Any
) -> AsyncIterator[list[RecordingClient]]:
    """Open ``count`` clients, a few at a time; close all of them at the end and raise what any found broken.

    Args:
        codes_of: what the n-th one subscribes to.
    """
    clients = [RecordingClient(url, codes_of(n), **options) for n in range(count)]
    try:
        await _in_batches([client.open for client in clients])
        yield clients
    finally:
        for result in await _in_batches([client.close for client in clients], return_exceptions=True):
            if isinstance(result, BaseException):
                raise result  # also when the test has failed already: this is why


async def _in_batches(calls: Sequence[Callable[[], Awaitable[Any]]], return_exceptions: bool = False) -> list[Any]:
    results: list[Any] = []
    for start in range(0, len(calls), _OPENED_AT_ONCE):
        batch = (call() for call in calls[start : start + _OPENED_AT_ONCE])
        results += await asyncio.gather(*batch, return_exceptions=return_exceptions)
    return results
