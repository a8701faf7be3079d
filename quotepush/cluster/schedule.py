"""Messages that are sent later, once or again and again: kept in Redis until then.

::

    <p>{jobs}        sorted set  id → when a node has to look at it: its time or, once a node sends it, the end of
                                 the lease
    <p>{jobs}:<id>   hash        text (the message as a command), next (the time that it is sent for), every, last,
                                 left, sent, made, tries; times in milliseconds, 0: none

Laws: each change is one atomic step on keys of one slot. Times are by the clock of Redis, so no machine's clock counts.
A job is at most one node's at a time, until the end of its lease; what it is sent for next changes only for whoever has
sent it for the time before. Jobs are bounded in number and size, and one that no node has sent within ``LEFT_S`` of its
time is nobody's any more.
"""

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol, TypedDict

from quotepush.cluster.commands import OPS, BadCommand, ClusterKeys, Command, encode, is_job, new_id, parse_command
from quotepush.cluster.line import Words
from quotepush.cluster.pages import Listing, Page, next_cursor, set_cursor
from quotepush.cluster.sets import text
from quotepush.errors import CallRefused

__all__ = ["LEASE_S", "LEFT_S", "MAX_JOB_BYTES", "Claim", "Claims", "Job", "Schedule", "Times", "When", "times_of"]

# Whoever has claimed a job has so long to send it.
LEASE_S = 30
LEFT_S = 7 * 86_400
# Of a message with its recipients, as JSON.
MAX_JOB_BYTES = 65_536
LEAST_EVERY_S, MOST_EVERY_S = 1, 10 * 366 * 86_400
# A time in milliseconds is between 1973 and 2286; in seconds or microseconds it is not.
_FIRST_MS, _LAST_MS = 10**11, 10**13
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
# Jobs are read in one piece, and may be large.
_PAGE = 100

When = datetime | timedelta | int

_CLOCK = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
"""
_KEEP = """
local function keep(at)
    local needed = at + left_ms - now
    redis.call('PEXPIRE', KEYS[2], string.format('%d', math.max(1, needed)))
    if redis.call('PTTL', KEYS[1]) < needed then redis.call('PEXPIRE', KEYS[1], string.format('%d', needed)) end
end
"""
_ADD = f"""
local id, at, wait, every, last, left, most, left_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]),
    tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
{_CLOCK}{_KEEP}
if at == 0 then at = now + wait end
if last > 0 and last < math.max(at, now) then return {{'late', now}} end
if redis.call('ZCARD', KEYS[1]) >= most then return {{'full', now}} end
redis.call('HSET', KEYS[2], 'text', ARGV[9], 'next', string.format('%d', at), 'every', ARGV[4], 'last', ARGV[5],
    'left', ARGV[6], 'sent', 0, 'tries', 0, 'made', string.format('%d', now))
redis.call('ZADD', KEYS[1], string.format('%d', at), id)
keep(math.max(at, now))
return {{'added', now, at}}
"""
_CLAIM = f"""
{_CLOCK}
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now), 'LIMIT', 0, ARGV[2])
local lease = string.format('%d', now + ARGV[1])
for _, id in ipairs(ids) do redis.call('ZADD', KEYS[1], lease, id) end
local soonest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {{now, redis.call('ZCARD', KEYS[1]), soonest[2] or '', ids}}
"""
_SETTLE = f"""
local left_ms = tonumber(ARGV[3])
{_CLOCK}{_KEEP}
local job = redis.call('HMGET', KEYS[2], 'next', 'every', 'last', 'left')
local at, every, last, left = tonumber(job[1]), tonumber(job[2]) or 0, tonumber(job[3]) or 0, tonumber(job[4]) or 0
if at ~= tonumber(ARGV[2]) then return 0 end
if every > 0 and left ~= 1 then
    local following = at + every * math.max(1, math.floor((now - at) / every) + 1)
    if last == 0 or following <= last then
        redis.call('HSET', KEYS[2], 'next', string.format('%d', following), 'tries', 0)
        redis.call('HINCRBY', KEYS[2], 'sent', 1)
        if left > 0 then redis.call('HINCRBY', KEYS[2], 'left', -1) end
        redis.call('ZADD', KEYS[1], string.format('%d', following), ARGV[1])
        keep(following)
        return 1
    end
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
"""
_PUT_OFF = f"""
{_CLOCK}
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not lease or tonumber(lease) ~= tonumber(ARGV[2]) then return 0 end
local wait = tonumber(ARGV[3])
if wait > 0 and redis.call('EXISTS', KEYS[2]) == 1 then
    wait = math.min(wait * 2 ^ redis.call('HINCRBY', KEYS[2], 'tries', 1), tonumber(ARGV[4]))
