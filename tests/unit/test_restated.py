"""New epochs, gaps and resumed subscriptions, from the board to what clients read; only Redis and the sockets are not
there. Every client proves its stream by itself.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quotepush.node import relay as relay_module
from quotepush.node.bus import Answered, Ask, Rows
from quotepush.node.relay import Relay, WorkerFeed
from quotepush.push import outbox as outbox_module
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.hub import Hub
from quotepush.push.outbox import Outbox
from quotepush.push.session import Session
from quotepush.push.subscriptions import Subscriptions
from quotepush.quote.board import GAP, NEW_EPOCH, Board, Quote, TradingDays
from quotepush.quote.ring import Ring
from quotepush.wire.formats import JSON, MSGPACK
from tests.support.proving_client import ProvingClient
from tests.support.ws_client import Violation

KINDS: dict[str, dict[str, Any]] = {
    "objects": {},
    "arrays": {"format": "rows"},
    "view": {"fields": ["last"]},
    "view as arrays": {"fields": ["last", "volume"], "format": "rows"},
    "with the book": {"fields": ["last", "bids"]},
    "MessagePack": {"is_msgpack": True},
    "MessagePack arrays": {"is_msgpack": True, "format": "rows"},
}
NOW_MS = 1_800_000_000_000


class Worker:
    """The other end of main's bus: it takes everything at once, or lets it pile up."""

    def __init__(self) -> None:
        self.unsent_bytes = 0
        self.on_message: Callable[[Any], None]

    def send(self, message: Any) -> None:
        self.on_message(message)

    send_now = send


