"""Main and a worker over a real socketpair: everything arrives, once and in order."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from quotepush.node import bus
from tests.support.waiting import wait_until

TO_WORKER = [
    bus.Setup(
        1,
        {"port": 8008, "allowed_origins": ["*"], "zones": {"SH": "Asia/Shanghai"}},
        "n1",
        "epoch",
        "0.1",
        "a1",
        [("secret", False), ("{}", True)],
    ),
    bus.TokenKeys([("secret", False)]),
    bus.TokenKeys(None, True),
    bus.Rows(
        [("600519.SH", 7, b'{"code":"600519.SH","seq":7,"name":"\xe8\x8c\x85"}'), ("AAPL", 2**40, b"{}", b"[]")], 7
    ),
    bus.Answered(
        5,
        [("A", 3, b"{}", b"{}", "e1"), ("B", 0, None, None, "e0")],
        {"C": "unknown_code"},
        {"A": [(2, b"{}"), (3, b"{}")]},
        ["A"],
        {"D": (None, []), "E": (1, [(2, b"{}", 2**40)])},
        2**40,
    ),
    bus.Found(6, b"[]"),
    bus.Found(7, None),
    bus.Freshness(["A"], ["B", "C"]),
    bus.PlacesGranted(6),
    bus.PlacesGranted(0, ["", "overloaded"]),
    bus.Feed("ok", 1_721_872_800_123, "e1"),
    bus.Doubt(),
    bus.Lend(1, True),
    bus.Order(9, b'{"op":"poke"}'),
    bus.Sent(3, 2),
    bus.Sent(4, 0, 1, "not_online", "nobody", True),
    bus.Drain(10.5, 1000),
]
TO_MAIN = [
    bus.Hello("0.1721872800000000"),
    bus.Ready(),
    bus.Ask(5, ["A", "B"], True, False, {"A": ("e1", 1)}),
    bus.Ask(6, ["A"], True, False, {"A": ("@a1", 7)}),
    bus.Find(7, "app", 20),
    bus.Find(8, None, 10, ("*.SH", "AAPL")),
    bus.KeysWanted(),
    bus.Unwatch(["A"]),
    bus.PlacesWanted(2, 16),
    bus.PlacesBack(3),
    bus.RegistryClient(17, "0.1721872800000000:members"),
    bus.Carried(9, b'{"id":"a","node":"n1"}'),
    bus.UsersCame(["u1", "u2"], [("u1", 2, True)]),
    bus.ClientSend(3, b'{"op":"send"}'),
    bus.Happened([b"{}", b"{}"]),
    bus.Listed(["AAPL"], ["MSFT", "600519.SH"]),
    bus.PlacesWanted(0, 0, ["192.0.2.1", ""]),
    bus.PlacesBack(0, ["192.0.2.1"]),
    bus.Figures({"connections": 3, "connections_closed": {"closed": 2}, "lag": 0.5}),
]


class End:
    """One end with everything that it was told."""

    def __init__(self, inbound: Any) -> None:
        self.told: list[Any] = []
        self.turns: list[int] = []
        self.losses = 0
        self.drains = 0
        self.bus = bus.BusEnd(
            inbound, self.told.append, on_lost=self._lost, on_turn=lambda: self.turns.append(len(self.told)),
            on_drained=self._drained,
        )  # fmt: skip

    def _lost(self) -> None:
        self.losses += 1

    def _drained(self) -> None:
        self.drains += 1

    async def heard(self, count: int) -> list[Any]:
        await wait_until(lambda: len(self.told) >= count, what=f"{count} messages")
        return self.told


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[End, End]]:
    """Main's end and the worker's."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    main, worker = End(bus.ToMain), End(bus.ToWorker)
    for end, sock in ((main, ours), (worker, theirs)):
        sock.setblocking(False)
        await loop.create_unix_connection(lambda end=end: end.bus, sock=sock)
    yield main, worker
    for end in (main, worker):
        end.bus.close()
    await wait_until(lambda: main.losses and worker.losses, what="both ends are gone")
    assert (main.losses, worker.losses) == (1, 1)


