"""The command line: what it says about wrong words, and what it passes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def quotepush(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QUOTEPUSH_")}
    command = [sys.executable, "-m", "quotepush", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=clean | environment)


def test_help_names_every_command() -> None:
    shown = quotepush("--help").stdout
    for command in ("serve", "demo", "check", "watch", "publish", "settings", "send", "kick", "conns", "stats"):
        assert command in shown


def test_serve_has_a_flag_for_every_setting() -> None:
    from quotepush.cli import cli
    from quotepush.settings import Settings

    assert {option.name for option in cli.commands["serve"].params} == {*Settings.__dataclass_fields__, "config"}


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["serve", "--nonsense"], ["serve", "--port"], ["watch"], ["demo", "--port", "x"], ["check", "more"]],
)
def test_wrong_words_exit_with_2_and_no_traceback(words: list[str]) -> None:
    ended = quotepush(*words)
    assert ended.returncode == 2
    assert ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_names_all_faults_at_once() -> None:
    ended = quotepush("check", "--port", "x", "--node", "a b", QUOTEPUSH_MAX_CODES="0", QUOTEPUSH_PROT="1")
    assert ended.returncode == 2
    faults = ended.stderr.splitlines()
    assert all(fault.startswith("quotepush: ") for fault in faults)
    for word in ("port", "node", "max_codes", "QUOTEPUSH_PROT"):
        assert any(word in fault for fault in faults)


def test_check_never_shows_a_password() -> None:
    ended = quotepush("check", "--redis", "redis://reader:geheim@127.0.0.1:1/0")
    assert ended.returncode == 0
    assert "geheim" not in ended.stdout + ended.stderr


def test_check_says_whether_clients_need_a_token_and_never_shows_the_key() -> None:
    ended = quotepush("check", QUOTEPUSH_TOKEN_KEY="geheim" * 6)
    assert ended.returncode == 0
    assert "every client needs a token" in ended.stdout
    assert "everybody may subscribe" in quotepush("check").stdout
    wrong = quotepush("check", QUOTEPUSH_TOKEN_KEY="geheim")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "geheim" not in ended.stdout + ended.stderr + wrong.stdout + wrong.stderr


def test_check_says_that_a_configuration_is_right(tmp_path: Path) -> None:
    file = tmp_path / "quotepush.toml"
    file.write_text('node = "here"\nworkers = 3\n')
    ended = quotepush("check", "--config", str(file))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "node here, 3 workers" in ended.stdout


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "quotepush.toml"
    file.write_text('node = "there"\n')
    assert "node there" in quotepush("check", QUOTEPUSH_CONFIG=str(file)).stdout


def test_serve_with_a_file_that_is_not_there_is_one_line() -> None:
    ended = quotepush("serve", "--config", "/nowhere/quotepush.toml")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "/nowhere/quotepush.toml" in ended.stderr
