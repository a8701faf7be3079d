"""A stream and its positions: wherever it is cut and goes on, no row comes twice and none that main has is lost.

Main's side (board, ring, relay) and two workers' (hub, sessions) are real, what is between them are queues.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from quotepush.entitlement import Entitlement
from quotepush.node import relay as relay_module
from quotepush.node.bus import Answered, Ask, Rows
from quotepush.node.relay import Relay, WorkerFeed
from quotepush.push import outbox as outbox_module
from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.hub import Hub
from quotepush.push.link import SocketLink
from quotepush.push.outbox import Outbox
from quotepush.push.session import Session
from quotepush.push.stream import StreamLink
from quotepush.push.subscriptions import Subscriptions
from quotepush.quote.board import Board, TradingDays
from quotepush.quote.ring import Ring
from quotepush.wire.events import EVENTS, parse_position, selection
from quotepush.wire.formats import View
from quotepush.wire.messages import parse_request
from tests.support.event_source import EventReader
from tests.support.waiting import wait_until

NOW_MS = 1_800_000_000_000


class Main:
    """What main does of it, and its two workers."""

    def __init__(self, life: str = "a1", *, ring_bytes: int = 10**6, max_rows: int = 10**6) -> None:
        self.ring = Ring(max_bytes=10**7, max_code_bytes=ring_bytes, max_age_ms=10**9, life=life)
        self.relay = Relay(lambda code: code != "REFUSED", self.ring, keep_s=1000)
        self.board = self.relay.board = Board(
            epoch="main", days=TradingDays({}), watched=self.relay.wanted, books_watched=self.relay.books
        )
        self.board.log_epoch = "E"
        self.max_rows = max_rows
        self.price = 0
        self.numbered = 0
        self.published: dict[str, list[int]] = {}
        self.workers = [Worker(self), Worker(self)]

    def tick(self, code: str = "A", *, flush: bool = True, **fields: Any) -> None:
        self.price += 1
        quote = self.board.apply(code, orjson.dumps(fields or {"last": self.price}), NOW_MS)
        self._offer(quote, flush)

    def numbered_tick(self, lost: int = 0, *, flush: bool = True) -> None:
        """A tick of the log, behind some that are lost."""
        self.price += 1
        self.numbered += 1 + lost
        self._offer(self.board.apply_numbered("LOG", self.numbered, {"last": self.price}, NOW_MS), flush)

    def _offer(self, quote: Any, flush: bool) -> None:
        if quote is not None:
            if quote.code in self.relay.wanted:
                self.published.setdefault(quote.code, []).append(quote.seq)
            self.relay.offer(quote)
        if flush:
            self.flush()

    def flush(self) -> None:
        self.relay.flush()
        for worker in self.workers:
            worker.carry()


class Worker:
    """One worker; what main sends waits until :meth:`carry` while it does not read."""

    def __init__(self, main: Main) -> None:
        self.main = main
        self.down: list[Any] = []
        self.is_reading = True
        self.unsent_bytes = 0
        self.feed = WorkerFeed(self)  # type: ignore[arg-type]
        self.subscriptions = Subscriptions()
        self.hub = Hub(
            self.subscriptions, max_delay_s=0.0, max_rows=main.max_rows, max_bytes=10**9,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=self._fail, clock_ms=lambda: NOW_MS,
        )  # fmt: skip
        self.desk = Desk(
            subscriptions=self.subscriptions, limits=Limits(100, 100, 1e6, 10**6), server="test", epoch="main",
            heartbeat_ms=5000, watch=self._watch, look=self._never,
            unwatch=lambda codes: main.relay.unwatch(self.feed, codes), subscribed=lambda fd: None,
            clock_ms=lambda: NOW_MS, deliver=self.hub.deliver, replay=self.hub.replay, life=main.ring.life,
        )  # fmt: skip
        self._questions: list[Callable[[Answer], None]] = []

    def _fail(self, outbox: Outbox) -> None:
        raise AssertionError("a session could not be written to")

    def _never(self, *_: Any) -> None:
        raise AssertionError("streams do not look")

    def _watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        self._questions.append(then)
        self.main.relay.ask(self.feed, Ask(len(self._questions) - 1, list(codes), True, books, dict(since)))
        self.carry()

    def send(self, message: Any) -> None:
        self.down.append(message)

    send_now = send

    def carry(self) -> None:
        """As node.worker does it."""
        while self.is_reading and self.down:
            message = self.down.pop(0)
            self.hub.ordinal = message.ordinal
            if isinstance(message, Rows):
                for row in message.rows:
                    self.hub.offer(*row)
            else:
                assert isinstance(message, Answered)
                rows = {row[0]: row[1:] for row in message.rows}
                answer = Answer(rows, message.refused, message.missed, frozenset(message.stale), message.behind)
                self._questions[message.question](answer)
        self.hub.flush_soon()

    # As push.worker for its links

    def opened(self, link: SocketLink) -> None: ...

    def unblocked(self, outbox: Outbox) -> None:
        self.hub.unblock(outbox)

    def closed(self, link: SocketLink) -> None:
        link.session.close()
        self.hub.forget([link.session.outbox])


class Wire:
    """A transport whose peer reads when the test says so."""

    def __init__(self, client: "Client", link: StreamLink) -> None:
        self.client = client
        self.link = link
        self.waiting = b""

    def write(self, data: bytes) -> None:
        if self.client.is_reading and not self.waiting:
            self.client.feed(data)
        else:
            self.waiting += data
            self.link.pause_writing()

    def set_write_buffer_limits(self, high: int, low: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def close(self) -> None: ...

    def abort(self) -> None: ...


class Client(EventReader):
    """A browser: it comes back with the last id it has seen, to the same codes and fields."""

    def __init__(self, main: Main, *codes: str, **options: Any) -> None:
        super().__init__()
        self.main = main
        self.codes = codes
        self.options = options
        self.is_reading = True
        self.wire: Wire | None = None
        self.worker: Worker

    def come(self, worker: int = 0) -> list[str]:
        """Connect; return what the ack says of each code's resume, when it is here."""
        assert self.wire is None
        self.connect()
        self.worker = self.main.workers[worker]
        request = parse_request({"action": "subscribe", "codes": list(self.codes), **self.options}, 1000)
        selected = selection(self.codes, request.fields)
        if self.last_id:
            life, ordinal, of = parse_position(self.last_id) or ("", 0, "")
            assert of == selected
            request = request.behind(dict.fromkeys(self.codes, (f"@{life}", ordinal)))
        can_go_on = request.max_rate is None and not View.of(request.fields).has_book
        link = StreamLink(self.worker, "x", self.worker.hub, self.worker.desk.life, selected if can_go_on else "")
        link.session = Session("n.0.1", link, self.worker.desk, EVENTS)
        self.wire = Wire(self, link)
        link.attach(self.wire)  # type: ignore[arg-type]
        before = len(self.of("ack"))
        link.session.greet()
        link.session.carry_out(request)
        acks = self.of("ack")[before:]
        return [entry.get("resume", "") for ack in acks for entry in ack["accepted"]]

    def take(self, count: int | None = None) -> None:
        """Read some of what waits, all of it if no count is given."""
        assert self.wire is not None
        waiting = self.wire.waiting
        some = waiting if count is None else waiting[:count]
        self.wire.waiting = waiting[len(some) :]
        self.feed(some)
        if not self.wire.waiting and self.is_reading:
            self.wire.link.resume_writing()

    def stall(self) -> None:
        self.is_reading = False

    def read_on(self) -> None:
        self.is_reading = True
        self.take()

    def cut(self, count: int = 0) -> None:
        """The connection breaks when so many of the bytes that wait have come."""
        assert self.wire is not None
        self.take(count)
        wire, self.wire = self.wire, None
        wire.link.connection_lost(None)
        self.is_reading = True

    def _take(self, kind: str, row: dict[str, Any]) -> None:
        before = self.rows.get(row["code"])
        super()._take(kind, row)
        if kind == "tick" and before is not None and self.main.max_rows == 10**6:
            between = [s for s in self.main.published.get(row["code"], ()) if before["seq"] < s < row["seq"]]
            assert not between or self.options.get("fields"), f"lost: {between} of {row['code']}"


