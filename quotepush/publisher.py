"""How ticks get into Redis so that none is lost: numbered, kept and logged, a batch in one atomic step.

Laws:

1. A batch happens wholly and once, however often it is sent: Redis knows the number of the last
   batch of each publisher, and what it answered. So a lost link is answered by sending again, for ever.
2. ``seq`` of a code rises by one with each of its ticks, whoever publishes them, within an epoch.
3. A store that is behind what its publisher has seen (emptied, a tail of its append-only file is gone, a replica that
   was behind took over) begins a new epoch before it takes another batch of that publisher. The server does the
   same for what it has seen.

In Redis, all under the prefix: the string ``epoch``; the hash ``seq`` (code to number, and ``#`` to the number of
the last batch); the stream ``log``, whose entry ``<n>-0`` is batch ``n``; for each code a hash ``row:<code>`` of its
newest fields as JSON text, with ``@``: seq, epoch and arrival (epoch milliseconds); for each publisher of the last
day a string ``publisher:<name>``: its last batch and the numbers it got; the channel ``feed``.
An entry of the log and a message on the channel are the same JSON::

    {"epoch":"…","n":7,"at":1721872800123,"ticks":[[1042,"600519.SH",{"last":1688.2}],…]}

The JSON of a tick is put together here and passed through: Redis never decodes it. Who reads it:
:mod:`quotepush.ingest.log`.
"""

import asyncio
import contextlib
import hashlib
import random
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from operator import add
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
import orjson
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
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
from redis.retry import Retry

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.ingest.keys import FeedKeys
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import SERVERS_OWN, BadTick, Shape, check_tick, shape_of

__all__ = ["BlockingPublisher", "Publisher", "open_client", "reason_of", "shown_address"]

_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0
# Redis forgets a publisher that has been silent for so long; it comes back under the same name all the same.
_REMEMBERED_S = 86_400
# A row without a tick for so long goes: ten days, as on the server's board (last_max_age_s).
_ROW_MAX_AGE_S = 864_000

_MOST_TICKS = 1_000
_MOST_FIELDS = 1_000  # Lua can hand about 8,000 values to a command, two for each field
_LONGEST_TICK = 1 << 20  # characters; as much as the server can be told to take
_MOST_BYTES = 16 << 20  # of a batch, where every value stands twice
_MOST_FORMS = 4_096
_MOST_LEFT = 64

# A state of Redis that passes; older ones name it in the middle of what the script says: "… @user_script: 16: -OOM …"
_PASSING = re.compile(r"(?:^|[ :]-)(?:LOADING|BUSY|READONLY|MASTERDOWN|OOM|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|MISCONF)\b")
# redis-py takes the word off the text of these.
_PASSING_KINDS = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError)
_REFUSED_KINDS = (AuthenticationError, AuthorizationError)  # they are ConnectionErrors, but no link will mend them

_ABOUT = "@"  # in the hash of a row: what is no field of it begins so

