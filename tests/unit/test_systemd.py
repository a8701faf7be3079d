"""The units in systemd/ say what the server relies on, and systemd accepts them."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from quotepush import errors, settings

UNITS = Path(__file__).parents[2] / "systemd"
SERVICE = UNITS / "quotepush.service"
SOCKET = UNITS / "quotepush.socket"

Unit = dict[str, dict[str, list[str]]]


def parse(path: Path) -> Unit:
    """Return section → key → values in file order; systemd allows a key to stand more than once."""
    unit: Unit = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            continue
        key, equals, value = line.partition("=")
        assert equals, f"{path.name}: {line!r} is no assignment"
        unit[section][key].append(value)
    return unit


@pytest.fixture
def service() -> Unit:
    return parse(SERVICE)


def test_service_reports_ready_and_answers_the_watchdog(service: Unit) -> None:
    assert service["Service"]["Type"] == ["notify"]
    assert service["Service"]["NotifyAccess"] == ["main"]
    assert service["Service"]["WatchdogSec"] == ["30"]


def test_service_starts_the_installed_command_with_the_operators_file(service: Unit) -> None:
    assert service["Service"]["ExecStart"] == [
        "/opt/quotepush/venv/bin/quotepush serve --config /etc/quotepush/quotepush.toml"
    ]


def test_service_is_started_again_for_ever_unless_that_cannot_help(service: Unit) -> None:
    hopeless = {errors.SettingsError.exit_code, errors.AlreadyRunning.exit_code, errors.WorkerUnfit.exit_code}

    assert service["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert service["Service"]["Restart"] == ["on-failure"]
    assert set(map(int, service["Service"]["RestartPreventExitStatus"][0].split())) == hopeless
    assert errors.RedisUnavailable.exit_code not in hopeless


def test_stop_leaves_time_to_drain(service: Unit) -> None:
    assert service["Service"]["KillMode"] == ["mixed"]
    assert int(service["Service"]["TimeoutStopSec"][0]) > settings.Settings().drain_timeout_s


def test_lock_file_lies_in_the_runtime_directory_and_stays_there(service: Unit) -> None:
    assert service["Service"]["RuntimeDirectory"] == ["quotepush"]
    assert service["Service"]["RuntimeDirectoryPreserve"] == ["yes"]
    assert "QUOTEPUSH_LOCK_FILE=%t/quotepush/quotepush.lock" in service["Service"]["Environment"]


def test_environment_of_the_unit_names_existing_settings(service: Unit) -> None:
    names = [entry.partition("=")[0] for entry in service["Service"]["Environment"]]

    for name in names:
        if name.startswith(settings.ENV_PREFIX):
            assert name.removeprefix(settings.ENV_PREFIX).lower() in settings.Settings.__dataclass_fields__


def test_service_may_hold_a_million_files_and_keep_state(service: Unit) -> None:
    assert service["Service"]["LimitNOFILE"] == ["1048576"]
    assert service["Service"]["StateDirectory"] == ["quotepush"]


def test_one_killed_worker_does_not_stop_the_others(service: Unit) -> None:
    assert service["Service"]["OOMPolicy"] == ["continue"]


def test_service_may_use_only_the_sockets_it_needs(service: Unit) -> None:
    assert service["Service"]["RestrictAddressFamilies"] == ["AF_INET AF_INET6 AF_UNIX"]
    assert service["Service"]["CapabilityBoundingSet"] == [""]
    assert service["Service"]["NoNewPrivileges"] == ["yes"]


def test_socket_unit_opens_the_default_port_for_the_service() -> None:
    socket = parse(SOCKET)["Socket"]

    assert socket["ListenStream"] == [str(settings.Settings().port)]
    assert socket["Service"] == [SERVICE.name]
    assert socket["Backlog"] == [str(settings.Settings().backlog)]


systemd_analyze = shutil.which("systemd-analyze")
needs_systemd_analyze = pytest.mark.skipif(systemd_analyze is None, reason="systemd-analyze is not on PATH")


def run_systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert systemd_analyze is not None
    return subprocess.run([systemd_analyze, *arguments], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd_analyze
def test_systemd_verifies_both_units(tmp_path: Path) -> None:
    # verify wants the executable of ExecStart to exist; only an installed machine has it.
    stand_in = shutil.which("true")
    assert stand_in is not None
    text = SERVICE.read_text(encoding="utf-8").replace("/opt/quotepush/venv/bin/quotepush", stand_in)
    (tmp_path / SERVICE.name).write_text(text, encoding="utf-8")
    shutil.copy(SOCKET, tmp_path)

    verified = run_systemd_analyze(
        "verify", "--man=no", "--recursive-errors=no", str(tmp_path / SERVICE.name), str(tmp_path / SOCKET.name)
    )

    # A misspelt key may be no more than a warning, so silence about our units counts too.
    complaints = [line for line in verified.stderr.splitlines() if "quotepush" in line]
    assert (verified.returncode, complaints) == (0, []), verified.stderr


@needs_systemd_analyze
def test_exposure_is_two_or_better() -> None:
    rated = run_systemd_analyze("security", "--offline=true", "--no-pager", "--threshold=20", str(SERVICE))

    assert rated.returncode == 0, rated.stdout + rated.stderr