@pytest.fixture
def main() -> Main:
    return Main()


def come(main: Main, *codes: str, worker: int = 0, **options: Any) -> Client:
    client = Client(main, *codes, **options)
    client.come(worker)
    return client


async def test_a_stream_is_greeted_and_gets_snapshot_and_rows(main: Main) -> None:
    main.tick()
    client = come(main, "A", "B")
    main.tick()
    assert [message["type"] for message in client.messages] == ["hello", "ack", "snapshot", "tick"]
    assert client.snapshots == [("A", 1), ("B", 0)]
    assert client.seen == {"A": [2]}
    assert client.rows["A"]["prev"] == 1


@pytest.mark.parametrize("worker", [0, 1])
async def test_what_was_missed_comes_once_and_in_order_also_from_another_worker(main: Main, worker: int) -> None:
    client = come(main, "A", "B")
    other = come(main, "A", "B", worker=1)
    for code in "ABA":
        main.tick(code)
    client.cut()
    for code in "BAAB":
        main.tick(code)
    assert client.come(worker) == ["replay", "replay"]
    await asyncio.sleep(0)
    main.tick("A")
    assert client.seen == {"A": [1, 2, 3, 4, 5], "B": [1, 2, 3]} == other.seen
    assert [row["code"] for m in client.of("tick") if m.get("replay") for row in m["data"]] == list("BAAB")
    assert client.snapshots == [("A", 0), ("B", 0)]


