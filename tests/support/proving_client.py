"""A client that proves from its own stream alone that it has missed nothing, over all its connections.

It resumes with ``epoch`` and ``since`` whenever it comes back, follows the chain of ``prev`` through every row and
raises at the first hole, the first row that comes twice and the first change of epoch that was not announced.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.typing import Subprotocol

from tests.support.ws_client import Violation

__all__ = ["Place", "ProvingClient", "Sight"]

Place = tuple[str, int]
"""Epoch and seq of a row."""


class Sight(msgspec.Struct):
    """What a client has seen until now; it can be sent from process to process.

    Attributes:
        options: that it subscribes with.
        is_subscribed: every code was acknowledged on its connection, and its snapshot, if there is one, is here.
        places: per code the row it stands at.
        rows: per code the newest row.
        prices: per code every row that came as a tick: place and ``last``.
        begins: per code where each chain of them begins: how many ticks came before it, and the place of its snapshot.
        received, merged, gaps, restarts, resumed, lives, states: as of :class:`ProvingClient`.
    """

    options: dict[str, Any]
    is_subscribed: bool
    places: dict[str, Place]
    rows: dict[str, dict[str, Any]]
    prices: dict[str, list[tuple[Place, float | None]]]
    begins: dict[str, list[tuple[int, Place]]]
    received: int
    merged: int
    gaps: dict[str, int]
    restarts: dict[str, int]
    resumed: dict[str, int]
    lives: int
    states: list[str]

    def chains(self, code: str) -> list[tuple[Place, list[Place]]]:
        """Return each chain of a code: where it begins, and the ticks that came behind.

        "No value yet", and then a row in a snapshot, is none.
        """
        begins = self.begins.get(code, [])
        ends = [count for count, _ in begins[1:]] + [len(self.prices[code])]
        return [
            (place, [tick for tick, _ in self.prices[code][count:end]])
            for (count, place), end in zip(begins, ends, strict=True)
            if place[1] or count < end
        ]


class ProvingClient:
    """One client.

    Args:
        url: ``ws://…``.
        codes: subscribed to at each connection, behind the rows that the last one brought.
        leaves_after: cut the connection off whenever it has brought so many tick rows, and come back.
        is_msgpack: speak MessagePack.
        keep: what ``seen`` has of a row; None: the row.
        options: of ``subscribe``, e.g. ``fields`` and ``format``.

    Attributes:
        places: per code the row it stands at.
        rows: per code the newest row.
        seen: per code every row that came as a tick: place and row.
        begins: per code where each chain of them begins: how many ticks came before it, and the place of its snapshot.
        received: tick rows.
        merged: rows that the server says it merged into others.
        merged_here: the same by code, on this connection.
        states: of its connections, as it was told.
        gaps: per code how often loss was announced.
        restarts: per code how often the chain began anew: by a snapshot that was no first one.
        resumed: what the server said to ``since``, counted.
        lives: connections that were greeted.
    """

    def __init__(
        self,
        url: str,
        codes: Iterable[str],
        *,
        leaves_after: int | None = None,
        is_msgpack: bool = False,
        keep: Callable[[dict[str, Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        self._url = url
        self._codes = list(codes)
        self._leaves_after = leaves_after
        self._subprotocol = Subprotocol("quotes.v1.msgpack" if is_msgpack else "quotes.v1.json")
        self._encode: Callable[[Any], Any] = msgspec.msgpack.encode if is_msgpack else _json_text
        self._decode: Callable[[Any], Any] = msgspec.msgpack.decode if is_msgpack else orjson.loads
        self._keep = keep or (lambda row: row)
        self.options = options
        self._socket: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_leaving = False
        self.places: dict[str, Place] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, list[tuple[Place, Any]]] = {code: [] for code in self._codes}
        self.begins: dict[str, list[tuple[int, Place]]] = {}
        self.received = 0
        self.merged = 0
        self.gaps: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.resumed: Counter[str] = Counter()
        self.states: list[str] = []
        self.lives = 0
        self.begin()

    def begin(self) -> None:
        """There is another connection, which has said nothing yet."""
        self._hello: dict[str, Any] = {}
        self._columns: dict[int, list[str]] = {}
        self._answered: dict[str, str] = {}  # subscribed code to what its ack said of ``resume``
        self._awaited: set[str] = set()  # codes whose snapshot has to come before their first tick
        self._asked_since: set[str] = set()
        self.merged_here: Counter[str] = Counter()
        self._listed: asyncio.Future[list[dict[str, Any]]] | None = None
        self._has_live = False
        self._received_here = 0

    async def __aenter__(self) -> "ProvingClient":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving = True
        assert self._task is not None
        if self._socket is not None:
            self._socket.transport.abort()
        self._task.cancel()
        await asyncio.wait([self._task])
        self.check()

    def check(self) -> None:
        """Raise what was found broken so far."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    @property
    def is_subscribed(self) -> bool:
        """Every code was acknowledged on this connection, and its snapshot, if there is one, is here."""
        self.check()
        return self._answered.keys() >= set(self._codes) and not self._awaited

    def sight(self, *, is_whole: bool = True) -> Sight:
        """Return what it has seen until now; otherwise than whole, without the rows before the newest."""
        seen = self.seen if is_whole else dict.fromkeys(self.seen, ())
        return Sight(
            options=self.options,
            is_subscribed=self.is_subscribed,
            places=self.places,
            rows=self.rows,
            prices={code: [(place, row.get("last")) for place, row in rows] for code, rows in seen.items()},
            begins=self.begins,
            received=self.received,
            merged=self.merged,
            gaps=self.gaps,
            restarts=self.restarts,
            resumed=self.resumed,
            lives=self.lives,
            states=self.states,
        )

    async def subscriptions(self) -> list[dict[str, Any]]:
        """Ask the server for the list of our subscriptions."""
        assert self._socket is not None
        self._listed = asyncio.get_running_loop().create_future()
        await self._socket.send(self._encode({"action": "list", "id": 2}))
        return await asyncio.wait_for(self._listed, 30)

    async def _run(self) -> None:
        while not self._is_leaving:
            with contextlib.suppress(OSError, InvalidHandshake, TimeoutError, EOFError, ConnectionClosed):
                await self._run_connection()
            await asyncio.sleep(random.uniform(0.02, 0.1))

    async def _run_connection(self) -> None:
        self.begin()
        async with connect(
            self._url, subprotocols=[self._subprotocol], compression=None, max_size=None, ping_interval=None,
            open_timeout=10, close_timeout=1, proxy=None,
        ) as ws:  # fmt: skip
            self._socket = ws
            self.take(self._decode(await ws.recv()))
            await ws.send(self._encode(self.request()))
            async for message in ws:
                self.take(self._decode(message))
                if self._leaves_after is not None and self._received_here >= self._leaves_after:
                    ws.transport.abort()
                    return

    def request(self, codes: Iterable[str] | None = None, *, resumes: bool = True, **options: Any) -> dict[str, Any]:
        """Return what subscribes to these codes (None: all), behind the rows that are known, with other options."""
        self.options |= options
        wanted = self._codes if codes is None else list(codes)
        since = {code: {"epoch": epoch, "seq": seq} for code, (epoch, seq) in self.places.items() if code in wanted}
        self._asked_since = set(since) if resumes else set()
        request = {"action": "subscribe", "id": 1, "codes": wanted, **self.options}
        return {**request, "since": since} if self._asked_since else request

    # What the server says

    def take(self, message: dict[str, Any]) -> None:
        """Take a message; raise what is wrong with it."""
        kind = message["type"]
        self._expect(bool(self._hello) != (kind == "hello"), f"{kind}, and hello is first")
        if kind == "hello":
            self._hello = message
            self.lives += 1
        elif kind == "ack" and message["action"] == "subscribe":
            self._take_ack(message)
        elif kind == "ack" and message["action"] == "unsubscribe":
            for code in message["removed"]:
                del self._answered[code], self.places[code]
                self._awaited.discard(code)
        elif kind == "snapshot":
            self._take_snapshot(message)
        elif kind == "tick":
            self._take_ticks(message)
        elif kind == "ack" and message["action"] == "list" and self._listed is not None:
            self._listed.set_result(message["subscriptions"])
        elif kind == "status" and message["scope"] == "connection":
            self.states.append(message["state"])
        else:
            self._expect(kind in ("ack", "heartbeat", "status"), f"{message}")

    def _take_ack(self, message: Mapping[str, Any]) -> None:
        if "columns" in message:
            self._columns[message["cols"]] = message["columns"]
        self._expect(not message["rejected"], f"{message}")
        for entry in message["accepted"]:
            code, resume = entry["code"], entry.get("resume")
            self._expect((resume is not None) == (code in self._asked_since), f"an answer to no question: {entry}")
            if resume is not None:
                self.resumed[resume] += 1
            if resume in ("current", "replay"):
                self._expect(entry.get("epoch", self._hello["epoch"]) == self.places[code][0], f"resumed: {entry}")
            elif resume or self.options.get("snapshot", True):
                self._awaited.add(code)
            self._answered[code] = resume or "snapshot"

    def _rows_of(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        if "cols" not in message:
            return list(message["data"])
        columns = self._columns[message["cols"]]
        rows: Sequence[Sequence[Any]] = message["data"]
        self._expect(all(len(row) == len(columns) for row in rows), f"columns {columns} of {message}")
        return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]

    def _take_snapshot(self, message: Mapping[str, Any]) -> None:
        has_gap = message.get("gap", False)
        for row in self._rows_of(message):
            code, seq = row["code"], row["seq"]
            epoch = row.get("epoch") or message.get("epochs", {}).get(code) or self._hello["epoch"]
            before = self.places.get(code)
            self._expect("prev" not in row, f"prev in a snapshot row: {row}")
            self._expect(code in self._answered, f"a snapshot of {code}, which is not subscribed")
            is_asked = code in self._awaited
            self._awaited.discard(code)
            if before is not None:
                is_known = before[0] == epoch
                # In the same epoch it can be one without a gap: it has been another epoch in between, and was merged.
                self._expect(not is_known or seq >= before[1] + (not is_asked), f"{code}: {row} after {before}")
                if before[1]:
                    self.restarts[code] += 1
            if has_gap:
                self.gaps[code] += 1
            self.places[code] = epoch, seq
            self.begins.setdefault(code, []).append((len(self.seen[code]), self.places[code]))
            if seq:
                self.rows[code] = row

    def _take_ticks(self, message: Mapping[str, Any]) -> None:
        is_replay = message.get("replay", False)
        self._expect(not (is_replay and self._has_live), "a replayed row after a live one")
        self._has_live |= not is_replay
        for row in self._rows_of(message):
            code, seq = row["code"], row["seq"]
            self._expect(code in self._answered, f"a row of {code}, which is not subscribed")
            self._expect(code not in self._awaited, f"a tick of {code} before its snapshot")
            self._expect(not is_replay or self._answered[code] == "replay", f"replayed, but not said so: {row}")
            epoch, before = self.places[code]
            self._expect(row.get("prev") == before, f"{code}: after {before} came {row}")
            self._expect(next(iter(row)) == "prev", f"prev is not first: {row}")
            self._expect(seq > before, f"{code}: after {before} came {row}")
            if seq != before + 1:
                self.merged += seq - before - 1
                self.merged_here[code] += seq - before - 1
            self.received += 1
            self._received_here += 1
            self.places[code] = epoch, seq
            self.rows[code] = row
            self.seen[code].append(((epoch, seq), self._keep(row)))

    def _expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            raise Violation(f"{self._hello.get('conn', '?')}: {otherwise}")


def _json_text(said: Any) -> str:
    return orjson.dumps(said).decode()
