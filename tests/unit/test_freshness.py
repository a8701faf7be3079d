"""Codes without a tick for too long: who is told, what, and how often; from the board to the client."""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson
import pytest

from quotepush.node import bus
from quotepush.node import relay as relay_module
from quotepush.node.relay import Relay, WorkerFeed
from quotepush.push import freshness as freshness_module
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.freshness import Freshness
from quotepush.push.session import Session
from quotepush.push.subscriptions import Subscriptions
from quotepush.push.worker import FeedState
from quotepush.quote.board import Board, TradingDays
from quotepush.quote.ring import Ring
from quotepush.wire.formats import CODECS, JSON, Codec
from tests.support.waiting import wait_until

STALE_MS = 1_000


@pytest.fixture(autouse=True)
def _everybody_is_told_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is; slices are for the test that asks for them."""
    monkeypatch.setattr(freshness_module, "_BUDGET_S", 60.0)


class Clock:
    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


def payloads(frames: bytes) -> list[bytes]:
    """What unmasked server frames carry."""
    found = []
    while frames:
        length, at = frames[1], 2
        if length == 126:
            length, at = int.from_bytes(frames[2:4], "big"), 4
        elif length == 127:
            length, at = int.from_bytes(frames[2:10], "big"), 10
        found.append(frames[at : at + length])
        frames = frames[at + length :]
    return found


class Client:
    """One session and everything it was told."""

    def __init__(self, worker: "Worker", codec: Codec = JSON) -> None:
        self.worker = worker
        self.heard: list[dict[str, Any]] = []
        self.session = Session("n1.0.1", self, worker.desk, codec)

    def write(self, data: bytes) -> None:
        self.heard += [self.session.codec.decode(payload) for payload in payloads(data)]

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...

    def ask(self, action: str, *codes: str, **options: Any) -> None:
        request = orjson.dumps({"action": action, "codes": list(codes), **options})
        self.session.receive(request.decode())

    def subscribe(self, *codes: str, **options: Any) -> None:
        self.ask("subscribe", *codes, **options)
        self.worker.bench.carry()

    def block(self) -> None:
        self.session.outbox.is_blocked = True

    def unblock(self) -> None:
        self.session.outbox.is_blocked = False
        self.worker.freshness.unblock(self.session.outbox)

    def told(self) -> list[tuple[str, list[str]]]:
        """Take the status messages about codes."""
        heard, self.heard = self.heard, []
        return [(m["state"], m["codes"]) for m in heard if m["type"] == "status"]

    def kinds(self) -> list[str]:
        heard, self.heard = self.heard, []
        return [m["type"] for m in heard]


class Worker:
    """A worker at main's bus, without processes: both directions are queues."""

    def __init__(self, bench: "Bench") -> None:
        self.bench = bench
        self.down: list[Any] = []
        self.up: list[Any] = []
        self.unsent_bytes = 0
        self.feed = WorkerFeed(self)  # type: ignore[arg-type]
        self.subscriptions = Subscriptions()
        self.freshness = Freshness(self.subscriptions)
        self.desk = Desk(
            subscriptions=self.subscriptions, limits=Limits(5_000, 5_000, 1e6, 1 << 20), server="", epoch="",
            heartbeat_ms=5_000, watch=self.watch, look=self.look,
            unwatch=lambda codes: self.up.append(bus.Unwatch(list(codes))),
            subscribed=lambda fd: None, clock_ms=bench.clock,
        )  # fmt: skip
        self._questions: dict[int, Callable[[Answer], None]] = {}

    def watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        self._put(codes, then, watch=True, books=books, since=dict(since))

    def look(self, codes: Sequence[str], then: Callable[[Answer], None]) -> None:
        self._put(codes, then, watch=False, books=False, since={})

    def _put(self, codes: Iterable[str], then: Callable[[Answer], None], **how: Any) -> None:
        number = len(self._questions)
        self._questions[number] = then
        self.up.append(bus.Ask(number, list(codes), **how))

    def send(self, message: Any) -> None:
        self.down.append(message)

    send_now = send

    def carry_up(self) -> None:
        up, self.up = self.up, []
        for message in up:
            if isinstance(message, bus.Ask):
                self.bench.relay.ask(self.feed, message)
            else:
                self.bench.relay.unwatch(self.feed, message.codes)

    def carry_down(self) -> None:
        down, self.down = self.down, []
        for message in down:
            if isinstance(message, bus.Answered):
                rows = {row[0]: row[1:] for row in message.rows}
                self._questions[message.question](Answer(rows, message.refused, message.missed, message.stale))
            elif isinstance(message, bus.Freshness):
                self.freshness.note(message.stale, message.fresh)


