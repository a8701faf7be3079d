"""Programs' way to bring ticks in so that none is lost, with asyncio or without.

Invariant: a batch has one number in all attempts to send it, and the next batch is not sent before it is taken or
given up. So a lost link is answered by sending again, for ever, and what Redis makes of a batch
(:mod:`quotepush.batches`) happens once and in the order of the calls.
"""

import asyncio
import contextlib
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from quotepush.batches import SCRIPT, SCRIPT_SHA, Batch, Batches
from quotepush.errors import RedisUnavailable, SettingsError, reason_of
from quotepush.ingest.keys import FeedKeys
from quotepush.store.clients import Store, hang_up

__all__ = ["BlockingPublisher", "Publisher"]

_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0

# A state of Redis that passes; older ones name it in the middle of what the script says: "… @user_script: 16: -OOM …"
_PASSING = re.compile(r"(?:^|[ :]-)(?:LOADING|BUSY|READONLY|MASTERDOWN|OOM|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|MISCONF)\b")
# redis-py takes the word off the text of these.
_PASSING_KINDS = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError)
_REFUSED_KINDS = (AuthenticationError, AuthorizationError)  # they are ConnectionErrors, but no link will mend them


def _is_passing(error: Exception) -> bool:
    """Say whether to try again helps."""
    if isinstance(error, ResponseError):
        return isinstance(error, _PASSING_KINDS) or _PASSING.search(str(error)) is not None
    return isinstance(error, (RedisConnectionError, RedisTimeoutError, OSError)) and not isinstance(
        error, _REFUSED_KINDS
    )