# Everything that can be refused comes before the first write: a script that fails later leaves what it wrote. Out of
# memory and read-only are decided by Redis at the first write, too. What is left is a row's key that holds no hash.
_SCRIPT = """
local epoch_key, seq_key, log_key, done_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local batch, proposed, known_epoch, known_n, left = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local channel, row_prefix, copies = ARGV[6], ARGV[7], ARGV[10]
if known_epoch == '' and redis.acl_check_cmd then
    for _, wanted in ipairs({{'XADD', log_key, '*', 'a', ''}, {'UNLINK', log_key}, {'HSET', row_prefix, 'a', ''},
            {'HDEL', row_prefix, 'a'}, {'EXPIRE', row_prefix, '1'}, {'PUBLISH', channel, ''},
            {'PUBLISH', copies, ''}}) do
        if wanted[2] ~= '' and not redis.acl_check_cmd(unpack(wanted)) then
            return redis.error_reply('NOPERM the user may not ' .. wanted[1] .. ' ' .. wanted[2])
        end
    end
end
local ticks = cmsgpack.unpack(ARGV[9])
local codes = {'#'}
for i = 1, #ticks do codes[i + 1] = ticks[i][1] end
local seqs = redis.call('HMGET', seq_key, unpack(codes))
local n = tonumber(seqs[1] or 0)
local epoch = redis.call('GET', epoch_key)
local done = redis.call('GET', done_key)
redis.call('XLEN', log_key)
if not epoch or n == 0 or (epoch == known_epoch and n < known_n) or string.find(left, epoch, 1, true) then
    epoch = proposed
    redis.call('SET', epoch_key, epoch)
    if n == 0 then redis.call('UNLINK', log_key) end
end
if done then
    done = cmsgpack.unpack(done)
    if done[1] >= batch then
        done[1] = epoch
        table.insert(done, 2, n)
        return done
    end
end
n = n + 1
local clock = redis.call('TIME')
local at = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000))
local stamp = ' ' .. epoch .. ' ' .. at
local newest, written, told, reply = {}, {'#', n}, {}, {batch}
for i = 1, #ticks do
    local tick = ticks[i]
    local code, text, replaces, fields, cleared = tick[1], tick[2], tick[3], tick[4], tick[5]
    local seq = (newest[code] or tonumber(seqs[i + 1] or 0)) + 1
    newest[code] = seq
    reply[i + 1] = seq
    local number = string.format('%d', seq)
    told[i] = '[' .. number .. ',"' .. code .. '",' .. text .. ']'
    local row = row_prefix .. code
    if replaces then redis.call('DEL', row) end
    if #cleared > 0 then redis.call('HDEL', row, unpack(cleared)) end
    fields[#fields + 1] = number .. stamp
    redis.call('HSET', row, unpack(fields))
    redis.call('EXPIRE', row, ARGV[12])
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
redis.call('XADD', log_key, 'MAXLEN', '~', ARGV[8], string.format('%d', n) .. '-0', 'batch', message)
redis.call('SET', done_key, cmsgpack.pack(reply), 'EX', ARGV[11])
redis.call('PUBLISH', channel, message)
reply[1] = epoch
table.insert(reply, 2, n)
return reply
"""
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class _Form:
    """What all ticks with the same fields have in common; made once for them."""

    __slots__ = ("dropped", "heads", "names", "resets", "shape")

    def __init__(self, fields: tuple[str, ...], shape: Shape) -> None:
        for name in fields:
            if type(name) is not str or name.startswith(_ABOUT):
                raise BadTick("wrong_type", f"{name!r} cannot be the name of a field")
        if len(fields) > _MOST_FIELDS:
            raise BadTick("too_large", f"a tick has at most {_MOST_FIELDS:,} fields")
        self.shape = shape
        self.dropped = tuple(name for name in fields if name in SERVERS_OWN)
        self.names = tuple(name for name in fields if name not in SERVERS_OWN)
        try:
            self.heads = tuple(orjson.dumps(name).decode() + ":" for name in self.names)
        except orjson.JSONEncodeError as e:
            raise BadTick("wrong_type", f"the name of a field: {e}") from None
        self.resets = "reset" in fields


_Spelled = tuple[str, str, bool, list[str], list[str]]  # code, tick, replaces the row, its fields and texts, cleared


