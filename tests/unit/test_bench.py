"""The benchmark counts right, ends what it starts and says what is wrong; nothing here asserts a speed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_until

BENCH = Path(__file__).parents[2] / "tools" / "bench.py"
# 20 clients watch 4 of 8 codes each: every tick goes to 10 of them.
SMALL = ("--clients", "20", "--codes", "8", "--per-client", "4", "--rate", "200", "--seconds", "1")
TICKS, AUDIENCE = 200, 10


def node_of(tmp_path: Path) -> str:
    """A name for the server of this test alone; it stands in its processes' titles."""
    return f"bench-{zlib.crc32(str(tmp_path).encode()):08x}"


def start_bench(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the benchmark; everything it starts makes its files below ``tmp_path``."""
    return subprocess.Popen(
        [sys.executable, str(BENCH), f"--set=node={node_of(tmp_path)}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip


def run_bench(tmp_path: Path, *arguments: str) -> "tuple[int, str, str]":
    """Run the benchmark to its end; return its exit status and what it printed."""
    process = start_bench(tmp_path, *arguments)
    try:
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def results_of(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the benchmark with ``--json``; return its results by server."""
    status, stdout, stderr = run_bench(tmp_path, *arguments, "--json")
    assert status == 0, stderr
    return json.loads(stdout)["results"]


def is_started_in(tmp_path: Path, pid: int) -> bool:
    """Say whether a process was started by the benchmark that had ``tmp_path``."""
    process = Path(f"/proc/{pid}")
    try:
        is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        # A process that sets its title may write it over its environment.
        environment = (process / "environ").read_bytes().split(b"\0")
        title = (process / "cmdline").read_bytes()
    except OSError:
        return False
    has_our_files = f"TMPDIR={tmp_path}".encode() in environment
    return not is_zombie and (has_our_files or f"quotepush[{node_of(tmp_path)}]".encode() in title)


def left_over(tmp_path: Path) -> list[int]:
    """The live processes that the benchmark started."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and is_started_in(tmp_path, int(name))]


def test_every_server_delivers_each_tick_to_each_subscriber_and_nothing_keeps_running(tmp_path: Path):
    results = results_of(tmp_path, *SMALL, "--loaders", "2", "--baseline", "aiohttp,websockets")

    assert [one["server"] for one in results] == ["quotepush", "aiohttp", "websockets"]
    for one in results:
        assert one["ticks"] == TICKS
        assert one["rows"] == one["rows_due"] == TICKS * AUDIENCE
        assert one["lost"] == one["closed"] == 0
        assert one["p50_ms"] <= one["p99_ms"] <= one["p999_ms"]
        assert one["cpu_us_row"] > 0 and one["connects_per_s"] >= one["subscribes_per_s"] > 0
    assert left_over(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_bursts_of_uneven_codes_slow_clients_and_a_storm_are_counted_too(tmp_path: Path):
    (result,) = results_of(
        tmp_path, *SMALL, "--seconds", "1.5", "--zipf", "1", "--burst", "20", "--slow", "2", "--storm", "30",
    )  # fmt: skip

    assert result["ticks"] == 1.5 * TICKS
    # The slow ones are left out, and the storm's rows too; which codes tick is left to chance, but the same each time.
    assert 0 < result["rows_due"] <= 1.5 * TICKS * AUDIENCE
    assert result["rows"] == result["rows_due"]
    assert result["storm_s"] > 0


def test_table_names_machine_load_and_servers(tmp_path: Path):
    status, stdout, stderr = run_bench(tmp_path, *SMALL, "--baseline", "websockets", "--seconds", "0.3")

    assert status == 0, stderr
    for word in ("machine", "kernel", "commit", "rows/s", "p99.9 ms", "quotepush x1", "websockets", "/ quotepush"):
        assert word in stdout


async def test_interrupted_it_ends_everything_it_has_started(tmp_path: Path):
    process = start_bench(tmp_path, "--load", "watch", "--seconds", "60")
    try:
        await wait_until(lambda: {"loader.py", "publisher.py", "main", "worker 0"} <= names(tmp_path), 30)
        process.send_signal(signal.SIGINT)
        _, stderr = await asyncio.to_thread(process.communicate, timeout=30)
    finally:
        process.kill()

    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert left_over(tmp_path) == []


def names(tmp_path: Path) -> set[str]:
    """What the live processes of the benchmark are called: the last word of a program's path, or of a title."""
    found = set()
    for pid in left_over(tmp_path):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
        found.add(words.rpartition(": ")[2].rpartition("/")[2])
    return found


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--load", "nonsense"), 2, "'nonsense' is none of watch, busy"),
        (("--baseline", "tornado"), 2, "'tornado' is none of aiohttp, websockets"),
        (("--workers", "0"), 2, "is no list of numbers"),
        (("--clients", "9999999"), 1, "raise the limit with ulimit -n"),
        (("--codes", "5", "--per-client", "6"), 1, "cannot watch 6 of 5 codes"),
        ((*SMALL, "--set", "heartbeat_ms=1"), 1, "heartbeat_ms must be at least 100"),
    ],
)
def test_a_fault_of_the_user_gets_one_line_and_no_traceback(
    tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
):
    code, _, stderr = run_bench(tmp_path, *arguments)

    assert code == status
    assert words in stderr
    assert "Traceback" not in stderr
