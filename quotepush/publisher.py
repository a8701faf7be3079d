"""How ticks get into Redis so that none is lost: numbered, kept and logged, a batch in one atomic step.

Laws:

1. A batch happens wholly and once, however often it is sent: Redis knows the number of the last
   batch of each publisher. So a lost link is answered by sending again, for ever.
2. ``seq`` of a code rises by one with each of its ticks, whoever publishes them, within an epoch.
3. A store that has gone back (a tail of its append-only file is gone, a replica that was behind
   took over) begins a new epoch before it takes another batch.

In Redis, all under the prefix: the string ``epoch``; the hash ``seq`` (code to number, and ``#`` to the number of
the last batch); the stream ``log``, whose entry ``<n>-0`` is batch ``n``; for each code a hash ``row:<code>`` of its
newest fields as JSON text, with ``@``: seq, epoch and arrival (epoch milliseconds); the channel ``feed``.
An entry of the log and a message on the channel are the same JSON::

    {"epoch":"…","n":7,"at":1721872800123,"ticks":[[1042,"600519.SH",{"last":1688.2}],…]}

The JSON of a tick is put together here and passed through: Redis never decodes it. Law 3 of the log's readers is in
:mod:`quotepush.ingest.log`.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Iterable, Mapping
from math import isfinite
from types import TracebackType
from typing import Any, Self

import msgspec
import orjson
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.ingest.keys import FeedKeys
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import BadTick, check_tick, shape_of
from quotepush.settings import without_password

__all__ = ["BlockingPublisher", "Publisher"]

_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0
# Redis forgets a publisher that has been silent for so long; it comes back under the same name all the same.
_REMEMBERED_S = 86_400
_MOST_TICKS = 1_000

# What Redis says of a state that passes; anything else of the kind is for somebody to act on.
_PASSING = ("LOADING", "BUSY", "READONLY", "MASTERDOWN", "OOM", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "MISCONF")

# The server decides or derives these: whoever publishes them is ignored.
_NOT_PUBLISHED = frozenset(("code", "seq", "prev", "epoch", "change", "change_pct"))

_SCRIPT = """
local epoch_key, seq_key, log_key, done_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local batch, proposed, known_epoch, known_n = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local channel, row_prefix, copies = ARGV[5], ARGV[6], ARGV[9]
local ticks = cmsgpack.unpack(ARGV[8])
local codes = {'#'}
for i = 1, #ticks do codes[i + 1] = ticks[i][1] end
local seqs = redis.call('HMGET', seq_key, unpack(codes))
local n = tonumber(seqs[1] or 0)
local epoch = redis.call('GET', epoch_key)
if not epoch or (epoch == known_epoch and n < known_n) then
    epoch = proposed
    redis.call('SET', epoch_key, epoch)
end
local done = redis.call('GET', done_key)
if done and tonumber(done) >= batch then
    return {epoch, n, 0}
