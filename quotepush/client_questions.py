"""Questions of the Python client to its server: ``list``, ``snapshot`` and ``ping``.

Law: whoever asks gets the answer to his own question, over lost connections and rate limits, or an exception in time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from quotepush.client_errors import NotAnswered
from quotepush.client_messages import (
    Accepted,
    Message,
    Rejected,
    Row,
    read_results,
    refusal_of,
    retry_after_ms,
)
from quotepush.client_state import ClientState
from quotepush.errors import PeerError

__all__ = ["Questions", "SnapshotResult"]


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """What ``snapshot`` returns.

    Attributes:
        rows: newest row by canonical code; a code without a value yet is missing.
        accepted: codes that were understood, in the order in which they were given.
        rejected: codes that were refused.
    """

    rows: dict[str, Row]
    accepted: tuple[Accepted, ...]
    rejected: tuple[Rejected, ...]


class Questions:
    """The questions of one client that have no answer yet.

    Args:
        core: numbers them.
        say: sends a request on the connection that is open.
        greeted: returns when there is a connection; raises when there will be none.
        timeout_s: for an answer, waiting for a connection included.
    """

    def __init__(
        self, core: ClientState, say: Callable[[bytes], None], greeted: Callable[[], Awaitable[None]], timeout_s: float
    ) -> None:
        self._core = core
        self._say = say
        self._greeted = greeted
        self._timeout_s = timeout_s
        self._answers: dict[int, asyncio.Future[Message | None]] = {}
        self._awaited_snapshot: tuple[asyncio.Future[Message | None], Message] | None = None

    async def ask(self, action: str, codes: Sequence[str] = ()) -> Message:
        """Ask a question until it is answered.

        Raises:
            PeerError: the server refuses to answer.
            NotAnswered: the time is over.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    await self._greeted()
                    answer = await self._exchange(action, codes)
                    if answer is None:
                        continue
                    if answer["type"] != "error":
                        return answer
                    if not answer.get("retryable"):
                        raise PeerError(str(answer.get("error")), str(answer.get("message")))
                    await asyncio.sleep(retry_after_ms(answer) / 1000)
        except TimeoutError:
            raise NotAnswered(action, self._timeout_s) from None

    async def snapshot(self, codes: Iterable[str]) -> SnapshotResult:
        """Ask for the newest rows, in as many requests as the server's limits want."""
        rows: dict[str, Row] = {}
        accepted: tuple[Accepted, ...] = ()
        rejected: list[Rejected] = []
        sendable: list[str] = []
        for code in codes:
            refusal = refusal_of(code)
            if refusal is None:
                sendable.append(code)
            else:
                rejected.append(refusal)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._greeted()  # the server's hello says how many codes a request may hold
        except TimeoutError:
            raise NotAnswered("snapshot", self._timeout_s) from None
        for part in self._core.parts(sendable):
            answer = await self.ask("snapshot", part)
            results = read_results(answer)
            accepted += results.accepted
            rejected += results.rejected
            rows |= {row["code"]: row for row in answer.get("data", ()) if row["seq"]}
        return SnapshotResult(rows, accepted, tuple(rejected))

    # What the server says

    def take_answer(self, message: Message, request_id: int) -> None:
        """Take an ``ack``, ``pong`` or ``error``; others' answers are left alone."""
        answer = self._answers.get(request_id)
        if message["type"] == "ack" and message.get("action") == "snapshot" and read_results(message).accepted:
            if answer is not None:
                self._awaited_snapshot = answer, message
        else:
            _settle(answer, message)

    def take_snapshot(self, message: Message) -> None:
        """Take rows that may be the answer to a question."""
        if self._awaited_snapshot is None:
            return
        answer, ack = self._awaited_snapshot
        wanted = dict.fromkeys(entry["code"] for entry in ack["accepted"])
        if [row["code"] for row in message["data"]] == list(wanted):
            self._awaited_snapshot = None
            _settle(answer, {**ack, "data": message["data"]})

    def lose(self) -> None:
        """The connection is gone; what was asked on it is asked again on the next."""
        self._awaited_snapshot = None
        for answer in self._answers.values():
            _settle(answer, None)

    async def _exchange(self, action: str, codes: Sequence[str]) -> Message | None:
        """Send one question; return its answer, or None when the connection is lost before."""
        answer: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self._say(self._core.ask(action, codes=codes))
        request_id = self._core.last_id
        self._answers[request_id] = answer
        try:
            return await answer
        finally:
            self._answers.pop(request_id, None)


def _settle(answer: "asyncio.Future[Message | None] | None", message: Message | None) -> None:
    if answer is not None and not answer.done():
        answer.set_result(message)