class Stack:
    """Main and one of its workers."""

    def __init__(self, *, max_rows: int = 1000, max_bytes: int = 10**6, keeps: bool = True) -> None:
        self.now_ms = NOW_MS
        self.ring = Ring(max_bytes=10**6, max_code_bytes=10**5 if keeps else 0, max_age_ms=60_000)
        self.relay = Relay(lambda code: True, self.ring, keep_s=1000)
        self.board = self.relay.board = Board(
            epoch="main", days=TradingDays({}), watched=self.relay.wanted, books_watched=self.relay.books
        )
        self.board.log_epoch = "E"
        self.seqs: dict[str, int] = {}
        self.price = 0
        self.worker = Worker()
        self.worker.on_message = self._take
        self.feed = WorkerFeed(self.worker)  # type: ignore[arg-type]
        self._questions: dict[int, Callable[[Answer], None]] = {}
        self.subscriptions = Subscriptions()
        self.states: list[str] = []
        self.hub = Hub(
            self.subscriptions, max_delay_s=0.0, max_rows=max_rows, max_bytes=max_bytes,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=self._fail, clock_ms=lambda: self.now_ms,
        )  # fmt: skip
        self.desk = Desk(
            subscriptions=self.subscriptions, limits=Limits(100, 100, 1e6, 10**6), server="test", epoch="E",
            heartbeat_ms=5000, watch=self._watch, look=self._look,
            unwatch=lambda codes: self.relay.unwatch(self.feed, codes), subscribed=lambda fd: None,
            clock_ms=lambda: self.now_ms, deliver=self.hub.deliver, replay=self.hub.replay,
        )  # fmt: skip
        self.clients: list[Client] = []

    def _fail(self, outbox: Outbox) -> None:
        raise AssertionError("a session could not be written to")

    # Between main and the worker

    def _watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        self._ask(codes, then, True, books, since)

    def _look(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        self._ask(codes, then, False, False, {})

    def _ask(
        self, codes: Sequence[str], then: Callable[[Answer], None], watch: bool, books: bool, since: Mapping[str, Any]
    ) -> None:
        number = len(self._questions)
        self._questions[number] = then
        self.relay.ask(self.feed, Ask(number, list(codes), watch, books, dict(since)))

    def _take(self, message: Any) -> None:
        if isinstance(message, Rows):
            for row in message.rows:
                self.hub.offer(*row)
        else:
            assert isinstance(message, Answered)
            rows = {row[0]: row[1:] for row in message.rows}
            self._questions[message.question](Answer(rows, message.refused, message.missed))

    # Ticks

    def offer(self, quote: Quote | None) -> None:
        if quote is not None:
            self.relay.offer(quote)

    def tick(self, code: str = "A", /, **fields: Any) -> None:
        """A tick of the log with a new price; nothing is flushed."""
        self.price += 1
        self.seqs[code] = seq = self.seqs.get(code, 0) + 1
        self.offer(self.board.apply_numbered(code, seq, {"last": self.price, **fields}, self.now_ms))

    def plain(self, code: str = "A", /, **fields: Any) -> None:
        self.price += 1
        self.offer(self.board.apply(code, orjson.dumps({"last": self.price, **fields}), self.now_ms))

    def lose(self, code: str = "A", count: int = 1) -> None:
        """Ticks that the log does not have any more."""
        self.seqs[code] = self.seqs.get(code, 0) + count

    def bridge(self, code: str = "A", /, reason: int = GAP) -> None:
        """Main reads the row anew behind ticks that were lost."""
        self.price += 1
        row = {"last": self.price, "volume": 7}
        self.offer(self.board.restate(code, self.board.log_epoch, self.seqs[code], row, self.now_ms, reason))

    def new_life(self, epoch: str) -> None:
        self.board.log_epoch = self.desk.epoch = epoch
        self.seqs.clear()

    def flush(self) -> None:
        self.relay.flush()
        self.hub.flush_soon()

    async def settle(self) -> None:
        """Flush until nothing moves any more."""
        self.flush()
        while self.hub._timer is not None or self.hub._due_timer is not None:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for client in self.clients:
            client.check()

    def client(self, *codes: str, **options: Any) -> "Client":
        client = Client(self, codes or ("A",), **options)
        self.clients.append(client)
        client.connect()
        return client

    def place(self, code: str) -> tuple[str, int]:
        quote = self.board.quotes[code]
        return quote.epoch, quote.seq


class Client:
    """A session, the socket that it speaks through, and a client at the other end.

    Attributes:
        heard: what the client was told, oldest first.
        blocks: the socket takes one write more, and then nothing until :meth:`unblock`.
    """

    def __init__(self, stack: Stack, codes: Iterable[str], *, is_msgpack: bool = False, **options: Any) -> None:
        self._stack = stack
        self._is_msgpack = is_msgpack
        self._decode: Callable[[bytes], Any] = msgspec.msgpack.decode if is_msgpack else orjson.loads
        self.prover = ProvingClient("", codes, is_msgpack=is_msgpack, **options)
        self.heard: list[dict[str, Any]] = []
        self.blocks = False
        self.is_open = False
        self._fault: Violation | None = None

    def connect(self, *, blocks: bool = False) -> None:
        self.prover.begin()
        self.session = Session("n.0.1", self, self._stack.desk, MSGPACK if self._is_msgpack else JSON)
        self.is_open = True
        self.blocks = blocks
        self.session.greet()
        self.say(self.prover.request())

    def disconnect(self) -> None:
        self.is_open = False
        outbox = self.session.outbox
        self.session.close()
        self._stack.hub.forget([outbox])

    def subscribe(self, *codes: str, **options: Any) -> dict[str, Any]:
        """Subscribe once more on this connection; return the ack."""
        self.say(self.prover.request(codes, **options))
        return self.acks[-1]

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        self.say({"action": action, **fields})
        return [m for m in self.heard if m["type"] in ("ack", "error")][-1]

    def say(self, request: dict[str, Any]) -> None:
        encode = msgspec.msgpack.encode if self._is_msgpack else orjson.dumps
        self.session.receive(encode(request))

    def merged(self, code: str = "A") -> int:
        """How many rows the server says it has merged for this subscription."""
        (entry,) = [entry for entry in self.ask("list")["subscriptions"] if entry["code"] == code]
        return int(entry["merged"])

    # The socket

    def write(self, data: bytes) -> None:
        assert self.is_open, "written behind the end"
        for message in map(self._decode, payloads(data)):
            if message["type"] in ("snapshot", "tick") and self.session.outbox.is_blocked:
                assert message["type"] == "snapshot", "a row for a socket that had not taken the last write"
            self.heard.append(message)
            try:
                self.prover.take(message)
            except Violation as e:
                self._fault = self._fault or e
        if self.blocks and message["type"] in ("snapshot", "tick"):
            self.session.outbox.is_blocked = True

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...

    def block(self) -> None:
        """The socket takes nothing any more."""
        self.blocks = True
        self.session.outbox.is_blocked = True

    def unblock(self, blocks: bool = False) -> None:
        """The socket has taken all of it; with ``blocks`` it takes one write more."""
        self.blocks = blocks
        self.session.outbox.is_blocked = False
        self._stack.hub.unblock(self.session.outbox)

    # What was heard

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    @property
    def acks(self) -> list[dict[str, Any]]:
        return [m for m in self.heard if m["type"] == "ack"]

    def take_rows(self) -> list[tuple[str, bool, list[tuple[str, int]]]]:
        """Kind, ``gap`` and the rows (code and seq) of each message with rows since the last time."""
        heard, self.heard = self.heard, []
        found = []
        for message in heard:
            if message["type"] in ("snapshot", "tick"):
                is_array = "cols" in message
                rows = [(row[1], row[2]) if is_array else (row["code"], row["seq"]) for row in message["data"]]
                kind = "replay" if message.get("replay") else message["type"]
                found.append((kind, message.get("gap", False), rows))
        return found

    def is_right(self) -> None:
        """The client has the newest row of every code, and knows its place."""
        for code, place in self.prover.places.items():
            quote = self._stack.board.quotes.get(code)
            if quote is not None:
                row = quote.row | quote.book
                names = self.prover.options.get("fields") or [n for n in quote.row if n not in ("seq", "ts", "code")]
                expected = {name: row[name] for name in names if name in row}
                assert {n: v for n, v in self.prover.rows[code].items() if n in names} == expected, code
                assert place[0] == quote.epoch


def payloads(data: bytes) -> Iterator[bytes]:
    """The payloads of frames that were written together."""
    while data:
        length, at = data[1], 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(data[2:at], "big")
        yield data[at : at + length]
        data = data[at + length :]


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """Everybody is checked at the end."""
    stack = Stack()
    yield stack
    await stack.settle()
    for client in stack.clients:
        client.is_right()


def row_of(message: dict[str, Any], client: Client) -> dict[str, Any]:
    """The only row of a message."""
    (row,) = client.prover._rows_of(message)
    return row


# New epochs and gaps


@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_epoch_is_one_snapshot_row_before_the_next_tick(stack: Stack, kind: str) -> None:
    stack.tick(bids=[[1, 1]])
    client = stack.client(**KINDS[kind])
    stack.tick()
    await stack.settle()
    client.take_rows()
    stack.new_life("F")
    stack.tick(volume=3)
    stack.flush()
    (message,) = client.heard
    epoch = message["epochs"]["A"] if "cols" in message else message["data"][0]["epoch"]
    assert (message["type"], "gap" in message, epoch) == ("snapshot", False, "F")
    row = row_of(message, client)
    assert (row["seq"], row["last"], "prev" in row) == (1, 3, False)
    client.take_rows()
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 2)])]
    assert client.merged() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_read_anew", [False, True])
