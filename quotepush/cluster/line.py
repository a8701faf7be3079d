"""One connection to Redis for many callers.

Invariant: what is asked while an answer is awaited goes out together afterwards, so a thousand calls at once are a
few pipelines of bounded size on one connection; and whoever asks gets his own answers, or an exception, within the
bound, whatever becomes of the others.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from redis.exceptions import RedisError

from quotepush.cluster.sets import SLICE_COMMANDS
from quotepush.errors import BackendUnavailable, reason_of
from quotepush.store.clients import hang_up

__all__ = ["Line", "Words"]

_PIPELINE_BYTES = 1 << 20

# A command.
Words = tuple[Any, ...]


class Line:
    """Asks Redis.

    Args:
        redis: a client of a :class:`~quotepush.store.clients.Store`; the caller closes it.
        where: its address, as it may be shown.
        timeout_s: the longest wait of one :meth:`ask` (or of each 200 commands of it), its turn included.
    """

    def __init__(self, redis: Any, where: str, timeout_s: float) -> None:
        self._redis = redis
        self._where = where
        self._timeout_s = timeout_s
        self._asked: deque[tuple[Sequence[Words], asyncio.Future[list[Any]]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, *commands: Words) -> list[Any]:
        """Return the reply to each command; they are carried out in their order, beside those of others.

        Cancelled or given up, they may be carried out all the same.

        Raises:
            BackendUnavailable: Redis does not answer in time, or refuses one of them.
        """
        if len(commands) > SLICE_COMMANDS:
            slices = (commands[at : at + SLICE_COMMANDS] for at in range(0, len(commands), SLICE_COMMANDS))
            return [reply for some in slices for reply in await self.ask(*some)]
        if not commands:
            return []
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._asked.append((commands, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="redis line")
        try:
            async with asyncio.timeout(self._timeout_s):
                replies = await answer
        except (RedisError, OSError) as e:
            raise self.unavailable(e) from None
        for reply in replies:
            if isinstance(reply, Exception):
                raise self.unavailable(reply)
        return replies

    def unavailable(self, error: Exception) -> BackendUnavailable:
        """Return what to raise for this trouble."""
        return BackendUnavailable(f"cannot use Redis at {self._where}: {reason_of(error, self._timeout_s)}")

    async def aclose(self) -> None:
        """Let those who wait go with an exception; ask no more."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        self._fail(list(self._asked), ConnectionError("closed"))
        self._asked.clear()

    async def _work(self) -> None:
        while self._asked:
            batch = self._next_batch()
            try:
                async with asyncio.timeout(self._timeout_s):
                    replies = await self._carry_out([command for commands, _ in batch for command in commands])
            except (RedisError, OSError) as e:  # TimeoutError is an OSError
                self._fail(batch, e)
                await self._hang_up()
                continue
            except BaseException:
                self._fail(batch, ConnectionError("closed"))
                raise
            at = 0
            for commands, answer in batch:
                if not answer.done():
                    answer.set_result(replies[at : at + len(commands)])
                at += len(commands)

    def _next_batch(self) -> list[tuple[Sequence[Words], asyncio.Future[list[Any]]]]:
        batch: list[tuple[Sequence[Words], asyncio.Future[list[Any]]]] = []
        count = size = 0
        while self._asked:
            commands, answer = self._asked[0]
            if answer.done():  # given up before its turn: not carried out at all
                self._asked.popleft()
                continue
            weight = sum(len(word) for command in commands for word in command if isinstance(word, (str, bytes)))
            if batch and (count + len(commands) > SLICE_COMMANDS or size + weight > _PIPELINE_BYTES):
                break
            self._asked.popleft()
            batch.append((commands, answer))
            count += len(commands)
            size += weight
        return batch

    async def _carry_out(self, commands: Sequence[Words]) -> list[Any]:
        if not commands:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def _hang_up(self) -> None:
        """What answers "read-only" is no longer what the address stands for, and half a reply is none."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await hang_up(self._redis, in_use=False)
        except (RedisError, OSError):
            pass

    @staticmethod
    def _fail(batch: Sequence[tuple[Sequence[Words], "asyncio.Future[list[Any]]"]], error: Exception) -> None:
        for _, answer in batch:
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # nobody may be there any more
