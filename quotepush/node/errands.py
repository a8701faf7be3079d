"""Commands of the cluster on their way to the workers of this node, and what these made of them.

Law: who gives a command is answered exactly once: as soon as each worker that it concerns has answered or is gone, and
after ``PATIENCE_S`` with what has come until then.
"""

import asyncio
from collections.abc import Callable, Mapping

from quotepush.cluster.commands import Command, Reply, decode_reply, worker_of
from quotepush.node import bus

__all__ = ["PATIENCE_S", "Errands"]

PATIENCE_S = 2.0

# A worker that has so much to read on its bus is given no further commands until it has.
_MAX_UNREAD_BYTES = 1 << 25


class _Errand:
    """One command under way."""

    __slots__ = ("reply", "then", "timer", "waiting")

    def __init__(self, reply: Reply, then: Callable[[Reply], None]) -> None:
        self.reply = reply
        self.then = then
        self.waiting: set[int] = set()
        self.timer: asyncio.TimerHandle | None = None


class Errands:
    """Gives commands to workers.

    Args:
        node: who answers.
        workers: the bus of each worker that is there, by number.
    """

    def __init__(self, node: str, workers: Callable[[], Mapping[int, bus.BusEnd]]) -> None:
        self._node = node
        self._workers = workers
        self._under_way: dict[int, _Errand] = {}
        self._next = 0
        self.refused = 0  # because a worker had too much to read

    def give(self, command: Command, text: bytes, then: Callable[[Reply], None]) -> None:
        """Have ``command`` carried out by the workers that it concerns.

        Args:
            text: the same as bytes.
            then: gets the reply.
        """
        workers = self._workers()
        fds = command.fds()
        named = workers.keys() if fds is None else workers.keys() & {worker_of(fd) for fd in fds}
        self._next += 1
        number = self._next
        errand = _Errand(Reply(command.id, self._node), then)
        for worker in named:
            end = workers[worker]
            if end.unsent_bytes > _MAX_UNREAD_BYTES:
                self.refused += 1
                errand.reply.error, errand.reply.message = "overloaded", "a worker has too much to read"
            else:
                errand.waiting.add(worker)
                end.send(bus.Order(number, text))
        self._under_way[number] = errand
        if errand.waiting:
            loop = asyncio.get_running_loop()
            errand.timer = loop.call_later(PATIENCE_S, self._finish, number)
        else:
            self._finish(number)

    def carried(self, worker: int, message: bus.Carried) -> None:
        """A worker has answered."""
        errand = self._under_way.get(message.question)
        if errand is None:
            return  # it was too late
        said = decode_reply(message.reply)
        assert said is not None, "the worker wrote it"
        reply = errand.reply
        reply.delivered += said.delivered
        reply.fds += said.fds
        reply.users += [user for user in said.users if user not in reply.users]
        if said.session is not None:
            reply.session = said.session
        if said.error:
            reply.error, reply.message = said.error, said.message
        self._leave(message.question, errand, worker)

    def gone(self, worker: int) -> None:
        """A worker is there no more, with everything that it was given."""
        for number, errand in list(self._under_way.items()):
            if worker in errand.waiting:
                self._leave(number, errand, worker)

    def _leave(self, number: int, errand: _Errand, worker: int) -> None:
        errand.waiting.discard(worker)
        if not errand.waiting:
            self._finish(number)

    def _finish(self, number: int) -> None:
        errand = self._under_way.pop(number)
        if errand.timer is not None:
            errand.timer.cancel()
        errand.then(errand.reply)