class Bench:
    """Main's half with a clock of ours, and workers."""

    def __init__(self, workers: int = 1, stale_ms: int = STALE_MS) -> None:
        self.clock = Clock()
        ring = Ring(max_bytes=1 << 20, max_code_bytes=1 << 16, max_age_ms=60_000)
        self.relay = Relay(lambda code: True, ring, 60.0, stale_ms=stale_ms, clock_ms=self.clock)
        self.board = self.relay.board = Board(
            epoch="e", days=TradingDays({}), watched=self.relay.wanted, books_watched=self.relay.books
        )
        self.workers = [Worker(self) for _ in range(workers)]

    def tick(self, code: str, **fields: Any) -> None:
        quote = self.board.apply(code, orjson.dumps(fields or {"last": 1.5}), self.clock.now_ms)
        if quote is not None:
            self.relay.offer(quote)
        self.relay.flush()

    def carry(self) -> None:
        while any(worker.up or worker.down for worker in self.workers):
            for worker in self.workers:
                worker.carry_up()
                worker.carry_down()

    def sweep(self) -> int:
        slices = sum(1 for _ in self.relay.sweep())
        self.carry()
        return slices

    def wait(self, ms: int) -> None:
        self.clock.now_ms += ms
        self.sweep()


def test_a_code_without_a_tick_for_too_long_is_stale_once_and_fresh_with_the_next_tick() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    bench.tick("A")
    client.subscribe("A")
    bench.wait(STALE_MS - 1)
    assert client.told() == []
    bench.wait(1)
    assert client.told() == [("stale", ["A"])]
    bench.wait(10 * STALE_MS)
    assert client.told() == []
    bench.tick("A", last=2)
    bench.sweep()
    assert client.told() == [("fresh", ["A"])]
    bench.wait(STALE_MS - 1)
    assert client.told() == []


def test_arrival_counts_not_news_nor_what_the_tick_says_of_its_time() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    bench.tick("A", last=1)
    bench.tick("OLD", last=1, ts=1_000_000_000_000)
    client.subscribe("A", "OLD")
    bench.wait(STALE_MS - 1)
    bench.tick("A", last=1, ts=1_000_000_000_001)  # nothing but ts
    bench.wait(1)
    assert client.told() == [("stale", ["OLD"])]
    bench.wait(STALE_MS - 1)
    assert client.told() == [("stale", ["A"])]
    bench.tick("A", last=1)
    bench.sweep()
    assert client.told() == [("fresh", ["A"])]


def test_a_refused_tick_has_not_arrived() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    bench.tick("A")
    client.subscribe("A")
    bench.clock.now_ms += STALE_MS
    bench.tick("A", last=-1)
    bench.sweep()
    assert client.told() == [("stale", ["A"])]


def test_a_code_without_any_tick_is_neither_stale_nor_fresh() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    client.subscribe("A")
    bench.wait(10 * STALE_MS)
    bench.tick("A")
    bench.sweep()
    assert client.told() == []


def test_nothing_is_ever_stale_with_a_limit_of_0() -> None:
    bench = Bench(stale_ms=0)
    client = Client(bench.workers[0])
    bench.tick("A")
    client.subscribe("A")
    bench.wait(10**9)
    client.subscribe("A")
    assert client.told() == []