async def test_every_message_arrives_as_it_was_sent() -> None:
    async with pair() as (main, worker):
        for message in TO_WORKER:
            main.bus.send(message)
        for message in TO_MAIN:
            worker.bus.send(message)
        assert await worker.heard(len(TO_WORKER)) == TO_WORKER
        assert await main.heard(len(TO_MAIN)) == TO_MAIN


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in TO_WORKER} == set(bus.ToWorker.__args__)
    assert {type(message) for message in TO_MAIN} == set(bus.ToMain.__args__)


async def test_what_is_sent_in_one_turn_shares_a_frame_and_a_turn() -> None:
    async with pair() as (main, worker):
        for n in range(100):
            main.bus.send(bus.Rows([("A", n, b"{}")]))
        told = await worker.heard(100)
        assert [message.rows[0][1] for message in told] == list(range(100))
        assert worker.turns == [100]


async def test_what_is_sent_now_comes_behind_what_is_queued() -> None:
    async with pair() as (main, worker):
        main.bus.send(bus.Feed("ok", 1, "e"))
        main.bus.send_now(bus.Feed("ok", 2, "e"))
        main.bus.send(bus.Feed("ok", 3, "e"))
        assert [message.last_tick_ms for message in await worker.heard(3)] == [1, 2, 3]


async def test_a_frame_that_comes_in_pieces_is_put_together() -> None:
    end = End(bus.ToWorker)
    body = msgspec.msgpack.encode(TO_WORKER)
    frame = struct.pack("!I", len(body)) + body
    for n in range(len(frame)):
        end.bus.data_received(frame[n : n + 1])
        assert end.told == ([] if n < len(frame) - 1 else TO_WORKER)
    assert end.turns == [len(TO_WORKER)]
    end.bus.data_received(frame + frame + frame[:10])
    assert end.told == TO_WORKER * 3
    end.bus.data_received(frame[10:])
    assert end.told == TO_WORKER * 4


async def test_large_frames_arrive_whole_and_what_waits_can_be_seen() -> None:
    async with pair() as (main, worker):
        row = b"x" * 1000
        for _ in range(20):
            main.bus.send_now(bus.Rows([("A", n, row) for n in range(1000)]))
        assert main.bus.unsent_bytes > 1_000_000
        told = await worker.heard(20)
        assert all(message.rows[-1] == ("A", 999, row) for message in told)
        await wait_until(lambda: main.drains, what="everything has been taken")
        assert main.bus.unsent_bytes == 0


async def test_an_answer_may_be_given_while_a_message_is_taken() -> None:
    async with pair() as (main, worker):
        main.bus._on_message = lambda message: main.bus.send(bus.Answered(message.question, [], {}, {}))
        worker.bus.send(bus.Ask(1, ["A"], False, False, {}))
        worker.bus.send(bus.Ask(2, ["A"], False, False, {}))
        assert [message.question for message in await worker.heard(2)] == [1, 2]


async def test_what_is_queued_is_sent_before_the_end() -> None:
    async with pair() as (main, worker):
        worker.bus.send(bus.Unwatch(["A"]))
        worker.bus.close()
        assert await main.heard(1) == [bus.Unwatch(["A"])]
        await wait_until(lambda: main.losses, what="main sees the end")


async def test_sending_to_one_who_is_gone_is_harmless() -> None:
    async with pair() as (main, worker):
        worker.bus.close()
        await wait_until(lambda: main.losses)
        main.bus.send(bus.Feed("ok", 1, "e"))
        main.bus.send_now(bus.Feed("ok", 2, "e"))
        main.bus.flush()
        main.bus.close()
        assert main.bus.unsent_bytes == 0
        await asyncio.sleep(0)


async def test_nonsense_is_refused() -> None:
    end = End(bus.ToWorker)
    with pytest.raises(ValueError, match="a bus frame of"):
        end.bus.data_received(b"\xff\xff\xff\xff")
    end = End(bus.ToWorker)
    with pytest.raises(msgspec.DecodeError):
        end.bus.data_received(b"\x00\x00\x00\x01\xc1")
    end = End(bus.ToWorker)
    body = msgspec.msgpack.encode([bus.Ready()])  # a worker's message, to a worker
    with pytest.raises(msgspec.ValidationError):
        end.bus.data_received(struct.pack("!I", len(body)) + body)
