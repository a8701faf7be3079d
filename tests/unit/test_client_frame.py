"""Rows as a table of pandas, where it is installed."""

import sys

import pytest

from quotepush.client_frame import frame_of

_ROWS = [
    {"prev": 3, "code": "A", "seq": 4, "ts": 9, "last": 1.5, "volume": 100},
    {"code": "600519.SH", "seq": 1, "ts": 8, "epoch": "own", "last": 1688.0, "name": "贵州茅台"},
]


def test_a_frame_has_a_line_per_row_indexed_by_code() -> None:
    pandas = pytest.importorskip("pandas")
    frame = frame_of(_ROWS)
    assert isinstance(frame, pandas.DataFrame)
    assert (list(frame.index), frame.index.name) == (["A", "600519.SH"], "code")
    assert list(frame.columns) == ["seq", "ts", "last", "volume", "name"]
    assert frame.loc["600519.SH", "last"] == 1688.0
    assert pandas.isna(frame.loc["600519.SH", "volume"])


def test_a_frame_of_nothing_is_empty() -> None:
    pytest.importorskip("pandas")
    frame = frame_of([])
    assert (len(frame), frame.index.name, list(frame.columns)) == (0, "code", ["seq", "ts"])


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        frame_of(_ROWS)