def test_who_subscribes_to_a_stale_code_is_told_right_behind_its_snapshot() -> None:
    bench = Bench(2)
    early, late, elsewhere = (Client(bench.workers[n]) for n in (0, 0, 1))
    bench.tick("A")
    bench.tick("B")
    early.subscribe("A")
    bench.wait(STALE_MS)
    bench.tick("B", last=2)
    early.told()
    late.subscribe("A", "B")
    assert late.kinds() == ["ack", "snapshot", "status"]
    elsewhere.subscribe("B", "A")
    assert elsewhere.told() == [("stale", ["A"])]
    elsewhere.subscribe("A", snapshot=False)
    assert elsewhere.told() == [("stale", ["A"])]
    bench.sweep()
    assert early.told() == late.told() == elsewhere.told() == []


def test_who_resumes_a_stale_code_is_told() -> None:
    bench = Bench()
    bench.tick("A")
    client = Client(bench.workers[0])
    client.subscribe("A")
    bench.wait(STALE_MS)
    other = Client(bench.workers[0])
    other.subscribe("A", epoch="e", since={"A": 1})
    assert other.heard[0]["accepted"][0]["resume"] == "current"
    assert other.told() == [("stale", ["A"])]


def test_who_comes_back_to_a_code_that_was_stale_when_he_left_hears_what_it_is_now() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    bench.tick("A")
    client.subscribe("A")
    bench.wait(STALE_MS)
    client.ask("unsubscribe", "A")
    bench.carry()
    bench.tick("A", last=2)
    client.told()
    client.subscribe("A")
    bench.sweep()
    assert client.told() == []


def test_a_snapshot_alone_says_nothing_of_staleness() -> None:
    bench = Bench()
    bench.tick("A")
    bench.clock.now_ms += STALE_MS
    client = Client(bench.workers[0])
    client.ask("snapshot", "A")
    bench.carry()
    assert client.kinds() == ["ack", "snapshot"]


def test_only_those_who_watch_the_code_are_told() -> None:
    bench = Bench(2)
    watcher, former, other = (Client(bench.workers[0]) for _ in range(3))
    elsewhere = Client(bench.workers[1])
    for code in ("A", "B"):
        bench.tick(code)
    watcher.subscribe("A")
    former.subscribe("A")
    former.ask("unsubscribe", "A")
    other.subscribe("B")
    elsewhere.subscribe("B")
    bench.clock.now_ms += STALE_MS
    bench.tick("B", last=2)
    bench.sweep()
    assert watcher.told() == [("stale", ["A"])]
    assert former.told() == other.told() == elsewhere.told() == []


def test_all_lanes_of_a_code_are_told_in_the_language_of_each_connection() -> None:
    bench = Bench()
    plain, viewing, slow, packed = (
        Client(bench.workers[0], codec) for codec in (JSON, JSON, JSON, next(c for c in CODECS if c.is_binary))
    )
    bench.tick("A", last=1, bids=[[1, 2]])
    plain.subscribe("A")
    viewing.subscribe("A", fields=["last"], format="rows")
    slow.subscribe("A", fields=["bids"], max_rate=1)
    packed.session.receive(packed.session.codec.frame({"action": "subscribe", "codes": ["A"]})[2:])
    bench.carry()
    bench.wait(STALE_MS)
    for client in (plain, viewing, slow, packed):
        assert client.told() == [("stale", ["A"])]


def test_other_options_of_a_subscription_do_not_make_it_forget_what_was_told() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    bench.tick("A")
    client.subscribe("A")
    bench.wait(STALE_MS)
    client.subscribe("A", fields=["last"])
    client.ask("snapshot", "A")
    client.told()
    bench.tick("A", last=2)
    bench.sweep()
    assert client.told() == [("fresh", ["A"])]


def test_one_message_has_all_codes_of_a_change_and_at_most_500() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    codes = [f"C{number:04}" for number in range(1_200)]
    for code in codes:
        bench.tick(code)
    client.subscribe(*codes)
    bench.wait(STALE_MS)
    told = client.told()
    assert [(state, len(some)) for state, some in told] == [("stale", 500), ("stale", 500), ("stale", 200)]
    assert [code for _, some in told for code in some] == codes
    bench.tick("C0003", last=2)
    bench.tick("C0001", last=2)
    bench.sweep()
    assert client.told() == [("fresh", ["C0001", "C0003"])]


