"""A Publisher's ticks, one after the other, and what each number stands for."""

import asyncio
import contextlib
import time
from collections import defaultdict

from quotepush import Publisher

__all__ = ["NumberedFeed"]


class NumberedFeed:
    """Publishes a tick of each code every few milliseconds, from :meth:`start` to :meth:`stop`; one before.

    Attributes:
        newest: number of the newest tick, by code.
        published: per code the ``last`` of each number.
    """

    def __init__(self, redis_url: str, *codes: str) -> None:
        self._publisher = Publisher(redis_url)
        self._codes = codes
        self._task: asyncio.Task[None] | None = None
        self.newest: dict[str, int] = {}
        self.published: defaultdict[str, dict[int, float]] = defaultdict(dict)

    async def __aenter__(self) -> "NumberedFeed":
        await self.tick()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self._publisher.aclose()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End with one more tick of each code; from now on ``newest`` stands still."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self.tick()  # whatever was under way is answered before

    async def tick(self) -> None:
        """Publish one tick of each code."""
        last = time.time()
        seqs = await self._publisher.publish([{"code": code, "last": last} for code in self._codes])
        self.newest = dict(zip(self._codes, seqs, strict=True))
        for code, seq in self.newest.items():
            self.published[code][seq] = last

    async def _run(self) -> None:
        while True:
            await asyncio.shield(self.tick())
            await asyncio.sleep(0.005)

    def judge(self, code: str, rows: list[tuple[int, float]], merged: int) -> None:
        """Raise when a client has not got every row of a code from its first one on: number and ``last`` of each.

        Args:
            merged: how many rows it was told to be merged into others.
        """
        seqs = [seq for seq, _ in rows]
        assert seqs == sorted(set(seqs)), f"{code}: twice or out of order"
        assert seqs[-1] == self.newest[code]
        assert merged == seqs[-1] - seqs[0] + 1 - len(seqs), f"{code}: {self._missing(code, seqs)}, {merged} merged"
        assert rows == [(seq, self.published[code][seq]) for seq in seqs]

    def _missing(self, code: str, seqs: list[int]) -> str:
        missing = sorted(set(range(seqs[0], seqs[-1] + 1)) - set(seqs))
        return f"{len(missing)} missing: {missing[:20]}"
