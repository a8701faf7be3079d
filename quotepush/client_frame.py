"""Rows as a table of pandas, which is no dependency: whoever asks for one has it.

Law: importing this module imports nothing.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from quotepush.client_messages import Row

__all__ = ["frame_of"]

# They say how a row travelled, not what it says; and only some rows have them.
_OF_THE_WIRE = ("prev", "epoch")


def frame_of(rows: Iterable[Row]) -> Any:
    """Return a ``pandas.DataFrame`` with a line per row, indexed by ``code``; what a row does not have is missing.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as e:
        raise ImportError("frame() needs pandas, which is not installed: pip install pandas", name="pandas") from e
    bare = [{name: value for name, value in row.items() if name not in _OF_THE_WIRE} for row in rows]
    columns = None if bare else ["code", "seq", "ts"]
    return pandas.DataFrame(bare, columns=columns).set_index("code")
