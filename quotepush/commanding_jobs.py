"""The commands about messages that are sent later: ``jobs``, and the times that ``send`` takes."""

import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import orjson

from quotepush.errors import SettingsError
from quotepush.reaching import NOBODY, reaching, run, say, say_json, warn

if TYPE_CHECKING:
    from quotepush.backend import Backend, Job

__all__ = ["job_options", "jobs", "say_job"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHOWN_CHARACTERS = 60


def job_options(at: str | None, every: str | None, until: str | None, count: int | None) -> dict[str, Any]:
    """Return the options of a send that the words of the command line stand for.

    Raises:
        SettingsError: one of them stands for nothing.
    """
    options = {
        "at": None if at is None else _moment("--at", at),
        "every": None if every is None else _span("--every", every),
        "until": None if until is None else _moment("--until", until),
        "count": count,
    }
    if isinstance(options["until"], timedelta):
        raise SettingsError(["--until: say it as a date and time"])
    return options


def say_job(job: "Job", *, is_json: bool) -> None:
    """Print a job as a line."""
    if is_json:
        say_json(job)
        return
    ((kind, names),) = job.to.items()
    to = "all" if kind == "all" else f"{kind.removesuffix('s')} {','.join(names) if isinstance(names, list) else names}"
    shown = job.data if isinstance(job.data, str) else orjson.dumps(job.data).decode()
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[: _SHOWN_CHARACTERS - 1] + "…"
    again = "" if job.every is None else f"  every {job.every:g} s"
    left = "" if job.left is None else f"  {job.left} left"
    until = "" if job.until is None else f"  until {_shown(job.until)}"
    say(f"{job.id}  {_shown(job.at)}{again}{left}{until}  {_printable(to)}  {_printable(shown)}")


@click.group(invoke_without_command=True)
@reaching
@click.pass_context
def jobs(context: click.Context, /, is_json: bool, **where: Any) -> None:
    """List the messages that are to be sent later, the next ones first; or cancel some.

    "quotepush send --at … --every …" makes them.

    Exit codes: 0 done; 1 Redis does not answer in time; 2 something is wrong with the call; 3 there was none of those
    to cancel.
    """
    if context.invoked_subcommand is not None:
        return

    async def do(backend: "Backend") -> int:
        for job in sorted(await backend.jobs(), key=lambda job: (job.at, job.id)):
            say_job(job, is_json=is_json)
        return 0

    run(do, **where)


@jobs.command("cancel")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@reaching
def cancel(ids: tuple[str, ...], is_json: bool, **where: Any) -> None:
    """Forget messages that are to be sent later, by their ids."""

    async def do(backend: "Backend") -> int:
        cancelled = 0
        for job in ids:
            is_cancelled = await backend.cancel_job(job)
            cancelled += is_cancelled
            if is_json:
                say_json({"job": job, "cancelled": is_cancelled})
            elif is_cancelled:
                say(f"{job} is cancelled")
            else:
                warn(f"there is no job {job!r}")
        return 0 if cancelled else NOBODY

    run(do, **where)


def _moment(flag: str, text: str) -> datetime | timedelta:
    if text.startswith("+"):
        return _span(flag, text[1:])
    try:
        return datetime.fromisoformat(text).astimezone()  # without a zone it is this machine's
    except (ValueError, OverflowError):
        raise SettingsError([f"{flag}: {text!r} must be like 2026-07-25T09:30+08:00, or +30m from now"]) from None


def _span(flag: str, text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if match is None:
        raise SettingsError([f"{flag}: {text!r} must be like 90s, 30m, 1h or 7d"])
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _shown(at_ms: int) -> str:
    """A time as it is on the clocks of this machine."""
    return datetime.fromtimestamp(at_ms / 1000).astimezone().isoformat(" ", "seconds")


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