end
redis.call('ZADD', KEYS[1], string.format('%d', now + wait), ARGV[1])
return 1
"""
_REMOVE = """
redis.call('ZREM', KEYS[1], ARGV[1])
return redis.call('DEL', KEYS[2])
"""
_FIELDS = ("text", "next", "every", "last", "left", "sent", "made")
_FIRST_AGAIN_MS, _LAST_AGAIN_MS = 1_000, 60_000


class SentTo(TypedDict, total=False):
    """Whom a message is for; exactly one of these."""

    conns: list[str]
    users: list[str]
    group: str
    all: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A message that is sent later.

    Attributes:
        id: for cancelling it.
        at: when it is sent next, in milliseconds.
        every: it is sent again after so many seconds; None: once.
        until: in milliseconds: it is not sent after that; None: no end.
        left: how many times it is still sent; None: no end.
        sent: how many times it was sent.
        made: when it was made, in milliseconds.
        to: whom it is for.
        data: any JSON value; with ``encoding``, the base64 of bytes.
        encoding: ``base64``, or empty.
        raw, exclude, delivery: as it was asked for.
    """

    id: str
    at: int
    every: float | None
    until: int | None
    left: int | None
    sent: int
    made: int
    to: SentTo
    data: Any
    encoding: str
    raw: bool
    exclude: tuple[str, ...]
    delivery: Literal["now", "kept"]


