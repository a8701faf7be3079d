"""How ticks become a batch, and what Redis does with one: numbered, kept and logged in one atomic step.

Laws:

1. A tick is checked before it is spelled, and a batch with a bad one is none at all.
2. Redis takes a batch wholly and once, however often it comes: it knows the number of the last batch of each
   publisher, and what it answered.
3. ``seq`` of a code rises by one with each of its ticks, whoever publishes them, within an epoch.
4. A store that is behind what its publisher has seen (emptied, a tail of its append-only file is gone, a replica that
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

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from operator import add
from typing import Any, NamedTuple

import msgspec
import orjson

from quotepush.ingest.keys import FeedKeys
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import SERVERS_OWN, BadTick, Shape, check_tick, shape_of

__all__ = ["SCRIPT", "SCRIPT_SHA", "Batch", "Batches"]

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

_ABOUT = "@"  # in the hash of a row: what is no field of it begins so

# Where a Redis Cluster has all its keys in one slot, those of its rows are named, too (Batch.rows): while the slot is
# being moved, Redis would else let it begin where only some of them are, and end it in the middle.
#
# Everything that can be refused comes before the first write: a script that fails later leaves what it wrote. Out of
# memory and read-only are decided by Redis at the first write, too. What is left is a row's key that holds no hash.
SCRIPT = """
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
SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()


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


class Batch(NamedTuple):
    """Ticks that have been checked, for :meth:`Batches.arguments`.

    Attributes:
        packed: as the script takes them.
        rows: the keys of their rows, where keys have a hash tag; else none.
    """

    packed: bytes
    rows: Sequence[str]


class Batches:
    """One publisher's batches: spells and numbers them, and knows how far Redis was. No I/O."""

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

    def spell(self, ticks: Iterable[Mapping[str, Any]]) -> Batch | None:
        """Return a batch; None when there is no tick.

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
            return None
        if len(spelled) > _MOST_TICKS:
            raise BadTick("too_large", f"a batch has at most {_MOST_TICKS:,} ticks")
        packed = self._pack(spelled)
        if len(packed) > _MOST_BYTES:
            raise BadTick("too_large", f"a batch has at most {_MOST_BYTES:,} bytes")
        row = self._keys.row
        return Batch(packed, list({row + tick[0]: None for tick in spelled}) if "{" in row else [])

    def next_number(self) -> int:
        """Return the number of the batch that is sent next; every attempt to send it has the same."""
        self._number += 1
        return self._number

    def arguments(self, number: int, batch: Batch) -> list[Any]:
        """Return keys and arguments of the script; asked anew for every attempt."""
        keys = self._keys
        return [
            4 + len(batch.rows), keys.epoch, keys.seq, keys.log, keys.publisher(self._name), *batch.rows,
            number, secrets.token_hex(8), self.epoch, self._n, " ".join(self._left), keys.channel, keys.row,
            self._log_batches, batch.packed, self._copies, _REMEMBERED_S, _ROW_MAX_AGE_S,
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
