"""The fan-out: its laws one by one, and a model test with sockets that block whenever they like.

The model test drives real sessions through the hub and reads what arrives at a fake socket, so that it
checks the promises to a client and not the hub's own books.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotepush.push import outbox as outbox_module
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.hub import Hub
from quotepush.push.outbox import Outbox
from quotepush.push.session import Session
from quotepush.push.subscriptions import PLAIN, Lane, Shape, Subscriptions


def message_of(frame: bytes) -> dict[str, Any]:
    length = frame[1]
    at = 2 if length < 126 else 4 if length == 126 else 10
    message: dict[str, Any] = orjson.loads(frame[at:])
    return message


class Socket:
    """A fake socket with its outbox; blocks when the test says so."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.writes = 0
        self.watchlist = self
        self.outbox = Outbox(self, self.write)
        self.blocks_next = False

    def write(self, frame: bytes) -> None:
        assert not self.outbox.is_blocked, "a row was written to a socket that had not taken the last write"
        self.writes += 1
        self.messages.append(message_of(frame))
        if self.blocks_next:
            self.outbox.is_blocked = True

    def note_merged(self, code: str, rows: int) -> None: ...

    def note_first_row(self, code: str, seq: int) -> None: ...

    @property
    def seqs(self) -> list[int]:
        return [row["seq"] for message in self.messages for row in message["data"]]


class Bench:
    """A hub with its callbacks recorded."""

    def __init__(self, **options: Any) -> None:
        self.subscriptions = Subscriptions()
        self.states: list[tuple[str, Outbox]] = []
        self.now_ms = 1000
        self.hub = Hub(
            self.subscriptions,
            **{"max_delay_s": 0.0, "max_rows": 3, "max_bytes": 10**6, **options},
            on_merging=lambda outbox: self.states.append(("merging", outbox)),
            on_caught_up=lambda outbox: self.states.append(("caught up", outbox)),
            on_failed=lambda outbox: self.fail(outbox),  # noqa: PLW0108  a test may put another one in its place
            clock_ms=lambda: self.now_ms,
        )

    def fail(self, outbox: Outbox) -> None:
        pytest.fail("a session could not be written to")

    def subscribe(self, code: str, *sockets: Socket, with_prev: bool = True, shape: Shape = PLAIN) -> Lane:
        channel = self.subscriptions.open(code, 0, None)
        for socket in sockets:
            base = channel.seq if with_prev else None
            lane = self.subscriptions.add(channel, socket.outbox, shape, base=base)
        return lane

    def offer(self, code: str, *seqs: int, size: int = 0) -> None:
        for seq in seqs:
            self.hub.offer(code, seq, orjson.dumps({"code": code, "seq": seq, "x": "y" * size}))


async def rest(hub: Hub) -> None:
    """Let the loop turn until the hub has nothing more to do."""
    async with asyncio.timeout(30):
        while hub._timer is not None or hub._dirty:  # noqa: ASYNC110  it is turns of the loop that are waited for
            await asyncio.sleep(0)


async def quiet(bench: Bench) -> None:
    await rest(bench.hub)


async def test_a_row_goes_to_everybody_who_watches_its_code_and_to_nobody_else() -> None:
    bench, a, b, c = Bench(), Socket(), Socket(), Socket()
    bench.subscribe("X", a, b)
    bench.subscribe("Y", c)
    bench.offer("X", 1)
    bench.offer("nobody's", 1)
    bench.hub.flush_soon()
    assert (a.seqs, b.seqs, c.seqs) == ([1], [1], [])
    assert (bench.hub.rows_in, bench.hub.rows_out, bench.hub.writes) == (1, 2, 2)


async def test_one_write_per_session_and_flush() -> None:
    bench, a = Bench(), Socket()
    bench.subscribe("X", a)
    bench.subscribe("Y", a)
    bench.offer("X", 1, 2)
    bench.offer("Y", 1)
    bench.offer("X", 3)
    assert a.writes == 0
    bench.hub.flush_soon()
    assert a.writes == 1
    assert [(r["code"], r["prev"], r["seq"]) for r in a.messages[0]["data"]] == [
        ("X", 0, 1), ("X", 1, 2), ("Y", 0, 1), ("X", 2, 3),
    ]  # fmt: skip