async def test_a_gap_is_one_snapshot_row_that_says_so(stack: Stack, kind: str, is_read_anew: bool) -> None:
    stack.tick()
    client = stack.client(**KINDS[kind])
    client.take_rows()
    stack.lose(count=5)
    if is_read_anew:
        stack.bridge()
    else:
        stack.tick()
    stack.flush()
    (message,) = client.heard
    assert (message["type"], message["gap"]) == ("snapshot", True)
    assert client.take_rows() == [("snapshot", True, [("A", 6 if is_read_anew else 7)])]
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 7 if is_read_anew else 8)])]
    assert client.merged() == 0
    assert client.prover.gaps == {"A": 1}


async def test_only_the_codes_concerned_are_restated(stack: Stack) -> None:
    client = stack.client("A", "B", "C")
    for code in "ABC":
        stack.tick(code)
    await stack.settle()
    client.take_rows()
    stack.lose("A")
    for code in "BACBA":
        stack.tick(code)
    await stack.settle()
    told = client.take_rows()
    assert ("snapshot", True, [("A", 3)]) in told
    assert [row for kind, _, rows in told if kind == "tick" for row in rows if row[0] != "A"] == [
        ("B", 2), ("C", 2), ("B", 3),
    ]  # fmt: skip
    assert told[-1] == ("tick", False, [("C", 2), ("B", 3), ("A", 4)])


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_before_and_behind_a_new_epoch_are_sent_in_their_order(stack: Stack, kind: str) -> None:
    stack.tick()
    client = stack.client(**KINDS[kind])
    client.take_rows()
    stack.tick()
    stack.new_life("F")
    stack.tick()
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [
        ("tick", False, [("A", 2)]), ("snapshot", False, [("A", 1)]), ("tick", False, [("A", 2)]),
    ]  # fmt: skip


async def test_a_code_that_changes_between_the_log_and_plain_ticks_is_announced_each_time(stack: Stack) -> None:
    client = stack.client()
    (ack,) = client.acks
    assert ack["accepted"][0]["epoch"] == "main"  # no tick yet: it may well be a plain one
    stack.plain()
    await stack.settle()
    assert client.take_rows()[-1] == ("tick", False, [("A", 1)])
    for n in (1, 2, 3):
        stack.tick()
        stack.plain()
        stack.plain()
        await stack.settle()
        kinds = [(kind, rows) for kind, _, rows in client.take_rows()]
        assert kinds == [("snapshot", [("A", n)]), ("snapshot", [("A", n + 1)]), ("tick", [("A", n + 2)])]
    assert client.prover.restarts["A"] == 6
    assert client.prover.places["A"] == stack.place("A")


async def test_the_ack_names_an_epoch_that_is_not_the_one_of_hello(stack: Stack) -> None:
    stack.tick("A")
    stack.plain("B")
    for kind in KINDS.values():
        client = stack.client("A", "B", **kind)
        (ack,) = client.acks
        assert [entry.get("epoch") for entry in ack["accepted"]] == [None, "main"]
        assert client.prover.places == {"A": ("E", 1), "B": ("main", 1)}


async def test_whoever_wanted_no_snapshot_is_told_of_a_new_epoch(stack: Stack) -> None:
    stack.tick()
    client = Client(stack, ["A"], snapshot=False)
    client.prover.places["A"] = "E", 1  # as of another connection
    client.prover.begin()
    client.connect()
    stack.clients.append(client)
    stack.new_life("F")
    stack.tick()
    await stack.settle()
    assert client.prover.places["A"] == ("F", 1)


async def test_a_rate_does_not_hold_back_a_new_epoch(stack: Stack) -> None:
    stack.tick()
    client = stack.client(max_rate=0.001)
    stack.tick()
    stack.tick()
    stack.flush()
    stack.new_life("F")
    stack.tick()
    stack.flush()
    assert client.take_rows()[-1] == ("snapshot", False, [("A", 1)])
    client.disconnect()
    stack.clients.clear()
    stack.hub._due_timer.cancel()  # type: ignore[union-attr]
    stack.hub._due_timer = None


