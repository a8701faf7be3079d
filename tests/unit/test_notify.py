"""What systemd is told, over a real datagram socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from quotepush.node.notify import notify, watchdog_interval_s


@pytest.fixture(autouse=True)
def without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(address)
        s.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield s


def test_facts_are_sent_line_by_line(listening: socket.socket) -> None:
    assert notify(READY="1", STATUS="2 of 2 workers ready")
    assert listening.recv(1000) == b"READY=1\nSTATUS=2 of 2 workers ready"


def test_each_call_is_one_message(listening: socket.socket) -> None:
    notify(WATCHDOG="1")
    notify(STOPPING="1")
    assert (listening.recv(1000), listening.recv(1000)) == (b"WATCHDOG=1", b"STOPPING=1")


def test_an_abstract_address_works(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"quotepush-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(f"\0{name}")
        s.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify(READY="1")
        assert s.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_sent() -> None:
    assert not notify(READY="1")


@pytest.mark.parametrize("address", ["", "relative/path", "/no/such/socket", "vsock:2:1", "@nobody-listens-here"])
def test_a_useless_address_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify(READY="1")


def test_the_watchdog_is_fed_twice_as_often_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 15.0


def test_a_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_interval_s() is None


@pytest.mark.parametrize("usec", ["", "soon", "-5", "1.5"])
def test_a_limit_that_is_no_number_is_none(monkeypatch: pytest.MonkeyPatch, usec: str) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    assert watchdog_interval_s() is None


def test_a_limit_of_zero_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    assert not watchdog_interval_s()
