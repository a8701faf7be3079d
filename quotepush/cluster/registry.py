"""The sets in Redis that say which connection watches which code.

Truth is in memory, in the sessions of a worker; Redis follows. Nothing here is read to push a tick: the sets
describe the cluster for backends, operators and feeds.

::

    <p>codes                              set    every code with a subscriber anywhere
    <p>code:<code>                        set    the fds subscribed to it
    <p>fd:<fd>                            set    the codes of one fd (no codes, no key: Redis has no empty sets)
    <p>node:<node>                        set    the lives of its workers, each <worker>.<start_us>
    <p>node:<node>:<worker>.<start_us>    set    the fds of that life

Two invariants, and nobody else writes these keys:

* What Redis says about a worker's connections ends up equal to what is true (:class:`RegistryMirror`).
* Wherever a writer is cut off between two commands, ``nodes.purge_life`` finds all that it wrote from the sets alone.
  So an entry is added from the finder to the found (node, life, fd, code, codes), and removed from the found to the
  finder.

No command names two keys, and nothing needs a transaction or a script: in Redis Cluster these keys live in different
slots. Commands whose order matters are never in one pipeline, unless they name the same key.
"""

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from quotepush.cluster.comparing import CodeComparison
from quotepush.cluster.nodes import purge
from quotepush.cluster.sets import (
    BATCH_FDS,
    SLICE_TIMEOUT_S,
    Codes,
    Command,
    RegistryKeys,
    codes_of_fds,
    connection_name,
    enlist,
    execute,
    remove_fds,
    scan_page,
    settle,
    text,
    with_members,
    withdraw,
)
from quotepush.store.clients import Store, greet_with, hang_up, log_in, reach

__all__ = ["RegistryMirror", "registry_client"]

log = logging.getLogger(__name__)

BATCH_MEMBERS = 100_000
CHECKED_PER_ROUND = 500
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 2.0

# All that Redis, its client and the network between them raise; anything else is a bug and keeps its traceback.
REDIS_TROUBLE = (RedisError, RedisClusterException, OSError, TimeoutError)


