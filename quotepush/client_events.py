"""Who listens to which event of the Python client.

Law: a listener that fails is told to the loop like any other bug of its own, and keeps nothing from anybody else.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["EVENTS", "Listeners"]

EVENTS = ("row", "gap", "state", "status", "message", "raw", "error", "heartbeat")


class Listeners:
    """The callbacks of one client, by event."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[[Any], object]]] = {event: [] for event in EVENTS}

    def add(self, event: str, fn: Callable[[Any], object]) -> Callable[[], None]:
        """Call ``fn`` on each ``event``; return what ends that."""
        if event not in self._listeners:
            raise ValueError(f"{event!r} is none of {', '.join(EVENTS)}")
        if inspect.iscoroutinefunction(fn):
            raise TypeError("a callback is a plain function; let it start a task")
        listeners = self._listeners[event]
        listeners.append(fn)

        def remove() -> None:
            if fn in listeners:
                listeners.remove(fn)

        return remove

    def tell(self, event: str, payload: Any) -> None:  # hot
        """Call everybody who listens to ``event``."""
        listeners = self._listeners[event]
        if not listeners:
            return
        for fn in tuple(listeners):
            try:
                fn(payload)
            except Exception as e:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"a listener of {event!r} failed", "exception": e}
                )
