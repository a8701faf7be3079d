"""Notes every pause for Python's garbage collector in the process that imports it, and writes them down at its end.

Python imports a module of this name by itself when it starts. ``bench.py --gc`` puts this directory into the
``PYTHONPATH`` of the server, so main and its workers are measured without knowing of it.

``BENCH_GC_LEFT`` is the directory to write to. With ``BENCH_GC_DEFAULTS`` the process is held to Python's own
thresholds: what it asks of the collector at its start is not done.
"""

import atexit
import functools
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_pauses: list[tuple[float, int, float]] = []  # end (epoch seconds), generation, seconds
_began = 0.0


def _note(phase: str, facts: dict[str, Any]) -> None:
    global _began
    if phase == "start":
        _began = time.perf_counter()
    else:
        _pauses.append((time.time(), facts["generation"], time.perf_counter() - _began))


def _write(directory: str) -> None:
    if _note not in gc.callbacks:
        return  # written already
    gc.callbacks.remove(_note)
    text = json.dumps({"command": sys.orig_argv, "pauses": _pauses})
    Path(directory, f"gc-{os.getpid()}.left").write_text(text)


def _leave(directory: str, leave: Any, status: int) -> None:
    _write(directory)
    leave(status)


if directory := os.environ.get("BENCH_GC_LEFT"):
    gc.callbacks.append(_note)
    atexit.register(_write, directory)
    os._exit = functools.partial(_leave, directory, os._exit)  # as workers end, without what is registered atexit
    if os.environ.get("BENCH_GC_DEFAULTS"):
        gc.freeze = lambda: None
        gc.set_threshold = lambda *numbers: None