class RegistryMirror:
    """What Redis says about this worker's connections always ends up equal to what is true.

    Sessions call :meth:`open`, :meth:`touch` and :meth:`close`, which are plain and cheap; the task :meth:`run` writes
    the differences every ``interval_s``. Changes that Redis does not take (it is away, full, read-only, loading) wait
    in memory, one entry per fd, however long it lasts.

    The client must be the mirror's own and hold one connection (to each node of a Redis Cluster), as
    :func:`registry_client` makes it: a lost connection
    is what tells the mirror that Redis may have come back with other contents. ``SLICE_TIMEOUT_S`` bounds each wait for
    Redis, whatever socket timeouts the client has. The caller closes the client.

    Args:
        prefix: of every key, e.g. ``qp:``.
        life: ``<worker>.<start_us>``; the fds of this life are ``<node>.<worker>.<n>`` with ``n >= start_us``.
        interval_s: how long changes are gathered before they are written.
        ttl_s: every key expires so long after it was last renewed; each is renewed four times in this time.
        check_interval_s: between two rounds of comparing Redis with memory. A round looks at the totals and at 500 fds
            and 500 codes in turn, or as many as it takes to have seen all within a quarter of ``ttl_s``; how much of
            the sets of codes it reads is bounded by :class:`~quotepush.cluster.comparing.CodeComparison`.
        on_client_id: gets the ``CLIENT ID`` of each new connection before anything is written through it, so that
            somebody else can cut it off (:func:`cut_connection`) before purging a dead worker's life.
            With a Redis Cluster it gets the ids of the connections to all of its nodes.
        told: called with each code that nobody in the cluster watched before (True), or watches any more (False).

    Attributes:
        repairs: differences that the rounds of comparing found and put right.
    """

    def __init__(
        self,
        redis: Any,
        *,
        prefix: str,
        node: str,
        life: str,
        interval_s: float = 0.1,
        ttl_s: int = 7200,
        check_interval_s: float = 5.0,
        on_client_id: Callable[[int], None] | None = None,
        told: Callable[[str, bool], None] | None = None,
    ) -> None:
        self._redis = redis
        self._keys = self._make_keys(prefix, node, life)
        self._keys.told = told
        self._connection_name = connection_name(node, self._keys.life_name)
        worker, _, start_us = life.partition(".")
        self._fd_prefix = f"{node}.{worker}."
        self._start_us = int(start_us)
        self._newest = 0  # number of an fd
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._check_interval_s = check_interval_s
        self._on_client_id = on_client_id

        self.repairs = 0
        self._healthy = False
        self._away_since: float | None = None
        self._client_ids: dict[tuple[str, int], int] = {}  # by where the server is
        self._may_connect = False
        self._is_doubted = False

        self._open: dict[str, Collection[str]] = {}  # the truth: each session's own live collection
        self._dirty: dict[str, float] = {}  # fd to the time of its oldest unwritten change; oldest first
        self._in_flight = (0, 0.0)  # how many fds a running flush has yet to write, and the oldest one's time
        # What Redis holds is known, or nothing (new), or not known (in neither): then the fd's set is read first.
        self._written: dict[str, Codes] = {}
        self._new: set[str] = set()
        self._audience: dict[str, int] = {}  # code to its number of fds in _written
        self._fds_to_check: list[str] = []
        self._codes_to_check: list[str] = []
        self._codes_cursor = 0
        self._comparison = CodeComparison(
            redis, self._keys, written=self._written, audience=self._audience, is_ours=self._is_ours
        )

        greet_with(redis, self._greet)

    _make_keys: Callable[[str, str, str], RegistryKeys] = RegistryKeys

    # ------------------------------------------------------------------ for sessions: no await, no Redis

    def open(self, fd: str, codes: Collection[str]) -> None:
        """A session began. ``codes`` is its own live collection, read again at each flush."""
        assert fd not in self._open, fd
        self._open[fd] = codes
        self._new.add(fd)
        self._newest = max(self._newest, int(fd[len(self._fd_prefix) :]))  # not always the last: SessionMirror
        self.touch(fd)

    def touch(self, fd: str) -> None:
        """The codes of ``fd`` changed."""
        if fd not in self._dirty:
            self._dirty[fd] = time.monotonic()

    def close(self, fd: str) -> None:
        """The session is gone. Harmless for an fd that is not open."""
        if self._open.pop(fd, None) is not None:
            self.touch(fd)

    def doubt(self) -> None:
        """Redis may hold anything now: write all of it again, soon."""
        self._is_doubted = True

    @property
    def pending(self) -> int:
        """How many fds have a change that Redis has not taken yet."""
        return len(self._dirty) + self._in_flight[0]

    @property
    def lag_ms(self) -> int:
        """Age of the oldest change that Redis has not taken yet; 0: in step."""
        unfinished, since = self._in_flight
        if not unfinished:
            if not self._dirty:
                return 0
            since = next(iter(self._dirty.values()))
        return math.ceil((time.monotonic() - since) * 1000)

    @property
    def healthy(self) -> bool:
        """Redis took all that it was last given."""
        return self._healthy

    # ------------------------------------------------------------------ the task

    async def run(self) -> None:
        """Follow the truth until cancelled. No answer of Redis ends it.

        Any trouble has one way out, and one line in the log: a new connection, after which nothing is taken for known
        and everything is written again.
        """
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                self._is_doubted = False
                await self._begin()
                await self._flush()
                await self._check()
                self._caught_up()
                backoff_s = BACKOFF_FIRST_S
                await self._follow()
            except REDIS_TROUBLE as error:
                self._fell_behind(error)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)

    async def finish(self) -> bool:
        """Remove everything of this life from Redis; True if Redis took it. Call it after :meth:`run` has ended.

        One attempt; the caller bounds it with a timeout. What stays is for :func:`purge_node`.
        """
        try:
            await self._connect()
            known = [*self._written, *self._new]
            removed = await purge(self._redis, self._keys)
            if removed < len(known):  # part of the life's set was lost, so the sets alone do not lead to all of it
                for start in range(0, len(known), BATCH_FDS):
                    await remove_fds(self._redis, self._keys, known[start : start + BATCH_FDS])
        except REDIS_TROUBLE as error:
            log.warning("registry: this worker's entries stay in Redis until its node clears them: %s", _brief(error))
            return False
        return True

    async def _follow(self) -> None:
        """Write what changes; return when it is to begin anew."""
        next_check = time.monotonic() + self._check_interval_s
        while not self._is_doubted:
            await asyncio.sleep(self._interval_s)
            await self._flush()
            if time.monotonic() >= next_check:
                await self._check()
                next_check = time.monotonic() + self._check_interval_s

    def _fell_behind(self, error: Exception) -> None:
        self._healthy = False
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("registry: Redis takes no changes (%s); they wait in memory", _brief(error))

    def _caught_up(self) -> None:
        self._healthy = True
        if self._away_since is not None:
            log.info("registry: Redis is in step again after %.1f s", time.monotonic() - self._away_since)
            self._away_since = None

    # ------------------------------------------------------------------ the connection

    async def _begin(self) -> None:
        """Connect anew, forget what was known of Redis, and make this life findable."""
        await self._connect()
        self._written.clear()
        self._audience.clear()
        self._comparison.begin_anew()
        now = time.monotonic()
        for fd in self._open:
            self._dirty.setdefault(fd, now)
        await execute(self._redis, self._find_me())

    async def _connect(self) -> None:
        """Drop the connection if there is one and open another; the only place where that may happen."""
        try:
            async with asyncio.timeout(SLICE_TIMEOUT_S):
                await hang_up(self._redis)
        except REDIS_TROUBLE:
            pass  # it was broken already, which is why we are here
        self._may_connect = True
        try:
            async with asyncio.timeout(SLICE_TIMEOUT_S):
                await reach(self._redis)
        finally:
            self._may_connect = False

    async def _greet(self, connection: AbstractConnection) -> None:
        """Say hello on a new connection: stop what the last one may still have under way, and tell our client id.

        redis-py calls it for every new connection before the command that needed it. A connection that would replace a
        lost one in the middle of a flush is refused: the new store may lack what the flush has already written.
        """
        if not self._may_connect:
            raise RedisConnectionError("the connection was lost")
        try:
            await log_in(connection)
            place = getattr(connection, "host", ""), getattr(connection, "port", 0)
            await self._ask(connection, "CLIENT", "SETNAME", self._connection_name)
            if (last := self._client_ids.get(place)) is not None:
                # After a time-out Redis may not have read all that we sent; it must not come after what we send now.
                # Ids start again when Redis does, so the name has to be ours too.
                entry = text(await self._ask(connection, "CLIENT", "LIST", "ID", last) or "")
                if f" name={self._connection_name} " in entry:
                    await self._ask(connection, "CLIENT", "KILL", "ID", last)
            await connection.send_command("CLIENT", "ID")
            self._client_ids[place] = client_id = int(await connection.read_response())
            if self._on_client_id is not None:
                self._on_client_id(client_id)
        except BaseException:
            await connection.disconnect(nowait=True)  # redis-py would use it, greeted or not
            raise

    @staticmethod
    async def _ask(connection: AbstractConnection, *command: Any) -> Any:
        """The reply; None where the server is too old for the command (6.2 has all), or denies it to this user."""
        await connection.send_command(*command)
        try:
            return await connection.read_response()
        except ResponseError as error:
            log.debug("registry: %s %s: %s", *command[:2], error)
            return None

    # ------------------------------------------------------------------ memory to Redis

    async def _flush(self) -> None:
        """Write all that was dirty when it began; what it could not write is dirty again."""
        if not self._dirty:
            return
        backlog, self._dirty = list(self._dirty.items()), {}
        written = 0
        try:
            while written < len(backlog):
                self._in_flight = (len(backlog) - written, backlog[written][1])
                wanted = await self._next_batch(backlog, written)
                await self._write(wanted)
                written += len(wanted)
        finally:
            self._in_flight = (0, 0.0)
            if written < len(backlog):
                unwritten = dict(islice(backlog, written, None))
                for fd, since in self._dirty.items():
                    unwritten.setdefault(fd, since)
                self._dirty = unwritten

    async def _next_batch(self, backlog: Sequence[tuple[str, float]], start: int) -> dict[str, Codes | None]:
        """What Redis shall hold for the next fds of the backlog; None for a closed one."""
        wanted: dict[str, Codes | None] = {}
        members = 0
        for fd, _ in islice(backlog, start, start + BATCH_FDS):
            codes = wanted[fd] = self._true_codes(fd)
            members += len(self._written.get(fd, ()) if codes is None else codes)
            if members >= BATCH_MEMBERS:
                break
            if len(wanted) % 500 == 0:
                await asyncio.sleep(0)
        return wanted

    def _true_codes(self, fd: str) -> Codes | None:
        codes = self._open.get(fd)
        if codes is None:
            return None
        try:
            true = tuple(set(codes))
            "".join(true).encode()  # a code that cannot be sent would hold up the whole batch, for ever
        except Exception:
            log.exception("registry: the codes of %s cannot be read; Redis keeps what it has of them", fd)
            return self._written.get(fd, ())
        return true

    async def _write(self, wanted: Mapping[str, Codes | None]) -> None:
        """Make Redis hold what is wanted: first what comes, then what goes, so that no code is unlisted in vain."""
        unknown = [fd for fd in wanted if fd not in self._written and fd not in self._new]
        found = await codes_of_fds(self._redis, self._keys, [(fd, len(wanted[fd] or ())) for fd in unknown])
        gained: defaultdict[str, list[str]] = defaultdict(list)
        lost: defaultdict[str, list[str]] = defaultdict(list)
        change: defaultdict[str, int] = defaultdict(int)
        joined: list[str] = []
        left: list[str] = []
        grown: list[Command] = []
        shrunk: list[Command] = []
        for count, (fd, codes) in enumerate(wanted.items(), 1):
            if count % 200 == 0:
                await asyncio.sleep(0)
            is_new = fd in self._new
            before = self._written.get(fd)
            self._new.discard(fd)
            if codes is None and is_new:
                continue
            held = found.get(fd, ()) if before is None else before
            goes = set(held).difference(codes or ())
            comes = codes or () if before is None else set(codes or ()).difference(held)
            for code in goes:
                lost[code].append(fd)
                if before is not None:
                    change[code] -= 1
            for code in comes:
                gained[code].append(fd)
                change[code] += 1
            if codes is None:
                left.append(fd)
                shrunk.extend((1, ("UNLINK", key)) for key in self._keys.all_of_fd(fd))
            elif goes:
                shrunk.extend(with_members("SREM", self._keys.fd(fd), goes))
            if before is None and codes is not None:
                joined.append(fd)
            if comes:
                grown.extend(with_members("SADD", self._keys.fd(fd), comes))
                if not before:
                    grown.append(self._renewal(self._keys.fd(fd)))
            if codes is not None:
                grown.extend(self._beside(fd))
        await self._enrol(joined, grown, gained)
        watched = {code for code in lost if self._audience.get(code, 0) + change[code] > 0}
        await withdraw(self._redis, self._keys, lost, shrunk, left, watched=watched)
        for fd, codes in wanted.items():
            if codes is None:
                self._written.pop(fd, None)
            else:
                self._written[fd] = codes
        for code, difference in change.items():
            self._count(code, difference)

    async def _enrol(self, joined: Sequence[str], grown: Iterable[Command], gained: Mapping[str, list[str]]) -> None:
        """Add, from the finder to the found; each step is in Redis before the next is sent."""
        if joined:
            await execute(self._redis, [*with_members("SADD", self._keys.life, joined), self._renewal(self._keys.life)])
        await execute(self._redis, grown)
        await execute(self._redis, self._to_codes(gained))
        if gained:
            await self._enlist(list(gained))

    async def _enlist(self, codes: Sequence[str]) -> None:
        await enlist(self._redis, self._keys, codes, is_listed=True)
        await execute(self._redis, [self._renewal(self._keys.codes)])

    def _beside(self, fd: str) -> Iterable[Command]:
        """What else is written about an fd, behind its place in the life and its codes."""
        return ()

    def _to_codes(self, gained: Mapping[str, list[str]]) -> Iterator[Command]:
        for code, fds in gained.items():
            yield from with_members("SADD", self._keys.code(code), fds)
            if code not in self._audience:  # else the key is there and is renewed in its turn
                yield self._renewal(self._keys.code(code))

    def _find_me(self) -> list[Command]:
        return [(1, ("SADD", self._keys.node, self._keys.life_name)), self._renewal(self._keys.node)]

    def _renewal(self, key: str | bytes) -> Command:
        return (1, ("EXPIRE", key, self._ttl_s))

    def _count(self, code: str, difference: int) -> None:
        fds = self._audience.get(code, 0) + difference
        if fds > 0:
            self._audience[code] = fds
        else:
            self._audience.pop(code, None)

    # ------------------------------------------------------------------ Redis against memory

    async def _check(self) -> None:
        """Compare a part of Redis with what was written to it; the next flush writes again what differs.

        Between two flushes ``_written`` stands still, so there is nothing to race with but other nodes.
        """
        repairs = await self._check_life() + await self._check_fds() + await self._check_codes()
        await self._check_foreign_codes()
        if repairs:
            self.repairs += repairs
            log.warning("registry: %d entries in Redis differed from this worker's connections; repaired", repairs)

    async def _check_life(self) -> int:
        """Are we in the node's set, and our fds, no more and no less, in the life's?"""
        was_missing, _, _, _, fds = await execute(
            self._redis,
            [
                *self._find_me(),
                self._renewal(self._keys.life),
                self._renewal(self._keys.codes),
                (1, ("SCARD", self._keys.life)),
            ],
        )
        repairs = int(was_missing)
        if fds == len(self._written):
            return repairs
        missing = dict.fromkeys(self._written)
        cursor = 0
        while True:
            cursor, page = await scan_page(self._redis, self._keys.life, cursor, 1_000)
            strangers = [fd for fd in page if missing.pop(fd, 0) == 0 and fd not in self._written]
            if strangers:  # Redis was restored from an older state
                repairs += len(strangers)
                await remove_fds(self._redis, self._keys, strangers)
            if not cursor:
                break
        return repairs + await self._forget(list(missing))

    async def _check_fds(self) -> int:
        """Has each of the next fds the codes that we gave it?"""
        fds = [fd for fd in self._in_turn(self._fds_to_check, self._written) if fd in self._written]
        return await self._forget(await self._wrong(fds))

    async def _wrong(self, fds: Sequence[str]) -> list[str]:
        """Renew what goes with these fds; return those of which Redis holds something else than was written."""
        found = await codes_of_fds(self._redis, self._keys, [(fd, len(self._written[fd])) for fd in fds])
        await execute(self._redis, (self._renewal(self._keys.fd(fd)) for fd in fds if self._written[fd]))
        return [fd for fd in fds if set(found[fd]) != set(self._written[fd])]

    async def _check_codes(self) -> int:
        """Is each of our next codes listed, and are our fds, no more and no less, in the sets of codes?"""
        codes = [code for code in self._in_turn(self._codes_to_check, self._audience) if code in self._audience]
        if not codes:
            return 0
        listed = await execute(self._redis, with_members("SMISMEMBER", self._keys.codes, codes))
        flags = [flag for reply in listed for flag in reply]
        unlisted = [code for code, flag in zip(codes, flags, strict=True) if not flag]
        await execute(self._redis, (self._renewal(self._keys.code(code)) for code in codes))
        found = await self._comparison.compare(len(codes))
        # One that has changed since it was written is about to be written again.
        stale = {code: [fd for fd in fds if fd not in self._dirty] for code, fds in found.stale.items()}
        stale = {code: fds for code, fds in stale.items() if fds}
        if stale:
            await withdraw(self._redis, self._keys, stale, (), ())
        if unlisted:
            await self._enlist(unlisted)
        await self._forget(list(found.lacking))
        return len(unlisted) + len(stale) + len(found.short)

    async def _check_foreign_codes(self) -> None:
        """Unlist a few codes that nobody watches any more: two nodes raced, and one died before it looked again."""
        self._codes_cursor, page = await scan_page(self._redis, self._keys.codes, self._codes_cursor, 100)
        await settle(self._redis, self._keys, [code for code in page if code not in self._audience])

    def _in_turn(self, queue: list[str], names: Collection[str]) -> list[str]:
        """The next names to look at, so many that all have been within a quarter of the time to live."""
        if not queue:
            queue.extend(names)
        share = math.ceil(len(names) * self._check_interval_s * 4 / self._ttl_s)
        turn = queue[-max(CHECKED_PER_ROUND, share) :]
        del queue[-len(turn) :]
        return turn

    def _is_ours(self, fd: str) -> bool:
        """Did this life give out ``fd``? Another life of the same worker uses other numbers under the same prefix."""
        if not fd.startswith(self._fd_prefix):
            return False
        try:
            return self._start_us <= int(fd[len(self._fd_prefix) :]) <= self._newest
        except ValueError:
            return False

    async def _forget(self, fds: Sequence[str]) -> int:
        """Take what Redis holds of these fds for unknown, so that the next flush reads and writes all of it."""
        now = time.monotonic()
        for count, fd in enumerate(fds, 1):
            for code in self._written.pop(fd, ()):
                self._count(code, -1)
            self._dirty.setdefault(fd, now)
            if count % 500 == 0:
                await asyncio.sleep(0)
        return len(fds)


def registry_client(url: str, *, connect_timeout_s: float = 5.0, **options: Any) -> Any:
    """A client that is fit for a mirror: one connection, to each node where it is a cluster.

    The mirror bounds every wait itself. ``options`` go to :meth:`quotepush.store.clients.Store.client`. The caller
    closes it.
    """
    return Store(url, timeout_s=connect_timeout_s).client(max_connections=1, **options)


def _brief(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]