async def test_whoever_is_ahead_of_this_server_is_not_set_back_by_its_gap(stack: Stack) -> None:
    for _ in range(3):
        stack.tick()
    ahead, other = Client(stack, ["A"]), stack.client()
    ahead.prover.places["A"] = "E", 20
    stack.clients.append(ahead)
    ahead.connect()
    assert ahead.prover.resumed == {"current": 1}
    stack.lose(count=5)
    stack.tick()
    stack.tick()
    await stack.settle()
    assert (ahead.take_rows(), other.prover.gaps["A"]) == ([], 1)
    stack.seqs["A"] = 18
    stack.bridge()
    for _ in range(3):
        stack.tick()
    await stack.settle()
    assert ahead.take_rows() == [("tick", False, [("A", 21)])]
    assert ahead.merged() == 0


# For those who are slow


@pytest.mark.parametrize("kind", KINDS)
async def test_a_socket_that_is_full_for_a_moment_gets_every_row_in_order(stack: Stack, kind: str) -> None:
    stack.tick()
    client = stack.client(**KINDS[kind])
    client.take_rows()
    client.block()
    stack.tick()
    stack.lose()
    stack.tick()
    stack.tick()
    await stack.settle()
    assert client.take_rows() == []
    assert client.merged() == 0
    client.take_rows()
    client.unblock()
    await stack.settle()
    assert client.take_rows() == [
        ("tick", False, [("A", 2)]), ("snapshot", True, [("A", 4)]), ("tick", False, [("A", 5)]),
    ]  # fmt: skip
    assert client.merged() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reason", [NEW_EPOCH, GAP])
async def test_who_merges_gets_one_snapshot_row_with_what_came_last(kind: str, reason: int) -> None:
    stack = Stack(max_rows=2)
    stack.tick("A")
    stack.tick("B")
    client = stack.client("A", "B", **KINDS[kind])
    client.take_rows()
    client.block()
    for _ in range(4):
        stack.tick("A")
        stack.tick("B")
        await stack.settle()
    if reason == GAP:
        stack.lose("A")
    else:
        stack.board.log_epoch = "F"
        stack.seqs["A"] = 0
    for _ in range(3):
        stack.tick("A")
        await stack.settle()
    client.unblock()
    await stack.settle()
    client.is_right()
    newest = 9 if reason == GAP else 3
    told = client.take_rows()
    assert sorted(told) == [("snapshot", reason == GAP, [("A", newest)]), ("tick", False, [("B", 5)])]
    assert client.prover.places["A"] == stack.place("A")
    assert client.merged("A") == 6  # seven rows came, one was sent
    assert client.merged("B") == 3
    client.take_rows()
    stack.board.log_epoch = stack.place("A")[0]
    stack.tick("A")
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", newest + 1)])]
    assert client.merged("A") == 6


async def test_what_a_slow_worker_is_held_says_of_a_loss_until_it_is_told(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    client.take_rows()
    stack.worker.unsent_bytes = relay_module._SLOW_BYTES + 1
    stack.lose()
    stack.tick()
    stack.flush()
    stack.new_life("F")
    stack.tick()
    stack.flush()
    stack.tick()
    stack.flush()
    stack.worker.unsent_bytes = 0
    stack.feed.drained()
    await stack.settle()
    assert client.take_rows() == [("snapshot", True, [("A", 2)])]
    assert client.prover.places["A"] == ("F", 2)


async def test_what_a_slow_worker_is_held_is_not_told_to_whoever_comes_back_in_another_epoch(stack: Stack) -> None:
    for _ in range(5):
        stack.tick()
    client = stack.client()
    stack.worker.unsent_bytes = relay_module._SLOW_BYTES + 1
    stack.tick()
    stack.flush()
    client.ask("unsubscribe", codes=["A"])
    stack.new_life("F")
    stack.tick()
    stack.flush()
    stack.desk.epoch = "E"  # the client's hello said so
    client.subscribe("A")
    stack.worker.unsent_bytes = 0
    stack.feed.drained()
    stack.tick()
    await stack.settle()
    assert client.prover.places["A"] == ("F", 2)


@pytest.mark.parametrize("reason", [NEW_EPOCH, GAP])
@pytest.mark.parametrize("is_merging", [False, True])
async def test_other_options_while_a_row_waits_to_be_restated_keep_its_announcement(
    reason: int, is_merging: bool
) -> None:
    stack = Stack(max_rows=2 if is_merging else 100)
    for _ in range(8):
        stack.tick()
    client = stack.client()
    client.block()
    if reason == GAP:
        stack.lose()
    else:
        stack.new_life("F")
    for _ in range(4):
        stack.tick()
        await stack.settle()
    client.take_rows()
    client.subscribe("A", resumes=False, snapshot=False, fields=["last"])
    client.unblock()
    await stack.settle()
    assert client.take_rows() == [("snapshot", reason == GAP, [("A", stack.seqs["A"])])]
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", stack.seqs["A"])])]
    client.is_right()


async def test_a_snapshot_stands_for_a_row_that_waits_to_be_restated(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    client.take_rows()
    client.block()
    stack.new_life("F")
    stack.tick()
    stack.tick()
    await stack.settle()
    client.subscribe("A", resumes=False)
    assert client.take_rows() == [("snapshot", False, [("A", 2)])]
    client.unblock()
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 3)])]