end
n = n + 1
local clock = redis.call('TIME')
local at = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000))
local stamp = ' ' .. epoch .. ' ' .. at
local newest, written, told, reply = {}, {'#', n}, {}, {epoch, n, 1}
for i = 1, #ticks do
    local tick = ticks[i]
    local code, text, replaces, fields, cleared = tick[1], tick[2], tick[3], tick[4], tick[5]
    local seq = (newest[code] or tonumber(seqs[i + 1] or 0)) + 1
    newest[code] = seq
    reply[i + 3] = seq
    local number = string.format('%d', seq)
    told[i] = '[' .. number .. ',"' .. code .. '",' .. text .. ']'
    local row = row_prefix .. code
    if replaces then redis.call('DEL', row) end
    if #cleared > 0 then redis.call('HDEL', row, unpack(cleared)) end
    fields[#fields + 1] = '@'
    fields[#fields + 1] = number .. stamp
    redis.call('HSET', row, unpack(fields))
    if copies ~= '' then
        local copy = '{"epoch":"' .. epoch .. '","seq":' .. number
        if #text > 2 then copy = copy .. ',' .. string.sub(text, 2) else copy = copy .. '}' end
        redis.call('PUBLISH', (string.gsub(copies, '{code}', code)), copy)
    end
end
for code, seq in pairs(newest) do
    written[#written + 1] = code
    written[#written + 1] = string.format('%d', seq)
end
redis.call('HSET', seq_key, unpack(written))
local message = '{"epoch":"' .. epoch .. '","n":' .. string.format('%d', n) .. ',"at":' .. at
    .. ',"ticks":[' .. table.concat(told, ',') .. ']}'
redis.call('XADD', log_key, 'MAXLEN', '~', ARGV[7], string.format('%d', n) .. '-0', 'batch', message)
redis.call('SET', done_key, string.format('%d', batch), 'EX', ARGV[10])
redis.call('PUBLISH', channel, message)
return reply
"""


class _Batches:
    """Numbers and spells batches and knows how far Redis was; no I/O, shared by both publishers."""

    def __init__(self, keys: FeedKeys, log_batches: int, copies: str) -> None:
        self._keys = keys
        self._log_batches = log_batches
        self._copies = copies
        self._name = secrets.token_hex(8)
        self._number = 0
        self._names: dict[str, str] = {}  # field to its name as JSON with a colon
        self._spell = msgspec.msgpack.Encoder().encode
        self.epoch = ""
        self.n = 0

    def next(self, ticks: Iterable[Mapping[str, Any]]) -> list[Any]:
        """Return what the script is to be called with for the next batch.

        Raises:
            BadTick: one of them is none; nothing is published.
        """
        spelled = [self._spelled(tick) for tick in ticks]
        if not spelled:
            return []
        if len(spelled) > _MOST_TICKS:
            raise ValueError(f"a batch has at most {_MOST_TICKS} ticks")
        self._number += 1
        return [self._number, self._spell(spelled)]

    def arguments(self, batch: list[Any]) -> list[Any]:
        """Return keys and arguments of the script; asked anew for every attempt."""
        keys = self._keys
        number, spelled = batch
        return [
            4, keys.epoch, keys.seq, keys.log, keys.publisher(self._name), number, secrets.token_hex(8), self.epoch,
            self.n, keys.channel, keys.row, self._log_batches, spelled, self._copies, _REMEMBERED_S,
        ]  # fmt: skip

    def done(self, reply: list[Any]) -> list[int]:
        """Return the seq of each tick (none when an earlier attempt had been taken already)."""
        epoch = reply[0].decode() if isinstance(reply[0], bytes) else reply[0]
        self.epoch, self.n = epoch, int(reply[1])
        return [int(seq) for seq in reply[3:]]

    def _spelled(self, tick: Mapping[str, Any]) -> tuple[str, str, bool, list[str], list[str]]:
        try:
            code = parse_code(tick["code"])
        except (KeyError, TypeError):
            raise BadTick("wrong_type", "a tick needs its code, a text") from None
        except BadCode as e:
            raise BadTick("bad_code", f"{tick['code']!r}: {e}") from None
        fields = {name: value for name, value in tick.items() if name not in _NOT_PUBLISHED}
        check_tick(fields, shape_of(fields))
        names = self._names
        parts: list[str] = []
        kept: list[str] = []
        cleared: list[str] = []
        for name, value in fields.items():
            spelled_name = names.get(name)
            if spelled_name is None:
                if len(names) > 10_000:
                    names.clear()
                spelled_name = names[name] = orjson.dumps(name).decode() + ":"
            t = type(value)
            if t is int or (t is float and isfinite(value)):
                text = repr(value)  # the same as JSON, and half the price
            elif t is float:
                raise BadTick("wrong_type", f"{name} must be finite")
            else:
                try:
                    text = orjson.dumps(value).decode()
                except orjson.JSONEncodeError as e:
                    raise BadTick("wrong_type", f"{name}: {e}") from None
            parts.append(spelled_name + text)
            if value is None:
                cleared.append(name)
            elif name != "reset":
                kept += (name, text)
        return code, f"{{{','.join(parts)}}}", fields.get("reset") is True, kept, cleared


def _is_passing(error: Exception) -> bool:
    """Say whether to try again helps."""
    if isinstance(error, ResponseError):
        return str(error).startswith(_PASSING)
    return True


def _wait_s(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * float(2 ** min(attempt, 10)))


class _Publisher:
    """What both publishers have in common."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "qp:",
        log_batches: int = 10_000,
        copies: str = "",
        give_up_s: float | None = None,
    ) -> None:
        if copies and copies.count("{code}") != 1:
            raise SettingsError(["copies: a channel with {code} where the code goes"])
        self._where = without_password(url)
        self._give_up_s = give_up_s
        self._batches = _Batches(FeedKeys(prefix), log_batches, copies)
        self._sha = ""

    @property
    def epoch(self) -> str:
        """Name of the life of the log, as of the last batch; empty before the first."""
        return self._batches.epoch

    def _given_up(self, error: Exception, deadline: float | None) -> RedisUnavailable | None:
        if _is_passing(error) and (deadline is None or time.monotonic() < deadline):
            return None
        return RedisUnavailable("feed_redis", self._where, " ".join(str(error).split()) or type(error).__name__)

    def _deadline(self) -> float | None:
        return None if self._give_up_s is None else time.monotonic() + self._give_up_s


class Publisher(_Publisher):
    """Publishes ticks so that none is lost and none is doubled.

    ::

        async with quotepush.Publisher("redis://127.0.0.1:6379/0") as publisher:
            await publisher.publish([{"code": "sh600519", "last": 1688.2}, {"code": "AAPL", "last": 227.5}])

    Several may publish the same code. Batches of one publisher are taken in the order of the calls.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        prefix: of every key and channel; the server's ``redis_prefix``.
        log_batches: how many batches the log keeps, about; what is older cannot be caught up.
        copies: also publish each tick on this channel (``quote.{code}``), for other readers; the server knows them
            by their ``epoch`` and does not take them twice.
        give_up_s: raise after so long without Redis; None: try for ever.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "qp:",
        log_batches: int = 10_000,
        copies: str = "",
        give_up_s: float | None = None,
    ) -> None:
        super().__init__(url, prefix=prefix, log_batches=log_batches, copies=copies, give_up_s=give_up_s)
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url, retry=AsyncRetry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError:  # its text can hold the password
            raise SettingsError(["no Redis address; write redis://[:password@]host:port/0"]) from None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connection."""
        await self._redis.aclose()

    async def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch, in its order; return when Redis has it, with the ``seq`` of each tick.

        The list is empty when the link was lost behind a batch that had been taken. Cancelled, the batch is in Redis
        or not.

        Raises:
            BadTick: one of them is none (``reason`` is the word for it); nothing is published.
            ValueError: more than 1,000 ticks.
            RedisUnavailable: Redis refuses for good, or ``give_up_s`` is over.
        """
        async with self._turn:
            batch = self._batches.next(ticks)
            if not batch:
                return []
            deadline = self._deadline()
            attempt = 0
            while True:
                try:
                    async with asyncio.timeout(_TIMEOUT_S):
                        return self._batches.done(await self._call(batch))
                except (RedisError, OSError, TimeoutError) as e:
                    if given_up := self._given_up(e, deadline):
                        raise given_up from None
                    await self._redis.connection_pool.disconnect()
                    await asyncio.sleep(_wait_s(attempt))
                    attempt += 1

    async def _call(self, batch: list[Any]) -> Any:
        redis: Any = self._redis  # redis-py's annotations are neither here nor there
        arguments = self._batches.arguments(batch)
        if self._sha:
            try:
                return await redis.evalsha(self._sha, *arguments)
            except NoScriptError:
                pass
        self._sha = await redis.script_load(_SCRIPT)
        return await redis.evalsha(self._sha, *arguments)


class BlockingPublisher(_Publisher):
    """The same for programs without asyncio; not for several threads at once.

    ::

        with quotepush.BlockingPublisher("redis://127.0.0.1:6379/0") as publisher:
            publisher.publish([{"code": "sh600519", "last": 1688.2}])
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "qp:",
        log_batches: int = 10_000,
        copies: str = "",
        give_up_s: float | None = None,
    ) -> None:
        super().__init__(url, prefix=prefix, log_batches=log_batches, copies=copies, give_up_s=give_up_s)
        try:
            self._redis = redis.Redis.from_url(
                url, retry=Retry(NoBackoff(), 0), socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
        except ValueError:  # its text can hold the password
            raise SettingsError(["no Redis address; write redis://[:password@]host:port/0"]) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._redis.close()

    def publish(self, ticks: Iterable[Mapping[str, Any]]) -> list[int]:
        """Publish a batch as :meth:`Publisher.publish` does."""
        batch = self._batches.next(ticks)
        if not batch:
            return []
        deadline = self._deadline()
        attempt = 0
        while True:
            try:
                return self._batches.done(self._call(batch))
            except (RedisError, OSError) as e:
                if given_up := self._given_up(e, deadline):
                    raise given_up from None
                self._redis.connection_pool.disconnect()
                time.sleep(_wait_s(attempt))
                attempt += 1

    def _call(self, batch: list[Any]) -> Any:
        redis: Any = self._redis
        arguments = self._batches.arguments(batch)
        if self._sha:
            try:
                return redis.evalsha(self._sha, *arguments)
            except NoScriptError:
                pass
        self._sha = redis.script_load(_SCRIPT)
        return redis.evalsha(self._sha, *arguments)
