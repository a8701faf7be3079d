"""The benchmark counts right, ends what it starts and says what is wrong; nothing here asserts a speed."""

import asyncio
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.waiting import wait_until

BENCH = Path(__file__).parents[2] / "tools" / "bench.py"
sys.path.insert(0, str(BENCH.parent))  # the benchmark's package stands beside its program

from bench import asker, own_figures, pauses, plots, report  # noqa: E402
from bench.figures import feed_figures, median_figures, nearest_rank  # noqa: E402
from bench.loads import LOADS  # noqa: E402
from bench.measure import quotepush, with_default_collector  # noqa: E402

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
        stdout, stderr = process.communicate(timeout=110)
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


@pytest.mark.long
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


def test_over_tls_every_row_arrives_too(tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")

    (result,) = results_of(tmp_path, *SMALL, "--tls", "--storm", "10", "--seconds", "1.5")

    assert result["rows"] == result["rows_due"] == 1.5 * TICKS * AUDIENCE
    assert result["closed"] == 0
    assert list(tmp_path.iterdir()) == []


def test_without_openssl_tls_is_refused_in_one_line(tmp_path: Path):
    empty = tmp_path / "nothing"
    empty.mkdir()
    redis = next(found for name in ("redis-server", "valkey-server") if (found := shutil.which(name)))
    (empty / Path(redis).name).symlink_to(redis)
    done = subprocess.run(
        [sys.executable, str(BENCH), *SMALL, "--tls"], check=False, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": str(empty)},
    )  # fmt: skip

    assert done.returncode == 1
    assert "openssl, which makes one, is not on PATH" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_clients_that_subscribe_again_and_again_and_mains_own_figures_stand_in_the_result(tmp_path: Path):
    (result,) = results_of(tmp_path, "--load", "subscribe", "--codes", "60", "--asking", "30", "--rate", "600",
                           "--seconds", "2")  # fmt: skip

    for how in ("1 at a time", "4 at a time"):
        one = result["subscribes"][how]
        assert one["count"] > 0 and one["kib"] > 0
        assert 0 < one["ack_p50_ms"] <= one["ack_p99_ms"]
        assert one["ack_p50_ms"] <= one["snapshot_p50_ms"] <= one["snapshot_p99_ms"]
    assert result["feed"]["taken"] == result["feed"]["sent"] == result["feed"]["due"] == 1200
    assert result["feed"]["missed"] == result["feed"]["links_cut"] == 0


@pytest.mark.long
def test_pauses_of_main_and_workers_are_noted_with_our_thresholds_and_with_pythons(tmp_path: Path):
    ours, pythons = results_of(tmp_path, *SMALL, "--gc")

    assert (ours["server"], pythons["server"]) == ("quotepush", "default gc")
    places = {"main, connecting", "main, ticks", "workers, connecting", "workers, ticks"}
    assert set(ours["gc"]) == set(pythons["gc"]) == places
    count = {one["server"]: sum(phase["count"] for phase in one["gc"].values()) for one in (ours, pythons)}
    assert count["quotepush"] <= count["default gc"]
    assert not any("pauses" in note for note in [*ours["notes"], *pythons["notes"]])


def test_table_names_machine_load_and_servers(tmp_path: Path):
    status, stdout, stderr = run_bench(tmp_path, *SMALL, "--baseline", "websockets", "--seconds", "0.3")

    assert status == 0, stderr
    for word in ("machine", "kernel", "commit", "rows/s", "p99.9 ms", "quotepush x1", "websockets", "/ quotepush"):
        assert word in stdout


async def test_interrupted_it_ends_everything_it_has_started(tmp_path: Path):
    process = start_bench(tmp_path, "--load", "watch", "--seconds", "60")
    try:
        await wait_until(lambda: {"loader.py", "publisher.py", "main", "worker 0"} <= names(tmp_path), 60)
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
        (("--codes", "50", "--asking", "51"), 1, "nobody can subscribe 51 of 50 codes"),
        (("--tls", "--baseline", "aiohttp"), 2, "speak no TLS"),
        (("--plot", "rate", "--load", "watch"), 2, "--plot has loads and servers of its own"),
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


# --- parts that need no server ----------------------------------------------------------------------------------------


def test_askers_take_neighbouring_windows_of_the_codes_and_begin_again_at_the_end():
    codes = ["a", "b", "c", "d", "e"]

    assert [asker.window(codes, 2, turn) for turn in range(4)] == [["a", "b"], ["c", "d"], ["e", "a"], ["b", "c"]]


def test_nearest_rank_is_a_value_that_was_measured():
    times = [float(ms) for ms in range(200, 0, -1)]

    assert nearest_rank(times, 0.5) == 100.0
    assert nearest_rank(times, 0.99) == 198.0
    assert nearest_rank([7.0], 0.99) == 7.0
    assert nearest_rank([], 0.99) == 0.0


def test_figures_of_the_private_listener_are_summed_over_their_labels():
    page = (
        "# HELP quotepush_rows_out_total Rows.\n"
        'quotepush_rows_out_total{worker="0"} 5.0\nquotepush_rows_out_total{worker="1"} 7.0\n'
        "quotepush_feed_lag_seconds 0.25\npython_info 1.0\n"
    )

    assert own_figures.parse(page) == {"rows_out_total": 12.0, "feed_lag_seconds": 0.25}


def sample(time: float, accepted: int, *, lag_s: float = 0.0, links: int = 1) -> dict[str, float]:
    """What main says of its feed at a time."""
    return {
        "time": time, "ticks_accepted_total": accepted, "ticks_refused_total": 0, "feed_links_total": links,
        "feed_lag_seconds": lag_s, "rows_merged_main_total": 0,
    }  # fmt: skip


def test_flood_is_taken_until_the_last_tick_is_there_not_until_nobody_asks_any_more():
    samples = [sample(10.0, 500), sample(11.0, 1000, lag_s=0.2), sample(12.0, 2300), sample(15.0, 2300)]

    figures = feed_figures(samples, sent=1800, due=2000)

    assert figures["taken"] == 1800
    assert figures["taken_per_s"] == 900
    assert figures["most_lag_ms"] == 200
    assert figures["missed"] == figures["links_cut"] == 0


def test_ticks_that_went_with_a_feed_link_are_missed():
    figures = feed_figures([sample(0.0, 0), sample(1.0, 700, links=3), sample(2.0, 700, links=3)], sent=1000, due=1000)

    assert figures["missed"] == 300
    assert figures["links_cut"] == 2


def test_median_is_taken_within_groups_of_figures_too():
    runs = [{"feed": {"taken": taken, "deep": {"ms": -taken}}, "notes": []} for taken in (3, 1, 2)]

    assert median_figures(runs) == {"runs": 3, "feed": {"taken": 2, "deep": {"ms": -2}}, "notes": []}


def test_pauses_count_in_the_phase_in_which_they_ended():
    phases = {"connecting": (0.0, 10.0), "ticks": (20.0, 30.0)}
    main = {"command": ["python", "-m", "quotepush", "serve"], "pauses": [(5.0, 0, 0.001), (15.0, 2, 9.0)]}
    worker = {
        "command": ["python", "-c", "from quotepush.node.worker import main; main()"],
        "pauses": [(21.0, 0, 0.001), (22.0, 2, 0.004)],
    }

    found = pauses.summary([json.dumps(main), json.dumps(worker), json.dumps(worker)], phases)

    assert found["main, connecting"]["count"] == 1
    assert found["main, ticks"]["count"] == 0
    ticks = found["workers, ticks"]
    assert (ticks["count"], ticks["counts"]) == (4, {"0": 2, "1": 0, "2": 2})
    assert ticks["longest_ms"] == pytest.approx(4.0)
    assert ticks["total_ms"] == pytest.approx(10.0)
    assert ticks["share"] == pytest.approx(0.0005)  # of one worker


def test_probe_writes_down_pauses_and_holds_a_process_to_pythons_thresholds(tmp_path: Path):
    environment = pauses.noting_pauses(None, has_defaults=True) | {"BENCH_GC_LEFT": str(tmp_path)}
    program = (
        "import gc, os; gc.freeze(); gc.set_threshold(50_000); gc.collect(); print(gc.get_threshold()); os._exit(3)"
    )

    done = subprocess.run(
        [sys.executable, "-u", "-c", program], check=False, capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip

    assert done.returncode == 3
    assert done.stdout.strip() == str(gc.get_threshold())
    (left,) = tmp_path.glob("gc-*.left")
    noted = json.loads(left.read_text())
    assert noted["command"][-1] == program
    assert 2 in [generation for _, generation, _ in noted["pauses"]]


def test_only_servers_under_gc_get_the_probe():
    plain = quotepush(1, [])
    noting = quotepush(1, [], is_noting_pauses=True)

    assert plain.environment == ()
    assert dict(noting.environment)["PYTHONPATH"].split(":")[0].endswith("gc_probe")
    assert "BENCH_GC_DEFAULTS" not in dict(noting.environment)
    assert "BENCH_GC_DEFAULTS" in dict(with_default_collector(noting).environment)


def test_what_a_load_measures_besides_the_columns_has_a_line_each():
    waits = {
        "count": 200,
        "kib": 551.4,
        "ack_p50_ms": 1.0,
        "ack_p99_ms": 20.0,
        "snapshot_p50_ms": 2,
        "snapshot_p99_ms": 21,
    }
    feed = {"taken_per_s": 150_000.4, "missed": 12, "links_cut": 1, "rows_merged": 3, "most_lag_ms": 700}
    pause = {"count": 3, "counts": {"0": 1, "1": 2, "2": 0}, "longest_ms": 0.5, "total_ms": 1.2, "share": 0.0003}

    lines = report.detail_lines({"subscribes": {"4 at a time": waits}, "feed": feed, "gc": {"main, ticks": pause}})

    assert [line.strip() for line in lines] == [
        "4 at a time: 200 subscribes, ack p50 1.0 ms, p99 20.0 ms; snapshot of 551 KiB read p50 2.0 ms, p99 21.0 ms",
        "main took 150,000 ticks/s and missed 12; feed link cut 1 times, 3 rows merged in main, at most 700 ms behind",
        "gc, main, ticks: 3 pauses (1 young, 2 middle, 0 old), longest 0.50 ms, 1.2 ms in all, 0.03% of the time",
    ]
    assert report.detail_lines({}) == []


@pytest.mark.parametrize("name", plots.SERIES)
def test_every_point_of_a_series_is_a_load_that_can_be_run(name: str):
    series = plots.SERIES[name]

    places = [(point.line, point.x, point.server) for point in series.points]
    assert len(set(places)) == len(places)
    for point in series.points:
        assert 0 < point.load.per_client <= min(1_000, point.load.codes)
        assert point.load.clients <= 10_000


def test_series_over_codes_keeps_ticks_and_rows_and_what_part_each_client_watches():
    loads = [point.load for point in plots.SERIES["codes"].points]

    assert {load.rate for load in loads} == {2_000}
    assert {load.rows_per_s for load in loads} == {50_000}
    assert {load.per_client / load.codes for load in loads} == {0.05}


def test_series_over_clients_keeps_ticks_on_one_line_and_rows_on_the_other():
    points = plots.SERIES["clients"].points

    assert {point.load.rate for point in points if point.line == "1,000 ticks/s"} == {1_000}
    assert {round(point.load.rows_per_s) for point in points if point.line == "50,000 rows/s"} == {50_000}


def test_drawing_is_xml_with_a_line_per_name_and_a_spot_per_point():
    costs = {"a < b": [(100.0, 7.0), (1_000.0, 3.5)], "other": [(100.0, 2.0)]}
    waits = {"a < b": [(100.0, 0.9), (1_000.0, 40.0)], "other": [(100.0, 5.0)]}

    drawing = plots.draw("clients", costs, waits)

    names = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()]
    assert names.count("circle") == 6
    words = [
        element.text for element in ElementTree.fromstring(drawing).iter() if element.text and element.text.strip()
    ]
    assert {"a < b", "other", "clients", "100", "1k"} <= set(words)
    assert all(0 <= float(y) <= 290 for y in re.findall(r'cy="([-\d.]+)"', drawing))


def test_scale_is_logarithmic_only_where_figures_are_far_apart():
    assert not plots.is_wide({"near": [(1, 2.0), (2, 50.0)]})
    assert plots.is_wide({"near": [(1, 2.0)], "far": [(1, 50.1)]})


def test_points_without_a_figure_are_left_out_of_a_drawing():
    points = plots.SERIES["workers"].points[:3]

    assert plots.lines_of(points, [1.5, None, 2.5]) == {"busy": [(1, 1.5), (4, 2.5)]}


@pytest.mark.parametrize(
    ("high", "marks"),
    [(7.1, [0, 2, 4, 6, 8]), (0.42, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (10, [0, 2, 4, 6, 8, 10]), (51, [0, 20, 40, 60])],
)
def test_marks_from_zero_are_round_and_reach_the_highest_value(high: float, marks: list[float]):
    assert plots.marks_from_zero(high) == pytest.approx(marks)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.9, 7.6, [0.5, 1, 2, 5, 10]),
        (3.0, 3.0, [2, 5]),
        (1, 5_000, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]),
    ],
)
def test_marks_of_a_logarithmic_axis_enclose_all_values(low: float, high: float, marks: list[float]):
    assert plots.marks_of_log(low, high) == pytest.approx(marks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (20.0, "20"), (400_000, "400k"), (1_500, "1.5k"), (2e6, "2M")]
)
def test_numbers_at_an_axis_are_short(value: float, text: str):
    assert plots.short(value) == text


