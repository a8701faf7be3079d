"""The browser client's own rules, run in Node: the cases are in tests/browser/quotepush.test.mjs."""

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

CASES = Path(__file__).parents[1] / "browser" / "quotepush.test.mjs"
NODE = shutil.which("node")


def _has_test_runner() -> bool:
    if NODE is None:
        return False
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=False).stdout
    return int(version.strip().lstrip("v").split(".")[0] or 0) >= 20


@pytest.mark.skipif(not _has_test_runner(), reason="needs Node 20 or later; the browser tests cover the main ways")
def test_browser_client_subscribes_reconnects_and_resubscribes_by_its_rules() -> None:
    assert NODE is not None
    run = subprocess.run([NODE, "--test", str(CASES)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_browser_client_is_small_and_needs_nothing_else() -> None:
    source = (Path(__file__).parents[2] / "quotepush" / "static" / "quotepush.js").read_bytes()
    assert len(gzip.compress(source, 9)) < 6 * 1024
    assert b"import " not in source.split(b"*/", 1)[1]