async def test_a_session_that_cannot_be_written_to_ends_and_the_others_go_on() -> None:
    bench, before, broken, after = Bench(), Socket(), Socket(), Socket()
    failed: list[Outbox] = []
    bench.fail = failed.append  # type: ignore[method-assign]

    def raising(frame: bytes) -> None:
        raise ZeroDivisionError

    broken.outbox.write = raising
    lane = bench.subscribe("X", before, broken, after)
    bench.offer("X", 1)
    bench.hub.flush_soon()
    assert failed == [broken.outbox]
    bench.subscriptions.discard([lane], broken.outbox)
    bench.offer("X", 2)
    bench.hub.flush_soon()
    await rest(bench.hub)
    assert before.seqs == after.seqs == [1, 2]


async def test_a_row_that_is_not_newer_is_ignored() -> None:
    bench, a = Bench(), Socket()
    bench.subscribe("X", a)
    bench.offer("X", 5, 5, 4, 6)
    bench.hub.flush_soon()
    assert a.seqs == [5, 6]


async def test_without_a_snapshot_only_the_first_row_has_no_prev() -> None:
    bench, old, new = Bench(), Socket(), Socket()
    bench.subscribe("X", old)
    bench.offer("X", 1)
    bench.subscribe("X", new, with_prev=False)
    bench.offer("X", 2, 3)
    bench.hub.flush_soon()
    assert [row.get("prev") for row in old.messages[0]["data"]] == [0, 1, 2]
    assert [row.get("prev") for row in new.messages[0]["data"]] == [None, 2]


async def test_a_blocked_socket_is_left_alone_and_holds_nobody_up() -> None:
    bench, slow, fast = Bench(), Socket(), Socket()
    bench.subscribe("X", slow, fast)
    slow.outbox.is_blocked = True
    for seq in (1, 2, 3):
        bench.offer("X", seq)
        bench.hub.flush_soon()
    assert (slow.seqs, fast.seqs) == ([], [1, 2, 3])
    slow.outbox.is_blocked = False
    bench.hub.unblock(slow.outbox)
    await quiet(bench)
    assert slow.seqs == [1, 2, 3]
    assert bench.states == []


async def test_above_its_bounds_a_blocked_session_merges_and_says_so_once() -> None:
    bench, slow = Bench(), Socket()
    bench.subscribe("X", slow)
    bench.subscribe("Y", slow)
    slow.outbox.is_blocked = True
    for seq in range(1, 20):
        bench.offer("X", seq)
        bench.offer("Y", seq)
        bench.hub.flush_soon()
        assert slow.outbox.pending <= 4
    assert bench.states == [("merging", slow.outbox)]
    slow.outbox.is_blocked = False
    bench.hub.unblock(slow.outbox)
    await quiet(bench)
    assert [(r["code"], r["prev"], r["seq"]) for m in slow.messages for r in m["data"]] == [("X", 0, 19), ("Y", 0, 19)]
    assert bench.states == [("merging", slow.outbox), ("caught up", slow.outbox)]
    assert bench.hub.rows_merged == slow.outbox.merged == 36


async def test_bytes_bound_an_outbox_too() -> None:
    bench, slow = Bench(max_rows=1000, max_bytes=5000), Socket()
    bench.subscribe("X", slow)
    slow.outbox.is_blocked = True
    for seq in range(1, 20):
        bench.offer("X", seq, size=1000)
        bench.hub.flush_soon()
        assert slow.outbox.pending <= 5
    assert [state for state, _ in bench.states] == ["merging"]


async def test_a_session_that_no_longer_wants_what_waited_has_caught_up() -> None:
    bench, slow = Bench(max_rows=1), Socket()
    lane = bench.subscribe("X", slow)
    slow.outbox.is_blocked = True
    bench.offer("X", 1, 2, 3)
    bench.hub.flush_soon()
    assert bench.states == [("merging", slow.outbox)]
    slow.outbox.drop([lane])
    bench.subscriptions.discard([lane], slow.outbox)
    slow.outbox.is_blocked = False
    bench.hub.unblock(slow.outbox)
    await quiet(bench)
    assert slow.messages == []
    assert bench.states == [("merging", slow.outbox), ("caught up", slow.outbox)]


async def test_a_session_that_catches_up_does_not_hold_the_loop() -> None:
    bench, slow = Bench(max_rows=1, max_delay_s=0.0), Socket()
    slow.outbox.is_blocked = True
    for n in range(400):
        bench.subscribe(f"C{n}", slow)
        bench.offer(f"C{n}", 1, size=66_000)  # each of them one piece of its own
    bench.hub.flush_soon()
    slow.outbox.is_blocked = False
    bench.hub.unblock(slow.outbox)
    at_once = slow.writes
    await quiet(bench)
    assert at_once < 10
    assert slow.writes == 400
    assert len(slow.seqs) == 400