async def test_a_stream_that_may_not_have_every_row_has_no_position(main: Main) -> None:
    for worker in main.workers:
        worker.desk.anonymous = Entitlement(max_rate=0.001)
    client = come(main, "A", "B")
    for code in "AABA":
        main.tick(code)
    assert (client.seen, client.last_id) == ({"A": [1], "B": [1]}, "")
    client.cut()
    client.come(1)
    assert client.snapshots[-2:] == [("A", 3), ("B", 1)]
    held = come(main, "A")
    main.workers[0].desk.anonymous = None
    free = come(main, "A")
    free.wire.link.session.entitle(Entitlement(max_rate=0.001))  # type: ignore[union-attr]
    for _ in range(2):
        main.tick("A")
    assert held.last_id == free.last_id == ""
    assert free.of("status")[-1]["limits"]["max_rate"] == 0.001


async def test_who_has_missed_nothing_is_sent_nothing(main: Main) -> None:
    main.tick()
    client = come(main, "A")
    client.cut()
    assert client.come(1) == ["current"]
    main.tick()
    assert client.snapshots == [("A", 1)]
    assert client.seen == {"A": [2]}
    assert client.rows["A"]["prev"] == 1


async def test_a_position_holds_for_codes_that_were_quiet(main: Main) -> None:
    main.tick("B")
    client = come(main, "A", "B")
    for _ in range(5):
        main.tick("A")
    client.cut()
    main.tick("B")
    assert client.come(1) == ["current", "replay"]
    assert client.rows["B"]["prev"] == 1


async def test_who_left_a_code_that_nobody_watched_for_a_while_gets_a_snapshot(main: Main) -> None:
    client = come(main, "A")
    main.tick()
    client.cut()
    main.relay._keep_s = -1.0
    main.relay.tidy()
    main.tick()  # for nobody: it is in no ring
    come(main, "A", worker=1)
    main.tick()
    assert client.come() == ["snapshot"]
    assert client.snapshots[-1] == ("A", 3)


async def test_another_life_of_main_is_another_story(main: Main) -> None:
    main.tick()
    client = come(main, "A")
    client.cut()
    client.main = Main(life="b2")
    client.main.tick()
    assert client.come() == ["snapshot"]


