"""The recording that tests replay is what its generator makes."""

import gzip
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from quotepush.feed.replay import CsvLines

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "tests" / "data" / "us-ticks-small.csv.gz"


def make_ticks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_ticks", ROOT / "tools" / "make_ticks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_recording_is_what_its_generator_makes_and_every_line_of_it_is_a_tick():
    generator = make_ticks()
    written = gzip.decompress(RECORDING.read_bytes()).decode().splitlines()

    assert generator.csv_lines(len(written) - 1) == written
    # No time and no name in the file: bytes 4 to 7 of a gzip file are its mtime, bit 3 of byte 3 a name.
    assert RECORDING.read_bytes()[3:8] == bytes(5)
    assert RECORDING.stat().st_size < 60_000
    lines = CsvLines(pytest.fail)
    lines.parse(written[0].encode())
    ticks = [lines.parse(line.encode()) for line in written[1:]]
    assert {one[0] for one in ticks if one} == set(generator.CODES)
    assert len(ticks) >= 2000