class _Batches:
    """Numbers and spells batches and knows how far Redis was; no I/O, shared by both publishers."""

    def __init__(self, keys: FeedKeys, log_batches: int, copies: str) -> None:
        self._keys = keys
        self._log_batches = log_batches
        self._copies = copies
        self._name = secrets.token_hex(8)
        self._number = 0
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._pack = msgspec.msgpack.Encoder().encode
        self._left: list[str] = []  # epochs that were over: a store that shows one of them again has gone back
        self._n = 0
        self.epoch = ""

    def spell(self, ticks: Iterable[Mapping[str, Any]]) -> bytes:
        """Return a batch as the script takes it; empty when there is no tick.

        Raises:
            BadTick: one of them is none, or they are too many.
        """
        spelled: list[_Spelled] = []
        for tick in ticks:
            try:
                spelled.append(self._spelled(tick))
            except BadTick as e:
                raise BadTick(e.reason, f"tick {len(spelled) + 1}: {e.message}") from None
        if not spelled:
            return b""
        if len(spelled) > _MOST_TICKS:
            raise BadTick("too_large", f"a batch has at most {_MOST_TICKS:,} ticks")
        packed = self._pack(spelled)
        if len(packed) > _MOST_BYTES:
            raise BadTick("too_large", f"a batch has at most {_MOST_BYTES:,} bytes")
        return packed

    def next_number(self) -> int:
        """Return the number of the batch that is sent next; every attempt to send it has the same."""
        self._number += 1
        return self._number

    def arguments(self, number: int, packed: bytes) -> list[Any]:
        """Return keys and arguments of the script; asked anew for every attempt."""
        keys = self._keys
        return [
            4, keys.epoch, keys.seq, keys.log, keys.publisher(self._name), number, secrets.token_hex(8), self.epoch,
            self._n, " ".join(self._left), keys.channel, keys.row, self._log_batches, packed, self._copies,
            _REMEMBERED_S, _ROW_MAX_AGE_S,
        ]  # fmt: skip

    def taken(self, answer: list[Any]) -> list[int]:
        """Return the seq of each tick of the batch that Redis has taken."""
        epoch, n, *seqs = answer
        epoch = epoch.decode() if isinstance(epoch, bytes) else epoch
        if self.epoch and epoch != self.epoch:
            self._left = [*self._left[1 - _MOST_LEFT :], self.epoch]
        self.epoch, self._n = epoch, int(n)
        return seqs

    def _spelled(self, tick: Mapping[str, Any]) -> _Spelled:  # hot
        try:
            code = parse_code(tick["code"])
        except (KeyError, TypeError):
            raise BadTick("wrong_type", "it needs its code, a text") from None
        except BadCode as e:
            raise BadTick("bad_code", f"{tick['code']!r}: {e}") from None
        fields = dict(tick)
        form = self._forms.get(tuple(fields)) or self._form_of(fields)
        for name in form.dropped:
            del fields[name]
        check_tick(fields, form.shape)
        names = form.names
        values = list(fields.values())
        cleared: list[str] = []
        try:
            joined = orjson.dumps(values).decode()
        except orjson.JSONEncodeError:
            joined = ""  # one by one they say which of them it is
        # All at once cost a third of one by one. If there are as many commas as between them, none is inside of one.
        texts = joined[1:-1].split(",")
        # An infinite number is null, too.
        if not joined or len(texts) != len(values) or "null" in joined or form.resets:
            texts = [_text_of(name, value) for name, value in fields.items()]
            cleared = [name for name, value in fields.items() if value is None]
            kept = [
                text
                for name, value, spelled in zip(names, values, texts, strict=True)
                if value is not None and name != "reset"
                for text in (name, spelled)
            ]
        else:
            kept = [""] * (2 * len(values))
            kept[::2] = names
            kept[1::2] = texts
        kept.append(_ABOUT)
        text = f"{{{','.join(map(add, form.heads, texts))}}}"
        if len(text) > _LONGEST_TICK:
            raise BadTick("too_large", f"a tick has at most {_LONGEST_TICK:,} characters")
        return code, text, form.resets and fields["reset"] is True, kept, cleared

    def _form_of(self, fields: dict[str, Any]) -> _Form:
        form = _Form(tuple(fields), shape_of(fields))
        if len(self._forms) >= _MOST_FORMS:  # a publisher that invents field names
            self._forms.clear()
        self._forms[tuple(fields)] = form
        return form


