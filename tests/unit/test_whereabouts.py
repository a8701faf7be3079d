"""Nobody is called dead who may be alive."""

import os
import subprocess
import sys

from quotepush.node.whereabouts import birth_of, here, is_running


def test_this_place_is_the_same_for_two_processes() -> None:
    script = "from quotepush.node.whereabouts import here; print(here())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here()
    assert here().partition("/")[0]


def test_a_process_runs_until_it_has_ended_also_when_nobody_has_looked() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = birth_of(process.pid)
    assert is_running(process.pid, birth)
    assert is_running(process.pid, "")  # we cannot tell
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not is_running(process.pid, birth)
    process.communicate()
    assert not is_running(process.pid, birth)


def test_a_pid_that_somebody_else_has_now_is_no_sign_of_life() -> None:
    assert birth_of(os.getpid()) not in ("", "1")
    assert not is_running(os.getpid(), "1")
    assert is_running(1, birth_of(1))  # also where we may not send it a signal
    assert birth_of(2**22 + 1) == ""