def test_a_sweep_lets_others_have_a_turn_and_tells_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_SWEPT_PER_SLICE", 2)
    bench = Bench()
    client = Client(bench.workers[0])
    codes = [f"C{number}" for number in range(9)]
    for code in codes:
        bench.tick(code)
    client.subscribe(*codes)
    bench.clock.now_ms += STALE_MS
    sweep = bench.relay.sweep()
    for _ in range(4):
        next(sweep)
    assert bench.workers[0].down == []
    client.ask("unsubscribe", "C0")
    bench.carry()
    list(sweep)
    bench.carry()
    assert client.told() == [("stale", codes[1:])]
    assert bench.relay.stale == 9  # as the sweep saw it


def test_a_worker_that_dies_within_a_sweep_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "_SWEPT_PER_SLICE", 1)
    bench = Bench(2)
    clients = [Client(worker) for worker in bench.workers]
    for code in ("A", "B"):
        bench.tick(code)
        for client in clients:
            client.subscribe(code)
    bench.clock.now_ms += STALE_MS
    sweep = bench.relay.sweep()
    next(sweep)
    bench.relay.forget(bench.workers[0].feed)
    list(sweep)
    assert bench.workers[0].down == []
    bench.carry()
    assert clients[1].told() == [("stale", ["A", "B"])]


def test_a_session_whose_socket_is_full_is_told_when_it_is_not() -> None:
    bench = Bench()
    client, gone = Client(bench.workers[0]), Client(bench.workers[0])
    for code in ("A", "B"):
        bench.tick(code)
    client.subscribe("A", "B")
    gone.subscribe("A")
    client.block()
    gone.block()
    bench.wait(STALE_MS)
    bench.tick("B", last=2)
    bench.sweep()
    assert client.told() == []
    gone.session.close()
    bench.workers[0].freshness.forget(gone.session)
    gone.unblock()
    client.unblock()
    assert client.told() == [("stale", ["A"])]  # B was stale and is fresh again: nothing to say
    assert gone.told() == []


async def test_a_crowd_is_told_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freshness_module, "_BUDGET_S", -1.0)  # spent, however coarse the clock is
    bench = Bench()
    clients = [Client(bench.workers[0]) for _ in range(20)]
    bench.tick("A")
    for client in clients:
        client.subscribe("A")
        client.told()
    bench.wait(STALE_MS)
    assert sum(len(client.told()) for client in clients) == 0
    await asyncio.sleep(0)
    assert sum(len(client.heard) for client in clients) == 1
    late = Client(bench.workers[0])
    late.subscribe("A")
    await wait_until(lambda: all(client.heard for client in clients))
    assert [client.told() for client in [*clients, late]] == [[("stale", ["A"])]] * 21


def test_a_bug_in_one_session_is_not_felt_by_the_others() -> None:
    bench = Bench()
    clients = [Client(bench.workers[0]) for _ in range(3)]
    bench.tick("A")
    for client in clients:
        client.subscribe("A")
        client.told()

    def broken(data: bytes) -> None:
        raise RuntimeError("a bug")

    clients[1].write = broken  # type: ignore[method-assign]
    bench.wait(STALE_MS)
    assert [client.told() for client in clients] == [[("stale", ["A"])], [], [("stale", ["A"])]]


def test_ticks_that_are_read_from_the_log_arrived_when_redis_got_them() -> None:
    bench = Bench()
    bench.board.log_epoch = "log"
    client = Client(bench.workers[0])
    now_ms = bench.clock.now_ms
    bench.board.apply_numbered("A", 1, {"last": 1.5}, now_ms - STALE_MS, now_ms - 5 * STALE_MS)
    client.subscribe("A")
    assert client.heard[1]["data"][0]["ts"] == now_ms - 5 * STALE_MS  # the same on every server
    assert client.told() == [("stale", ["A"])]
    bench.board.apply_numbered("A", 2, {"last": 2.5}, now_ms - STALE_MS + 1)
    bench.sweep()
    assert client.told() == [("fresh", ["A"])]
    assert bench.board.newest_ms == now_ms - STALE_MS + 1


