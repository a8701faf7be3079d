"""What the options of a subscription do: views, rates and formats, in one worker with a clock of the test's own."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import orjson
import pytest

from quotepush.push.desk import Answer, Desk, Limits
from quotepush.push.hub import Hub
from quotepush.push.session import Session
from quotepush.push.subscriptions import Subscriptions
from quotepush.wire.formats import DEFAULT_FIELDS, JSON, MSGPACK, Codec, Format, View

LIMITS = Limits(codes=10, codes_per_request=10, requests_per_s=1e9, message_bytes=10_000)


class Clock:
    """Stands for the module ``time`` in the hub."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Client:
    """A session and everything that it said to its socket."""

    def __init__(self, worker: "Worker", codec: Codec) -> None:
        self.codec = codec
        self.messages: list[dict[str, Any]] = []
        worker.clients += 1
        self.session = Session(f"n.0.{worker.clients}", self, worker.desk, codec)

    def write(self, data: bytes) -> None:
        while data:
            length, at = data[1], 2
            if length >= 126:
                at = 4 if length == 126 else 10
                length = int.from_bytes(data[2:at], "big")
            payload, data = data[at : at + length], data[at + length :]
            self.messages.append(self.codec.decode(payload))

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(f"closed with {code} {reason}")

    def hold_requests(self, hold: bool) -> None: ...

    def ask(self, action: str, *codes: str, **options: Any) -> dict[str, Any]:
        """Ask; return the answer and keep what comes behind it."""
        self.messages.clear()
        self.session.receive(self.codec.encode({"action": action, "codes": codes, **options}))
        return self.messages.pop(0)

    def take(self) -> list[dict[str, Any]]:
        """Return the messages since the last question."""
        messages, self.messages = self.messages, []
        return messages

    @property
    def rows(self) -> list[Any]:
        """The rows of the messages since the last question."""
        return [row for message in self.messages for row in message["data"]]

    @property
    def chain(self) -> list[tuple[int | None, int]]:
        """``prev`` and ``seq`` of those rows."""
        return [(row.get("prev"), row["seq"]) for row in self.rows]

    def block(self) -> None:
        self.session.outbox.is_blocked = True

    def listed(self) -> dict[str, Any]:
        (entry,) = self.ask("list")["subscriptions"]
        return dict(entry)


