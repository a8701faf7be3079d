"""One main per lock file, whoever dies and however."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quotepush.errors import AlreadyRunning, LockError
from quotepush.node.lock import Holder, hold, read_holder

HOLD = """
import sys
from quotepush.node.lock import hold
with hold(sys.argv[1]) as lock:
    lock.write("127.0.0.1:8009")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "quotepush-test.lock")


def start_holder(path: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate(timeout=20)


def test_the_file_says_who_holds_the_lock(path: str) -> None:
    with hold(path) as lock:
        assert read_holder(path) == Holder(os.getpid(), "")
        lock.write("127.0.0.1:18009")
        assert read_holder(path) == Holder(os.getpid(), "127.0.0.1:18009")
        lock.write("[::1]:9")
        assert Path(path).read_text() == f"{os.getpid()}\n[::1]:9\n"


def test_a_second_holder_is_told_who_the_first_one_is(path: str) -> None:
    process = start_holder(path)
    with pytest.raises(AlreadyRunning) as found, hold(path):
        pass
    assert (found.value.pid, found.value.path, found.value.exit_code) == (process.pid, path, 3)
    assert str(found.value).startswith("Process already exist")
    assert str(process.pid) in str(found.value) and path in str(found.value)
    # ... and has disturbed nothing.
    assert read_holder(path) == Holder(process.pid, "127.0.0.1:8009")
    end(process)


def test_two_holders_in_one_process_exclude_each_other_too(path: str) -> None:
    with hold(path), pytest.raises(AlreadyRunning) as found, hold(path):
        pass
    assert found.value.pid == os.getpid()


def test_a_lock_is_free_after_its_holder_has_ended(path: str) -> None:
    end(start_holder(path))
    with hold(path):
        assert read_holder(path).pid == os.getpid()


def test_a_lock_is_free_after_its_holder_was_killed(path: str) -> None:
    process = start_holder(path)
    process.kill()
    end(process)
    assert read_holder(path).pid == process.pid  # it could not tidy up
    with hold(path):
        assert read_holder(path) == Holder(os.getpid(), "")


def test_the_file_is_emptied_and_never_unlinked(path: str) -> None:
    with hold(path):
        number = os.stat(path).st_ino
    assert os.stat(path).st_ino == number
    assert read_holder(path) == Holder(0, "")


def test_the_file_is_emptied_when_the_holder_fails(path: str) -> None:
    with pytest.raises(RuntimeError), hold(path):
        raise RuntimeError("cannot go on")
    assert read_holder(path) == Holder(0, "")
    with hold(path):
        pass


def test_a_process_that_the_holder_has_started_does_not_hold_the_lock(path: str) -> None:
    program = [sys.executable, "-c", "print('runs', flush=True); input()"]
    with hold(path):
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    try:
        # The kernel closes what is close-on-exec a moment after the parent goes on.
        assert child.stdout is not None and child.stdout.readline() == b"runs\n"
        with hold(path):
            pass
    finally:
        child.communicate(b"\n", timeout=20)


def test_a_link_is_not_followed(tmp_path: Path, path: str) -> None:
    target = tmp_path / "precious"
    target.write_text("precious words")
    os.symlink(target, path)
    with pytest.raises(LockError) as found, hold(path):
        pass
    assert target.read_text() == "precious words"
    assert path in str(found.value)


def test_a_file_that_cannot_be_made_is_an_error_of_its_own(tmp_path: Path) -> None:
    for path in (str(tmp_path / "missing" / "lock"), str(tmp_path)):
        with pytest.raises(LockError) as found, hold(path):
            pass
        assert found.value.exit_code == 1
        assert path in str(found.value)
        assert "--lock-file" in str(found.value)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "holder"),
    [
        (b"", Holder(0, "")), (b"\n", Holder(0, "")), (b"123", Holder(123, "")), (b"123\n", Holder(123, "")),
        (b"123\n127.0.0.1:8009\n", Holder(123, "127.0.0.1:8009")), (b"nonsense\nx", Holder(0, "x")),
        (b"-5\n", Holder(0, "")), (b"\xff\xfe\n", Holder(0, "")),
    ],
)  # fmt: skip
def test_a_file_of_any_content_can_be_read(path: str, content: bytes, holder: Holder) -> None:
    Path(path).write_bytes(content)
    assert read_holder(path) == holder


def test_a_file_that_is_not_there_names_nobody(path: str) -> None:
    assert read_holder(path) == Holder(0, "")


def test_what_an_old_holder_has_left_is_overwritten_whole(path: str) -> None:
    Path(path).write_text("9" * 300)
    with hold(path):
        assert read_holder(path) == Holder(os.getpid(), "")