def test_a_restored_row_keeps_its_arrival() -> None:
    bench = Bench()
    client = Client(bench.workers[0])
    then_ms = bench.clock.now_ms - 7 * STALE_MS
    bench.board.restate("A", "log", 5, {"last": 1.5}, then_ms, 1)
    assert bench.board.newest_ms == then_ms
    client.subscribe("A")
    assert client.told() == [("stale", ["A"])]


def test_a_heartbeat_s_state_fits_its_age_also_before_main_has_said_so() -> None:
    feed = FeedState("ok", 1_000_000, stale_ms=500)
    assert (feed.state_at(1_000_499), feed.age_ms(1_000_499)) == ("ok", 499)
    assert (feed.state_at(1_000_500), feed.age_ms(1_000_500)) == ("stale", 500)
    feed.state = "down"
    assert feed.state_at(1_000_500) == "down"


class Told:
    """What clients know while everything happens in any order; messages are under way for long, in both directions."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.bench = Bench(2)
        self.clients = [Client(self.bench.workers[n % 2]) for n in range(4)]
        self.known: list[dict[str, str]] = [{} for _ in self.clients]
        self.changes = 0

    def happen(self) -> None:
        """One thing."""
        client, worker = self.chance.choice(self.clients), self.chance.choice(self.bench.workers)
        code = self.chance.choice("ABC")
        match self.chance.randrange(10):
            case 0:
                self.bench.tick(code, last=self.chance.randrange(1, 3))
            case 1:
                self.bench.clock.now_ms += self.chance.choice((1, STALE_MS // 2, STALE_MS))
            case 2:
                list(self.bench.relay.sweep())
            case 3:
                client.ask("subscribe", code, fields=self.chance.choice((None, ["last", "bids"])))
            case 4:
                client.ask("unsubscribe", code)
            case 5:
                client.block()
            case 6:
                client.unblock()
            case 7:
                worker.carry_up()
            case _:
                worker.carry_down()
        self.listen()

    def listen(self) -> None:
        """Nobody is told a change twice, but for who asks anew."""
        for client, known in zip(self.clients, self.known, strict=True):
            heard, client.heard = client.heard, []
            asked: set[str] = set()
            for message in heard:
                if message["type"] == "ack" and message["action"] == "subscribe":
                    asked = {entry["code"] for entry in message["accepted"]}
                    for code in asked:
                        known.setdefault(code, "fresh")
                elif message["type"] == "ack" and message["action"] == "unsubscribe":
                    for code in message["removed"]:
                        del known[code]
                elif message["type"] == "status":
                    self.changes += 1
                    for code in message["codes"]:
                        assert code in known, f"{code} is not subscribed"
                        is_again = message["state"] == known[code]
                        assert not is_again or (code in asked and message["state"] == "stale"), (message, known)
                        known[code] = message["state"]

    def end(self) -> None:
        """When nothing is under way any more, everybody knows what is true."""
        self.bench.carry()
        for client in self.clients:
            client.unblock()
        self.bench.sweep()
        self.listen()
        for client, known in zip(self.clients, self.known, strict=True):
            for code in client.session.watchlist.subscriptions:
                quote = self.bench.board.quotes.get(code)
                is_stale = quote is not None and self.bench.clock.now_ms - quote.arrived_ms >= STALE_MS
                assert known[code] == ("stale" if is_stale else "fresh")
        for worker in self.bench.workers:
            assert worker.feed.stale <= worker.feed.codes


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_client_knows_the_truth_in_the_end(seed: int) -> None:
    chance = random.Random(seed)
    changes = 0
    for _ in range(20):
        told = Told(chance)
        for _ in range(chance.randrange(20, 200)):
            told.happen()
        told.end()
        changes += told.changes
    assert changes > 50
