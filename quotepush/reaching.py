"""How a command of a backend or an operator reaches the servers' Redis, how it answers, and how it ends."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click
import orjson

from quotepush import settings as settings_module
from quotepush.errors import CallRefused, NotOnline, SettingsError

if TYPE_CHECKING:
    from quotepush.backend import Backend

__all__ = ["NOBODY", "reaching", "run", "say", "say_json", "warn"]

# The exit code where nobody was there.
NOBODY = 3

Do = Callable[["Backend"], Awaitable[int]]


def reaching(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where Redis is, and how it answers."""
    for option in (
        click.option("--json", "is_json", is_flag=True, help="Answer in JSON."),
        click.option("--timeout", type=click.FloatRange(0.05, 600), default=3.0, show_default=True, metavar="SECONDS",
                     help="Longest wait for Redis, and then for the nodes."),
        click.option("--config", metavar="FILE", envvar="QUOTEPUSH_CONFIG", help="TOML file with settings."),
        click.option("--prefix", help="The servers' redis_prefix  [default: as for serve]"),
        click.option("--redis", "url", metavar="URL", help="The servers' registry Redis  [default: as for serve]"),
    ):  # fmt: skip
        command = option(command)
    return command


def run(do: Do, *, url: str | None, prefix: str | None, config: str | None, timeout: float) -> None:
    """Carry it out with a backend and end the process with the exit code that it returns."""
    import uvloop

    from quotepush.backend import Backend

    flags = {name: value for name, value in (("registry_redis", url), ("redis_prefix", prefix)) if value is not None}
    found = settings_module.load(config, flags=flags)

    async def call() -> int:
        options: dict[str, Any] = {"timeout_s": timeout, "jobs_max": found.jobs_max}
        async with Backend(found.registry_url, prefix=found.redis_prefix, **options) as backend:
            return await do(backend)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(call())
    except NotOnline as e:
        warn(e.message)
        status = NOBODY
    except CallRefused as e:
        raise SettingsError([e.message]) from None
    sys.exit(status)


def say(line: str) -> None:
    """Print a line of the answer."""
    print(line, flush=True)


def warn(line: str) -> None:
    """Print a line beside the answer."""
    print(f"quotepush: {line}", file=sys.stderr)


def say_json(value: Any) -> None:
    """Print a line of the answer as JSON."""
    say(orjson.dumps(value).decode())
