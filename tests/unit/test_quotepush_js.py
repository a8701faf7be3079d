"""The browser client's own rules, run in Node: the cases are in tests/browser/quotepush.test.mjs."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import quotepush

STATIC = Path(__file__).parents[2] / "quotepush" / "static"
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
    source = (STATIC / "quotepush.js").read_bytes()
    assert len(gzip.compress(source, 9)) <= 6 * 1024 - len(b"quotepush.js\0")  # the program gzip adds the name
    assert re.search(rb"^import ", source, re.MULTILINE) is None


def test_the_package_for_npm_is_the_file_that_the_server_sends_and_has_its_version() -> None:
    package = json.loads((STATIC / "package.json").read_text())
    assert package["version"] == quotepush.__version__
    assert package["exports"]["."] == {"types": "./quotepush.d.ts", "default": "./quotepush.js"}
    assert all((STATIC / name).is_file() for name in package["files"])
    assert "dependencies" not in package


def test_every_method_option_and_event_of_the_browser_client_has_its_type() -> None:
    types = (STATIC / "quotepush.d.ts").read_text()
    source = (STATIC / "quotepush.js").read_text()
    quotes = source[source.index("class Quotes") : source.index("class Link")]
    for name in re.findall(r"^  (?:get )?([a-z]\w+)\(", quotes, re.MULTILINE):
        assert name == "constructor" or re.search(rf"^  (?:readonly )?{name}[<(:]", types, re.MULTILINE), name
    options = re.search(r"new Quotes\(absolute\(url\), \{(.*?)\.\.\.options", source, re.DOTALL)
    assert options is not None
    for name in [
        *re.findall(r"^    (\w+)[:,]", options[1], re.MULTILINE),
        *re.findall(r"\{ (\w+) \} = this\.#env", quotes),
    ]:
        assert re.search(rf"^  {name}\?: ", types, re.MULTILINE), name
    events = types[types.index("export interface Events") : types.index("export interface StateEvent")]
    for name in [
        "state",
        "row",
        "merged",
        "gap",
        *re.findall(r'"(\w+)"', source.split("STREAM_EVENTS = ")[1].split("]")[0]),
    ]:
        assert re.search(rf"^  {name}: ", events, re.MULTILINE), name