@pytest.mark.parametrize("kind", KINDS)
async def test_list_counts_what_was_merged_and_not_what_was_lost(kind: str) -> None:
    stack = Stack(max_rows=3)
    stack.tick()
    client = stack.client(**KINDS[kind])
    sent = len(client.prover.seen["A"])
    offered = 0
    for blocks, lost, ticks in [(False, 0, 3), (True, 0, 9), (False, 4, 2), (True, 2, 2), (True, 0, 8), (False, 0, 2)]:
        if blocks:
            client.block()
        elif client.blocks:
            client.unblock()
        await stack.settle()
        stack.lose(count=lost)
        for _ in range(ticks):
            stack.tick()
            offered += 1
            await stack.settle()
    client.unblock()
    await stack.settle()
    sent = len(client.prover.seen["A"]) + client.prover.restarts["A"]
    assert client.merged() == offered - sent


async def test_list_counts_nothing_twice_while_a_restated_row_waits(stack: Stack) -> None:
    for _ in range(50):
        stack.tick()
    client = stack.client()
    client.block()
    stack.tick()
    stack.new_life("F")
    for _ in range(3):
        stack.tick()
        await stack.settle()
        (entry,) = client.ask("list")["subscriptions"]
        assert (entry["seq"], entry["merged"]) == (50, 0)
    client.unblock()
    await stack.settle()
    (entry,) = client.ask("list")["subscriptions"]
    assert (entry["seq"], entry["merged"]) == (3, 0)


# Resume


def missed(stack: Stack, client: Client, *codes: str) -> None:
    """The client is away while ticks come."""
    client.disconnect()
    for code in codes:
        stack.tick(code)
    stack.flush()
    client.take_rows()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "with the book"])
async def test_what_was_missed_is_replayed_oldest_first_before_any_live_row(stack: Stack, kind: str) -> None:
    for code in "AB":
        stack.tick(code, volume=1, name="x")
    other = stack.client("A", "B", "C")
    client = stack.client("A", "B", "C", **KINDS[kind])
    missed(stack, client, *"ABAB")
    client.connect()
    stack.tick("A")
    await stack.settle()
    assert [entry["resume"] for entry in client.acks[-1]["accepted"]] == ["replay", "replay", "snapshot"]
    told = client.take_rows()
    assert told == [
        ("snapshot", False, [("C", 0)]),
        ("replay", False, [("A", 2), ("A", 3), ("B", 2), ("B", 3)]),
        ("tick", False, [("A", 4)]),
    ]
    assert client.prover.restarts == {}
    assert [client.merged(code) for code in "AB"] == [0, 0]
    other.check()


async def test_a_replayed_row_is_the_row_that_the_others_were_sent(stack: Stack) -> None:
    stack.tick(name="Ay")
    other, client = stack.client(), stack.client()
    missed(stack, client, "A")
    stack.tick(volume=5)
    stack.tick(name=None)
    stack.flush()
    client.connect()
    await stack.settle()
    assert client.prover.seen == other.prover.seen
    assert len(client.prover.seen["A"]) == 3


async def test_nothing_missed_is_said_and_nothing_is_sent(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client)
    client.connect()
    assert client.acks[-1]["accepted"] == [{"as": "A", "code": "A", "resume": "current"}]
    assert client.take_rows() == []
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 2)])]


async def test_numbers_without_news_are_nothing_missed(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    stack.tick()
    stack.flush()
    missed(stack, client)
    stack.seqs["A"] += 1
    stack.offer(stack.board.apply_numbered("A", 3, {"last": stack.price}, NOW_MS))
    client.connect()
    assert client.prover.resumed == {"current": 1}
    stack.tick()
    await stack.settle()
    assert client.take_rows()[-1] == ("tick", False, [("A", 4)])
    assert client.merged() == 1


async def test_whoever_is_ahead_of_this_server_gets_what_he_has_not_seen(stack: Stack) -> None:
    for _ in range(3):
        stack.tick()
    other = stack.client()
    client = Client(stack, ["A"])
    client.prover.places["A"] = "E", 5
    stack.clients.append(client)
    client.connect()
    assert client.prover.resumed == {"current": 1}
    for _ in range(4):
        stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 6), ("A", 7)])]
    assert (client.merged(), other.merged()) == (0, 0)


@pytest.mark.parametrize(
    ("epoch", "seq"), [("other", 3), ("", 3), ("E", 0)], ids=["another epoch", "no epoch at all", "too old"]
)
async def test_what_cannot_be_replayed_is_a_snapshot(stack: Stack, epoch: str, seq: int) -> None:
    for _ in range(3):
        stack.tick()
    stack.client()
    stack.tick()
    stack.flush()
    client = Client(stack, ["A"])
    client.prover.places["A"] = epoch, seq
    stack.clients.append(client)
    client.connect()
    assert client.prover.resumed == {"snapshot": 1}
    assert client.take_rows() == [("snapshot", False, [("A", 4)])]
    stack.tick()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 5)])]