def _text_of(name: str, value: Any) -> str:
    """Return a value as JSON text."""
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError as e:
        raise BadTick("wrong_type", f"{name}: {e}") from None
    if "null" in text and not _is_finite(value):
        raise BadTick("wrong_type", f"{name} must be finite")
    return text


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return isfinite(value)
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return True


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
        self._where = shown_address(url)
        self._give_up_s = give_up_s
        self._timeout_s = _TIMEOUT_S if give_up_s is None else max(0.05, min(_TIMEOUT_S, give_up_s))
        self._on_link = on_link
        self._is_away = False
        self._batches = _Batches(FeedKeys(prefix), log_batches, copies)
        self._redis = self._client(url)

    @property
    def epoch(self) -> str:
        """Name of the life of the log, as of the last batch; empty before the first."""
        return self._batches.epoch

    @abstractmethod
    def _client(self, url: str) -> Any: ...

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
        url: ``redis://``, ``rediss://`` or ``unix://``; its password is never shown.
        prefix: of every key and channel; the server's ``redis_prefix``.
        log_batches: how many batches the log keeps, about; what is older cannot be caught up.
        copies: also publish each tick on this channel (``quote.{code}``), for other readers; the server knows them
            by their ``epoch`` and does not take them twice.
        give_up_s: raise after so long without Redis; None: try for ever.
        on_link: called when Redis goes away, with the reason, and with an empty text when it is back.

    Raises:
        SettingsError: an argument is wrong.
    """

    def _client(self, url: str) -> Any:
        self._turn = asyncio.Lock()
        # One attempt per call: what happens between attempts is decided here, not inside the client. One timeout per
        # attempt, too; redis-py's is one per answer.
        return open_client(
            redis.asyncio.Redis, url,
            retry=AsyncRetry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=self._timeout_s,
        )  # fmt: skip

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
        packed = self._batches.spell(ticks)
        if not packed:
            return []
        deadline = self._deadline()
        async with self._turn:
            number = self._batches.next_number()
            attempt = 0
            while True:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        return self._taken(await self._call(number, packed))
                except (RedisError, OSError) as e:
                    wait_s = self._wait_s(e, attempt, deadline)
                # What answers "read-only" is no longer what the address stands for: connect anew.
                with contextlib.suppress(RedisError, OSError):
                    await self._redis.connection_pool.disconnect()
                await asyncio.sleep(wait_s)
                attempt += 1

    async def _call(self, number: int, packed: bytes) -> list[Any]:
        arguments = self._batches.arguments(number, packed)
        try:
            answer: list[Any] = await self._redis.evalsha(_SHA, *arguments)
        except NoScriptError:
            answer = await self._redis.eval(_SCRIPT, *arguments)
        return answer


class BlockingPublisher(_Publisher):
    """`Publisher` for programs without asyncio; not for several threads at once.

    ::

        with quotepush.BlockingPublisher("redis://127.0.0.1:6379/0") as publisher:
            publisher.publish([{"code": "sh600519", "last": 1688.2}])
    """

    def _client(self, url: str) -> Any:
        return open_client(
            redis.Redis, url,
            retry=Retry(NoBackoff(), 0), socket_timeout=self._timeout_s, socket_connect_timeout=self._timeout_s,
        )  # fmt: skip

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
        packed = self._batches.spell(ticks)
        if not packed:
            return []
        deadline = self._deadline()
        number = self._batches.next_number()
        attempt = 0
        while True:
            try:
                return self._taken(self._call(number, packed))
            except (RedisError, OSError) as e:
                wait_s = self._wait_s(e, attempt, deadline)
            self._redis.connection_pool.disconnect()
            time.sleep(wait_s)
            attempt += 1

    def _call(self, number: int, packed: bytes) -> list[Any]:
        arguments = self._batches.arguments(number, packed)
        try:
            answer: list[Any] = self._redis.evalsha(_SHA, *arguments)
        except NoScriptError:
            answer = self._redis.eval(_SCRIPT, *arguments)
        return answer


def open_client(kind: Any, url: str, **options: Any) -> Any:
    """Return a Redis client of a kind (``redis.Redis``, ``redis.asyncio.Redis``); it connects when it is first used.

    Raises:
        SettingsError: the URL is none, or has options that Redis connections do not have.
    """
    try:
        client = kind.from_url(url, **options)
        client.connection_pool.make_connection()  # connects nowhere, but looks at the options
    except ValueError:  # its text can hold the password
        raise SettingsError(["not a Redis address; write redis://[:password@]host:port/0"]) from None
    except TypeError:
        raise SettingsError(["the address has an option that is unknown; leave out what follows its ?"]) from None
    return client


def reason_of(error: Exception, timeout_s: float) -> str:
    """Return in one line why Redis did not answer, or not within ``timeout_s``."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {timeout_s:g} s"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def shown_address(url: str) -> str:
    """Return where a Redis URL points to, without user, password and options."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return f"unix:{parts.path}"
        return f"{parts.hostname or '127.0.0.1'}:{parts.port or 6379}"
    except ValueError:
        return "an address that is none"
