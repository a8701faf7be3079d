"""Proving clients by the hundred, in processes of their own: one could not read as fast as they are sent to."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from tests.support.proving_client import ProvingClient, Sight
from tests.support.ws_client import Violation

__all__ = ["Fleet", "Sailor", "fleet_of"]

_PATIENCE_S = 60.0
_LONGEST_LINE = 1 << 28


class Sailor(msgspec.Struct):
    """A client of a fleet.

    Attributes:
        options: of :class:`ProvingClient`.
    """

    codes: list[str]
    options: dict[str, Any]


class _Plan(msgspec.Struct):
    url: str
    sailors: list[Sailor]


class _Answer(msgspec.Struct, omit_defaults=True):
    """What a process says of its clients, in their order, or what they found broken."""

    faults: list[str] = []
    received: list[int] = []
    sights: list[Sight] = []


class Fleet:
    """Clients in several processes."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def received(self) -> list[int]:
        """How many rows each client has been sent as ticks."""
        return [count for answer in await self._ask("received") for count in answer.received]

    async def newest(self) -> list[Sight]:
        """What each client has seen, but for the rows that are not the newest."""
        return [sight for answer in await self._ask("newest") for sight in answer.sights]

    async def sights(self) -> list[Sight]:
        """All that each client has seen."""
        return [sight for answer in await self._ask("sights") for sight in answer.sights]

    async def agree_with_the_server(self) -> None:
        """What the server lists of each subscription is what its client has counted."""
        await self._ask("compare")

    async def _ask(self, question: str) -> list[_Answer]:
        answers = await asyncio.gather(*(_ask(process, question.encode()) for process in self._processes))
        faults = [fault for answer in answers for fault in answer.faults]
        assert not faults, "\n".join(faults)
        return answers


@contextlib.asynccontextmanager
async def fleet_of(url: str, sailors: Sequence[Sailor], processes: int = 2) -> AsyncIterator[Fleet]:
    """Let them connect and subscribe; at the end raise what they have found broken.

    Args:
        url: ``ws://…``.
    """
    started: list[asyncio.subprocess.Process] = []
    try:
        for n in range(processes):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.support.fleet", cwd=Path(__file__).parents[2], limit=_LONGEST_LINE,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            started.append(process)
            await _ask(process, msgspec.json.encode(_Plan(url, list(sailors[n::processes]))))
        yield Fleet(started)
        await Fleet(started).received()
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


async def _ask(process: asyncio.subprocess.Process, line: bytes) -> _Answer:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line + b"\n")
    async with asyncio.timeout(_PATIENCE_S):
        await process.stdin.drain()
        answer = await process.stdout.readline()
    assert answer, "a process of the fleet has ended"
    return msgspec.json.decode(answer, type=_Answer)


# In the process


async def _sail() -> None:
    questions = asyncio.StreamReader(limit=_LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    plan = msgspec.json.decode(await questions.readline(), type=_Plan)
    clients = [
        ProvingClient(plan.url, sailor.codes, keep=lambda row: {"last": row.get("last")}, **sailor.options)
        for sailor in plan.sailors
    ]
    async with contextlib.AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        _say(_Answer())
        while question := (await questions.readline()).decode().strip():
            _say(await _answer(clients, question))


async def _answer(clients: list[ProvingClient], question: str) -> _Answer:
    faults = []
    for client in clients:
        try:
            client.check()
        except Violation as e:
            faults.append(f"{client.options}: {e}")
    if faults:
        return _Answer(faults=faults)
    match question:
        case "received":
            return _Answer(received=[client.received for client in clients])
        case "sights":
            return _Answer(sights=[client.sight() for client in clients])
        case "newest":
            return _Answer(sights=[client.sight(is_whole=False) for client in clients])
        case _:
            differences = await asyncio.gather(*map(_difference, clients))
            return _Answer(faults=[difference for difference in differences if difference])


async def _difference(client: ProvingClient) -> str:
    listed = {entry["code"]: (entry["seq"], entry["merged"]) for entry in await client.subscriptions()}
    counted = {code: (seq, client.merged_here[code]) for code, (_, seq) in client.places.items()}
    return "" if listed == counted else f"{client.options}: listed is {listed}, counted {counted}"


def _say(answer: _Answer) -> None:
    text = msgspec.json.encode(answer) + b"\n"
    while text:
        text = text[os.write(sys.stdout.fileno(), text) :]


if __name__ == "__main__":
    uvloop.run(_sail())
