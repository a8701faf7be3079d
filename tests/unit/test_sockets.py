"""Listening sockets, opened and inherited."""

import os
import socket
import subprocess
import sys

import pytest

from quotepush.node.sockets import inherited_sockets, open_sockets

INHERIT = """
import os, socket, sys
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "ours" else "1"
from quotepush.node.sockets import inherited_sockets
found = inherited_sockets()
print([s.getsockname()[1] for s in found], [s.getblocking() or s.get_inheritable() for s in found])
print("LISTEN_FDS" in os.environ or "LISTEN_PID" in os.environ)
"""


def close(*sockets: socket.socket) -> None:
    for s in sockets:
        s.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_port_zero_takes_one_free_port_for_all() -> None:
    sockets = open_sockets("127.0.0.1", 0, 3, 16)
    addresses = {s.getsockname() for s in sockets}
    assert len(sockets) == 3
    assert len(addresses) == 1
    assert addresses.pop()[1] > 0
    assert not any(s.getblocking() for s in sockets)
    assert not any(s.get_inheritable() for s in sockets)
    close(*sockets)


def test_connections_come_in() -> None:
    sockets = open_sockets("127.0.0.1", 0, 2, 16)
    with socket.create_connection(sockets[0].getsockname(), timeout=5) as client:
        accepted = None
        while accepted is None:
            for s in sockets:
                try:
                    accepted, _ = s.accept()
                except BlockingIOError:
                    continue
        accepted.sendall(b"x")
        assert client.recv(1) == b"x"
        accepted.close()
    close(*sockets)


def test_a_port_that_somebody_listens_on_is_refused() -> None:
    for reuse in (False, True):
        with socket.socket() as other:
            if reuse:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            with pytest.raises(OSError):
                open_sockets("127.0.0.1", other.getsockname()[1], 2, 16)


def test_two_servers_cannot_share_a_port() -> None:
    sockets = open_sockets("127.0.0.1", 0, 2, 16)
    with pytest.raises(OSError):
        open_sockets("127.0.0.1", sockets[0].getsockname()[1], 1, 16)
    close(*sockets)


def test_a_port_is_free_again_after_its_sockets_are_closed() -> None:
    sockets = open_sockets("127.0.0.1", 0, 2, 16)
    port = sockets[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    close(*sockets)
    close(*open_sockets("127.0.0.1", port, 2, 16))


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(OSError):
        open_sockets(host, 0, 1, 16)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6_works_and_every_interface_means_both_families() -> None:
    (s,) = open_sockets("::1", 0, 1, 16)
    assert s.family == socket.AF_INET6
    close(s)
    (s,) = open_sockets("::", 0, 1, 16)
    with socket.create_connection(("127.0.0.1", s.getsockname()[1]), timeout=5):
        pass
    close(s)


def test_without_systemd_nothing_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert inherited_sockets() == []


@pytest.mark.parametrize(("count", "pid"), [("", "ours"), ("x", "ours"), ("-1", "ours"), ("1", "1"), ("1", "")])
def test_descriptors_for_somebody_else_are_left_alone(monkeypatch: pytest.MonkeyPatch, count: str, pid: str) -> None:
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid == "ours" else pid)
    assert inherited_sockets() == []
    assert "LISTEN_FDS" not in os.environ and "LISTEN_PID" not in os.environ


@pytest.mark.parametrize(("whose", "expected"), [("ours", True), ("others", False)])
def test_passed_sockets_are_taken_over_by_the_process_they_are_for(whose: str, expected: bool) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        # As systemd passes them: from descriptor 3 on.
        script = f"import os,sys; os.dup2({listening.fileno()}, 3); os.execv(sys.executable, sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", script, sys.executable, "-c", INHERIT, whose],
            pass_fds=(listening.fileno(),),
            env={**os.environ, "LISTEN_FDS": "1"}, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ports, variables = done.stdout.splitlines()
    assert ports == (f"[{port}] [False]" if expected else "[] []")
    assert variables == "False"
