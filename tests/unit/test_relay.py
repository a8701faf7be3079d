"""Which worker gets which row: without a hole, in order, the newest per code where somebody lags."""

from typing import Any

import orjson
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quotepush.node import relay as relay_module
from quotepush.node.bus import Answered, Ask, Rows
from quotepush.node.relay import Relay, WorkerFeed
from quotepush.quote.board import Board, TradingDays
from quotepush.quote.ring import Ring


class RecordingBus:
    """A bus end whose worker reads as the test says."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.unsent_bytes = 0

    def send(self, message: Any) -> None:
        self.sent.append(message)

    send_now = send

    def flush(self) -> None: ...

    def take(self) -> list[Any]:
        sent, self.sent = self.sent, []
        return sent

    @property
    def seqs(self) -> list[tuple[str, int]]:
        return [(code, seq) for message in self.take() for code, seq, *_ in message.rows]


class Bench:
    def __init__(self, *unknown: str, keep_s: float = 0.0) -> None:
        self.ring = Ring(max_bytes=1 << 20, max_code_bytes=1 << 16, max_age_ms=60_000)
        self.relay = Relay(lambda code: code not in unknown, self.ring, keep_s)
        self.board = self.relay.board = Board(
            epoch="e", days=TradingDays({}), watched=self.relay.wanted, books_watched=self.relay.books
        )
        self.price = 0

    def worker(self, *codes: str, books: bool = False) -> tuple[WorkerFeed, RecordingBus]:
        bus = RecordingBus()
        feed = WorkerFeed(bus)  # type: ignore[arg-type]
        if codes:
            self.relay.ask(feed, Ask(1, list(codes), True, books, {}))
            bus.take()
        return feed, bus

    def tick(self, *codes: str, flush: bool = True, **fields: Any) -> None:
        for code in codes:
            self.price += 1
            quote = self.board.apply(code, orjson.dumps(fields or {"last": self.price}), 1000)
            if quote is not None:
                self.relay.offer(quote)
        if flush:
            self.relay.flush()


def test_an_answer_has_the_newest_row_or_none() -> None:
    bench = Bench()
    bench.tick("A", "A")
    feed, bus = bench.worker()
    bench.relay.ask(feed, Ask(7, ["A", "B"], False, False, {}))
    (answer,) = bus.take()
    assert (answer.question, answer.refused) == (7, {})
    (a, seq, row, book, epoch), b = answer.rows
    assert (a, seq, orjson.loads(row)["seq"], book, epoch) == ("A", 2, 2, None, "e")
    assert b == ("B", 0, None, None, "e")
    assert (answer.missed, answer.stale) == ({}, [])


def test_to_look_is_not_to_watch() -> None:
    bench = Bench()
    feed, bus = bench.worker()
    bench.relay.ask(feed, Ask(7, ["A"], False, False, {}))
    bus.take()
    bench.tick("A")
    assert bus.take() == []
    assert bench.relay.wanted == {}


def test_who_watches_gets_every_later_row() -> None:
    bench = Bench()
    _, bus = bench.worker("A")
    bench.tick("A", "B", "A")
    assert bus.seqs == [("A", 1), ("A", 2)]


def test_unknown_codes_are_refused_and_not_watched() -> None:
    bench = Bench("ZZZ")
    feed, bus = bench.worker()
    bench.relay.ask(feed, Ask(7, ["A", "ZZZ"], True, False, {}))
    (answer,) = bus.take()
    assert answer.refused == {"ZZZ": "unknown_code"}
    assert [code for code, *_ in answer.rows] == ["A"]
    assert feed.codes == {"A"} == set(bench.relay.wanted)


def test_rows_before_an_answer_are_sent_before_it() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    bench.tick("A", flush=False)
    bench.relay.ask(feed, Ask(8, ["B"], True, False, {}))
    bench.tick("A", "B", flush=False)
    bench.relay.flush()
    rows, answer, later = bus.take()
    assert [(code, seq) for code, seq, *_ in rows.rows] == [("A", 1)]
    assert isinstance(answer, Answered)
    assert [(code, seq) for code, seq, *_ in later.rows] == [("A", 2), ("B", 1)]


def test_each_worker_gets_what_it_wants() -> None:
    bench = Bench()
    _, first = bench.worker("A", "B")
    _, second = bench.worker("B")
    bench.tick("A", "B")
    assert first.seqs == [("A", 1), ("B", 1)]
    assert second.seqs == [("B", 1)]


def test_the_same_bytes_go_to_every_worker() -> None:
    bench = Bench()
    _, first = bench.worker("A")
    _, second = bench.worker("A")
    bench.tick("A")
    ((_, _, one),), ((_, _, other),) = first.take()[0].rows, second.take()[0].rows
    assert one is other


def test_a_code_that_is_given_up_is_not_sent_any_more() -> None:
    bench = Bench()
    feed, bus = bench.worker("A", "B")
    bench.relay.unwatch(feed, ["A", "never watched"])
    bench.tick("A", "B")
    assert bus.seqs == [("B", 1)]
    assert bench.relay.watched == 1
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {}))
    (answer,) = bus.take()
    assert answer.rows[0][1] == 1
    bench.tick("A")
    assert bus.seqs == [("A", 2)]


def test_watching_twice_is_watching_once() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {}))
    bus.take()
    bench.tick("A")
    assert bus.seqs == [("A", 1)]
    bench.relay.unwatch(feed, ["A"])
    assert bench.relay.watched == 0
    bench.relay.tidy()
    assert bench.relay.wanted == {}


def test_a_worker_that_is_gone_wants_nothing() -> None:
    bench = Bench()
    feed, _ = bench.worker("A", "B")
    _, here = bench.worker("B")
    bench.tick("A", flush=False)
    bench.relay.forget(feed)
    bench.tick("B")
    assert here.seqs == [("B", 1)]
    assert bench.relay.watched == 1
    bench.relay.tidy()
    assert set(bench.relay.wanted) == {"B"}
    assert feed.codes == set()


def test_a_worker_that_reads_too_slowly_is_held_the_newest_row_per_code() -> None:
    bench = Bench()
    feed, slow = bench.worker("A", "B")
    _, fast = bench.worker("A", "B")
    slow.unsent_bytes = relay_module._SLOW_BYTES + 1
    for _ in range(5):
        bench.tick("A", "B", "A")
    assert slow.take() == []
    assert len(fast.seqs) == 15
    assert feed.merged == 9 + 4
    # It stays so until everything has been taken: no newer row may overtake the held one of another code.
    slow.unsent_bytes = 0
    bench.tick("A")
    assert slow.take() == []
    feed.drained()
    assert slow.seqs == [("A", 11), ("B", 5)]
    bench.tick("A")
    assert slow.seqs == [("A", 12)]


def test_draining_when_nothing_is_held_sends_nothing() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    feed.drained()
    assert bus.take() == []


def test_a_slow_worker_gets_its_answers_all_the_same() -> None:
    bench = Bench()
    feed, slow = bench.worker("A")
    slow.unsent_bytes = relay_module._SLOW_BYTES + 1
    bench.tick("A", "A")
    bench.relay.ask(feed, Ask(9, ["B"], True, False, {}))
    (answer,) = slow.take()
    assert answer.question == 9


def test_while_main_lags_a_batch_sends_the_newest_row_per_code() -> None:
    bench = Bench()
    _, bus = bench.worker("A", "B")
    bench.relay.is_lagging = True
    bench.tick("A", "B", "A", "A")
    assert bus.seqs == [("A", 3), ("B", 1)]
    assert bench.relay.merged == 2
    assert bench.relay.is_lagging
    bench.relay.is_lagging = False
    bench.tick("A", "A")
    assert bus.seqs == [("A", 4), ("A", 5)]


def test_what_nobody_watches_is_not_merged_by_a_lagging_main() -> None:
    bench = Bench()
    bench.relay.is_lagging = True
    bench.tick("A", "A")
    assert bench.relay.merged == 0


# Books


def test_a_book_goes_only_to_the_workers_that_asked_for_it() -> None:
    bench = Bench()
    bench.tick("A", bids=[[10, 1]])
    feed, deep = bench.worker()
    bench.relay.ask(feed, Ask(7, ["A", "B"], True, True, {}))
    (answer,) = deep.take()
    assert [(code, seq, book) for code, seq, _, book, _ in answer.rows] == [
        ("A", 1, b'{"bids":[[10,1]]}'),
        ("B", 0, b"{}"),
    ]
    _, flat = bench.worker("A", "B")
    bench.tick("A", last=5, bids=[[10, 2]])
    bench.tick("B", last=6)
    assert [entry[3:] for message in flat.take() for entry in message.rows] == [(), ()]
    assert [entry[3:] for message in deep.take() for entry in message.rows] == [(b'{"bids":[[10,2]]}',), (b"{}",)]


def test_a_change_of_the_book_alone_is_news_only_where_somebody_wants_it() -> None:
    bench = Bench()
    _, flat = bench.worker("A")
    bench.tick("A", last=5, bids=[[10, 1]])
    assert flat.seqs == [("A", 1)]
    bench.tick("A", last=5, bids=[[10, 2]])
    assert flat.seqs == []
    _, deep = bench.worker("A", books=True)
    bench.tick("A", last=5, bids=[[10, 3]])
    bench.tick("A", last=5, bids=[[10, 3]])
    assert deep.seqs == [("A", 3)]


def test_who_only_looks_at_a_book_is_not_sent_it_later() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    bench.relay.ask(feed, Ask(7, ["A"], False, True, {}))
    (answer,) = bus.take()
    assert answer.rows[0][3] == b"{}"
    assert not bench.relay.books
    bench.tick("A", last=5, bids=[[10, 1]])
    assert [len(entry) for message in bus.take() for entry in message.rows] == [3]


def test_a_book_is_given_up_with_its_code() -> None:
    bench = Bench()
    first, _ = bench.worker("A", books=True)
    second, _ = bench.worker("A", books=True)
    bench.relay.unwatch(first, ["A"])
    assert dict(bench.relay.books) == {"A": 1}
    bench.relay.forget(second)
    assert not bench.relay.books
    assert not first.books and not second.books


# Who comes back


def test_a_code_that_everybody_has_left_is_kept_for_a_while() -> None:
    bench = Bench(keep_s=3600.0)
    feed, bus = bench.worker("A")
    bench.tick("A")
    bench.relay.unwatch(feed, ["A"])
    bench.relay.tidy()
    bench.tick("A", "A")
    assert bus.seqs == [("A", 1)]
    assert bench.relay.watched == 0
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {"A": ("e", 1)}))
    (answer,) = bus.take()
    assert [(seq, orjson.loads(row)["seq"]) for seq, row in answer.missed["A"]] == [(2, 2), (3, 3)]
    assert bench.relay.watched == 1
    bench.tick("A")
    assert bus.seqs == [("A", 4)]


def test_what_was_missed_of_a_code_that_was_given_up_is_not_known() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    bench.tick("A")
    bench.relay.unwatch(feed, ["A"])
    bench.relay.tidy()
    bench.tick("A")
    bus.take()
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {"A": ("e", 1)}))
    (answer,) = bus.take()
    assert (answer.missed, answer.rows[0][1]) == ({}, 2)
    assert bench.ring.bytes == 0


def test_who_has_missed_nothing_is_told_so_and_who_asks_in_another_epoch_is_not() -> None:
    bench = Bench()
    feed, bus = bench.worker("A", "B")
    bench.tick("A", "B")
    bus.take()
    bench.relay.ask(feed, Ask(9, ["A", "B", "C"], True, False, {"A": ("e", 1), "B": ("before", 1), "C": ("e", 0)}))
    (answer,) = bus.take()
    assert answer.missed == {"A": []}


def test_a_worker_for_which_rows_are_held_is_not_told_what_was_missed() -> None:
    bench = Bench()
    feed, slow = bench.worker("A")
    slow.unsent_bytes = relay_module._SLOW_BYTES + 1
    bench.tick("A", "A")
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {"A": ("e", 1)}))
    (answer,) = slow.take()
    assert answer.missed == {}  # the rows that are held come behind the answer


def test_what_was_missed_is_not_told_while_the_newest_row_still_waits_in_a_lagging_main() -> None:
    bench = Bench()
    feed, bus = bench.worker("A")
    bench.tick("A")
    bus.take()
    bench.relay.is_lagging = True
    bench.tick("A", flush=False)
    bench.relay.ask(feed, Ask(9, ["A"], True, False, {"A": ("e", 1)}))
    (answer,) = bus.take()
    assert (answer.missed, answer.rows[0][1]) == ({}, 2)  # or the worker would take row 2 for one that it has sent


CODES = ("A", "B", "C")


class RelayMachine(RuleBasedStateMachine):
    """Two workers that watch, leave, stall and die, and what each of them knows in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()

    @initialize()
    def start(self) -> None:
        self.workers: list[tuple[WorkerFeed, RecordingBus]] = [self.bench.worker(), self.bench.worker()]
        # Per worker and watched code: the entry that it knows; with the book, where it has asked for that.
        self.known: list[dict[str, tuple[Any, ...]]] = [{}, {}]

    def read(self, who: int) -> None:
        """The worker takes what has come, as its hub does."""
        known = self.known[who]
        for message in self.workers[who][1].take():
            if isinstance(message, Rows):
                for entry in message.rows:
                    code, seq, row = entry[:3]
                    assert orjson.loads(row)["seq"] == seq
                    if code in known and seq > known[code][1]:
                        assert len(entry) >= len(known[code]), "a row without the book, behind one with it"
                        known[code] = entry
            else:
                for code, seq, row, book, _ in message.rows:
                    if code not in known or seq > known[code][1] or book is not None:
                        assert code not in known or seq >= known[code][1]
                        known[code] = (code, seq, row, book) if book is not None else (code, seq, row)

    @rule(codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=6), flush=st.booleans())
    def tick(self, codes: list[str], flush: bool) -> None:
        self.bench.tick(*codes, flush=flush)

    @rule(codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=6), flush=st.booleans(), size=st.integers(1, 3))
    def change_the_book(self, codes: list[str], flush: bool, size: int) -> None:
        self.bench.tick(*codes, flush=flush, bids=[[10, size]])

    @rule()
    def flush(self) -> None:
        self.bench.relay.flush()

    @rule(who=st.integers(0, 1), codes=st.lists(st.sampled_from(CODES), min_size=1, unique=True), books=st.booleans())
    def watch(self, who: int, codes: list[str], books: bool) -> None:
        feed, _ = self.workers[who]
        if not books:  # a worker asks for what it does not have; with the book it has everything
            codes = [code for code in codes if code not in feed.books]
        self.bench.relay.ask(feed, Ask(1, codes, True, books, {}))

    @rule(who=st.integers(0, 1), codes=st.lists(st.sampled_from(CODES), min_size=1, unique=True))
    def unwatch(self, who: int, codes: list[str]) -> None:
        self.read(who)
        for code in codes:
            self.known[who].pop(code, None)
        self.bench.relay.unwatch(self.workers[who][0], codes)

    @rule(who=st.integers(0, 1), is_slow=st.booleans())
    def change_pace(self, who: int, is_slow: bool) -> None:
        feed, bus = self.workers[who]
        was_slow, bus.unsent_bytes = bool(bus.unsent_bytes), (relay_module._SLOW_BYTES + 1) * is_slow
        if was_slow and not is_slow:
            feed.drained()

    @rule(is_lagging=st.booleans())
    def lag(self, is_lagging: bool) -> None:
        self.bench.relay.is_lagging = is_lagging

    @rule(who=st.integers(0, 1))
    def replace(self, who: int) -> None:
        self.bench.relay.forget(self.workers[who][0])
        self.workers[who], self.known[who] = self.bench.worker(), {}

    @rule()
    def tidy(self) -> None:
        """What nobody came back to is given up at once."""
        self.bench.relay.tidy()
        if hasattr(self, "workers"):
            assert set(self.bench.relay.wanted) == set().union(*(feed.codes for feed, _ in self.workers))

    @precondition(lambda self: hasattr(self, "workers"))
    @rule()
    def come_to_rest(self) -> None:
        self.bench.relay.flush()
        for who, (feed, bus) in enumerate(self.workers):
            bus.unsent_bytes = 0
            feed.drained()
            self.read(who)
            for code, (_, _, row, *book) in self.known[who].items():
                quote = self.bench.board.quotes.get(code)
                newest, newest_book = ({}, {}) if quote is None else (quote.row, quote.book)
                known = {} if row is None else orjson.loads(row)
                assert known.get("last") == newest.get("last"), "a worker was not told the newest row"
                assert bool(book) is (code in feed.books)
                assert not book or orjson.loads(book[0]) == newest_book, "a worker was not told the newest book"

    @invariant()
    def wanted_is_what_the_workers_want(self) -> None:
        if hasattr(self, "workers"):
            wanted = set().union(*(feed.codes for feed, _ in self.workers))
            assert {code for code, feeds in self.bench.relay.wanted.items() if feeds} == wanted
            assert self.bench.relay.watched == len(wanted)
            assert set(self.bench.relay.books) == set().union(*(feed.books for feed, _ in self.workers))

    def teardown(self) -> None:
        if hasattr(self, "workers"):
            self.come_to_rest()


TestRelayAgainstItsLaw = RelayMachine.TestCase
TestRelayAgainstItsLaw.settings = settings(deadline=None, derandomize=True, max_examples=80, stateful_step_count=30)
