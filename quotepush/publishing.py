"""``quotepush publish``: one tick by hand, or a stream of them from standard input, with plain ``PUBLISH``."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from quotepush.errors import RedisUnavailable, SettingsError
from quotepush.feed.replay import LineFault, LineSplitter, parse_json_line
from quotepush.quote.code import BadCode, parse_code
from quotepush.settings import without_password

__all__ = ["Tally", "parse_fields", "publish_lines", "publish_one", "run"]

_CODE_PLACE = "{code}"
_TIMEOUT_S = 5.0
_CHUNK_BYTES = 65_536
# Fields whose value is text whatever it looks like; "name=360" is the name 360.
_TEXT_FIELDS = frozenset(("name", "phase", "status"))
# The server derives or decides these and ignores what a tick says of them.
_SERVERS_OWN = frozenset(("seq", "prev", "epoch", "change", "change_pct"))

_CodedTick = tuple[str, dict[str, Any]]


@dataclass(slots=True)
class Tally:
    """What became of ticks.

    Attributes:
        published: taken by Redis.
        heard: how many of them had a subscriber.
        refused: bad lines.
    """

    published: int = 0
    heard: int = 0
    refused: int = 0

    def __str__(self) -> str:
        text = f"{self.published} published, {self.heard} heard by a subscriber"
        return f"{text}, {self.refused} refused" if self.refused else text


def run(code: str | None, fields: Sequence[str], text: str | None, url: str, channel: str) -> int:
    """Publish what the command line says; return the exit status.

    Args:
        code: of the one tick that ``fields`` (``FIELD=VALUE``) make.
        text: instead: one tick as JSON with its ``code``, or ``-`` for one per line of standard input.
        url: of Redis.
        channel: template with ``{code}``; without it all ticks go to one channel.

    Raises:
        SettingsError: a wrong code, field, value, channel or URL.
        RedisUnavailable: Redis does not answer, or refuses us.
    """
    if (text is None) == (code is None):
        raise SettingsError(["publish: give either CODE FIELD=VALUE… or --json"])
    if "*" in channel or channel.count(_CODE_PLACE) > 1 or not channel:
        raise SettingsError([f"--channel: {channel!r} must be one channel, with {_CODE_PLACE} where the code goes"])
    if text == "-":
        with _Link(url) as link:
            return _run_lines(link, channel)
    tick = _tick_of_text(text) if text is not None else _tick_of_fields(code or "", fields)
    with _Link(url) as link:
        name, receivers = publish_one(link, channel, tick)
    hint = "" if receivers else "; does a server run on this Redis?"
    _say(f"{name}: {receivers} subscriber{'' if receivers == 1 else 's'}{hint}")
    return 0


def parse_fields(fields: Iterable[str]) -> dict[str, Any]:
    """Return the tick that ``FIELD=VALUE`` texts make; an empty value is ``null`` and clears the field.

    Raises:
        SettingsError: it is none; each fault has its line.
    """
    tick: dict[str, Any] = {}
    faults: list[str] = []
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals or not name:
            faults.append(f"publish: {field!r} is not FIELD=VALUE")
        elif name == "code" or name in _SERVERS_OWN:
            faults.append(f"publish: {name} cannot be published; the server makes it")
        else:
            tick[name] = _value_of(name, value)
            try:
                parse_json_line(orjson.dumps({"code": "A", name: tick[name]}))
            except orjson.JSONEncodeError:
                faults.append(f"publish: {field!r} is not text in UTF-8")
            except LineFault as e:
                faults.append(f"publish: {field!r}: {e}")
    if faults:
        raise SettingsError(faults)
    if not tick:
        raise SettingsError(["publish: a tick needs at least one FIELD=VALUE"])
    return tick


def publish_one(link: "_Link", channel: str, tick: _CodedTick) -> tuple[str, int]:
    """Publish a tick; return the channel it went to and how many subscribers Redis gave it to."""
    name, _ = _message_of(channel, tick)
    return name, link.publish(channel, [tick])[0]


def publish_lines(link: "_Link", channel: str, chunks: Iterable[bytes], tally: Tally) -> None:
    """Publish ticks from pieces of NDJSON as they come; say each bad line with its number and go on."""
    splitter = LineSplitter()
    number = 0
    for chunk in chunks:
        ticks: list[_CodedTick] = []
        for line in splitter.feed(chunk) if chunk else splitter.end():
            number += 1
            try:
                tick = parse_json_line(line)
            except LineFault as e:
                tally.refused += 1
                _say(f"line {number}: {e}", sys.stderr)
                continue
            if tick is not None:
                ticks.append(tick)
        if ticks:
            receivers = link.publish(channel, ticks)
            tally.published += len(receivers)
            tally.heard += sum(1 for count in receivers if count)


def _run_lines(link: "_Link", channel: str) -> int:
    tally = Tally()
    try:
        publish_lines(link, channel, _standard_input(), tally)
    finally:
        _say(str(tally))
    return 2 if tally.refused else 0


def _standard_input() -> Iterator[bytes]:
    """Yield what comes as soon as it comes, and nothing at all as the last piece."""
    chunk = b"?"
    while chunk:
        chunk = os.read(sys.stdin.fileno(), _CHUNK_BYTES)
        yield chunk


def _tick_of_fields(code: str, fields: Iterable[str]) -> _CodedTick:
    try:
        canonical = parse_code(code)
    except BadCode as e:
        raise SettingsError([f"publish: {code!r}: {e}"]) from None
    return canonical, parse_fields(fields)


def _tick_of_text(text: str) -> _CodedTick:
    try:
        tick = parse_json_line(text.encode())
    except (LineFault, UnicodeEncodeError) as e:
        raise SettingsError([f"--json: {e}"]) from None
    if tick is None:
        raise SettingsError(["--json: it is empty"])
    return tick


def _value_of(name: str, text: str) -> Any:
    if not text:
        return None
    if name in _TEXT_FIELDS:
        return text
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return text


def _message_of(channel: str, tick: _CodedTick) -> tuple[str, bytes]:
    code, fields = tick
    before, place, after = channel.partition(_CODE_PLACE)
    return before + code + after if place else before, orjson.dumps(fields if place else {"code": code, **fields})


class _Link:
    """Redis, for as long as the command runs; what it says is turned into one line."""

    def __init__(self, url: str) -> None:
        self._where = without_password(url)
        try:
            self._redis = redis.Redis.from_url(
                url,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
            )
        except ValueError:  # its text can hold the password
            raise SettingsError(["--redis: not a Redis address; write redis://[:password@]host:port/0"]) from None

    def __enter__(self) -> "_Link":
        return self

    def __exit__(self, *_: object) -> None:
        self._redis.close()

    def publish(self, channel: str, ticks: Iterable[_CodedTick]) -> list[int]:
        """Publish in one round trip; return per tick how many subscribers Redis gave it to."""
        pipeline = self._redis.pipeline(transaction=False)
        for tick in ticks:
            pipeline.publish(*_message_of(channel, tick))
        try:
            return [int(receivers) for receivers in pipeline.execute()]
        except (RedisError, OSError) as e:
            raise RedisUnavailable("feed_redis", self._where, " ".join(str(e).split()).rstrip(".")) from None


def _say(line: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    stream.write(f"{line}\n")
    stream.flush()
