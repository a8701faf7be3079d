"""A wall clock that jumps, for a server of its own: its interpreter loads a module that moves ``time.time``."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["JumpingClock"]

# Loaded by every Python that finds it on its path, before anything else.
_MODULE = """
import os, time

_real, _real_ns, _file = time.time, time.time_ns, os.environ["JUMPING_CLOCK"]

def _offset_s():
    with open(_file) as f:
        return int(f.read())

time.time = lambda: _real() + _offset_s()
time.time_ns = lambda: _real_ns() + _offset_s() * 10**9
"""


class JumpingClock:
    """Its ``environment`` is for the processes that shall go by it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._file = directory / "offset"
        (directory / "sitecustomize.py").write_text(_MODULE)
        self.jump_to(0)
        path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment: Mapping[str, str] = {"PYTHONPATH": path, "JUMPING_CLOCK": str(self._file)}

    def jump_to(self, offset_s: int) -> None:
        """Be ahead of the true time by so much, behind it when negative, from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self._file)