async def test_a_flush_out_of_budget_goes_on_in_the_next_turn_and_forgets_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quotepush.push.hub._BUDGET_S", -1.0)  # used up before it begins
    bench = Bench()
    sockets = [Socket() for _ in range(500)]
    bench.subscribe("X", *sockets)
    bench.offer("X", 1)
    bench.hub.flush_soon()
    assert 0 < sum(socket.writes for socket in sockets) < 500
    bench.offer("X", 2)
    bench.hub.flush_soon()
    await quiet(bench)
    assert all(socket.seqs == [1, 2] for socket in sockets)


async def test_rows_that_come_during_the_rest_share_the_next_write() -> None:
    bench, a = Bench(max_delay_s=1000.0), Socket()
    bench.subscribe("X", a)
    bench.offer("X", 1)
    bench.hub.flush_soon()
    bench.hub._next_flush = asyncio.get_running_loop().time() + 3600  # as after a very long flush
    for seq in range(2, 6):
        bench.offer("X", seq)
        bench.hub.flush_soon()
    assert a.writes == 1
    assert bench.hub._timer is not None
    bench.hub._timer.cancel()
    bench.hub._flush()
    assert a.seqs == [1, 2, 3, 4, 5]
    assert a.writes == 2


async def test_a_flush_with_nothing_to_say_writes_nothing() -> None:
    bench, a = Bench(), Socket()
    bench.subscribe("X", a)
    bench.hub.flush_soon()
    bench.offer("X", 1)
    bench.hub.flush_soon()
    bench.hub.flush_soon()
    assert a.writes == 1


async def test_nothing_is_sent_to_a_session_that_was_forgotten() -> None:
    bench, gone, here = Bench(), Socket(), Socket()
    lane = bench.subscribe("X", gone, here)
    gone.outbox.is_blocked = True
    bench.offer("X", 1)
    bench.hub.flush_soon()
    bench.offer("X", 2)
    bench.subscriptions.discard([lane], gone.outbox)
    bench.hub.forget([gone.outbox])
    gone.outbox.is_blocked = False
    bench.hub.flush_soon()
    await quiet(bench)
    assert (gone.seqs, here.seqs) == ([], [1, 2])


# The model test

CODES = ("A", "B", "C")
LIMITS = Limits(codes=10, codes_per_request=10, requests_per_s=1e9, message_bytes=10_000)


class Client:
    """One real session on a fake socket, and what its client may conclude from what it is sent."""

    def __init__(self, machine: "HubMachine", name: str) -> None:
        self.machine = machine
        self.name = name
        self.was_blocked = False
        self.blocks_next = False
        self.is_conflating = False
        self.answers: list[dict[str, Any]] = []
        self.subscribed: set[str] = set()
        self.seen: dict[str, int] = {}  # highest seq per code on this wire
        self.last: dict[str, int | None] = {}  # seq of the row before, per subscription
        self.got: dict[str, list[int]] = {}  # ticks per subscription
        self.offered: dict[str, list[int]] = {}  # what was handed to the hub meanwhile
        self.merged: dict[str, int] = {}
        self.session = Session(name, self, machine.desk)

    # The link that the session speaks through

    def write(self, frame: bytes) -> None:
        message = message_of(frame)
        kind = message["type"]
        if kind == "tick":
            outbox = self.session.outbox
            assert not outbox.is_blocked, "rows were written to a socket that had not taken the last write"
            if self.blocks_next:
                outbox.is_blocked = self.was_blocked = True
            for row in message["data"]:
                self.take_row(row)
        elif kind == "snapshot":
            for row in message["data"]:
                self.take_snapshot_row(row)
        elif kind == "status":
            assert message["state"] == ("realtime" if self.is_conflating else "conflating")
            self.is_conflating = not self.is_conflating
        else:
            assert kind == "ack", message
            self.answers.append(message)
            if message["action"] == "unsubscribe":
                self.subscribed -= set(message["removed"])
            elif message["action"] == "subscribe":
                self.subscribed |= {entry["code"] for entry in message["accepted"]}

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...

    # What the client concludes

    def take_row(self, row: dict[str, Any]) -> None:
        code, seq = row["code"], row["seq"]
        assert code in self.subscribed, "a row of a code that is not subscribed"
        assert seq > self.seen.get(code, 0), "a row came twice, or behind a newer one"
        self.seen[code] = seq
        before = self.last[code]
        if before is None:
            assert "prev" not in row
            # Nothing says how many were merged into it; the server knows which row was the first one.
            self.merged[code] += seq - self.offered[code][0]
        else:
            assert row["prev"] == before, "a hole in the chain"
            self.merged[code] += seq - before - 1
        self.last[code] = seq
        self.got[code].append(seq)

    def take_snapshot_row(self, row: dict[str, Any]) -> None:
        code, seq = row["code"], row["seq"]
        assert "prev" not in row
        assert seq >= self.seen.get(code, 0), "a snapshot older than what was sent before"
        self.seen[code] = seq
        if code not in self.subscribed:
            return
        before = self.last.get(code)
        if before is None:
            if self.offered.get(code):
                self.merged[code] += seq - self.offered[code][0]
        else:
            self.merged[code] += max(0, seq - before - 1)
        self.last[code] = seq
        self.got[code] = []
        self.offered[code] = []

    def ask(self, **request: Any) -> dict[str, Any]:
        self.answers.clear()
        self.session.receive(orjson.dumps(request).decode())
        (answer,) = self.answers
        return answer