class Worker:
    """Subscriptions, hub and sessions; main answers at once."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.clients = 0
        self.rows: dict[str, dict[str, Any]] = {}
        self.book: dict[str, dict[str, Any]] = {}
        self.with_books: set[str] = set()
        self.asked: list[tuple[list[str], bool]] = []
        self.desk = Desk(
            subscriptions=Subscriptions(), limits=LIMITS, server="test", epoch="e", heartbeat_ms=5000, watch=self.watch,
            look=lambda codes, then: then(self.answer(codes, False)), unwatch=self.with_books.difference_update,
            subscribed=lambda fd: None, clock_ms=lambda: 1000, extra_fields=frozenset({"x1"}),
        )  # fmt: skip
        self.hub = Hub(
            self.desk.subscriptions, max_delay_s=0.0, max_rows=1000, max_bytes=10**6,
            on_merging=lambda outbox: outbox.session.say_merging(),
            on_caught_up=lambda outbox: outbox.session.say_caught_up(),
            on_failed=lambda outbox: pytest.fail("a session could not be written to"),
            clock_ms=self.desk.clock_ms,
        )  # fmt: skip
        self.desk.deliver = self.hub.deliver

    def watch(
        self, codes: Sequence[str], books: bool, since: Mapping[str, tuple[str, int]], then: Callable[[Answer], None]
    ) -> None:
        self.asked.append((list(codes), books))
        if books:
            self.with_books |= set(codes)
        then(self.answer(codes, books))

    def answer(self, codes: Iterable[str], books: bool) -> Answer:
        return Answer(
            {
                code: (*self.encoded(code), orjson.dumps(self.book.get(code, {})) if books else None, "e")
                for code in codes
            },
            {},
        )

    def encoded(self, code: str) -> tuple[int, bytes | None]:
        row = self.rows.get(code)
        return (0, None) if row is None else (row["seq"], orjson.dumps(row))

    def open(self, *codes: str, codec: Codec = JSON, **options: Any) -> Client:
        """Return a client, subscribed to these codes, with nothing to read."""
        client = Client(self, codec)
        if codes:
            client.ask("subscribe", *codes, **options)
            client.take()
        return client

    def tick(self, code: str = "A", flush: bool = True, skip: int = 0, **fields: Any) -> None:
        """Main sends a row with these fields changed; ``skip`` rows before it were merged there."""
        book = {name: fields.pop(name) for name in ("bids", "asks") if name in fields}
        before = self.rows.get(code, {"code": code, "seq": 0})
        seq = before["seq"] + 1 + skip
        self.rows[code] = {**before, "seq": seq, "ts": seq * 10, **fields}
        self.book[code] = {**self.book.get(code, {}), **book}
        _, row = self.encoded(code)
        assert row is not None
        self.hub.offer(code, seq, row, *([orjson.dumps(self.book[code])] if code in self.with_books else []))
        if flush:
            self.hub.flush_soon()

    def wait(self, by_s: float) -> None:
        """Time passes, and what is due goes out."""
        self.clock.now_s += by_s
        self.hub._hand_out_due()

    def unblock(self, client: Client) -> None:
        client.session.outbox.is_blocked = False
        self.hub.unblock(client.session.outbox)


@pytest.fixture
async def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    clock = Clock()
    monkeypatch.setattr("quotepush.push.hub.time", clock)
    return Worker(clock)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, View, Format]]:
    """Which rows are encoded, and how."""
    calls: list[tuple[int, View, Format]] = []
    encode = Format.encode

    def count(self: Format, row: Any, view: View) -> bytes:
        calls.append((row["seq"], view, self))
        return encode(self, row, view)

    monkeypatch.setattr(Format, "encode", count)
    return calls


# Views


async def test_a_row_has_the_fields_of_its_view(worker: Worker) -> None:
    worker.tick(last=5, bid=4, x1="own", name="n")
    client = Client(worker, JSON)
    client.ask("subscribe", "A", fields=["x1", "last", "volume"])
    assert client.take()[0]["data"] == [{"code": "A", "seq": 1, "ts": 10, "x1": "own", "last": 5}]
    worker.tick(last=6)
    assert client.rows == [{"prev": 1, "code": "A", "seq": 2, "ts": 20, "x1": "own", "last": 6}]


async def test_a_tick_that_changes_nothing_in_a_view_is_not_sent_and_counts_as_merged(worker: Worker) -> None:
    worker.tick(last=5, bid=4)
    narrow, wide = worker.open("A", fields=["last"]), worker.open("A")
    worker.tick(bid=3)
    worker.tick(bid=2)
    assert narrow.chain == []
    assert narrow.listed()["merged"] == 0
    worker.tick(last=6)
    assert narrow.chain == [(1, 4)]
    assert wide.chain == [(1, 2), (2, 3), (3, 4)]
    assert (narrow.listed()["seq"], narrow.listed()["merged"]) == (4, 2)


@pytest.mark.parametrize("before", [{"last": 5}, {"last": 5.0}, {"last": None}, {}])
async def test_what_appears_or_goes_is_a_change(worker: Worker, before: dict[str, Any]) -> None:
    worker.tick(bid=1, **{k: v for k, v in before.items() if v is not None})
    client = worker.open("A", fields=["last"])
    worker.tick(last=6)
    del worker.rows["A"]["last"]
    worker.tick()
    assert [row.get("last") for row in client.rows] == [6, None]


async def test_a_row_is_encoded_once_for_each_view_and_format_however_many_get_it(
    worker: Worker, encoded: list[tuple[int, View, Format]]
) -> None:
    for codec in (JSON, MSGPACK):
        for fields in (["last"], ["last", "bid"]):
            for spelled in ("rows", "objects"):
                for rate in (None, 5, 10):  # other lanes, the same bytes
                    for _ in range(3):
                        worker.open("A", codec=codec, fields=fields, format=spelled, max_rate=rate)
    encoded.clear()
    worker.tick(last=5, bid=4)
    assert len(encoded) == len(set(encoded)) == 2 * 2 * 2


async def test_what_main_has_encoded_is_not_encoded_again(
    worker: Worker, encoded: list[tuple[int, View, Format]]
) -> None:
    clients = [worker.open("A"), worker.open("A"), worker.open("A", max_rate=5)]
    worker.open("A", fields=["volume"])
    encoded.clear()
    worker.tick(last=5)
    assert encoded == []
    assert [client.chain for client in clients] == [[(0, 1)]] * 3


async def test_each_client_of_a_code_has_a_true_chain_whatever_the_others_want(worker: Worker) -> None:
    options: list[dict[str, Any]] = [
        {}, {"fields": ["last"]}, {"fields": ["bid"]}, {"max_rate": 1}, {"fields": ["last"], "max_rate": 1},
    ]  # fmt: skip
    worker.tick(last=0, bid=0)
    clients = [worker.open("A", **o) for o in options] + [worker.open("A", codec=MSGPACK, **o) for o in options]
    for n in range(1, 9):
        worker.tick(**{"last" if n % 3 else "bid": n})
        worker.wait(0.3)
    worker.wait(1)
    for client, option in zip(clients, options * 2, strict=True):
        last = 1
        for row in client.rows:
            assert row["prev"] == last
            last = row["seq"]
        fields = option.get("fields", ["last", "bid"])
        assert [client.rows[-1][name] for name in fields] == [worker.rows["A"][name] for name in fields]
        sent = len(client.rows)
        assert sent + client.listed()["merged"] == last - 1


async def test_unknown_fields_are_news_only_where_they_are_shown(worker: Worker) -> None:
    worker.tick(last=5, x1=1)
    objects, arrays, named = worker.open("A"), worker.open("A", format="rows"), worker.open("A", fields=["x1"])
    worker.tick(x1=2)
    assert [len(client.rows) for client in (objects, arrays, named)] == [1, 0, 1]
    assert arrays.listed()["fields"] == list(DEFAULT_FIELDS)


# Books


async def test_a_book_goes_only_to_who_names_it(worker: Worker) -> None:
    worker.tick(last=5, bids=[[1, 2]], asks=[[3, 4]])
    plain, flat, deep = worker.open("A"), worker.open("A", fields=["last"]), Client(worker, JSON)
    deep.ask("subscribe", "A", fields=["bids", "last"])
    assert worker.asked == [(["A"], False), (["A"], True)]
    assert deep.take()[0]["data"] == [{"code": "A", "seq": 1, "ts": 10, "bids": [[1, 2]], "last": 5}]
    worker.tick(bids=[[1, 3]])
    worker.tick(asks=[[3, 5]])
    assert (plain.rows, flat.rows) == ([], [])
    assert [(row["prev"], row["seq"], row["bids"]) for row in deep.rows] == [(1, 2, [[1, 3]])]
    worker.tick(last=6)
    for client in (plain, flat, deep):
        assert (client.rows[-1]["last"], "asks" in client.rows[-1]) == (6, False)
    assert plain.chain == flat.chain == [(1, 4)]


@pytest.mark.parametrize("others", [{}, {"format": "rows"}, {"max_rate": 5}])
async def test_a_book_that_begins_to_be_watched_is_no_news_to_others(worker: Worker, others: dict[str, Any]) -> None:
    worker.tick(last=5, bids=[[1, 2]])
    before, msgpack = worker.open("A", **others), worker.open("A", codec=MSGPACK, **others)
    worker.open("A", fields=["asks"])
    worker.tick(bids=[[1, 3]])
    worker.wait(1)
    assert (before.rows, msgpack.rows) == ([], [])


async def test_a_row_that_waits_for_its_time_still_goes_when_a_book_begins_to_be_watched(worker: Worker) -> None:
    worker.tick(last=5)
    client = worker.open("A", max_rate=1)
    worker.tick(last=6)
    worker.tick(last=7)
    worker.open("A", fields=["bids"])
    worker.wait(1)
    assert [row["last"] for row in client.rows] == [6, 7]


async def test_only_the_first_who_names_the_book_asks_main_for_it(worker: Worker) -> None:
    worker.open("A", fields=["bids"])
    worker.open("A", fields=["asks", "last"])
    worker.open("A")
    assert worker.asked == [(["A"], True)]


async def test_a_snapshot_of_a_book_shows_what_its_rows_would_have_shown(worker: Worker) -> None:
    worker.tick(last=5, x1=1, bids=[[1, 2]])
    client = worker.open("A", fields=["bids", "x1"])
    client.block()
    worker.tick(x1=2)
    client.ask("snapshot", "A")
    (row,) = client.rows
    assert (row["x1"], row["bids"], row["last"]) == (2, [[1, 2]], 5)
    worker.unblock(client)
    assert len(client.rows) == 1


# Rates


async def test_a_rate_lets_one_row_through_and_the_newest_when_its_time_has_come(worker: Worker) -> None:
    worker.tick(last=0)
    client = worker.open("A", max_rate=2)
    for n in range(1, 10):
        worker.tick(last=n)
    assert client.chain == [(1, 2)]
    worker.wait(0.4)
    assert client.chain == [(1, 2)]
    worker.wait(0.1)
    assert client.chain == [(1, 2), (2, 10)]
    assert client.rows[-1]["last"] == 9
    worker.wait(0.5)
    assert len(client.rows) == 2
    assert client.listed()["merged"] == 7


async def test_there_is_at_most_one_row_per_period_however_the_ticks_fall(worker: Worker) -> None:
    worker.tick(last=-1)
    client = worker.open("A", max_rate=4)
    times: list[float] = []
    for n in range(400):
        worker.tick(last=n)
        worker.wait((0.01, 0.07, 0.002, 0.11)[n % 4])
        times += [worker.clock.now_s] * (len(client.rows) - len(times))
    worker.wait(1)
    assert client.rows[-1]["last"] == 399
    assert len(client.rows) + client.listed()["merged"] == 400
    assert len(times) > 60
    for n in range(len(times) - 4):
        assert times[n + 4] - times[n] > 0.99, "more than four rows in a second"


async def test_a_row_that_is_due_is_not_overtaken_while_the_loop_is_late(worker: Worker) -> None:
    worker.tick(last=0)
    client = worker.open("A", max_rate=1)
    worker.tick(last=1)
    worker.tick(last=2)
    worker.clock.now_s += 1.5  # its timer has not run yet
    worker.tick(last=3)
    worker.tick(last=4)
    worker.wait(0)
    assert [row["last"] for row in client.rows] == [1, 4]
    worker.tick(last=5)
    worker.wait(0.9)
    assert len(client.rows) == 2
    worker.wait(0.1)
    assert [row["last"] for row in client.rows] == [1, 4, 5]


async def test_a_value_that_has_come_back_in_time_is_no_news(worker: Worker) -> None:
    worker.tick(last=0)
    client = worker.open("A", max_rate=1)
    for price in (1, 2, 1):
        worker.tick(last=price, volume=5)
    worker.wait(1)
    # The default view goes by the number, for main has said that there is news.
    assert [row["last"] for row in client.rows] == [1, 1]
    narrow = worker.open("A", fields=["last"], max_rate=1)
    for price in (7, 8, 7):
        worker.tick(last=price)
    worker.wait(1)
    assert [row["last"] for row in narrow.rows] == [7]
    worker.tick(last=9)
    assert narrow.chain[-1] == (5, 8)


async def test_a_value_that_has_come_back_is_news_to_who_saw_the_other_one_in_his_snapshot(worker: Worker) -> None:
    worker.tick(last=0)
    worker.open("A", fields=["last"], max_rate=1)
    worker.tick(last=1)
    worker.tick(last=2)
    newcomer = Client(worker, JSON)
    newcomer.ask("subscribe", "A", fields=["last"], max_rate=1)
    assert newcomer.take()[0]["data"][0]["last"] == 2
    worker.tick(last=1)
    worker.wait(1)
    assert [(row["prev"], row["last"]) for row in newcomer.rows] == [(3, 1)]


async def test_a_newcomer_is_not_sent_the_row_of_his_snapshot_when_its_time_comes(worker: Worker) -> None:
    worker.tick(last=0)
    first = worker.open("A", max_rate=1)
    worker.tick(last=1)
    worker.tick(last=2)
    second = worker.open("A", max_rate=1)
    worker.wait(1)
    assert (first.chain, second.chain) == ([(1, 2), (2, 3)], [])
    worker.tick(last=3)
    worker.tick(last=4)
    worker.wait(1)
    assert second.chain == [(3, 5)]  # and not 4: the lane had its row a moment ago
    assert (first.listed()["merged"], second.listed()["merged"]) == (1, 1)


@pytest.mark.parametrize("snapshot", [True, False])
@pytest.mark.parametrize("rate", [10, 1, 0.1, None])
async def test_a_rate_is_changed_without_a_hole(worker: Worker, rate: float | None, snapshot: bool) -> None:
    worker.tick(last=0)
    client = worker.open("A", max_rate=1)
    for n in range(1, 4):
        worker.tick(last=n)
    assert client.chain == [(1, 2)]
    client.ask("subscribe", "A", max_rate=rate, snapshot=snapshot)
    last = client.rows[-1] if client.rows else None
    if rate == 1 and not snapshot:
        assert last is None  # it is the same subscription, and waits
    else:
        assert last is not None
        assert (last.get("prev"), last["last"]) == (None if snapshot else 2, 3)
    delivered = len(client.rows) + 1
    client.take()
    for n in range(4, 8):
        worker.tick(last=n)
    worker.wait(10)
    chain = client.chain
    assert [prev for prev, _ in chain] == [2 if last is None else 4, *(seq for _, seq in chain[:-1])]
    assert client.rows[-1]["last"] == 7
    delivered += len(chain)
    assert client.listed()["merged"] + delivered == 8 - 1


async def test_to_ask_for_the_same_again_is_no_way_around_the_rate(worker: Worker) -> None:
    worker.tick(last=0)
    client = worker.open("A", max_rate=1)
    worker.tick(last=1)
    for n in range(2, 6):
        client.ask("subscribe", "A", max_rate=1)
        client.take()
        worker.tick(last=n)
        assert client.rows == []
        client.ask("snapshot", "A")
        client.take()
        worker.tick(last=-n)
        assert client.rows == []
    worker.tick(last=6)
    worker.wait(1)
    assert [row["last"] for row in client.rows] == [6]


async def test_the_row_that_new_options_bring_begins_a_period(worker: Worker) -> None:
    worker.tick(last=0, bid=0)
    client = worker.open("A", fields=["last"])
    worker.tick(bid=1)
    client.ask("subscribe", "A", max_rate=1, snapshot=False)
    assert client.chain == [(1, 2)]
    worker.tick(bid=2)
    worker.wait(0.9)
    assert client.chain == [(1, 2)]
    worker.wait(0.1)
    assert client.chain == [(1, 2), (2, 3)]


async def test_timers_that_come_early_do_not_raise_the_rate(worker: Worker) -> None:
    client = worker.open("A", max_rate=500)
    begin = worker.clock.now_s
    for n in range(1000):
        worker.tick(last=n)
        worker.wait(0.00105)
    assert len(client.rows) <= (worker.clock.now_s - begin + 0.001) * 500 + 1


async def test_what_waits_for_its_time_is_not_sent_after_an_unsubscribe(worker: Worker) -> None:
    client, other = worker.open("A", "B", max_rate=1), worker.open("A", max_rate=1)
    worker.tick(last=1)
    worker.tick(last=2)
    client.ask("unsubscribe", "A")
    worker.wait(1)
    assert client.rows == []
    assert [row["last"] for row in other.rows] == [1, 2]
    client.ask("unsubscribe", "*")
    other.session.close()
    worker.wait(1)
    assert not worker.hub._due


async def test_a_lane_that_was_left_does_not_disturb_its_successor(worker: Worker) -> None:
    client = worker.open("A", max_rate=1)
    worker.tick(last=1)
    worker.tick(last=2)
    client.ask("unsubscribe", "A")
    client.ask("subscribe", "A", max_rate=1)
    client.take()
    worker.tick(last=3)
    worker.tick(last=4)
    worker.wait(0.9)
    worker.wait(0.1)
    assert [row["last"] for row in client.rows] == [3, 4]


async def test_a_slow_client_with_a_rate_gets_the_newest_row(worker: Worker) -> None:
    worker.hub._max_rows = 1
    client = worker.open("A", max_rate=10)
    client.block()
    for n in range(1, 50):
        worker.tick(last=n)
        worker.wait(0.03)
    worker.wait(1)
    worker.unblock(client)
    rows = [row for message in client.messages if message["type"] == "tick" for row in message["data"]]
    assert [(row["prev"], row["last"]) for row in rows] == [(0, 49)]
    assert client.listed()["merged"] == 48


async def test_the_loops_own_timer_sends_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    waits: list[tuple[float, Callable[[], None]]] = []
    monkeypatch.setattr(loop, "call_later", lambda delay, call: waits.append((delay, call)) or loop.call_soon(int))
    clock = Clock()
    monkeypatch.setattr("quotepush.push.hub.time", clock)
    worker = Worker(clock)
    client = worker.open("A", max_rate=4)
    worker.tick(last=1)
    worker.tick(last=2)
    ((wait_s, call),) = waits
    assert wait_s == 0.25
    clock.now_s += wait_s
    call()
    assert [row["last"] for row in client.rows] == [1, 2]
    worker.open("B", max_rate=1)
    worker.open("C", max_rate=8)
    waits.clear()
    for code in ("B", "C"):
        worker.tick(code, last=8)
        worker.tick(code, last=9)
    assert [wait_s for wait_s, _ in waits] == [1.0, 0.125], "what is due first decides"


# Subscribing again


async def test_other_fields_begin_with_the_newest_row_in_them(worker: Worker) -> None:
    worker.tick(last=1, bid=1)
    client = worker.open("A", fields=["last"])
    worker.tick(bid=2)
    assert client.rows == []
    ack = client.ask("subscribe", "A", fields=["bid"], snapshot=False)
    assert ack["total"] == 1
    worker.hub.flush_soon()
    assert client.rows == [{"prev": 1, "code": "A", "seq": 2, "ts": 20, "bid": 2}]
    worker.tick(bid=3)
    assert client.chain == [(1, 2), (2, 3)]
    assert client.listed()["merged"] == 0


async def test_who_changes_into_a_lane_that_others_are_in_misses_nothing(worker: Worker) -> None:
    worker.tick(last=1, bid=1)
    other = worker.open("A", fields=["last"])
    client = worker.open("A", fields=["bid"])
    worker.tick(name="n")  # neither of them has been sent this one
    client.ask("subscribe", "A", fields=["last"], snapshot=False)
    assert client.chain == [(1, 2)]
    worker.tick(last=2)
    assert (client.chain, other.chain) == ([(1, 2), (2, 3)], [(1, 3)])
    assert (client.listed()["merged"], other.listed()["merged"]) == (0, 1)


async def test_a_first_row_that_waits_is_not_lost_when_the_options_change(worker: Worker) -> None:
    client = worker.open("A", snapshot=False)
    client.block()
    for n in range(1, 4):
        worker.tick(last=n)
    client.ask("subscribe", "A", fields=["last"], snapshot=False)
    assert client.rows == []
    worker.unblock(client)
    assert client.rows == [{"code": "A", "seq": 3, "ts": 30, "last": 3}]
    assert client.listed()["merged"] == 2


async def test_a_snapshot_of_no_value_is_a_base_all_the_same(worker: Worker) -> None:
    client = worker.open("A")
    client.ask("subscribe", "A", fields=["last"], snapshot=False)
    worker.tick(last=1)
    assert client.chain == [(0, 1)]


async def test_a_snapshot_counts_what_a_view_or_a_rate_has_left_out(worker: Worker) -> None:
    worker.tick(last=1)
    client = worker.open("A", fields=["last"])
    for n in range(5):
        worker.tick(bid=n)
    client.ask("subscribe", "A", fields=["last"])
    assert (client.listed()["seq"], client.listed()["merged"]) == (6, 4)


# Formats


async def test_rows_are_arrays_in_the_order_that_the_ack_names(worker: Worker) -> None:
    worker.tick(last=5, name="a,b")
    client = Client(worker, JSON)
    ack = client.ask("subscribe", "A", "B", fields=["name", "volume", "last"], format="rows")
    assert ack["columns"] == ["prev", "code", "seq", "ts", "name", "volume", "last"]
    (snapshot,) = client.take()
    assert snapshot["cols"] == ack["cols"]
    assert snapshot["data"] == [[None, "A", 1, 10, "a,b", None, 5], [None, "B", 0, None, None, None, None]]
    worker.tick(last=6)
    (tick,) = client.take()
    assert (tick["type"], tick["cols"], tick["data"]) == ("tick", ack["cols"], [[1, "A", 2, 20, "a,b", None, 6]])


async def test_a_first_row_without_a_snapshot_has_null_as_prev(worker: Worker) -> None:
    client = worker.open("A", fields=["last"], format="rows", snapshot=False)
    worker.tick(last=1)
    worker.tick(last=2)
    assert client.rows == [[None, "A", 1, 10, 1], [1, "A", 2, 20, 2]]


async def test_an_ack_of_objects_names_no_columns(worker: Worker) -> None:
    client = Client(worker, JSON)
    assert not {"cols", "columns"} & set(client.ask("subscribe", "A", format="objects"))
    assert "cols" not in client.take()[0]


@pytest.mark.parametrize("is_slow", [False, True])
async def test_objects_and_arrays_come_in_messages_of_their_own(worker: Worker, is_slow: bool) -> None:
    client = worker.open("A", "B")
    cols = client.ask("subscribe", "B", fields=["last"], format="rows")["cols"]
    other_cols = client.ask("subscribe", "C", fields=["bid"], format="rows")["cols"]
    client.take()
    client.block()
    for n in range(1, 4):
        for code in "ABC":
            worker.tick(code, last=n, bid=n)
    if is_slow:
        client.session.outbox.merge()
    worker.unblock(client)
    told = {message.get("cols"): message["data"] for message in client.messages if message["type"] == "tick"}
    assert len(told) == 3
    if is_slow:
        assert [(row["prev"], row["seq"]) for row in told[None]] == [(0, 3)]
        assert (told[cols], told[other_cols]) == ([[0, "B", 3, 30, 3]], [[0, "C", 3, 30, 3]])
    else:
        assert [(row["prev"], row["seq"]) for row in told[None]] == [(0, 1), (1, 2), (2, 3)]
        assert told[cols] == [[0, "B", 1, 10, 1], [1, "B", 2, 20, 2], [2, "B", 3, 30, 3]]
        assert [row[:3] for row in told[other_cols]] == [[0, "C", 1], [1, "C", 2], [2, "C", 3]]


async def test_list_names_the_options(worker: Worker) -> None:
    client = worker.open("A", fields=["last", "ts"], max_rate=2.5, format="rows")
    assert client.listed() == {
        "code": "A", "fields": ["last"], "max_rate": 2.5, "format": "rows", "seq": 0, "merged": 0,
    }  # fmt: skip


# MessagePack


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x81", b"\xa2\xff\xfe", b"\x01\x01", b"\x91" * 5000, b"\x81\xa1a" * 3000, b"\x81\x81\x01\x02\x03",
     b"\xdd\xff\xff\xff\xff", b'{"action":"ping"}'],
)  # fmt: skip
async def test_bytes_that_are_no_messagepack_are_bad_json(worker: Worker, data: bytes) -> None:
    client = Client(worker, MSGPACK)
    client.session.receive(data)
    (error,) = client.take()
    assert (error["type"], error["error"]) == ("error", "bad_json")
    assert "MessagePack" in error["message"]


@pytest.mark.parametrize(
    "said", [[], 5, "ping", {1: 2}, {"action": b"ping"}, {"action": "ping", "id": b"1"},
             {"action": "subscribe", "codes": [b"A"]}, {"action": "ping", "id": msgspec.msgpack.Ext(5, b"x")}]
)  # fmt: skip
async def test_what_json_could_not_say_is_a_bad_request(worker: Worker, said: Any) -> None:
    client = Client(worker, MSGPACK)
    client.session.receive(msgspec.msgpack.encode(said))
    (error,) = client.take()
    assert (error["type"], error["error"]) == ("error", "bad_request")