class _Publisher(ABC):
    """What both publishers have in common: everything but the waiting."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "qp:",
        log_batches: int = 10_000,
        copies: str = "",
        give_up_s: float | None = None,
        on_link: Callable[[str], None] | None = None,
    ) -> None:
        if copies and (copies.count("{code}") != 1 or "*" in copies):
            raise SettingsError(["copies: a channel with {code} where the code goes"])
        if log_batches < 1:
            raise SettingsError(["log_batches: at least 1"])
        store = Store(url, timeout_s=_TIMEOUT_S if give_up_s is None else max(0.05, min(_TIMEOUT_S, give_up_s)))
        self._where = str(store)
        self._give_up_s = give_up_s
        self._timeout_s = _TIMEOUT_S if give_up_s is None else max(0.05, min(_TIMEOUT_S, give_up_s))
        self._on_link = on_link
        self._is_away = False
        self._batches = Batches(FeedKeys(prefix, store.is_cluster), log_batches, copies)
        self._redis = self._client(store)

    @property
    def epoch(self) -> str:
        """Name of the life of the log, as of the last batch; empty before the first."""
        return self._batches.epoch

    @abstractmethod
    def _client(self, store: Store) -> Any: ...

    def _deadline(self) -> float | None:
        return None if self._give_up_s is None else time.monotonic() + self._give_up_s

    def _taken(self, answer: list[Any]) -> list[int]:
        if self._is_away:
            self._is_away = False
            if self._on_link is not None:
                self._on_link("")
        return self._batches.taken(answer)

    def _wait_s(self, error: Exception, attempt: int, deadline: float | None) -> float:
        """Return how long to wait before another attempt.

        Raises:
            RedisUnavailable: there is to be none.
        """
        left_s = _MAX_BACKOFF_S if deadline is None else deadline - time.monotonic()
        if not _is_passing(error) or left_s <= 0:
            raise self._unavailable(error) from None
        if not self._is_away:
            self._is_away = True
            if self._on_link is not None:
                self._on_link(reason_of(error, self._timeout_s))
        return min(left_s, random.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(attempt, 10)))

    def _unavailable(self, error: Exception) -> RedisUnavailable:
        return RedisUnavailable("feed_redis", self._where, reason_of(error, self._timeout_s))


class Publisher(_Publisher):
    """Publishes ticks so that none is lost and none is doubled.

    ::

        async with quotepush.Publisher("redis://127.0.0.1:6379/0") as publisher:
            await publisher.publish([{"code": "sh600519", "last": 1688.2}, {"code": "AAPL", "last": 227.5}])

    Several publishers may publish the same code. Batches of one are taken in the order of the calls.

    Args:
        url: in any form of docs/operations.md ("Which Redis"); its password is never shown.
        prefix: of every key and channel; the server's ``redis_prefix``.
        log_batches: how many batches the log keeps, about; what is older cannot be caught up.
        copies: also publish each tick on this channel (``quote.{code}``), for other readers; the server knows them
            by their ``epoch`` and does not take them twice.
        give_up_s: raise after so long without Redis; None: try for ever.
        on_link: called when Redis goes away, with the reason, and with an empty text when it is back.

    Raises:
        SettingsError: an argument is wrong.
    """

    def _client(self, store: Store) -> Any:
        self._turn = asyncio.Lock()
        return store.client()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connection; nobody may be publishing any more."""
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.aclose()

    async def connect(self) -> None:
        """Reach Redis, for a program that wants to know at its start; `publish` connects by itself.

        Raises:
            RedisUnavailable: there is no Redis now, or it refuses us.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.ping()
        except (RedisError, OSError) as e:
            raise self._unavailable(e) from None

    async def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch, in its order; return when Redis has it, with the ``seq`` of each tick.

        When this is cancelled, or gives up, the batch is in Redis or not, but never in part. Ticks are read before the
        first wait: the caller may change them afterwards.

        Raises:
            BadTick: one of them is none (``reason`` is the word for it), or there are more than 1,000; nothing is
                published.
            RedisUnavailable: Redis refuses for good, or ``give_up_s`` is over.
        """
        batch = self._batches.spell(ticks)
        if batch is None:
            return []
        deadline = self._deadline()
        async with self._turn:
            number = self._batches.next_number()
            attempt = 0
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        return self._taken(await self._call(number, batch))
                except (RedisError, OSError) as e:
                    wait_s = self._wait_s(e, attempt, deadline)
                # What answers "read-only" is no longer what the address stands for: connect anew.
                with contextlib.suppress(RedisError, OSError):
                    await hang_up(self._redis)
                await asyncio.sleep(wait_s)
                attempt += 1

    async def _call(self, number: int, batch: Batch) -> list[Any]:
        arguments = self._batches.arguments(number, batch)
        try:
            answer: list[Any] = await self._redis.evalsha(SCRIPT_SHA, *arguments)
        except NoScriptError:
            answer = await self._redis.eval(SCRIPT, *arguments)
        return answer


class BlockingPublisher(_Publisher):
    """`Publisher` for programs without asyncio; not for several threads at once.

    ::

        with quotepush.BlockingPublisher("redis://127.0.0.1:6379/0") as publisher:
            publisher.publish([{"code": "sh600519", "last": 1688.2}])
    """

    def _client(self, store: Store) -> Any:
        return store.blocking_client(self._timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._redis.close()

    def connect(self) -> None:
        """Reach Redis as :meth:`Publisher.connect` does."""
        try:
            self._redis.ping()
        except (RedisError, OSError) as e:
            raise self._unavailable(e) from None

    def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch as :meth:`Publisher.publish` does."""
        batch = self._batches.spell(ticks)
        if batch is None:
            return []
        deadline = self._deadline()
        number = self._batches.next_number()
        attempt = 0
        while True:
            try:
                return self._taken(self._call(number, batch))
            except (RedisError, OSError) as e:
                wait_s = self._wait_s(e, attempt, deadline)
            self._redis.connection_pool.disconnect()
            time.sleep(wait_s)
            attempt += 1

    def _call(self, number: int, batch: Batch) -> list[Any]:
        arguments = self._batches.arguments(number, batch)
        try:
            answer: list[Any] = self._redis.evalsha(SCRIPT_SHA, *arguments)
        except NoScriptError:
            answer = self._redis.eval(SCRIPT, *arguments)
        return answer