def test_loads_that_flood_and_that_subscribe_ask_main_how_it_keeps_up():
    assert {name for name, load in LOADS.items() if load.watches_main} == {"subscribe", "flood", "surge"}
    assert LOADS["surge"].rate == LOADS["flood"].rate == 200_000


@pytest.mark.long
def test_each_format_is_counted_on_the_wire(tmp_path: Path):
    process = subprocess.run(
        [sys.executable, str(BENCH.parent / "bench" / "wire.py"), "0.5"],
        capture_output=True, text=True, timeout=60, env=os.environ | {"TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    _, _, *lines = (line.strip("| ").split(" | ") for line in process.stdout.splitlines())
    snapshots = {line[0]: int(line[1]) for line in lines}
    assert len(snapshots) == 7
    assert snapshots["objects, all fields"] > snapshots["rows, all fields"] > snapshots["rows, three fields"] > 0
    assert snapshots["objects, all fields"] > snapshots["msgpack, objects, all fields"]
    assert all(float(line[5]) > 0 for line in lines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_rows_are_measured_while_jobs_are_due(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, str(BENCH.parent / "bench" / "jobs.py"), "40"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    _, jobs, last_s, *ages_ms, _ = [cell.strip() for cell in ended.stdout.splitlines()[-1].split("|")]
    assert jobs == "40" and 0 < float(last_s) < 60
    assert all(0 < float(age_ms) < 60_000 for age_ms in ages_ms[:2])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_messages_of_backends_are_measured_until_the_last_client_has_them(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, str(BENCH.parent / "bench" / "backend.py"), "20", "10", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|")[1].strip() for line in ended.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.partition("`,")[0].partition("` ")[0].strip("`") for row in rows] == [
        "send_to_user", "send_to_user", "send_to_all", "until nothing of a killed node is in the registry",
    ]  # fmt: skip
    assert "20 connections on 2 nodes: " in ended.stdout and "KiB per user" in ended.stdout
