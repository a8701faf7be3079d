"""Waiting for a condition instead of sleeping for luck."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["wait_until"]


async def wait_until(
    predicate: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_s: float = 20.0, what: str = ""
) -> Any:
    """Ask ``predicate`` (plain or async) every few milliseconds; return its first true answer.

    Raises:
        AssertionError: it never was true; the text names ``what`` and the last answer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            wanted = what or getattr(predicate, "__qualname__", repr(predicate))
            raise AssertionError(f"not within {timeout_s:g} s: {wanted}; last answer: {answer!r}")
        await asyncio.sleep(0.01)