@pytest.mark.parametrize("options", [{"max_rate": 1000}, {"fields": ["last", "bids"]}], ids=["a rate", "the book"])
async def test_with_a_rate_or_the_book_it_is_a_snapshot(stack: Stack, options: dict[str, Any]) -> None:
    stack.tick()
    client = stack.client(**options)
    missed(stack, client, "A")
    client.connect()
    assert client.prover.resumed == {"snapshot": 1}
    assert client.take_rows() == [("snapshot", False, [("A", 2)])]


@pytest.mark.parametrize("reason", [NEW_EPOCH, GAP])
async def test_behind_a_gap_or_a_new_epoch_it_is_a_snapshot(stack: Stack, reason: int) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client, "A")
    if reason == GAP:
        stack.lose()
    else:
        stack.new_life("F")
    stack.tick()
    stack.tick()
    stack.flush()
    client.connect()
    assert client.prover.resumed == {"snapshot": 1}
    missed(stack, client, "A")
    client.connect()
    assert client.prover.resumed == {"snapshot": 1, "replay": 1}


async def test_a_code_with_an_epoch_of_its_own_is_resumed_in_it(stack: Stack) -> None:
    stack.plain()
    client = stack.client()
    client.disconnect()
    stack.plain()
    stack.flush()
    client.connect()
    await stack.settle()
    assert client.acks[-1]["accepted"] == [{"as": "A", "code": "A", "resume": "replay", "epoch": "main"}]
    assert client.prover.places["A"] == ("main", 2)


async def test_numbers_alone_count_in_the_epoch_of_the_request(stack: Stack) -> None:
    stack.tick("600519.SH")
    stack.tick("B")
    client = stack.client("600519.SH", "B")
    missed(stack, client, "600519.SH", "B")
    client.connect()
    client.disconnect()
    session = Session("n.0.2", client, stack.desk)
    client.session, client.is_open = session, True
    client.prover.begin()
    session.greet()
    client.prover.request()
    client.prover.places.update({"600519.SH": ("E", 1), "B": ("E", 1)})
    since = {"sh600519": 1, "B": 1, "no such": 4, "C": 7}
    client.say({"action": "subscribe", "codes": ["sh600519", "b"], "epoch": "E", "since": since})
    await stack.settle()
    assert [entry["resume"] for entry in client.acks[-1]["accepted"]] == ["replay", "replay"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"since": {"A": 1}}, {"epoch": 7, "since": {"A": 1}}, {"epoch": "E", "since": {"A": -1}},
        {"epoch": "E", "since": {"A": "1"}}, {"epoch": "E", "since": {"A": 1.5}}, {"epoch": "E", "since": {"A": None}},
        {"epoch": "E", "since": {"A": True}}, {"epoch": "E", "since": {"A": 1 << 63}}, {"epoch": "E", "since": ["A"]},
        {"epoch": "E", "since": {"A": {"seq": 1}}}, {"epoch": "E", "since": {"A": {"epoch": "E"}}},
        {"epoch": "E", "since": 1},
    ],
)  # fmt: skip
async def test_a_since_that_says_nothing_is_an_error_and_nothing_is_subscribed(
    stack: Stack, wrong: dict[str, Any]
) -> None:
    stack.tick()
    client = stack.client("B")
    client.heard.clear()
    client.session.receive(orjson.dumps({"action": "subscribe", "id": 3, "codes": ["A"], **wrong}))
    client._fault = None  # the client behind it has asked for nothing of the kind
    (error,) = client.heard
    assert (error["type"], error["error"], error["id"]) == ("error", "bad_request", 3)
    assert list(client.session.watchlist.subscriptions) == ["B"]