async def test_what_the_ring_has_lost_comes_as_a_snapshot() -> None:
    main = Main(ring_bytes=100)
    client = come(main, "A", "B")
    main.tick("A")
    client.cut()
    for code in "AAAAB":
        main.tick(code)
    assert client.come() == ["snapshot", "replay"]
    assert client.rows["A"]["seq"] == 5
    assert client.seen["B"] == [1]


async def test_of_numbers_without_a_row_nobody_says_which_was_sent_last(main: Main) -> None:
    main.tick()
    early, late = come(main, "A"), None
    main.tick(ts=NOW_MS + 5)  # row 2 would show nothing new
    late = come(main, "A", worker=1)
    assert (early.rows["A"]["seq"], late.rows["A"]["seq"]) == (1, 2)
    early.cut()
    late.cut()
    main.tick()
    for client in (early, late):
        assert client.come() == ["replay"]
        await asyncio.sleep(0)
        assert client.seen == {"A": [3]}
        assert "prev" not in client.rows["A"]


async def test_rows_of_a_view_are_replayed_in_it(main: Main) -> None:
    client = come(main, "A", fields=["last"])
    main.tick(last=1, volume=1)
    client.cut()
    main.tick(last=2, volume=2)
    assert client.come(1) == ["replay"]
    await asyncio.sleep(0)
    assert client.rows["A"] == {"code": "A", "seq": 2, "ts": NOW_MS, "last": 2}


@pytest.mark.parametrize("options", [{"max_rate": 5}, {"fields": ["bids"]}])
async def test_who_could_not_go_on_gets_no_position(main: Main, options: dict[str, Any]) -> None:
    client = come(main, "A", **options)
    main.tick(last=1, bids=[[1, 2]])
    assert client.rows["A"]["seq"] == 1
    assert client.last_id == ""


async def test_who_is_cut_off_while_his_rows_are_merged_starts_from_a_snapshot() -> None:
    main = Main(max_rows=2)
    client = come(main, "A", "B")
    main.tick("A")
    assert client.last_id
    client.stall()
    for code in "ABAABA":
        main.tick(code)
    assert client.wire is not None and client.wire.link.session.outbox.held
    client.read_on()
    await wait_until(lambda: len(client.of("status")) == 2)
    assert [m["state"] for m in client.of("status")] == ["conflating", "realtime"]
    assert client.rows["A"]["seq"] == 5
    client.cut()
    main.tick("A")
    assert client.come() == ["replay", "current"]


