"""A market that publishes ticks at a steady pace, and can judge what clients have seen of it."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

import quotepush
from tests.support.proving_client import Place, Sight

__all__ = ["Market", "PlainMarket"]

_TURN_S = 0.02


class Market:
    """Publishes batches of many codes through a ``Publisher``, and knows what every row has to be.

    Args:
        ticks_per_s: in all, in a batch every 20 ms; what a Redis that was away has cost is not caught up.
        ends_whole: the last tick of each code says all fields once more.

    Attributes:
        rows: per code the merge of all its ticks.
        prices: ``last`` of every tick by its code and place, as far as Redis has answered for it.
        newest: per code the place of its last tick.
        counts: how many ticks of each code were published.
        published: in all.
        took_s: what publishing them took, but for what Redis was late.
    """

    def __init__(
        self,
        url: str,
        codes: Sequence[str],
        ticks_per_s: int = 750,
        *,
        log_batches: int = 10_000,
        ends_whole: bool = False,
    ) -> None:
        self._connect(url, log_batches)
        self._ends_whole = ends_whole
        self._random = random.Random(4)
        self._is_stopped = False
        self._batch = round(ticks_per_s * _TURN_S)
        self.codes = codes
        self.rows: dict[str, dict[str, Any]] = {code: {} for code in codes}
        self.prices: dict[str, dict[Place, float | None]] = {code: {} for code in codes}
        self.newest: dict[str, Place] = {}
        self.counts: Counter[str] = Counter()
        self.published = 0
        self.took_s = 0.0

    def _connect(self, url: str, log_batches: int) -> None:
        self._publisher = quotepush.Publisher(url, log_batches=log_batches)

    @property
    def epoch(self) -> str:
        return self._publisher.epoch

    async def run(self) -> None:
        """Publish until :meth:`stop`; at the end one more tick of every code."""
        try:
            await self._run()
        finally:
            await self._close()

    async def _run(self) -> None:
        await self._publish([{"code": code, "name": f"Name {code}", "prev_close": 1.0} for code in self.codes])
        due = time.monotonic()
        while not self._is_stopped:
            begin = time.monotonic()
            await self._publish([self._tick(self._random.choice(self.codes)) for _ in range(self._batch)])
            due = max(due + _TURN_S, time.monotonic() - 0.1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.took_s += min(0.1, time.monotonic() - begin)
        # Redis may have come back empty: the last number of each code is only known from a last answer.
        last = [self._tick(code) for code in self.codes]
        await self._publish([self.rows[tick["code"]] | tick for tick in last] if self._ends_whole else last)

    def stop(self) -> None:
        self._is_stopped = True

    def _tick(self, code: str) -> dict[str, Any]:
        self.published += 1
        tick: dict[str, Any] = {"code": code, "last": self.published / 100}
        for name in ("volume", "open", "high"):
            if self._random.random() < 0.3:
                tick[name] = self.published
        return tick

    async def _close(self) -> None:
        await self._publisher.aclose()

    async def _publish(self, ticks: list[dict[str, Any]]) -> None:
        seqs = await self._publisher.publish(ticks)
        for seq, tick in zip(seqs, ticks, strict=True):
            code = tick["code"]
            self.counts[code] += 1
            self.rows[code] |= tick
            self.newest[code] = place = self.epoch, seq
            self.prices[code][place] = tick.get("last")

    # Judging

    def lacks(self, sight: Sight) -> list[str]:
        """Say what a client still has to be sent of the newest rows; the market stands still."""
        found = [] if sight.is_subscribed else ["it is not subscribed"]
        fields = sight.options.get("fields")
        for code in sight.prices:
            expected = self.rows[code]
            if fields is not None:
                expected = {k: v for k, v in expected.items() if k == "code" or k in fields}
            row = sight.rows.get(code, {})
            # A tick that shows nothing new in a view is not sent.
            place, newest = sight.places.get(code), self.newest.get(code) if _shows(sight, "last") else None
            if newest not in (None, place) or any(row.get(name) != value for name, value in expected.items()):
                found.append(f"{code}: {place} {row}, not {newest} {expected}")
        return found

    def judge(self, sight: Sight) -> int:
        """Check every row that a client was sent; return how many it was told were merged.

        Each was published, at this price; prices rise, and within an epoch numbers, over all connections; and those
        that are missing between two of a chain are as many as it was told.
        """
        merged = 0
        for code, prices in sight.prices.items():
            published = self.prices[code]
            for place, price in prices:
                if place in published and _shows(sight, "last"):
                    assert price == published[place], (code, place, price)
            shown = [price for _, price in prices if price is not None]
            assert all(before < after for before, after in pairwise(shown)), f"{code}: {shown}"
            highest: dict[str, int] = {}
            for (epoch, base), ticks in sight.chains(code):
                assert {epoch for epoch, _ in ticks} <= {epoch}, f"{code}: another epoch without a word"
                assert base >= highest.get(epoch, 0), f"{code}: {base} of {epoch} after {highest[epoch]}"
                numbers = [base, *(seq for _, seq in ticks)]
                assert all(before < after for before, after in pairwise(numbers)), f"{code}: {numbers}"
                merged += numbers[-1] - base - len(ticks)
                highest[epoch] = numbers[-1]
        assert merged == sight.merged
        return merged

    def judge_whole(self, sight: Sight, *, was_behind: bool = False) -> None:
        """Check besides that nothing was lost: from its first row on, each that was published was sent or merged.

        And that each was published once: so many ticks of a code, so many numbers.

        Args:
            was_behind: main has merged rows for a worker that was slow; who came back there was told so by a snapshot.
        """
        assert len({epoch for places in self.prices.values() for epoch, _ in places}) == 1
        assert not sight.gaps
        sent = {code: [place for place, _ in prices] for code, prices in sight.prices.items()}
        for code, places in sent.items():
            assert self.newest[code][1] == self.counts[code], f"{code}: numbered to {self.newest[code]}"
            assert self.prices[code].keys() >= set(places), f"{code}: rows that were never published"
            chains = sight.chains(code)
            if "max_rate" in sight.options or was_behind:
                continue  # it may not have been replayed to: what it missed is in a snapshot
            assert len(chains) == 1, f"{code}: the chain began anew: {sight.begins[code]}"
            if not sight.merged:
                (epoch, base), _ = chains[0]
                last = places[-1][1] if places else base
                assert places == [(epoch, seq) for seq in range(base + 1, last + 1)]
        assert "max_rate" in sight.options or was_behind or not sight.resumed.get("snapshot")


def _shows(sight: Sight, field: str) -> bool:
    return field in sight.options.get("fields", [field])


class PlainMarket(Market):
    """Publishes by plain ``PUBLISH``: what nobody hears is lost, and the market knows the number of nothing."""

    def _connect(self, url: str, log_batches: int) -> None:
        # Without a timeout: what was sent before it would overtake what is sent after it.
        self._redis = Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0))

    @property
    def epoch(self) -> str:
        return ""

    async def _close(self) -> None:
        await self._redis.aclose()

    async def _publish(self, ticks: list[dict[str, Any]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for tick in ticks:
            pipeline.publish(f"quote.{tick['code']}", orjson.dumps(tick))
            self.rows[tick["code"]] |= tick
            self.counts[tick["code"]] += 1
        with contextlib.suppress(RedisError, OSError):
            await pipeline.execute()
