"""Coroutines that live and end together, as in a ``TaskGroup``, but for how that is told.

Invariant: a cancellation is never lost. A ``TaskGroup`` raises what its tasks raised rather than a cancellation that
came in the same turn, so who deals with that and goes on cannot be stopped any more (Python issue 116720; in 3.11
``Task.cancelling()`` does not tell it either).
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["together"]


async def together(*coroutines: Coroutine[Any, Any, None], name: str) -> None:
    """Run coroutines side by side until all have ended or one fails; then the others are cancelled and waited for.

    Args:
        name: of their tasks.

    Raises:
        CancelledError: the caller was cancelled, whatever else has happened.
        Exception: what one of them has raised, as it is; if several have, the first one's of the arguments.
    """
    tasks = [asyncio.create_task(coroutine, name=name) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        faults = [fault for task in tasks if not task.cancelled() and (fault := task.exception()) is not None]
    if faults:
        raise faults[0]