async def test_whoever_is_subscribed_already_gets_a_snapshot_whatever_he_asks(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    client.take_rows()
    client.block()
    stack.tick()
    stack.tick()
    await stack.settle()
    for options in ({}, {"snapshot": False}, {"snapshot": False, "fields": ["last"]}):
        ack = client.subscribe("A", **options)
        assert ack["accepted"][0]["resume"] == "snapshot"
        assert client.take_rows() == [("snapshot", False, [("A", stack.seqs["A"])])]
        stack.tick()
        await stack.settle()
    client.unblock()
    await stack.settle()
    assert client.take_rows() == [("tick", False, [("A", 6)])]


# Paced


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay in pieces of one row."""
    monkeypatch.setattr(outbox_module, "_CATCH_UP_BYTES", 1)


@pytest.mark.usefixtures("small_pieces")
async def test_a_full_socket_stops_the_replay(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client, *"AAAA")
    client.connect(blocks=True)
    for seq in range(2, 6):
        await stack.settle()
        assert client.take_rows() == [("replay", False, [("A", seq)])]
        client.unblock(blocks=True)
    await stack.settle()
    client.unblock()
    stack.tick()
    await stack.settle()
    assert client.prover.places["A"] == ("E", 6)
    assert client.prover.merged == 0


@pytest.mark.usefixtures("small_pieces")
async def test_live_rows_wait_until_the_replay_is_over(stack: Stack) -> None:
    stack.tick("A")
    stack.tick("B")
    client = stack.client("A", "B")
    missed(stack, client, *"AAA")
    client.connect(blocks=True)
    stack.tick("B")
    stack.tick("A")
    await stack.settle()
    assert client.merged("A") == 0
    for _ in range(8):
        client.unblock(blocks=True)
        await stack.settle()
    told = client.take_rows()
    assert [kind for kind, _, _ in told] == ["replay", "replay", "replay", "tick"]
    assert told[-1][2] == [("B", 2), ("A", 5)]
    assert [client.merged(code) for code in "AB"] == [0, 0]


@pytest.mark.usefixtures("small_pieces")
async def test_what_is_unsubscribed_in_mid_replay_is_not_replayed_any_more(stack: Stack) -> None:
    stack.tick("A")
    stack.tick("B")
    client = stack.client("A", "B")
    missed(stack, client, *"AABB")
    client.connect()
    client.block()
    client.ask("unsubscribe", codes=["A"])
    client.take_rows()
    client.unblock()
    await stack.settle()
    assert client.take_rows() == [("replay", False, [("B", 2)]), ("replay", False, [("B", 3)])]
    missed(stack, client, *"BB")
    client.connect()
    client.block()
    client.ask("unsubscribe", codes=["*"])
    client.unblock()
    await stack.settle()
    assert client.session.outbox.replay is None
    assert client.session.outbox.pending == 0


@pytest.mark.usefixtures("small_pieces")
async def test_other_options_in_mid_replay_go_on_from_the_newest_row(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client, *"AAAA")
    client.connect()
    client.block()
    client.take_rows()
    client.subscribe("A", resumes=False, snapshot=False, fields=["last"])
    client.unblock()
    await stack.settle()
    assert client.prover.places["A"] == ("E", 5)
    stack.tick()
    await stack.settle()
    assert client.take_rows()[-1] == ("tick", False, [("A", 6)])
    assert client.merged() == client.prover.merged


@pytest.mark.usefixtures("small_pieces")
async def test_list_knows_where_a_replay_has_come_to(stack: Stack) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client, *"AAAA")
    client.connect(blocks=True)
    await stack.settle()
    for _ in range(5):
        (entry,) = client.ask("list")["subscriptions"]
        assert (entry["seq"], entry["merged"]) == (client.prover.places["A"][1], 0)
        client.unblock(blocks=True)
        await stack.settle()
    assert entry["seq"] == 5


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["objects", "view as arrays", "MessagePack"])
async def test_a_client_too_slow_for_the_live_rows_gets_its_replay_and_then_the_newest(kind: str) -> None:
    stack = Stack(max_rows=2)
    stack.tick()
    client = stack.client(**KINDS[kind])
    missed(stack, client, *"AAA")
    client.connect()
    client.block()
    for _ in range(6):
        stack.tick()
        await stack.settle()
    assert [m["state"] for m in client.heard if m["type"] == "status"] == ["conflating"]
    client.unblock()
    await stack.settle()
    assert [m["state"] for m in client.heard if m["type"] == "status"] == ["conflating", "realtime"]
    told = [rows for kind, _, rows in client.take_rows() if kind in ("replay", "tick")]
    assert told == [[("A", 2)], [("A", 3)], [("A", 4)], [("A", 10)]]
    assert client.merged() == client.prover.merged == 5
    client.is_right()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reason", [NEW_EPOCH, GAP])
async def test_a_row_that_is_restated_in_mid_replay_comes_behind_it(stack: Stack, reason: int) -> None:
    stack.tick()
    client = stack.client()
    missed(stack, client, *"AAA")
    client.connect()
    client.block()
    if reason == GAP:
        stack.lose()
    else:
        stack.new_life("F")
    stack.tick()
    stack.tick()
    await stack.settle()
    client.unblock()
    await stack.settle()
    kinds = [kind for kind, _, _ in client.take_rows()]
    assert kinds == ["replay", "replay", "replay", "snapshot", "tick"]
    assert client.prover.gaps["A"] == (reason == GAP)
    assert client.merged() == 0


# Any order of all of it

CODES = ("A", "B", "C")


class RestatedMachine(RuleBasedStateMachine):
    """Ticks of both kinds, losses and new lives, full sockets and slow workers; clients of every kind leave, resume and
    change their minds. Whatever happens, each stream proves itself, and in the end everybody has the newest rows."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pieces = outbox_module._CATCH_UP_BYTES

    @initialize(
        max_rows=st.sampled_from([1, 3, 1000]), piece=st.sampled_from([1, 120, 65_536]), keeps=st.booleans(),
        kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=4),
    )  # fmt: skip
    def start(self, max_rows: int, piece: int, keeps: bool, kinds: list[str]) -> None:
        outbox_module._CATCH_UP_BYTES = piece
        self.lives = 0
        self.is_held = False
        self.stack = Stack(max_rows=max_rows, keeps=keeps)
        self.run(lambda: [self.stack.client(*CODES, **KINDS[kind]) for kind in kinds])

    def run(self, act: Callable[[], Any]) -> None:
        """Do something within the loop, and let it rest."""

        async def body() -> None:
            act()
            await self.stack.settle()

        self.loop.run_until_complete(body())

    clients = st.integers(0, 3)

    def client_of(self, n: int) -> Client:
        return self.stack.clients[n % len(self.stack.clients)]

    @rule(codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=4))
    def ticks(self, codes: list[str]) -> None:
        self.run(lambda: [self.stack.tick(code) for code in codes])

    @rule(code=st.sampled_from(CODES))
    def plain_tick(self, code: str) -> None:
        self.run(lambda: self.stack.plain(code))

    @rule(code=st.sampled_from(CODES), count=st.integers(1, 3), is_read_anew=st.booleans())
    def loss(self, code: str, count: int, is_read_anew: bool) -> None:
        def act() -> None:
            self.stack.lose(code, count)
            if is_read_anew:
                self.stack.bridge(code)
            else:
                self.stack.tick(code)

        self.run(act)

    @rule()
    def new_life(self) -> None:
        self.lives += 1
        self.stack.new_life(f"E{self.lives}")

    @rule(lags=st.booleans())
    def main_lags(self, lags: bool) -> None:
        def act() -> None:
            self.stack.relay.is_lagging = lags

        self.run(act)

    @rule()
    def the_worker_is_slow(self) -> None:
        self.stack.worker.unsent_bytes = relay_module._SLOW_BYTES + 1

    @rule()
    def the_worker_has_taken_everything(self) -> None:
        self.stack.worker.unsent_bytes = 0
        self.run(self.stack.feed.drained)

    @rule(n=clients)
    def block(self, n: int) -> None:
        client = self.client_of(n)
        if client.is_open:
            client.block()

    @rule(n=clients, blocks=st.booleans())
    def unblock(self, n: int, blocks: bool) -> None:
        client = self.client_of(n)
        if client.is_open and client.session.outbox.is_blocked:
            self.run(lambda: client.unblock(blocks))

    @rule(n=clients)
    def leave(self, n: int) -> None:
        client = self.client_of(n)
        if client.is_open:
            self.run(client.disconnect)

    @rule(n=clients)
    def come_back(self, n: int) -> None:
        client = self.client_of(n)
        if not client.is_open:
            self.run(client.connect)

    @rule(
        n=clients, codes=st.sets(st.sampled_from(CODES), min_size=1), resumes=st.booleans(), snapshot=st.booleans(),
        fields=st.sampled_from([None, ["last"], ["last", "bids"]]), spelled=st.sampled_from(["objects", "rows"]),
    )  # fmt: skip
    def change(
        self, n: int, codes: set[str], resumes: bool, snapshot: bool, fields: list[str] | None, spelled: str
    ) -> None:
        client = self.client_of(n)
        if not client.is_open:
            return
        codes &= set(client.session.watchlist.subscriptions)  # a subscription without a first row is tested elsewhere
        if codes:
            options = {"snapshot": snapshot, "fields": fields, "format": spelled}
            self.run(lambda: client.subscribe(*sorted(codes), resumes=resumes, **options))
        client.prover.options["snapshot"] = True

    @rule(n=clients, code=st.sampled_from(CODES))
    def unsubscribe(self, n: int, code: str) -> None:
        client = self.client_of(n)
        if client.is_open and code in client.session.watchlist.subscriptions:
            self.run(lambda: client.ask("unsubscribe", codes=[code]))

    @rule(n=clients)
    def look(self, n: int) -> None:
        client = self.client_of(n)
        if client.is_open:
            for entry in client.ask("list")["subscriptions"]:
                assert entry["merged"] >= 0

    @invariant()
    def streams_prove_themselves(self) -> None:
        if hasattr(self, "stack"):
            for client in self.stack.clients:
                client.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "stack"):
                self.everybody_has_everything()
        finally:
            outbox_module._CATCH_UP_BYTES = self.pieces
            self.loop.close()

    def everybody_has_everything(self) -> None:
        """In the end."""
        stack = self.stack
        stack.relay.is_lagging = False
        stack.worker.unsent_bytes = 0
        self.run(stack.feed.drained)
        for client in stack.clients:
            if not client.is_open:
                self.run(client.connect)
            self.run(client.unblock)
        for client in stack.clients:
            for code in client.session.watchlist.subscriptions:
                self.is_right(client, code)

    def is_right(self, client: Client, code: str) -> None:
        quote = self.stack.board.quotes.get(code)
        if quote is not None:
            assert client.prover.rows[code]["last"] == quote.row["last"]
            assert client.prover.places[code][0] == quote.epoch
            assert not client.session.outbox.pending


TestAnyOrder = RestatedMachine.TestCase
TestAnyOrder.settings = settings(deadline=None, derandomize=True, max_examples=100, stateful_step_count=40)
