"""Sessions with any options on sockets that block whenever they like: what each client is sent, against a plain model.

Main, the wire and the clock are the test's; subscriptions, hub, outboxes and sessions are real.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotepush.push import hub as hub_module
from quotepush.push import outbox as outbox_module
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.hub import Hub
from quotepush.push.session import Session
from quotepush.push.subscriptions import Lane, Subscriptions
from quotepush.push.watchlist import Watchlist
from quotepush.quote.tick import BOOK_FIELDS
from quotepush.wire.formats import DEFAULT_FIELDS, JSON, MSGPACK, Codec

CODES = ("A", "B")
LIMITS = Limits(codes=10, codes_per_request=10, requests_per_s=1e9, message_bytes=10_000)
VIEWS: tuple[list[str] | None, ...] = (None, ["last"], ["bid", "last"], ["bids"], ["last", "bids", "x1"], ["volume"])
RATES = (None, 4, 1)
LONGEST_PERIOD_S = 1.0

Row = dict[str, Any]


def messages_in(data: bytes, codec: Codec) -> Iterator[dict[str, Any]]:
    """The messages of one write, which can be several frames."""
    while data:
        length, at = data[1], 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(data[2:at], "big")
        payload, data = data[at : at + length], data[at + length :]
        yield msgspec.msgpack.decode(payload) if codec is MSGPACK else orjson.loads(payload)


def shown(row: Row, fields: Iterable[str] | None) -> Row:
    """What a view shows of a row."""
    if fields is None:
        return {name: value for name, value in row.items() if name not in BOOK_FIELDS}
    return {name: row[name] for name in ("code", "seq", "ts", *fields) if name in row}


def values(row: Row, fields: Iterable[str] | None) -> Row:
    """What is news when it changes."""
    return {name: value for name, value in shown(row, fields).items() if name not in ("code", "seq", "ts")}


class Wish:
    """A client's subscription to one code, and what it has been sent of it.

    Attributes:
        fields: what its rows show.
        last: seq of its last row or snapshot row; None: none yet.
        counts_from: the seq from which rows are counted as sent or merged; None: not known yet.
        sent: how many were sent since then.
        asked_at: seq of the code when it was made.
        is_settled: its last row was sent in these fields, so an equal one would say nothing new.
    """

    def __init__(self, options: dict[str, Any], asked_at: int) -> None:
        self.last: int | None = None
        self.counts_from: int | None = None
        self.sent = 0
        self.asked_at = asked_at
        self.change(options)

    def change(self, options: dict[str, Any]) -> None:
        self.options = options
        is_array = options.get("format") == "rows"
        self.fields = list(DEFAULT_FIELDS) if is_array and options["fields"] is None else options["fields"]
        self.is_settled = False

    @property
    def merged(self) -> int:
        return 0 if self.last is None or self.counts_from is None else self.last - self.counts_from - self.sent


class RecordingWatchlist(Watchlist):
    """Tells the client of the row at which the server begins to count, which no message says."""

    def __init__(self, client: "Client", desk: Desk) -> None:
        super().__init__(desk.subscriptions, client.session.outbox)
        self.client = client

    def note_first_row(self, code: str, seq: int) -> None:
        self.client.wishes[code].counts_from = seq - 1
        super().note_first_row(code, seq)


class Client:
    """One real session on a fake socket, and what its client concludes from what it is sent."""

    def __init__(self, machine: "FanOutMachine", name: str, codec: Codec) -> None:
        self.machine = machine
        self.codec = codec
        self.was_blocked = False
        self.blocks_next = False
        self.is_conflating = False
        self.answers: list[dict[str, Any]] = []
        self.wishes: dict[str, Wish] = {}
        self.asked: tuple[str, dict[str, Any]] = "", {}
        self.seen: dict[str, int] = {}  # highest seq per code on this wire
        self.columns: dict[int, list[str]] = {}
        self.session = Session(name, self, machine.desk, codec)
        self.session.watchlist = RecordingWatchlist(self, machine.desk)

    # The link that the session speaks through

    def write(self, data: bytes) -> None:
        for message in messages_in(data, self.codec):
            self.take(message)

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...

    # What the client concludes

    def take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "tick":
            outbox = self.session.outbox
            # One write may be several messages, so the socket blocks behind the last of them.
            assert not outbox.is_blocked or self.blocks_next, "rows for a socket that had not taken the last write"
            if self.blocks_next:
                outbox.is_blocked = self.was_blocked = True
            for row in message["data"]:
                self.take_row(self.as_object(message, row))
        elif kind == "snapshot":
            for row in message["data"]:
                self.take_snapshot_row(self.as_object(message, row))
        elif kind == "status":
            assert message["state"] == ("realtime" if self.is_conflating else "conflating")
            self.is_conflating = not self.is_conflating
        else:
            assert kind == "ack", message
            self.answers.append(message)
            self.take_ack(message)

    def take_ack(self, message: dict[str, Any]) -> None:
        action, options = self.asked
        assert message["action"] == action
        if action == "unsubscribe":
            for code in message["removed"]:
                del self.wishes[code]
        elif action == "subscribe":
            assert ("cols" in message) is (options["format"] == "rows")
            if "cols" in message:
                self.columns[message["cols"]] = message["columns"]
            for entry in message["accepted"]:
                wish = self.wishes.get(entry["code"])
                if wish is None or (wish.options != options and wish.counts_from is None):
                    # Who was sent nothing and wants no snapshot begins anew.
                    self.wishes[entry["code"]] = Wish(options, self.machine.board[entry["code"]])
                elif wish.options != options:
                    wish.change(options)

    def as_object(self, message: dict[str, Any], row: Any) -> Row:
        if "cols" not in message:
            assert type(row) is dict
            return row
        columns = self.columns[message["cols"]]
        assert columns[0] == "prev"
        if message["type"] == "snapshot":
            assert row[0] is None
        return {name: value for name, value in zip(columns, row, strict=True) if value is not None}

    def take_row(self, row: Row) -> None:
        code, seq = row["code"], row["seq"]
        wish = self.wishes[code]
        assert seq > self.seen.get(code, 0), "a row came twice, or behind a newer one"
        assert row.pop("prev", None) == wish.last, "a hole in the chain"
        history = self.machine.history[code]
        assert row == shown(history[seq], wish.fields)
        if wish.is_settled and not self.was_blocked and wish.options["max_rate"] is None:
            assert wish.last is not None
            assert values(history[wish.last], wish.fields) != values(row, wish.fields), "a row that says nothing new"
        self.seen[code] = wish.last = seq
        wish.sent += 1
        wish.is_settled = True

    def take_snapshot_row(self, row: Row) -> None:
        code, seq = row["code"], row["seq"]
        assert "prev" not in row
        assert seq == self.machine.known(code), "a snapshot of another row than the newest"
        assert seq >= self.seen.get(code, 0), "a snapshot older than what was sent before"
        self.seen[code] = seq
        wish = self.wishes.get(code)
        action, _ = self.asked
        if action == "subscribe":
            assert wish is not None
            assert row == shown(self.machine.history[code][seq], wish.fields)
        else:
            fields = None
            if wish is not None and wish.fields and not set(BOOK_FIELDS).isdisjoint(wish.fields):
                fields = [*DEFAULT_FIELDS, *wish.fields]
            assert row == shown(self.machine.history[code][seq], fields)
        if wish is None:
            return
        if wish.counts_from is None:
            wish.counts_from = seq
        elif wish.last is None or seq > wish.last:
            wish.sent += 1
        wish.last = seq
        wish.is_settled = True

    def ask(self, action: str, codes: Iterable[str] = (), **options: Any) -> dict[str, Any]:
        self.answers.clear()
        self.asked = action, {name: value for name, value in options.items() if name != "snapshot"}
        request = {"action": action, "codes": list(codes), **options}
        self.session.receive(self.codec.encode(request))
        (answer,) = self.answers
        return answer


class Clock:
    """Stands for the module ``time`` in the hub."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class FanOutMachine(RuleBasedStateMachine):
    """Ticks, requests with any options, blocked sockets and a clock, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pieces = outbox_module._CATCH_UP_BYTES
        outbox_module._CATCH_UP_BYTES = 120  # two or three rows, so that catching up comes in pieces
        self.clock = Clock()
        hub_module.time = self.clock  # type: ignore[assignment]
        self.board = dict.fromkeys(CODES, 0)
        # Each row that a code ever had, its book included.
        self.history: dict[str, list[Row]] = {code: [{"code": code, "seq": 0}] for code in CODES}
        self.watched: dict[str, bool] = {}  # and whether with the book
        self.handed_out: dict[Lane, float] = {}
        self.subscriptions = Subscriptions()
        self.desk = Desk(
            subscriptions=self.subscriptions, limits=LIMITS, server="test", epoch="e", heartbeat_ms=5000,
            watch=self.watch, look=self.look, unwatch=self.unwatch, subscribed=lambda fd: None,
            clock_ms=lambda: round(self.clock.now_s * 1000), extra_fields=frozenset({"x1"}),
        )  # fmt: skip
        self.clients: list[Client] = []

    options = st.fixed_dictionaries(
        {"fields": st.sampled_from(VIEWS), "max_rate": st.sampled_from(RATES),
         "format": st.sampled_from(["objects", "rows"])}
    )  # fmt: skip
    some_field = (st.sampled_from(["last", "last", "bid", "bids", "x1", "ts"]), st.integers(1, 2))
    some_tick = st.tuples(*some_field)
    some_options = st.integers(0, 2)
    someone = st.integers(0, 2)
    some_codes = st.lists(st.sampled_from(CODES), min_size=1, max_size=2, unique=True)

    @initialize(max_rows=st.integers(1, 4), max_bytes=st.sampled_from([200, 10_000]),
                kinds=st.tuples(options, options, options), last=st.sampled_from([JSON, MSGPACK]))  # fmt: skip
    def start(self, max_rows: int, max_bytes: int, kinds: tuple[dict[str, Any], ...], last: Codec) -> None:
        self.kinds = kinds  # few, so that clients meet in their lanes
        self.hub = Hub(
            self.subscriptions, max_delay_s=0.0, max_rows=max_rows, max_bytes=max_bytes,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=lambda outbox: pytest.fail("a session could not be written to"),
            clock_ms=self.desk.clock_ms,
        )  # fmt: skip
        self.desk.deliver = self.hub.deliver
        hand_out = self.hub._hand_out

        def note_time(lane: Lane, seq: int, bare: bytes) -> None:
            rate = lane.shape.max_rate
            if rate is not None:
                # Timers have milliseconds, and may be one too early.
                assert self.clock.now_s - self.handed_out.get(lane, 0.0) >= 1 / rate - 0.001, "more rows than max_rate"
                self.handed_out[lane] = self.clock.now_s
            hand_out(lane, seq, bare)

        self.hub._hand_out = note_time  # type: ignore[method-assign]
        self.clients = [Client(self, f"n.0.{n}", codec) for n, codec in enumerate((JSON, JSON, last))]

    def teardown(self) -> None:
        try:
            if self.clients:
                self.drain()
        finally:
            self.loop.close()
            outbox_module._CATCH_UP_BYTES = self.pieces
            hub_module.time = time

    # Main, which answers at once

    def known(self, code: str) -> int:
        """The seq of the newest row that the worker can have: that of the channel, or main's."""
        channel = self.subscriptions.channels.get(code)
        return self.board[code] if channel is None else channel.seq

    def watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        for code in codes:
            assert code not in self.watched or (books and not self.watched[code]), "asked for what comes already"
            self.watched[code] = books
            if books and self.board[code]:
                self.hub.offer(code, self.board[code], *self.encoded(code))  # as the worker does
        then(self.answer(codes, books))

    def look(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        then(self.answer(codes, False))

    def answer(self, codes: Iterable[str], books: bool) -> Answer:
        rows = {}
        for code in codes:
            row, book = self.encoded(code)
            rows[code] = self.board[code], row if self.board[code] else None, book if books else None, "e"
        return Answer(rows, {})

    def unwatch(self, codes: Iterable[str]) -> None:
        for code in codes:
            self.watched.pop(code, None)  # the claim of a look was given up, too

    def encoded(self, code: str) -> tuple[bytes, bytes]:
        row = self.history[code][-1]
        return orjson.dumps(shown(row, None)), orjson.dumps({k: v for k, v in row.items() if k in BOOK_FIELDS})

    # The loop

    def turn(self, what: Callable[[], object]) -> None:
        async def run() -> None:
            what()

        self.loop.run_until_complete(run())

    def settle(self) -> None:
        async def run() -> None:
            async with asyncio.timeout(30):
                while self.hub._timer is not None or self.hub._dirty:  # noqa: ASYNC110
                    await asyncio.sleep(0)

        self.loop.run_until_complete(run())

    # What can happen

    def tick(self, code: str, field: str, value: int) -> None:
        before = self.history[code][-1]
        self.board[code] += 1
        after = {**before, "seq": self.board[code], "ts": self.board[code], field: value}
        if field == "bids":
            after["bids"] = [[10, value]]
        elif field == "ts":
            after["ts"] = self.board[code]
        self.history[code].append(after)
        if code not in self.watched:
            return
        is_news = values(before, None) != values(after, None)
        if is_news or (self.watched[code] and before.get("bids") != after.get("bids")):
            row, book = self.encoded(code)
            self.hub.offer(code, self.board[code], row, *([book] if self.watched[code] else []))

    @rule(ticks=st.lists(st.tuples(st.sampled_from(CODES), *some_field), min_size=1, max_size=6))
    def take_ticks(self, ticks: list[tuple[str, str, int]]) -> None:
        def take() -> None:
            for tick in ticks:
                self.tick(*tick)
            self.hub.flush_soon()

        self.turn(take)

    @rule(tick=some_tick)
    def take_one_tick(self, tick: tuple[str, int]) -> None:
        self.take_ticks([("A", *tick)])

    @rule(by_s=st.sampled_from([0.0625, 0.125, 0.25, 1.0, 0.2495, 0.9995]))
    def let_time_pass(self, by_s: float) -> None:
        self.clock.now_s += by_s
        self.turn(self.hub._hand_out_due)

    @rule(by_s=st.sampled_from([0.125, 0.25, 1.0]))
    def be_late(self, by_s: float) -> None:
        """Time passes, but the loop has had no turn for what is due."""
        self.clock.now_s += by_s

    @rule(who=someone)
    def block(self, who: int) -> None:
        """The socket has not taken all of the last write."""
        client = self.clients[who]
        client.session.outbox.is_blocked = client.was_blocked = True

    @rule(who=someone, blocks=st.booleans())
    def block_at_the_next_write(self, who: int, blocks: bool) -> None:
        self.clients[who].blocks_next = blocks

    @rule(who=someone)
    def unblock(self, who: int) -> None:
        outbox = self.clients[who].session.outbox
        if outbox.is_blocked:
            outbox.is_blocked = False
            self.turn(lambda: self.hub.unblock(outbox))

    @rule()
    def turn_the_loop(self) -> None:
        self.turn(lambda: None)

    def ask(self, who: int, action: str, codes: Iterable[str] = (), **options: Any) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        self.turn(lambda: answers.append(self.clients[who].ask(action, codes, **options)))
        return answers[0]

    @rule(who=someone, codes=some_codes, kind=some_options, snapshot=st.booleans())
    def subscribe(self, who: int, codes: list[str], kind: int, snapshot: bool) -> None:
        answer = self.ask(who, "subscribe", codes, snapshot=snapshot, **self.kinds[kind])
        assert [entry["code"] for entry in answer["accepted"]] == codes

    @rule(who=someone, kind=some_options, ticks=st.lists(some_tick, max_size=2))
    def change_options_behind_ticks(self, who: int, kind: int, ticks: list[tuple[str, int]]) -> None:
        """The rows still wait for the flush, or for their time."""
        for field, value in ticks:
            self.turn(lambda field=field, value=value: self.tick("A", field, value))
        self.subscribe(who, ["A"], kind, False)
        self.list(who)

    @rule(who=someone, codes=some_codes)
    def unsubscribe(self, who: int, codes: list[str]) -> None:
        had = [code for code in codes if code in self.clients[who].wishes]
        assert self.ask(who, "unsubscribe", codes)["removed"] == had

    @rule(who=someone, codes=some_codes)
    def snapshot(self, who: int, codes: list[str]) -> None:
        self.ask(who, "snapshot", codes)

    @rule(who=someone)
    def list(self, who: int) -> None:
        wishes = self.clients[who].wishes
        listed = {entry.pop("code"): entry for entry in self.ask(who, "list")["subscriptions"]}
        assert listed == {
            code: {**wish.options, "fields": wish.fields, "seq": wish.last or 0, "merged": wish.merged}
            for code, wish in wishes.items()
        }

    @precondition(lambda self: self.clients)
    @rule()
    def drain(self) -> None:
        """Every socket takes everything, every period is over: nobody may miss what is newest in his view."""
        self.let_time_pass(LONGEST_PERIOD_S)
        for who, client in enumerate(self.clients):
            client.blocks_next = False
            self.unblock(who)
        self.settle()
        assert not self.hub._due
        for who, client in enumerate(self.clients):
            assert client.session.outbox.pending == 0
            assert not client.is_conflating
            for code, wish in client.wishes.items():
                known = self.history[code][wish.asked_at if wish.last is None else wish.last]
                assert values(known, wish.fields) == values(self.history[code][-1], wish.fields)
            self.list(who)

    @invariant()
    def main_sends_exactly_what_is_wanted(self) -> None:
        wanted = {code for client in self.clients for code in client.wishes}
        assert set(self.watched) == wanted == set(self.subscriptions.channels)
        for client in self.clients:
            for code, wish in client.wishes.items():
                assert self.watched[code] or wish.fields is None or set(BOOK_FIELDS).isdisjoint(wish.fields)

    @invariant()
    def books_are_right(self) -> None:
        if self.clients:
            assert self.hub.rows_out == sum(client.session.outbox.sent for client in self.clients)
            assert self.hub.rows_merged == sum(client.session.outbox.merged for client in self.clients)
            assert self.subscriptions.count == sum(len(client.wishes) for client in self.clients)


TestFanOutAgainstItsModel = FanOutMachine.TestCase
TestFanOutAgainstItsModel.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=50)
