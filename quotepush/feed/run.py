"""A feed as a whole: options in, ticks from one source to one publisher, a summary out.

`run_feed` is the only place where sources and publishers meet. It prints nothing: lines for a human and progress go to
callables, so the command line and the demo show them in their own ways.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from redis.exceptions import RedisError

from quotepush.backend_demand import Demand
from quotepush.errors import BackendUnavailable, RedisUnavailable, SettingsError
from quotepush.feed.listing import MAX_CODES, PINNED
from quotepush.feed.publish import CODE_PLACE, LoggedPublisher, PlainPublisher, TickPublisher
from quotepush.feed.replay import CodedTick
from quotepush.feed.sieve import Sieve
from quotepush.feed.simulate import Market
from quotepush.feed.sources import MAX_BATCH, Clock, piped, replayed, simulated
from quotepush.store.clients import Store

__all__ = ["FeedOptions", "FeedSummary", "JsonLines", "Recording", "Simulation", "Source", "run_feed"]

_log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.25
_MAX_RATE_PER_S = 1_000_000
_TIMEOUT_S = 5.0
_MAX_COUNTED_CODES = 1_000_000  # the set of codes seen stops growing here


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Ticks of a made-up market (`Market`)."""

    codes: int = 3000
    """How many instruments, 2 to 100,000."""
    rate_per_s: float = 1000.0
    """Ticks a second, the day's mean."""
    seed: int = 1
    """The same seed makes the same market."""
    is_steady: bool = False
    """Hold the rate all the time, without opening, lunch and bursts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Ticks of a CSV file (`CsvLines`)."""

    path: Path
    """Plain or gzip."""
    speed: float = 1.0
    """How many times faster than recorded; ``math.inf``: as fast as Redis takes it."""
    is_now: bool = False
    """Replace the recorded times by those of the replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """Ticks as JSON objects, one a line, read from a descriptor as they come."""

    fd: int = 0
    """Standard input unless told otherwise."""


Source: TypeAlias = Simulation | Recording | JsonLines


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """What a feed shall do."""

    redis_url: str = field(default="redis://127.0.0.1:6379/0", repr=False)  # it can hold a password
    source: Source = field(default_factory=Simulation)
    prefix: str = "qp:"
    """The server's ``redis_prefix``: where the log is."""
    channel: str | None = None
    """None: ticks go into the log (`quotepush.publisher`). A channel template: they are published there plainly and
    are nowhere else; without ``{code}`` all of them go to one channel and carry their code."""
    is_on_demand: bool = False
    """Publish only ticks of codes that somebody watches; those of others are held back, and come as one when needed."""
    registry_url: str | None = field(default=None, repr=False)
    """The servers' ``registry_redis``, which knows what is wanted; None: ``redis_url``."""
    duration_s: float | None = None
    """Stop after so many seconds; None: never."""
    count: int | None = None
    """Stop after so many ticks; None: never."""

    def check(self) -> None:
        """Look at all options at once.

        Raises:
            SettingsError: with one line for each that is out of range.
        """
        faults = []
        source = self.source
        if isinstance(source, Simulation):
            if not len(PINNED) <= source.codes <= MAX_CODES:
                faults.append(f"--codes: {len(PINNED)} to {MAX_CODES:,}, not {source.codes}")
            if not 0 < source.rate_per_s <= _MAX_RATE_PER_S:
                faults.append(
                    f"--rate: above 0 and up to {_MAX_RATE_PER_S:,} ticks a second, not {source.rate_per_s:g}"
                )
        if isinstance(source, Recording) and not source.speed > 0:
            faults.append(f"--speed: above 0, or max, not {source.speed:g}")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            faults.append(f"--duration: above 0 seconds, not {self.duration_s:g}")
        if self.count is not None and self.count < 1:
            faults.append(f"--count: at least 1, not {self.count}")
        rest = (self.channel or "").replace(CODE_PLACE, "", 1)
        if self.channel == "" or "{" in rest or "}" in rest:
            faults.append(f"--channel: a name with {CODE_PLACE} at most once and no other braces")
        if faults:
            raise SettingsError(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedSummary:
    """What a feed has done, so far or in all. As text it is one line for a human."""

    sent: int
    """Ticks that Redis has taken."""
    codes: int
    """Different codes among the ticks."""
    bad_lines: int
    """Lines that were refused."""
    dropped: int
    """Ticks of a simulation for which Redis was away."""
    outages: int
    """How often Redis went away."""
    elapsed_s: float
    withheld: int = 0
    """Ticks of codes that nobody wanted."""

    @property
    def rate_per_s(self) -> float:
        """Ticks sent a second, on average."""
        return self.sent / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def __str__(self) -> str:
        text = f"{self.sent:,} ticks of {self.codes:,} codes in {self.elapsed_s:.1f} s ({self.rate_per_s:,.0f}/s)"
        text += f", {self.bad_lines:,} bad lines, {self.dropped:,} dropped"
        text += f", {self.withheld:,} unwanted" if self.withheld else ""
        return text + (f", outages of Redis: {self.outages:,}" if self.outages else "")


async def run_feed(
    options: FeedOptions,
    *,
    stop: asyncio.Event | None = None,
    report: Callable[[str], None] = _log.warning,
    progress: Callable[[FeedSummary], None] | None = None,
    clock: Clock | None = None,
) -> FeedSummary:
    """Publish ticks until the source ends, ``stop`` is set, or the duration or count is reached.

    A simulation drops ticks while Redis is away; recordings and lines wait for it. Cancelling ends it like ``stop``,
    without a summary.

    Args:
        options: what to do.
        stop: set it to end the feed; the batch that is under way is still sent.
        report: takes lines for a human: bad input lines, Redis gone and back.
        progress: takes the figures so far, four times a second.
        clock: the sources' time; None: the real one.

    Raises:
        SettingsError: an option is wrong, or the file is not there or has no header.
        RedisUnavailable: Redis is not there at the start, or refuses to publish for us.
        RecordingUnreadable: the file breaks off in the middle.
    """
    options.check()
    return await _Feed(options, report, clock or Clock()).run(stop or asyncio.Event(), progress)


class _Feed:
    """One run: the source's batches go to the publisher, and are counted."""

    def __init__(self, options: FeedOptions, report: Callable[[str], None], clock: Clock) -> None:
        self._options = options
        self._report = report
        self._clock = clock
        self._bad_lines = 0
        self._codes: set[str] = set()
        self._started_at_s = time.monotonic()
        waits = not isinstance(options.source, Simulation)
        self._publisher: TickPublisher
        if options.channel is None:
            self._publisher = LoggedPublisher(options.redis_url, options.prefix, waits=waits, warn=report)
        else:
            self._publisher = PlainPublisher(options.redis_url, options.channel, waits=waits, warn=report)
        self._following = _Following(options) if options.is_on_demand else None
        self._sieve = Sieve(self._following.demand.__contains__) if self._following is not None else None
        self._publishing = asyncio.Lock()
        self._left = options.count

    async def run(self, stop: asyncio.Event, progress: Callable[[FeedSummary], None] | None) -> FeedSummary:
        """Start in steps, wait for the first reason to end, stop in the reverse order."""
        tasks: list[asyncio.Task[object]] = []
        try:
            # 1. Redis must be there before anything is read.
            await self._publisher.connect()
            if self._following is not None:
                await self._following.begin()
            self._started_at_s = time.monotonic()
            # 2. Ticks flow.
            tasks.append(asyncio.create_task(self._pump(), name="feed pump"))
            tasks.append(asyncio.create_task(stop.wait(), name="feed stop"))
            if self._following is not None and self._sieve is not None:
                tasks.append(asyncio.create_task(self._follow(self._following.demand, self._sieve), name="feed demand"))
            if progress is not None:
                tasks.append(asyncio.create_task(self._show(progress), name="feed progress"))
            # 3. The source ends, somebody stops us, the time is up, or one of the tasks fails.
            await asyncio.wait(tasks, timeout=self._options.duration_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # 4. The batch under way is finished by the publisher, then the connection goes.
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await self._publisher.aclose()
            if self._following is not None:
                await self._following.aclose()
        for task in tasks:
            if not task.cancelled():
                task.result()
        return self._summary()

    async def _pump(self) -> None:
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                async with self._publishing:
                    await self._publish(batch if self._sieve is None else self._sieve.sift(batch))
                if self._left == 0:
                    return

    async def _follow(self, demand: Demand, sieve: Sieve) -> None:
        """Publish what was held back of a code as soon as somebody wants it."""
        async for change in demand:
            async with self._publishing:
                released = sieve.release(change.wanted)
                for start in range(0, len(released), MAX_BATCH):
                    await self._publish(released[start : start + MAX_BATCH])

    async def _publish(self, batch: list[CodedTick]) -> None:
        if self._left is not None:
            batch = batch[: self._left]
            self._left -= len(batch)
        if not batch:
            return
        if len(self._codes) < _MAX_COUNTED_CODES:
            self._codes.update(code for code, _ in batch)
        await self._publisher.publish(batch)

    def _batches(self) -> AsyncGenerator[list[CodedTick], None]:
        source = self._options.source
        if isinstance(source, Simulation):
            market = Market(source.codes, source.seed)
            return simulated(market, source.rate_per_s, is_steady=source.is_steady, clock=self._clock)
        if isinstance(source, Recording):
            return replayed(
                source.path,
                speed=source.speed,
                is_now=source.is_now,
                clock=self._clock,
                reject=self._reject,
                warn=self._report,
            )
        return piped(source.fd, reject=self._reject)

    async def _show(self, progress: Callable[[FeedSummary], None]) -> None:
        while True:
            progress(self._summary())
            await asyncio.sleep(_PROGRESS_EVERY_S)

    def _reject(self, number: int, reason: str) -> None:
        self._bad_lines += 1
        self._report(f"line {number} skipped: {reason}")

    def _summary(self) -> FeedSummary:
        return FeedSummary(
            sent=self._publisher.sent,
            codes=len(self._codes),
            bad_lines=self._bad_lines,
            dropped=self._publisher.dropped,
            outages=self._publisher.outages,
            elapsed_s=time.monotonic() - self._started_at_s,
            withheld=0 if self._sieve is None else self._sieve.withheld,
        )


class _Following:
    """The link on which a feed hears what is wanted."""

    def __init__(self, options: FeedOptions) -> None:
        try:
            store = Store(options.registry_url or options.redis_url, timeout_s=_TIMEOUT_S)
        except SettingsError as e:
            raise SettingsError([f"--registry: {fault}" for fault in e.faults]) from None
        self._where = str(store)
        self._redis = store.client()
        self.demand = Demand(self._redis, store.links(), options.prefix, _TIMEOUT_S)

    async def begin(self) -> None:
        """Return when it is known what is wanted.

        Raises:
            RedisUnavailable: Redis does not answer, or refuses us.
        """
        try:
            await self.demand.__aenter__()
        except BackendUnavailable as e:
            raise RedisUnavailable("registry_redis", self._where, e.reason) from None

    async def aclose(self) -> None:
        """Let go of the link."""
        await self.demand.aclose()
        with suppress(RedisError, OSError):
            async with asyncio.timeout(_TIMEOUT_S):
                await self._redis.aclose()
