"""What the cluster wants, told to feeds: the first subscriber of a code at once, the last one after a while.

::

    <p>codes                   set      every code with a subscriber anywhere (:mod:`quotepush.cluster.registry`)
    <p>demand                  channel  {"code":…,"demand":true|false,"time":…}
    <p>demanded:{<p>codes}     hash     each code told as wanted, with the time (ms) of its newest first subscriber

Law: whoever hears the channel and reads the set knows what is wanted. Each message is true when it is said: one script
looks into the set, publishes, and notes what it has told, so messages come in the order of what they say, whichever
nodes tell, and none is lost between two steps. Whoever changes the set has it told (:class:`DemandTeller`); what it
did not live to tell, the node whose name is least tells soon, because the set and what was told differ.

Both keys are in one slot of a Redis Cluster, for the whole name of the set is the hash tag of the other.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from quotepush.cluster.commands import ClusterKeys
from quotepush.cluster.presence import records
from quotepush.cluster.sets import RegistryKeys, text
from quotepush.quote.code import BadCode, parse_code

__all__ = ["DemandTeller", "is_code"]

log = logging.getLogger("quotepush.main")

_TROUBLE = (RedisError, RedisClusterException, OSError, TimeoutError)
# Redis does nothing else meanwhile: 2.5 µs a code that is told, 2 µs one that is compared.
_PER_CALL = 200
_PER_PAGE = 500
_AGAIN_S = 1.0
# While it is compared, Redis is busy with that for a twentieth of its time and main for a fiftieth, however many codes
# there are: a round over 100,000 takes 9 s.
_PAGE_REST_S = 0.02
# What waits beyond that is found by comparing.
_MOST_WAITING = 200_000

# Keys: the set, what was told. Arguments: the channel, the time to live (s), the debounce (ms), whether these codes
# have just got their first subscriber, the codes. Returns how many messages went out, and the codes that have got a
# first subscriber since whoever asks has heard of their last: it is too early for those.
_TELL = """
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local time = string.format('%.0f', now_ms)
local said, early = 0, {}
for i = 5, #ARGV do
  local code, word = ARGV[i], nil
  local told_ms = tonumber(redis.call('HGET', KEYS[2], code) or nil)
  if redis.call('SISMEMBER', KEYS[1], code) == 1 then
    if not told_ms or ARGV[4] == '1' then
      redis.call('HSET', KEYS[2], code, time)
      word = 'true'
    end
  elseif told_ms then
    local age_ms = now_ms - told_ms
    if age_ms >= 0 and age_ms < tonumber(ARGV[3]) then
      early[#early + 1] = code
    else
      redis.call('HDEL', KEYS[2], code)
      word = 'false'
    end
  end
  if word then
    redis.call('PUBLISH', ARGV[1], '{"code":"' .. code .. '","demand":' .. word .. ',"time":' .. time .. '}')
    said = said + 1
  end
end
if said > 0 then redis.call('EXPIRE', KEYS[2], ARGV[2]) end
return {said, early}
"""

# Keys as above. Arguments: the time to live (s), which of the keys to go through, its cursor, members a page. Returns
# the next cursor and those of the page that the other key has not.
_COMPARE = """
redis.call('EXPIRE', KEYS[2], ARGV[1])
local of_set = ARGV[2] == 'set'
local page = redis.call(of_set and 'SSCAN' or 'HSCAN', KEYS[of_set and 1 or 2], ARGV[3], 'COUNT', ARGV[4])
local found = {}
for i = 1, #page[2], of_set and 1 or 2 do
  local code = page[2][i]
  local other = of_set and redis.call('HEXISTS', KEYS[2], code) or redis.call('SISMEMBER', KEYS[1], code)
  if other == 0 then found[#found + 1] = code end
end
return {page[1], found}
"""


def is_code(code: str) -> bool:
    """Say whether this is a canonical code; anybody may have put something else into the set."""
    try:
        return parse_code(code) == code
    except BadCode:
        return False


class DemandTeller:
    """Tells what is wanted, as far as this node knows more of it than others.

    Args:
        redis: a client of the registry, whatever it answers with.
        node: the name of this node.
        debounce_s: how long nobody must want a code until that is told.
        ttl_s: what was told is forgotten so long after the last node has renewed it.
        timeout_s: the longest wait for Redis.
        compare_s: how often the set is compared with what was told, by the node whose name is least.

    Attributes:
        told: messages that went out through this node.
    """

    def __init__(
        self,
        redis: Any,
        keys: ClusterKeys,
        node: str,
        *,
        debounce_s: float,
        ttl_s: int,
        timeout_s: float,
        compare_s: float = 10.0,
    ) -> None:
        self._redis = redis
        self._cluster_keys = keys
        registry_keys = RegistryKeys(keys.prefix, node, "")
        self._keys = (registry_keys.codes, registry_keys.demanded)
        self._node = node
        self._debounce_s = debounce_s
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._compare_s = compare_s
        self._first: dict[str, None] = {}  # codes that have just got their first subscriber
        self._later: dict[str, float] = {}  # codes to look at again, and when (loop time); the earliest first
        self._has_news = asyncio.Event()
        self._is_well = True
        self.told = 0

    @property
    def pending(self) -> int:
        """How many codes are still to be told, or to be looked at again."""
        return len(self._first) + len(self._later)

    def came(self, codes: Iterable[str]) -> None:
        """These codes have come into the set."""
        # What waits to be looked at again stays: two workers' words need not come in the order of what they did.
        for code in filter(is_code, codes):
            if len(self._first) < _MOST_WAITING:
                self._first[code] = None
        self._has_news.set()

    def left(self, codes: Iterable[str]) -> None:
        """These codes have left the set."""
        due = asyncio.get_running_loop().time() + self._debounce_s
        for code in filter(is_code, codes):
            self._look_again(code, due)
        self._has_news.set()

    def wanted(self, code: str, is_wanted: bool) -> None:
        """Say of one code that it has come (True) or left (False): what a purge finds (``cluster.nodes.Told``)."""
        (self.came if is_wanted else self.left)([code])

    async def run(self) -> None:
        """Tell and compare until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell(), name="demand")
            group.create_task(self._keep_comparing(), name="demand compared")

    # Telling

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._has_news.clear()
            try:
                while self._first:
                    await self._tell_first(list(islice(self._first, _PER_CALL)))
                while due := self._due(loop.time()):
                    await self._tell_change(due)
            except _TROUBLE as e:
                self._note_trouble(e)
                await asyncio.sleep(_AGAIN_S)
                continue
            # Else for ever: without news and with nothing to look at again there is nothing to do.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next(iter(self._later.values()), None)):
                    await self._has_news.wait()

    async def _tell_first(self, codes: Sequence[str]) -> None:
        for code in codes:
            del self._first[code]
        try:
            await self._say(codes, is_first=True)
        except _TROUBLE:
            self._first.update(dict.fromkeys(codes))
            raise

    async def _tell_change(self, codes: Sequence[str]) -> None:
        for code in codes:
            del self._later[code]
        again = codes
        try:
            again = await self._say(codes, is_first=False)
        finally:
            due = asyncio.get_running_loop().time() + self._debounce_s
            for code in again:
                if code not in self._later:
                    self._look_again(code, due)

    async def _say(self, codes: Sequence[str], *, is_first: bool) -> list[str]:
        """Tell what there is to tell of these codes; return those for which it is too early."""
        said, early = await self._call(
            _TELL, self._cluster_keys.demand, self._ttl_s, round(self._debounce_s * 1000), int(is_first), *codes
        )
        self.told += said
        self._is_well = True
        return [text(code) for code in early]

    def _due(self, now: float) -> list[str]:
        """The next codes whose time has come."""
        return [code for code, due in islice(self._later.items(), _PER_CALL) if due <= now]

    def _look_again(self, code: str, due: float) -> None:
        self._later.pop(code, None)  # whoever comes behind is due later
        if len(self._later) < _MOST_WAITING:
            self._later[code] = due

    # Comparing

    async def _keep_comparing(self) -> None:
        while True:
            try:
                if await self._is_my_turn():
                    await self._compare("set")
                    await self._compare("told")
            except _TROUBLE as e:
                self._note_trouble(e)
            await asyncio.sleep(self._compare_s)

    async def _is_my_turn(self) -> bool:
        async with asyncio.timeout(self._timeout_s):
            live = await records(self._redis, self._cluster_keys)
        return min(live, default=self._node) == self._node

    async def _compare(self, which: str) -> None:
        """Find what one key has and the other has not; if it is still so after the debounce, it is told."""
        cursor = b"0"
        while True:
            cursor, found = await self._call(_COMPARE, self._ttl_s, which, cursor, _PER_PAGE)
            due = asyncio.get_running_loop().time() + self._debounce_s
            for code in filter(is_code, map(text, found)):
                if code not in self._first and code not in self._later:
                    self._look_again(code, due)
            if found:
                self._has_news.set()
            if not int(cursor):
                return
            await asyncio.sleep(_PAGE_REST_S)

    async def _call(self, script: str, *arguments: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await self._redis.eval(script, len(self._keys), *self._keys, *arguments)

    def _note_trouble(self, error: Exception) -> None:
        if self._is_well:
            log.warning("demand is not told: %s", str(error) or type(error).__name__)
        self._is_well = False