@dataclass(frozen=True, slots=True)
class Times:
    """When a job is sent; 0: not said.

    Attributes:
        at_ms: the first time; 0: ``in_ms`` from now.
        every_ms: between two times.
        until_ms: it is not sent after that.
        count: how many times in all.
    """

    at_ms: int
    in_ms: int
    every_ms: int
    until_ms: int
    count: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is this node's to send, until its lease ends.

    Attributes:
        at_ms: the time that it is sent for.
        lease_ms: when the lease ends.
        sent: how many times it was sent before.
        command: what is sent; None: it is gone, or is no message.
        fault: why it is none.
        is_over: nobody wants it any more.
    """

    id: str
    at_ms: int
    lease_ms: int
    sent: int
    command: Command | None
    fault: str = ""
    is_over: bool = False

    @property
    def message(self) -> str:
        """What the message is called, whoever sends it for this time and however often."""
        return f"{self.id}.{self.sent}"


@dataclass(frozen=True, slots=True)
class Claims:
    """What there is to do.

    Attributes:
        waiting: how many jobs there are in all.
        soonest_s: in how many seconds the next one is due; None: there is none.
        is_more: as many as were asked for, so there may be more.
    """

    jobs: Sequence[Claim]
    waiting: int
    soonest_s: float | None
    is_more: bool


class Ask(Protocol):
    """Asks Redis, as :meth:`quotepush.cluster.line.Line.ask` does."""

    def __call__(self, *commands: Words) -> Awaitable[list[Any]]:
        """Return the reply to each command."""


class Schedule:
    """The jobs of a cluster.

    Every method raises ``BackendUnavailable`` when Redis does not answer in time.

    Args:
        ask: whose answers have bytes for texts.
    """

    def __init__(self, ask: Ask, prefix: str) -> None:
        self._ask = ask
        self._keys = ClusterKeys(prefix)

    # For backends

    async def add(self, command: Command, times: Times, *, most: int) -> Job:
        """Let a message be sent later.

        Args:
            command: with ``keep`` where it is kept for who is away.
            most: jobs at a time.

        Raises:
            CallRefused: it could be sent to nobody (``bad_request``), is ``too_large``, or there are too many
                (``job_limit``).
        """
        try:
            said = encode(command)
        except (TypeError, ValueError, OverflowError, RecursionError) as e:
            raise CallRefused("bad_request", f"not a JSON value: {e}") from None
        if len(said) > MAX_JOB_BYTES:
            why = f"with its recipients it has {len(said)} bytes of JSON, and may have {MAX_JOB_BYTES} to be sent later"
            raise CallRefused("too_large", why)
        if why := OPS[command.op](command):
            raise CallRefused("bad_request", why)
        job = new_id()
        numbers = (times.at_ms, times.in_ms, times.every_ms, times.until_ms, times.count, most, LEFT_S * 1000)
        outcome, now_ms, *rest = await self._run(_ADD, self._both(job), job, *numbers, said)
        if outcome == b"late":
            raise CallRefused("bad_request", "until is before the first time")
        if outcome == b"full":
            raise CallRefused("job_limit", f"{most} messages wait to be sent later, and no more may")
        fields = (said, rest[0], times.every_ms, times.until_ms, times.count, 0, now_ms)
        found = _job_of(job, fields)
        assert found is not None, "we wrote it"
        return found

    def jobs(self) -> Listing[Job]:
        """Find all jobs, in no order."""
        return Listing(self._page, lambda job: job.id)

    async def cancel(self, job: str) -> bool:
        """Forget a job; say whether it was there. What is on its way to clients just now still arrives."""
        if not is_job(job):
            return False
        return bool(await self._run(_REMOVE, self._both(job), job))

    async def _page(self, cursor: str, count: int) -> Page[Job]:
        at = set_cursor(cursor)
        ((after, found),) = await self._ask(("ZSCAN", self._keys.jobs, at, "COUNT", min(count, _PAGE)))
        ids = [text(job) for job, _ in found]
        read = await self._ask(*(("HMGET", self._keys.job(job), *_FIELDS) for job in ids))
        jobs = []
        for job, fields in zip(ids, read, strict=True):
            if (found_job := _job_of(job, fields)) is not None:
                jobs.append(found_job)
            await asyncio.sleep(0)  # reading a large one takes its time
        return Page(tuple(jobs), next_cursor(after))

    # For nodes

    async def claim(self, most: int) -> Claims:
        """Take jobs that are due; nobody else gets them for ``LEASE_S``."""
        now_ms, waiting, soonest, ids = await self._run(_CLAIM, (self._keys.jobs,), LEASE_S * 1000, most)
        names = [text(job) for job in ids]
        read = await self._ask(*(("HMGET", self._keys.job(job), *_FIELDS) for job in names))
        claims = []
        for job, fields in zip(names, read, strict=True):
            claims.append(_claim_of(job, fields, now_ms))
            await asyncio.sleep(0)
        soonest_s = (float(soonest) - now_ms) / 1000 if soonest else None
        return Claims(claims, waiting, soonest_s, len(claims) >= most)

    async def settle(self, claim: Claim) -> None:
        """It was sent for its time: what comes next is the first of its times that is not over yet."""
        await self._run(_SETTLE, self._both(claim.id), claim.id, claim.at_ms, LEFT_S * 1000)

    async def put_off(self, claim: Claim, *, has_failed: bool) -> None:
        """Give it back, if it is still ours: due at once or, when it has failed, after a longer wait each time."""
        wait_ms = _FIRST_AGAIN_MS // 2 if has_failed else 0
        await self._run(_PUT_OFF, self._both(claim.id), claim.id, claim.lease_ms, wait_ms, _LAST_AGAIN_MS)

    async def drop(self, claim: Claim) -> None:
        """Forget it, whatever it is."""
        await self._run(_REMOVE, self._both(claim.id), claim.id)

    def _both(self, job: str) -> tuple[str, str]:
        return self._keys.jobs, self._keys.job(job)

    async def _run(self, script: str, keys: Sequence[str], *arguments: Any) -> Any:
        (reply,) = await self._ask(("EVAL", script, len(keys), *keys, *arguments))
        return reply


def times_of(given: Mapping[str, Any]) -> Times | None:
    """Return when a message is sent; None: at once, for nothing is said of it.

    Args:
        given: ``at``, ``every``, ``until`` and ``count``, as far as they are given; None is as good as absent.

    Raises:
        CallRefused: one of them is none.
    """
    at, every, until, count = (given.get(name) for name in ("at", "every", "until", "count"))
    if at is None and every is None:
        if until is None and count is None:
            return None
        raise CallRefused("bad_request", "until and count belong to at or every")
    every_ms = 0 if every is None else _every_ms(every)
    if count is not None and (every is None or type(count) is not int or not 1 <= count < 1 << 31):
        raise CallRefused("bad_request", "count is how many times in all, at least 1, and belongs to every")
    at_ms = in_ms = 0
    if at is None:
        in_ms = every_ms
    elif isinstance(at, timedelta):
        in_ms = at // _MILLISECOND
        if not 0 <= in_ms <= MOST_EVERY_S * 1000:
            raise CallRefused("bad_request", "at must be a time from now, of at most ten years")
    else:
        at_ms = _moment_ms("at", at)
    return Times(at_ms, in_ms, every_ms, 0 if until is None else _moment_ms("until", until), count or 0)


def _every_ms(every: Any) -> int:
    if isinstance(every, timedelta):
        every = every.total_seconds()
    is_number = type(every) in (int, float) and math.isfinite(every)
    if not is_number or not LEAST_EVERY_S <= every <= MOST_EVERY_S:
        raise CallRefused("bad_request", f"every must be seconds, at least {LEAST_EVERY_S} and at most ten years")
    return round(float(every) * 1000)


def _moment_ms(name: str, moment: Any) -> int:
    if isinstance(moment, datetime):
        if moment.utcoffset() is None:
            raise CallRefused("bad_request", f"{name} must say its time zone: datetime(…, tzinfo=…)")
        moment = (moment - _EPOCH) // _MILLISECOND
    if type(moment) is not int or not _FIRST_MS <= moment < _LAST_MS:
        raise CallRefused("bad_request", f"{name} must be a time in milliseconds since 1970")
    return int(moment)


def _command_of(said: bytes | None) -> Command:
    """Return the message of a job.

    Raises:
        BadCommand: it is none.
    """
    command = parse_command(said or b"")
    if command.op != "send":
        raise BadCommand("only messages are sent later")
    return command


def _job_of(job: str, fields: Sequence[Any]) -> Job | None:
    """What Redis has of a job; None: it has gone, or somebody else has put it there."""
    try:
        command = _command_of(fields[0])
        at, every, last, left, sent, made = (int(field or 0) for field in fields[1:])
    except ValueError:  # BadCommand is one
        return None
    assert command.to is not None, "it has been checked"
    to: SentTo = {}
    if command.to.conns is not None:
        to["conns"] = command.to.conns
    elif command.to.users is not None:
        to["users"] = command.to.users
    elif command.to.group is not None:
        to["group"] = command.to.group
    else:
        to["all"] = True
    return Job(
        job, at, every / 1000 if every else None, last or None, left or None, sent, made, to, command.data,
        command.encoding, command.raw, tuple(command.exclude), "kept" if command.keep else "now",
    )  # fmt: skip


def _claim_of(job: str, fields: Sequence[Any], now_ms: int) -> Claim:
    said, at, _, last, _, sent, *_ = fields
    lease_ms = now_ms + LEASE_S * 1000
    if said is None:
        return Claim(job, 0, lease_ms, 0, None)
    try:
        at_ms, last_ms, sent_before = int(at or 0), int(last or 0), int(sent or 0)
        return Claim(job, at_ms, lease_ms, sent_before, _command_of(said), is_over=0 < last_ms < now_ms)
    except ValueError as e:
        return Claim(job, 0, lease_ms, 0, None, str(e))
