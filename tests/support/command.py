"""The command line as an operator meets it: what it prints where, and its exit status."""

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Outcome", "run_quotepush"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


async def run_quotepush(*arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> Outcome:
    """Run ``quotepush`` to its end.

    Args:
        env: added to the environment, in which no other QUOTEPUSH_ variable is left.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")} | dict(env or {})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quotepush", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        process.kill()
        stdout, stderr = await process.communicate()
        raise AssertionError(f"it did not end within {timeout_s:g} s:\n{stdout.decode()}{stderr.decode()}") from None
    assert process.returncode is not None
    return Outcome(process.returncode, stdout.decode(), stderr.decode())