async def test_a_peer_that_acknowledges_nothing_is_cut_off_and_a_slow_one_is_not(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = come(main, "A")
    assert client.wire is not None
    link = client.wire.link
    held = 0  # what the kernel has not got rid of
    monkeypatch.setattr("quotepush.push.stream.kernel_bytes", lambda transport: held)
    aborted: list[float] = []
    monkeypatch.setattr(client.wire, "abort", lambda: aborted.append(now_s))
    for now_s in range(5, 100, 5):  # it gets more than it takes, but it takes
        held += 90
        link.write(b":" * 100)
        link.check(now_s, 30.0, 1.0, 1.0)
    held = 0
    link.check(100.0, 30.0, 1.0, 1.0)
    for now_s in range(105, 200, 5):  # only heartbeats, and nothing comes back
        link.write(b":" * 100)
        held += 100
        link.check(now_s, 30.0, 1.0, 1.0)
    assert aborted == [135]
    assert (link.closed_by, link.reason) == ("server", "stalled")


def has_written_all(link: StreamLink) -> bool:
    """It writes as to a client that reads, but nothing comes through."""
    link.resume_writing()
    return not link.session.outbox.pending


def is_up_to_date(main: Main, client: Client) -> bool:
    return all(client.rows[code]["seq"] == main.board.seq(code) for code in client.codes)


async def cut_everywhere(monkeypatch: pytest.MonkeyPatch, act: Callable[[Main, Client], None], **how: Any) -> None:
    """Break a connection in the midst of what an act makes it send, at every place, and let it come back."""
    monkeypatch.setattr("quotepush.push.outbox._CATCH_UP_BYTES", 150)
    count = length = 0
    while count <= length:
        main = Main(**how)
        client = come(main, "A", "B", "LOG")
        for code in "AB":
            main.tick(code)
        main.numbered_tick()
        act(main, client)
        assert client.wire is not None
        await wait_until(functools.partial(has_written_all, client.wire.link))
        length = len(client.wire.waiting)
        client.cut(count)
        client.come(1)
        main.tick("A")
        await wait_until(functools.partial(is_up_to_date, main, client))
        count += 23
    assert length > 500


async def test_a_flush_of_several_events_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(main: Main, client: Client) -> None:
        client.stall()
        main.tick("A", flush=False)
        main.numbered_tick(lost=2, flush=False)
        main.tick("A", flush=False)
        main.numbered_tick(flush=False)
        main.tick("B")

    await cut_everywhere(monkeypatch, act)


async def test_a_merging_stream_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(main: Main, client: Client) -> None:
        client.stall()
        for code in "AABABBA":
            main.tick(code)

    await cut_everywhere(monkeypatch, act, max_rows=2)


@pytest.mark.parametrize("ring_bytes", [10**6, 150])
async def test_a_replay_is_cut(monkeypatch: pytest.MonkeyPatch, ring_bytes: int) -> None:
    def act(main: Main, client: Client) -> None:
        client.cut()
        for code in "ABBAAABA":  # a small ring has not all of A
            main.tick(code)
        main.numbered_tick()
        client.stall()
        client.come(1)
        main.tick("B")

    await cut_everywhere(monkeypatch, act, ring_bytes=ring_bytes)


async def test_while_main_is_late_there_are_no_positions(main: Main) -> None:
    other = come(main, "A")
    main.relay.is_lagging = True
    main.tick(flush=False)
    client = come(main, "A", worker=1)
    assert client.snapshots == [("A", 1)]
    assert client.last_id == ""
    main.flush()
    main.tick()
    main.flush()
    for one in (client, other):
        assert one.last_id
        one.cut()
        assert one.come() == ["current"]


async def test_while_main_holds_rows_for_a_slow_worker_it_has_no_positions(main: Main) -> None:
    slow = main.workers[0]
    come(main, "A", worker=1)
    come(main, "A")
    slow.unsent_bytes = relay_module._SLOW_BYTES + 1
    main.tick()
    client = come(main, "A", "B")
    assert client.last_id == ""
    slow.unsent_bytes = 0
    slow.feed.drained()
    slow.carry()
    main.tick()
    assert client.last_id
    client.cut()
    assert client.come(1) == ["current", "current"]


class Machine(RuleBasedStateMachine):
    """Everything that can happen, in any order; the clients themselves say what must never be."""

    may_lag = False

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.main = self.run(Main, max_rows=2 if self.may_lag else 10**6)
        self.clients: list[Client] = []
        self.slow = relay_module._SLOW_BYTES
        self.catch_up_bytes, outbox_module._CATCH_UP_BYTES = outbox_module._CATCH_UP_BYTES, 150

    def run(self, act: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        async def body() -> Any:
            result = act(*arguments, **named)
            for _ in range(3):
                await asyncio.sleep(0)
            return result

        return self.runner.run(body())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                self.settle()
            finally:
                outbox_module._CATCH_UP_BYTES = self.catch_up_bytes
                self.runner.close()

    @rule(code=st.sampled_from("ABC"), has_news=st.booleans(), flush=st.booleans())
    def tick(self, code: str, has_news: bool, flush: bool) -> None:
        fields = {} if has_news else {"ts": NOW_MS + self.main.price}
        self.run(self.main.tick, code, flush=flush, **fields)

    @rule(lost=st.sampled_from([0, 0, 0, 2]), flush=st.booleans())
    def numbered_tick(self, lost: int, flush: bool) -> None:
        self.run(self.main.numbered_tick, lost, flush=flush)

    @rule(codes=st.sampled_from([("A",), ("A", "B"), ("A", "B", "C", "LOG"), ("LOG",)]), worker=st.integers(0, 1))
    def somebody_comes(self, codes: tuple[str, ...], worker: int) -> None:
        if len(self.clients) < 5:
            client = Client(self.main, *codes)
            self.clients.append(client)
            self.run(client.come, worker)

    @rule(who=st.integers(0, 4), bytes_=st.integers(0, 900))
    def cut(self, who: int, bytes_: int) -> None:
        if who < len(self.clients) and self.clients[who].wire is not None:
            self.run(self.clients[who].cut, bytes_)

    @rule(who=st.integers(0, 4), worker=st.integers(0, 1))
    def come_back(self, who: int, worker: int) -> None:
        if who < len(self.clients) and self.clients[who].wire is None:
            client = self.clients[who]
            had = client.last_id
            told = self.run(client.come, worker)
            if had and told and not self.may_lag:
                # Nothing is too old here; only what was lost before it came to main comes as a snapshot.
                assert all(how != "snapshot" for how, code in zip(told, client.codes, strict=True) if code != "LOG")

    @rule(who=st.integers(0, 4))
    def stall(self, who: int) -> None:
        if who < len(self.clients):
            self.clients[who].stall()

    @rule(who=st.integers(0, 4))
    def read_on(self, who: int) -> None:
        if who < len(self.clients) and self.clients[who].wire is not None:
            self.run(self.clients[who].read_on)

    @rule(worker=st.integers(0, 1))
    def a_worker_dies(self, worker: int) -> None:
        main = self.main
        for client in self.clients:
            if client.wire is not None and client.worker is main.workers[worker]:
                self.run(client.cut)
        self.run(main.relay.forget, main.workers[worker].feed)
        main.workers[worker] = self.run(Worker, main)

    @rule(worker=st.integers(0, 1), is_reading=st.booleans())
    def bus(self, worker: int, is_reading: bool) -> None:
        """What main has sent to a worker waits for a moment, or no longer."""
        self.main.workers[worker].is_reading = is_reading
        self.run(self.main.workers[worker].carry)

    @precondition(lambda self: self.may_lag)
    @rule(worker=st.integers(0, 1), is_slow=st.booleans())
    def a_worker_is_slow(self, worker: int, is_slow: bool) -> None:
        slow = self.main.workers[worker]
        slow.unsent_bytes = self.slow + 1 if is_slow else 0
        if not is_slow:
            self.run(slow.feed.drained)
            self.run(slow.carry)

    @precondition(lambda self: self.may_lag)
    @rule(is_lagging=st.booleans())
    def main_lags(self, is_lagging: bool) -> None:
        self.main.relay.is_lagging = is_lagging

    def settle(self) -> None:
        """Everybody reads and is there: in the end he has the newest row of everything."""
        main = self.main
        main.relay.is_lagging = False
        for worker in main.workers:
            worker.unsent_bytes = 0
            worker.is_reading = True
            self.run(worker.feed.drained)
        self.run(main.flush)
        for client in self.clients:
            client.is_reading = True
            if client.wire is None:
                self.run(client.come, 0)
            self.run(client.take)
        for code in ("A", "B", "C"):
            self.run(main.tick, code)
        self.run(main.numbered_tick)
        for client in self.clients:
            self.runner.run(wait_until(lambda client=client: is_up_to_date(main, client) and client.last_id))


class LaggingMachine(Machine):
    """The same where main or a worker may be slow, so that rows are merged before they come here."""

    may_lag = True


TestStreams = Machine.TestCase
TestStreams.settings = settings(deadline=None, derandomize=True, max_examples=50, stateful_step_count=40)
TestLaggingStreams = LaggingMachine.TestCase
TestLaggingStreams.settings = settings(deadline=None, derandomize=True, max_examples=50, stateful_step_count=40)
