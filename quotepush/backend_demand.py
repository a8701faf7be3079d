"""What the cluster wants, for a feed or a backend: which codes have a subscriber anywhere.

Invariant: what has been told is what is true, sooner or later, whatever becomes of servers, Redis and the link
(:class:`Wanted`): what is wanted at once, and what is not any more only when a server has said so, or when the set has
lacked it for ``GRACE_S``.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson
from redis.exceptions import RedisError

from quotepush.backend_hearing import Hearing, pause_s
from quotepush.cluster.commands import ClusterKeys
from quotepush.cluster.demand import is_code
from quotepush.cluster.hearing import hear
from quotepush.cluster.sets import RegistryKeys, scan_page
from quotepush.errors import reason_of
from quotepush.store.clients import Links
from quotepush.together import together

__all__ = ["Demand", "DemandChange", "Wanted"]

GRACE_S = 10.0
"""A code that the set lacks is let go after so long: Redis may have been emptied, and fills again."""

_READ_AGAIN_S = 30.0
_PROOF_S = 2.0
_PER_PAGE = 1_000


class DemandChange(NamedTuple):
    """What has changed: codes that are wanted now, and codes that are not any more."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]


class Wanted:
    """Puts together what the channel says and what the set holds.

    Attributes:
        codes: those that are wanted, as far as is known.
        missing: those of them that the set lacked lately, and since when.
        unsaid: codes that were found in the set, and of which the channel has not spoken since.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._changed: dict[str, bool] = {}  # since it was last taken
        self._said: dict[str, bool] | None = None  # while the set is read
        self._found: set[str] = set()
        self.codes: set[str] = set()
        self.missing: dict[str, float] = {}
        self.unsaid: set[str] = set()

    def said(self, code: str, is_wanted: bool) -> None:
        """The channel has said this."""
        self.missing.pop(code, None)
        self.unsaid.discard(code)
        if self._said is not None:
            self._said[code] = is_wanted
        self._note(code, is_wanted)

    def begin_reading(self) -> None:
        """The set is about to be read."""
        self._said, self._found = {}, set()

    def found(self, codes: Iterable[str]) -> None:
        """A page of it."""
        self._found.update(codes)

    def end_reading(self, now_s: float) -> None:
        """All of it has been read; what was said meanwhile counts more."""
        said, self._said = self._said or {}, None
        for code, is_wanted in said.items():
            (self._found.add if is_wanted else self._found.discard)(code)
        self.unsaid = self._found - self.codes
        for code in self.unsaid:
            self._note(code, True)
        lacking = self.codes - self._found
        self.missing = {code: self.missing.get(code, now_s) for code in lacking}
        for code, since_s in list(self.missing.items()):
            if now_s - since_s >= self._grace_s:
                del self.missing[code]
                self._note(code, False)
        self._found = set()

    def take(self) -> DemandChange:
        """Return what has changed since this was last called."""
        changed, self._changed = self._changed, {}
        return DemandChange(
            tuple(code for code, is_wanted in changed.items() if is_wanted),
            tuple(code for code, is_wanted in changed.items() if not is_wanted),
        )

    @property
    def has_changed(self) -> bool:
        """Whether there is something to take."""
        return bool(self._changed)

    def _note(self, code: str, is_wanted: bool) -> None:
        if (code in self.codes) is is_wanted:
            return
        (self.codes.add if is_wanted else self.codes.discard)(code)
        if self._changed.pop(code, None) is None:  # else it is what it was when it was last taken
            self._changed[code] = is_wanted


class Demand(Hearing):
    """What is wanted, and each change of it: ``async for wanted, unwanted in backend.demand()``.

    The first change names all codes that are wanted, perhaps none; each later one (:class:`DemandChange`) what has
    changed since, together for as long as nobody asks. A lost link is made anew until :meth:`aclose`, and what was
    missed follows as a change. ``code in demand`` says whether a code is wanted, as far as is known at the moment.

    Args:
        redis: a client of the registry.
        links: of the registry, too.
        prefix: the servers' ``redis_prefix``.
        timeout_s: the longest wait for the link, and for a page of the set.
    """

    def __init__(self, redis: Any, links: Links, prefix: str, timeout_s: float) -> None:
        super().__init__("what is wanted", timeout_s)
        self._redis = redis
        self._links = links
        self._channel = ClusterKeys(prefix).demand
        self._set = RegistryKeys(prefix, "", "").codes
        self._wanted = Wanted(GRACE_S)
        self._has_begun = False  # the first change has been handed out

    def __contains__(self, code: object) -> bool:
        return code in self._wanted.codes

    def codes(self) -> frozenset[str]:
        """Return the codes that are wanted, as far as is known at the moment."""
        return frozenset(self._wanted.codes)

    async def __anext__(self) -> DemandChange:
        first = self._start()
        while self._is_closed or not first.done() or (self._has_begun and not self._wanted.has_changed):
            await self._wait()
        self._has_begun = True
        return self._wanted.take()

    # The task

    async def _run(self, first: "asyncio.Future[None]") -> None:
        attempt = 0
        while True:
            is_heard = asyncio.Event()
            try:
                await together(self._hear(is_heard), self._keep_reading(is_heard, first), name=self._what)
            except (RedisError, OSError) as e:  # TimeoutError is an OSError
                self._reason = reason_of(e, self._timeout_s)
            attempt = 0 if is_heard.is_set() else attempt + 1
            await asyncio.sleep(pause_s(attempt))

    async def _hear(self, is_heard: asyncio.Event) -> None:
        async with contextlib.aclosing(hear(self._links, self._channel, timeout_s=self._timeout_s)) as heard:
            async for said in heard:
                if said is None:
                    is_heard.set()
                else:
                    self._take(said)

    def _take(self, said: bytes) -> None:
        try:
            message = orjson.loads(said)
            code, is_wanted = message["code"], message["demand"]
        except (orjson.JSONDecodeError, TypeError, KeyError):
            return  # whoever says that on this channel is no node
        if type(code) is str and type(is_wanted) is bool and is_code(code):
            self._wanted.said(code, is_wanted)
            self._arrived.set()

    async def _keep_reading(self, is_heard: asyncio.Event, first: "asyncio.Future[None]") -> None:
        """Read the set as soon as the channel is heard, and again and again.

        Raises:
            ConnectionError: the channel does not say what the set does: its link may be dead, and only look alive.
        """
        await is_heard.wait()  # or _hear ends, and both do
        await self._read()
        if not first.done():
            first.set_result(None)
            self._arrived.set()
        while True:
            await asyncio.sleep(min(GRACE_S, _READ_AGAIN_S) if self._wanted.missing else _READ_AGAIN_S)
            await self._read()
            if self._wanted.unsaid:
                await asyncio.sleep(_PROOF_S)
                if self._wanted.unsaid:
                    raise ConnectionError("the link is silent")

    async def _read(self) -> None:
        wanted, cursor = self._wanted, 0
        wanted.begin_reading()
        while True:
            async with asyncio.timeout(self._timeout_s):
                cursor, page = await scan_page(self._redis, self._set, cursor, _PER_PAGE)
            wanted.found(filter(is_code, page))
            if not cursor:
                break
        wanted.end_reading(asyncio.get_running_loop().time())
        if wanted.has_changed:
            self._arrived.set()