class HubMachine(RuleBasedStateMachine):
    """Offers, blocks, unblocks, subscribes and leaves in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pieces = outbox_module._CATCH_UP_BYTES
        outbox_module._CATCH_UP_BYTES = 120  # two or three rows, so that catching up comes in pieces
        self.now_ms = 1000
        self.seqs = dict.fromkeys(CODES, 0)
        self.watched: set[str] = set()
        self.subscriptions = Subscriptions()
        self.desk = Desk(
            subscriptions=self.subscriptions, limits=LIMITS, server="test", epoch="e", heartbeat_ms=5000,
            watch=self.watch, look=self.look, unwatch=self.unwatch, subscribed=lambda fd: None,
            clock_ms=lambda: self.now_ms,
        )  # fmt: skip
        self.clients: list[Client] = []

    @initialize(max_rows=st.integers(1, 4), max_bytes=st.sampled_from([150, 10_000]),
                first=st.lists(st.tuples(st.sets(st.sampled_from(CODES)), st.booleans()), min_size=3,
                max_size=3))  # fmt: skip
    def start(self, max_rows: int, max_bytes: int, first: list[tuple[set[str], bool]]) -> None:
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self.hub = Hub(
            self.subscriptions, max_delay_s=0.0, max_rows=max_rows, max_bytes=max_bytes,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=lambda outbox: pytest.fail("a session could not be written to"),
            clock_ms=lambda: self.now_ms,
        )  # fmt: skip
        self.clients = [Client(self, name) for name in ("n.0.1", "n.0.2", "n.0.3")]
        for who, (codes, snapshot) in enumerate(first):
            if codes:
                self.subscribe(who, sorted(codes), snapshot)

    def teardown(self) -> None:
        with contextlib.suppress(AttributeError):
            self.drain()
        self.loop.close()
        outbox_module._CATCH_UP_BYTES = self.pieces

    # Main, which answers at once

    def watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        assert not self.watched & set(codes), "asked for a code that comes already"
        self.watched |= set(codes)
        self.look(codes, then)

    def look(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        then(Answer({c: (self.seqs[c], self.row(c) if self.seqs[c] else None, None, "e") for c in codes}, {}))

    def unwatch(self, codes: Iterable[str]) -> None:
        self.watched -= set(codes)

    def row(self, code: str) -> bytes:
        return orjson.dumps({"code": code, "seq": self.seqs[code], "last": 1.5})

    # The loop

    def turn(self, what: Callable[[], None]) -> None:
        async def run() -> None:
            what()

        self.loop.run_until_complete(run())

    def settle(self) -> None:
        self.loop.run_until_complete(rest(self.hub))

    # What can happen

    @rule(offers=st.lists(st.tuples(st.sampled_from(CODES), st.integers(1, 3)), min_size=1, max_size=12),
          later_ms=st.integers(0, 1))  # fmt: skip
    def take_ticks(self, offers: list[tuple[str, int]], later_ms: int) -> None:
        self.now_ms += later_ms
        for code, skip in offers:
            self.seqs[code] += skip  # the rows between were merged by main
            if code in self.watched:
                for client in self.clients:
                    if code in client.subscribed:
                        client.offered[code].append(self.seqs[code])
                self.hub.offer(code, self.seqs[code], self.row(code))
        self.turn(self.hub.flush_soon)
        for client in self.clients:
            outbox = client.session.outbox
            if outbox.held is not None:
                assert len(outbox.held) <= len(CODES)
            if self.hub._timer is None:
                if outbox.held is not None:
                    assert not outbox.rows
                else:
                    assert len(outbox.rows) <= self.max_rows

    @rule(code=st.sampled_from(CODES), count=st.integers(1, 6))
    def take_a_burst(self, code: str, count: int) -> None:
        for _ in range(count):
            self.take_ticks([(code, 1)], 0)

    @rule(code=st.sampled_from(CODES))
    def take_one_tick(self, code: str) -> None:
        self.take_ticks([(code, 1)], 1)

    @rule(who=st.integers(0, 2))
    def block(self, who: int) -> None:
        """The socket has not taken all of the last write."""
        client = self.clients[who]
        client.session.outbox.is_blocked = client.was_blocked = True

    @rule(who=st.integers(0, 2), blocks=st.booleans())
    def block_at_the_next_write(self, who: int, blocks: bool) -> None:
        self.clients[who].blocks_next = blocks

    @rule(who=st.integers(0, 2))
    def unblock(self, who: int) -> None:
        outbox = self.clients[who].session.outbox
        if outbox.is_blocked:
            outbox.is_blocked = False
            self.turn(lambda: self.hub.unblock(outbox))

    @rule()
    def turn_the_loop(self) -> None:
        self.turn(lambda: None)

    @rule(who=st.integers(0, 2), codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=3, unique=True),
          snapshot=st.booleans())  # fmt: skip
    def subscribe(self, who: int, codes: list[str], snapshot: bool) -> None:
        client = self.clients[who]
        for code in codes:
            if code not in client.subscribed:  # one that exists already goes on, and so does its count
                client.last[code] = None
                client.got[code], client.offered[code], client.merged[code] = [], [], 0
        answer = client.ask(action="subscribe", codes=codes, snapshot=snapshot)
        assert [entry["code"] for entry in answer["accepted"]] == codes
        assert answer["total"] == len(client.subscribed)

    @rule(who=st.integers(0, 2), codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=3, unique=True))
    def unsubscribe(self, who: int, codes: list[str]) -> None:
        client = self.clients[who]
        had = [code for code in codes if code in client.subscribed]
        assert client.ask(action="unsubscribe", codes=codes)["removed"] == had

    @rule(who=st.integers(0, 2), codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=3, unique=True))
    def snapshot(self, who: int, codes: list[str]) -> None:
        self.clients[who].ask(action="snapshot", codes=codes)

    @rule(who=st.integers(0, 2))
    def list(self, who: int) -> None:
        client = self.clients[who]
        listed = client.ask(action="list")["subscriptions"]
        assert {entry["code"] for entry in listed} == client.subscribed
        for entry in listed:
            code = entry["code"]
            assert entry["seq"] == (client.last[code] or 0)
            assert entry["merged"] == client.merged[code]

    @precondition(lambda self: self.clients)
    @rule()
    def drain(self) -> None:
        """Every socket takes everything: nobody may miss the newest row."""
        for client in self.clients:
            client.blocks_next = False
            outbox = client.session.outbox
            if outbox.is_blocked:
                outbox.is_blocked = False
                self.turn(lambda outbox=outbox: self.hub.unblock(outbox))
        self.settle()
        for client in self.clients:
            assert client.session.outbox.pending == 0
            assert not client.is_conflating
            for code in client.subscribed:
                if client.offered[code]:
                    assert client.last[code] == client.offered[code][-1]

    @invariant()
    def who_never_blocked_gets_every_row(self) -> None:
        if not self.clients or self.hub._timer is not None:
            return
        for client in self.clients:
            if not client.was_blocked:
                for code in client.subscribed:
                    assert client.got[code] == client.offered[code]

    @invariant()
    def main_sends_exactly_what_is_wanted(self) -> None:
        assert self.watched == set().union(*(client.subscribed for client in self.clients))
        assert self.watched == set(self.subscriptions.channels)

    @invariant()
    def books_are_right(self) -> None:
        if self.clients:
            assert self.hub.rows_out == sum(client.session.outbox.sent for client in self.clients)
            assert self.hub.rows_merged == sum(client.session.outbox.merged for client in self.clients)


TestHubAgainstItsPromises = HubMachine.TestCase
TestHubAgainstItsPromises.settings = settings(deadline=None, derandomize=True, max_examples=120, stateful_step_count=40)
