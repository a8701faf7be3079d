"""``quotepush publish``: one tick by hand, or a stream of them from standard input."""

import asyncio
import sys
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop

from quotepush.errors import SettingsError
from quotepush.feed.publish import CODE_PLACE, LoggedPublisher, PlainPublisher, TickPublisher
from quotepush.feed.replay import CodedTick, LineFault, parse_json_line
from quotepush.feed.sources import piped
from quotepush.quote.code import BadCode, parse_code
from quotepush.quote.tick import SERVERS_OWN

__all__ = ["Tally", "parse_fields", "run"]

_GIVE_UP_S = 5.0  # of one tick; a stream waits for Redis as long as it takes
# Fields whose value is text whatever it looks like; "name=360" is the name 360.
_TEXT_FIELDS = frozenset(("name", "phase", "status"))


@dataclass(slots=True)
class Tally:
    """What became of ticks.

    Attributes:
        published: taken by Redis.
        heard: how many of them had a subscriber; None: they went into the log.
        refused: bad lines.
    """

    published: int = 0
    heard: int | None = None
    refused: int = 0

    def __str__(self) -> str:
        text = f"{self.published} published"
        if self.heard is not None:
            text += f", {self.heard} heard by a subscriber"
        return f"{text}, {self.refused} refused" if self.refused else text


def run(code: str | None, fields: Sequence[str], text: str | None, url: str, prefix: str, channel: str | None) -> int:
    """Publish what the command line says; return the exit status.

    Args:
        code: of the one tick that ``fields`` (``FIELD=VALUE``) make.
        text: instead: one tick as JSON with its ``code``, or ``-`` for one per line of standard input.
        url: of Redis.
        prefix: the server's ``redis_prefix``.
        channel: None: into the log. A template with ``{code}``: plainly on that channel; without ``{code}`` all ticks
            go to one.

    Raises:
        SettingsError: a wrong code, field, value, channel or URL.
        RedisUnavailable: Redis does not answer, or refuses us.
    """
    if (text is None) == (code is None):
        raise SettingsError(["publish: give either CODE FIELD=VALUE… or --json"])
    if channel is not None and ("*" in channel or channel.count(CODE_PLACE) > 1 or not channel):
        raise SettingsError([f"--channel: {channel!r} must be one channel, with {CODE_PLACE} where the code goes"])
    tick: CodedTick | None = None
    if text != "-":
        tick = _tick_of_text(text) if text is not None else _tick_of_fields(code or "", fields)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_publish(tick, url, prefix, channel))


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
        elif name in SERVERS_OWN:
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


async def _publish(tick: CodedTick | None, url: str, prefix: str, channel: str | None) -> int:
    publisher: TickPublisher
    if channel is None:
        give_up_s = _GIVE_UP_S if tick is not None else None
        publisher = LoggedPublisher(url, prefix, waits=True, warn=_warn, give_up_s=give_up_s)
    else:
        publisher = PlainPublisher(url, channel, waits=True, warn=_warn)
    try:
        await publisher.connect()
        if tick is None:
            return await _publish_lines(publisher)
        return await _publish_one(publisher, tick)
    finally:
        await publisher.aclose()


async def _publish_one(publisher: TickPublisher, tick: CodedTick) -> int:
    answers = await publisher.publish([tick])
    if not answers:  # what is wrong with it has been said
        return 2
    if isinstance(publisher, PlainPublisher) and not publisher.counts_hearers:
        _say(f"{publisher.channel_of(tick[0])}: published")
    elif isinstance(publisher, PlainPublisher):
        hint = "" if answers[0] else "; does a server run on this Redis?"
        _say(f"{publisher.channel_of(tick[0])}: {answers[0]} subscriber{'' if answers[0] == 1 else 's'}{hint}")
    else:
        _say(f"{parse_code(tick[0])}: seq {answers[0]}")
    return 0


async def _publish_lines(publisher: TickPublisher) -> int:
    """Publish ticks from lines of standard input as they come; say each bad one with its number and go on."""
    counts_hearers = isinstance(publisher, PlainPublisher) and publisher.counts_hearers
    tally = Tally(heard=0 if counts_hearers else None)

    def reject(number: int, reason: str) -> None:
        tally.refused += 1
        _warn(f"line {number}: {reason}")

    try:
        async with aclosing(piped(sys.stdin.fileno(), reject=reject)) as batches:
            async for ticks in batches:
                answers = await publisher.publish(ticks)
                tally.published += len(answers)
                tally.refused += len(ticks) - len(answers)
                if tally.heard is not None:
                    tally.heard += sum(1 for subscribers in answers if subscribers)
    finally:
        _say(str(tally))
    return 2 if tally.refused else 0


def _tick_of_fields(code: str, fields: Iterable[str]) -> CodedTick:
    try:
        canonical = parse_code(code)
    except BadCode as e:
        raise SettingsError([f"publish: {code!r}: {e}"]) from None
    return canonical, parse_fields(fields)


def _tick_of_text(text: str) -> CodedTick:
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


def _say(line: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    stream.write(f"{line}\n")
    stream.flush()


def _warn(line: str) -> None:
    _say(line, sys.stderr)
