"""``quotepush token``: what is made is taken, what a server would say is said, and keys are nobody else's to read."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quotepush import tokens
from quotepush.cli import cli
from quotepush.errors import SettingsError
from quotepush.settings import load
from tests.support.tokens import KEY, KeyPair, token

ALGORITHMS = ["EdDSA", "ES256", "RS256", "HS256"]


def run(*arguments: object, stdin: str = "", **env: str | None) -> Result:
    return CliRunner().invoke(cli, ["token", *map(str, arguments)], input=stdin, env=env)


def fault(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, SettingsError), result.output
    return str(result.exception)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_made_with_a_new_key_is_taken_by_a_server_that_has_its_public_half(
    algorithm: str, tmp_path: Path
) -> None:
    key = tmp_path / "k"
    assert run("keygen", "--alg", algorithm, "--out", key).exit_code == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = key if algorithm == "HS256" else tmp_path / "k.pub"
    made = run(
        "make", "--sub", "ann", "--codes", "*.SH, aapl", "--max-rate", 2, "--max-codes", 5, "--max-conns", 1,
        "--conns-win", "oldest", "--groups", "a,b", "--claim", 'may_send={"all":true}', "--claim", "level=gold",
        "--key-file", key, "--kid", "k1", "--ttl", "30m",
    )  # fmt: skip
    checked = run("check", "-", "--token-key-file", public, stdin=made.output)
    assert (checked.exit_code, made.exit_code) == (0, 0), checked.output
    said = json.loads(checked.output)
    assert said.pop("expires_ms") % 1000 == 0
    assert said == {
        "taken": True, "user": "ann", "codes": ["*.SH", "AAPL"], "delay_s": 0, "max_rate": 2.0, "max_codes": 5,
        "max_conns": 1, "conns_win": "oldest", "groups": ["a", "b"],
        "may_send": {"users": [], "groups": [], "all": True}, "claims": {"level": "gold"},
    }  # fmt: skip


def test_no_key_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("precious")
    assert "is there already" in fault("keygen", "--out", tmp_path / "k")
    assert (tmp_path / "k").read_text() == "precious"
    assert "cannot be written" in fault("keygen", "--out", tmp_path / "no" / "k")


def test_without_a_key_file_the_servers_own_secret_signs() -> None:
    made = run("make", "--sub", "ann", "--ttl", "never", QUOTEPUSH_TOKEN_KEY=KEY)
    checked = run("check", QUOTEPUSH_TOKEN_KEY=KEY, QUOTEPUSH_TOKEN=made.output.strip())
    assert (checked.exit_code, json.loads(checked.output)["expires_ms"]) == (0, None)
    assert "--key-file" in fault("make", "--sub", "ann")


def test_what_a_server_would_refuse_is_refused_with_its_reason_and_shown() -> None:
    for text, reason in (
        (token(sub="ann", exp=1), "expired"),
        (token("x" * 32, sub="ann"), "signature"),
        (token(sub="ann", delay_s=901), "delay_s"),
        (token(sub="ann", codes="*"), "codes"),
        (token(sub="ann", aud="x"), "aud"),
    ):
        checked = run("check", "-", stdin=f"{text}\n", QUOTEPUSH_TOKEN_KEY=KEY)
        said = json.loads(checked.output)
        assert (checked.exit_code, said["taken"], said["error"]) == (1, False, "auth_failed")
        assert reason in said["message"] and said["claims_unverified"]["sub"] == "ann"
        assert KEY not in checked.output and text.split(".")[2] not in checked.output


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "a.é.c", "..", "x" * 9000, "a.bnVsbA.c"])
def test_garbage_is_refused_without_a_traceback(text: str) -> None:
    checked = run("check", "-", stdin=text, QUOTEPUSH_TOKEN_KEY=KEY)
    assert (checked.exit_code, json.loads(checked.output)["claims_unverified"]) == (1, None)


def test_a_configuration_without_keys_cannot_check() -> None:
    assert "no key" in fault("check", "x")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-rate", 0), ("--max-codes", 0), ("--conns-win", "x"), ("--codes", "a b"), ("--delay-s", 7), ("--ttl", "1w"),
     ("--ttl", "0"), ("--claim", "x"), ("--claim", "may_send=1"), ("--key-file", "/no/such/file")],
)  # fmt: skip
def test_no_token_is_made_that_no_server_would_take(option: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "k").write_text(KEY)
    assert fault("make", "--sub", "ann", "--key-file", tmp_path / "k", option, value)


def test_a_token_that_is_too_large_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "k").write_text(KEY)
    assert "8192" in fault("make", "--sub", "x" * 9000, "--key-file", tmp_path / "k")


def test_what_cannot_sign_is_a_fault_that_does_not_repeat_it(tmp_path: Path) -> None:
    pair = KeyPair("ES256")
    broken = pair.private_pem.replace("M", "N")
    for text in ("short", pair.public_pem, broken, ""):
        (tmp_path / "k").write_text(text)
        message = fault("make", "--key-file", tmp_path / "k")
        assert "--key-file" in message and (not text or text.strip() not in message)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800)])
def test_a_time_to_live_is_said_in_words(text: str, seconds: Any) -> None:
    assert tokens.seconds_of(text) == seconds
    assert tokens.seconds_of("never") is None


def test_check_fetches_the_key_set_of_the_configuration() -> None:
    with pytest.raises(SettingsError, match="cannot be fetched"):
        tokens.check("x", load(env={}, flags={"token_jwks_url": "http://127.0.0.1:1/"}))
