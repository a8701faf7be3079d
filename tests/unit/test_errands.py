"""Who gives a command is answered exactly once, whatever the workers do."""

import asyncio
from typing import Any, cast

import pytest

from quotepush.cluster.commands import Command, Reply, To, encode
from quotepush.node import bus, errands
from quotepush.node.errands import Errands


class End:
    """The bus of a worker that says nothing by itself."""

    def __init__(self) -> None:
        self.orders: list[bus.Order] = []
        self.unsent_bytes = 0

    def send(self, message: Any) -> None:
        self.orders.append(message)


class Office:
    def __init__(self, workers: int = 2) -> None:
        self.ends = [End() for _ in range(workers)]
        self.workers = dict(enumerate(self.ends))
        self.replies: list[Reply] = []
        self.errands = Errands("n1", lambda: cast(Any, self.workers))

    def give(self, command: Command) -> None:
        self.errands.give(command, encode(command), self.replies.append)

    def answer(self, worker: int, order: int = -1, **said: Any) -> None:
        question = self.ends[worker].orders[order].question
        self.errands.carried(worker, bus.Carried(question, encode(Reply("", "n1", **said))))


async def test_all_workers_are_asked_and_their_answers_are_one() -> None:
    office = Office()
    office.give(Command(op="send", id="a", to=To(users=["u", "v"])))
    office.answer(0, delivered=2, users=["u"])
    assert office.replies == []
    office.answer(1, delivered=3, users=["v", "u"])
    assert office.replies == [Reply("a", "n1", 5, users=["u", "v"])]
    office.answer(1, delivered=3)
    assert len(office.replies) == 1, "once"


async def test_only_the_workers_that_hold_the_connections_are_asked() -> None:
    office = Office(3)
    office.give(Command(op="close", id="a", conns=["n1.1.5", "n1.2.6", "n1.7.1"]))
    assert [len(end.orders) for end in office.ends] == [0, 1, 1]
    office.answer(1, delivered=1, fds=["n1.1.5"])
    office.answer(2, fds=[])
    assert office.replies == [Reply("a", "n1", 1, ["n1.1.5"])]


async def test_a_command_that_concerns_nobody_is_answered_at_once() -> None:
    office = Office()
    office.give(Command(op="unbind", id="a", conn="n1.9.1"))
    assert office.replies == [Reply("a", "n1")]


async def test_a_worker_that_is_gone_has_answered() -> None:
    office = Office()
    office.give(Command(op="send", id="a", to=To(all=True)))
    office.give(Command(op="send", id="b", to=To(all=True)))
    office.answer(0, 0, delivered=1)
    office.errands.gone(1)
    assert office.replies == [Reply("a", "n1", 1)]
    office.errands.gone(0)
    assert [reply.id for reply in office.replies] == ["a", "b"]


async def test_a_silent_worker_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errands, "PATIENCE_S", 0.02)
    office = Office()
    answered = asyncio.Event()
    command = Command(op="send", id="a", to=To(all=True))
    office.errands.give(command, encode(command), lambda reply: (office.replies.append(reply), answered.set()))
    office.answer(0, delivered=4, error="", message="")
    await asyncio.wait_for(answered.wait(), 10)
    office.answer(1, delivered=5)
    assert office.replies == [Reply("a", "n1", 4)]


async def test_a_worker_that_does_not_read_is_given_no_more() -> None:
    office = Office(1)
    office.ends[0].unsent_bytes = 1 << 26
    office.give(Command(op="send", id="a", to=To(all=True)))
    assert office.replies[0].error == "overloaded"
    assert office.ends[0].orders == [] and office.errands.refused == 1
