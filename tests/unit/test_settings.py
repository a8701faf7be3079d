"""Settings: three sources, all faults at once, and no password anywhere."""

import dataclasses
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quotepush import settings as settings_module
from quotepush.entitlement import UNLIMITED, Codes, Entitlement
from quotepush.errors import SettingsError
from quotepush.settings import Settings, default_node, example_toml, load, markdown
from quotepush.store.address import without_password
from tests.support.tokens import KeyPair

SECRET = "s3cret-w0rds"


def faults(file: str | None = None, env: dict[str, str] | None = None, **flags: Any) -> list[str]:
    with pytest.raises(SettingsError) as found:
        load(file, env or {}, flags)
    assert found.value.exit_code == 2
    assert all("\n" not in fault for fault in found.value.faults)
    assert str(found.value) == "\n".join(found.value.faults)
    return found.value.faults


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "quotepush.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Where values come from


def test_without_any_source_every_setting_has_its_default() -> None:
    found = load(env={})
    assert (found.host, found.port, found.admin_host, found.admin_port) == ("127.0.0.1", 8008, "127.0.0.1", 8009)
    assert found.feed_redis == "redis://127.0.0.1:6379/0"
    assert found.registry_url == found.feed_redis
    assert found.feed_channels == ["quote.{code}"]
    assert found.trading_day_zones["SH"] == "Asia/Shanghai"
    assert (found.node, found.ws_url_path) == (default_node(), "/ws")
    assert found.worker_count >= 1


def test_the_environment_wins_over_the_file_and_flags_win_over_both(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 1001\nnode = "file"\nbacklog = 1\n')
    env = {"QUOTEPUSH_PORT": "1002", "QUOTEPUSH_NODE": "env"}
    found = load(file, env, {"port": 1003, "host": None})
    assert (found.port, found.node, found.backlog, found.host) == (1003, "env", 1, "127.0.0.1")
    found = load(file, env)
    assert (found.port, found.node, found.backlog) == (1002, "env", 1)
    found = load(file, {})
    assert (found.port, found.node) == (1001, "file")


def test_a_value_of_a_weaker_source_is_checked_even_when_it_does_not_count(tmp_path: Path) -> None:
    assert faults(write(tmp_path, 'port = "x"'), {}, port=5)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("QUOTEPUSH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("QUOTEPUSH_PORT", "4321")
    monkeypatch.setenv("QUOTEPUSH_CONFIG", "read by the command line")
    monkeypatch.setenv("QUOTEPUSH_TOKEN", "what watch shows to a server")
    assert load().port == 4321


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0), ("redis_timeout_s", "1", 1.0), ("redis_timeout_s", "0.5", 0.5), ("drop_older", "yes", True),
        ("drop_older", "TRUE", True), ("drop_older", "1", True), ("drop_older", "on", True),
        ("drop_older", "off", False),
        ("drop_older", "0", False), ("workers", "auto", 0), ("workers", "3", 3),
        ("allowed_origins", "https://a.test, https://b.test", ["https://a.test", "https://b.test"]),
        ("allowed_origins", "*", ["*"]), ("allowed_origins", "", []),
        ("trading_day_zones", "SH=Asia/Shanghai,HK=Asia/Hong_Kong", {"SH": "Asia/Shanghai", "HK": "Asia/Hong_Kong"}),
        ("trading_day_zones", "=America/New_York", {"": "America/New_York"}), ("trading_day_zones", "", {}),
        ("feed_channels", "quote.{code}, pub.*.{code},*", ["quote.{code}", "pub.*.{code}", "*"]),
    ],
)  # fmt: skip
def test_a_text_becomes_a_value_of_the_settings_kind(name: str, text: str, value: Any) -> None:
    assert getattr(load(env={f"QUOTEPUSH_{name.upper()}": text}), name) == value
    assert getattr(load(env={}, flags={name: text}), name) == value


def test_a_file_says_values_in_toml(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'allowed_origins = ["*"]\ndrop_older = true\nredis_timeout_s = 2\nworkers = "auto"\n'
        '[trading_day_zones]\n"" = "America/New_York"\n',
    )
    found = load(file, {})
    assert (found.allowed_origins, found.drop_older, found.workers) == (["*"], True, 0)
    assert (found.redis_timeout_s, type(found.redis_timeout_s)) == (2.0, float)
    assert found.trading_day_zones == {"": "America/New_York"}


def test_settings_cannot_be_changed_and_defaults_are_not_shared() -> None:
    first, second = load(env={}), load(env={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.port = 1  # type: ignore[misc]
    first.allowed_origins.append("*")
    assert second.allowed_origins == []


# Faults


def test_all_faults_of_all_sources_are_named_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, 'porrt = 5\nbacklog = "many"\nhost = 7\n')
    env = {"QUOTEPUSH_WORKRES": "2", "QUOTEPUSH_DROP_OLDER": "perhaps", "OTHER_PORT": "x"}
    found = faults(
        file, env, node="no good", port=70_000, feed_redis="http://h", tls_cert="/no/such/file", log_level="loud",
        max_codes=0, feed_channels=["{code}.{code}"], trading_day_zones={"SH": "Mars/Olympus"}, ws_path="ws",
        max_tick_bytes=2_000_000, admin_host="0.0.0.0",
    )  # fmt: skip
    for words in (
        "porrt", "backlog must be a whole number", "host must be a text", "QUOTEPUSH_WORKRES",
        "drop_older must be true or false", "node must be", "port must be at most 65535", "feed_redis",
        "tls_cert and tls_key", "/no/such/file", "log_level", "max_codes must be at least 1", "{code} more than once",
        "Mars/Olympus", "ws_path", "max_tick_bytes", "admin_host",
    ):  # fmt: skip
        assert any(words in fault for fault in found), words


@pytest.mark.parametrize(
    ("name", "near"), [("porrt", "port"), ("feed_redi", "feed_redis"), ("max_connection", "max_connections")]
)
def test_a_name_that_is_nearly_right_is_pointed_out(tmp_path: Path, name: str, near: str) -> None:
    assert f"did you mean {near}?" in faults(write(tmp_path, f"{name} = 1"))[0]
    assert f"did you mean {near}?" in faults(env={f"QUOTEPUSH_{name.upper()}": "1"})[0]
    assert f"did you mean {near}?" in faults(**{name: 1})[0]


def test_a_name_that_is_nothing_like_a_setting_gets_no_guess(tmp_path: Path) -> None:
    (fault,) = faults(write(tmp_path, "zzzzqqq = 1"))
    assert "did you mean" not in fault


@pytest.mark.parametrize("text", ["port = ", "= 5", "port 5", "[", "\x00"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    (fault,) = faults(file)
    assert file in fault and "TOML" in fault


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for file in (str(tmp_path / "missing.toml"), str(tmp_path)):
        (fault,) = faults(file)
        assert file in fault and "cannot be read" in fault
    path = tmp_path / "latin.toml"
    path.write_bytes(b'node = "\xff"')
    assert "TOML" in faults(str(path))[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1), ("port", 65_536), ("port", True), ("port", 1.5), ("port", "x"), ("port", ""), ("port", [1]),
        ("drop_older", 1), ("drop_older", "maybe"), ("host", 5), ("allowed_origins", [5]),
        ("allowed_origins", {"a": 1}),
        ("trading_day_zones", {"SH": 8}), ("trading_day_zones", "SH"), ("trading_day_zones", ["SH"]),
        ("requests_per_s", 0),
        ("requests_per_s", float("nan")), ("requests_per_s", float("inf")), ("requests_per_s", "inf"),
        ("stall_timeout_s", "nan"), ("max_flush_delay_ms", float("inf")), ("drain_timeout_s", "inf"),
        ("node", "a b"), ("node", "x" * 33), ("node", "ünode"), ("base_path", "/"), ("base_path", "quotes"),
        ("base_path", "/quotes/"), ("base_path", "/a b"), ("ws_path", ""), ("ws_path", "/"), ("ws_path", "/ws?x"),
        ("log_level", "INFO"), ("log_level", ""), ("tls_cert", "x"), ("symbol_file", "/no/such"), ("feed_channels", []),
        ("feed_channels", [""]), ("feed_channels", ["a b"]), ("feed_channels", ["a[b]"]), ("feed_channels", ["a?"]),
        ("feed_channels", ["{codes}"]), ("feed_channels", ["{code}{code}"]), ("feed_channels", ["a\\*"]),
        ("feed_redis", "nonsense"), ("feed_redis", "http://h"), ("feed_redis", "redis://"), ("feed_redis", "redis://h:x"),
        ("feed_redis", "redis://[::1"), ("registry_redis", "redis://h:99999"), ("admin_host", "0.0.0.0"),
        ("admin_host", "example.com"), ("admin_host", ""), ("max_tick_bytes", 1_048_577), ("max_row_bytes", 10),
        ("feed_redis_password_file", "/no/such"), ("trading_day_zones", {"SH": ""}),
        ("trading_day_zones", {"SH": "../x"}), ("trusted_proxies", ["proxy.example"]), ("trusted_proxies", [""]),
        ("trusted_proxies", ["10.0.0.1/8"]), ("trusted_proxies", ["10.0.0.0/33"]), ("proxy_header", "x-real-ip"),
        ("proxy_header", ""), ("max_connections_per_ip", -1), ("connects_per_ip_s", -0.1), ("request_timeout_s", 0),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    found = faults(**{name: value})
    assert any(name in fault for fault in found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0), ("port", 65_535),
        ("node", "A-9"), ("base_path", ""), ("base_path", "/a/b.c~d_e-f"), ("ws_path", "/x"),
        ("feed_redis", "rediss://user:pw@h:1/2"), ("feed_redis", "unix:///run/redis.sock"), ("feed_redis", "redis://[::1]:6379"),
        ("admin_host", "localhost"), ("admin_host", "::1"), ("admin_host", "127.8.9.1"), ("feed_channels", ["*"]),
        ("feed_channels", ["pub.*.{code}"]), ("drain_timeout_s", 0), ("max_flush_delay_ms", 0),
        ("trading_day_zones", {}), ("trusted_proxies", ["127.0.0.1", "10.0.0.0/8", "2001:db8::/32", "::ffff:10.0.0.1"]),
        ("proxy_header", "forwarded"), ("connects_per_ip_s", 0.5), ("questions_per_ip_s", 0),
    ],
)  # fmt: skip
def test_a_right_value_is_taken(name: str, value: Any) -> None:
    assert getattr(load(env={}, flags={name: value}), name) == value


def test_two_listeners_need_two_ports() -> None:
    assert "private listener" in faults(port=9000, admin_port=9000)[0]
    load(env={}, flags={"port": 9000, "admin_port": 9000, "admin_host": "127.0.0.2"})
    load(env={}, flags={"port": 0, "admin_port": 0})


# This machine


def test_the_lock_lies_in_the_runtime_directory_and_is_named_after_the_node(tmp_path: Path) -> None:
    found = load(env={"XDG_RUNTIME_DIR": "/run/user/7"}, flags={"node": "n1"})
    assert found.lock_file == "/run/user/7/quotepush-n1.lock"
    assert load(env={}, flags={"node": "n1"}).lock_file.endswith("/quotepush-n1.lock")
    assert load(env={}, flags={"lock_file": "/x/y"}).lock_file == "/x/y"


def test_the_name_of_the_host_becomes_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, node in (
        ("quotes-1.example.com", "quotes-1"), ("my_host", "my-host"), ("größe", "gr-e"), ("___", "node"), ("", "node"),
        ("x" * 50, "x" * 32),
    ):  # fmt: skip
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert default_node() == node
        assert load(env={}).node == node


# Passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user@h", "redis://user@h"),
        (f"redis://:{SECRET}@h:6379/0", "redis://:***@h:6379/0"),
        (f"redis://user:{SECRET}@h", "redis://user:***@h"),
        (f"rediss://:a@{SECRET}@h", "rediss://:***@h"),
        (f"redis://:a/{SECRET}@h/0", "redis://:***@h/0"),
        (f"redis://:a#{SECRET}@h/0", "redis://:***@h/0"),
        (f"redis://:a?{SECRET}@h/0", "redis://:***@h/0"),
        (f"redis://:{SECRET}@[::1", "redis://:***@[::1"),
        (f"redis://:{SECRET}@", "redis://:***@"),
        (f"unix:///run/redis.sock?password={SECRET}", "unix:///run/redis.sock?password=***"),
        (f"unix://user:{SECRET}@/run/redis.sock", "unix://user:***@/run/redis.sock"),
        (f"redis://h/0?db=1&password={SECRET}&x=y", "redis://h/0?db=1&password=***&x=y"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@given(st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=20))
@hypothesis_settings(deadline=None, derandomize=True, max_examples=300)
def test_no_password_however_odd_is_ever_shown(password: str) -> None:
    marked = f"<<{password}>>"
    assert "<<" not in without_password(f"redis://:{marked}@host:6379/0")
    for scheme in ("redis", "http", ""):
        try:
            load(env={}, flags={"feed_redis": f"{scheme}://user:{marked}@host:port/0"})
        except SettingsError as e:
            assert "<<" not in str(e)


def test_a_password_may_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    odd = "p@ss/w:rd#?%"
    path = tmp_path / "password"
    path.write_text(f"{odd}\n")
    from_env = load(env={"QUOTEPUSH_FEED_REDIS_PASSWORD": odd})
    from_file = load(env={}, flags={"feed_redis_password_file": str(path)})
    for found in (from_env, from_file):
        assert found.feed_redis == "redis://:p%40ss%2Fw%3Ard%23%3F%25@127.0.0.1:6379/0"
        assert found.registry_url == found.feed_redis
        assert without_password(found.feed_redis) == "redis://:***@127.0.0.1:6379/0"


def test_each_redis_has_a_password_of_its_own() -> None:
    found = load(
        env={"QUOTEPUSH_FEED_REDIS_PASSWORD": "a", "QUOTEPUSH_REGISTRY_REDIS_PASSWORD": "b"},
        flags={"feed_redis": "redis://user@feed/1", "registry_redis": "unix:///run/redis.sock"},
    )
    assert (found.feed_redis, found.registry_redis) == ("redis://user:a@feed/1", "unix://:b@/run/redis.sock")


def test_a_password_in_the_url_is_kept() -> None:
    found = load(env={"QUOTEPUSH_FEED_REDIS_PASSWORD": "other"}, flags={"feed_redis": "redis://:own@h"})
    assert found.feed_redis == "redis://:own@h"


def test_a_password_without_its_redis_is_a_fault() -> None:
    (fault,) = faults(env={"QUOTEPUSH_REGISTRY_REDIS_PASSWORD": SECRET})
    assert "registry_redis" in fault and SECRET not in fault


@pytest.mark.parametrize(
    "flags",
    [
        {"feed_redis": f"http://:{SECRET}@h"}, {"feed_redis": f"redis://:{SECRET}@h:x"}, {"feed_redis": f"redis://:{SECRET}@"},
        {"feed_redis": f"redis://:{SECRET}@[::1"}, {"feed_redis": [f"redis://:{SECRET}@h"]},
        {"registry_redis": {"url": f"redis://:{SECRET}@h"}}, {"feed_redis": f"redis://user:a/{SECRET}@h"},
        {"feed_redis": f"http://h?password={SECRET}"}, {"feed_redis_password": SECRET},
    ],
)  # fmt: skip
def test_no_fault_repeats_a_password(tmp_path: Path, flags: dict[str, Any]) -> None:
    assert SECRET not in "\n".join(faults(**flags, port=-1))
    as_toml = "\n".join(f"{name} = {settings_module._toml(value)}" for name, value in flags.items())
    assert SECRET not in "\n".join(faults(write(tmp_path, as_toml)))


def test_a_password_file_that_cannot_be_read_is_named_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(SECRET.encode() + b"\xff")
    (fault,) = faults(feed_redis_password_file=str(path))
    assert str(path) in fault and SECRET not in fault


# What is generated


def test_the_example_is_toml_and_says_the_defaults() -> None:
    example = example_toml()
    assert tomllib.loads(example) == {}
    lines = [line[1:] for line in example.splitlines() if line.startswith("#") and not line.startswith("# ")]
    values = tomllib.loads("\n".join(lines))
    assert set(values) == {f.name for f in dataclasses.fields(Settings)}
    for f in dataclasses.fields(Settings):
        assert values[f.name] == settings_module._shown_default(f), f.name


def test_the_example_with_everything_uncommented_yields_the_defaults(tmp_path: Path) -> None:
    text = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in example_toml().splitlines()
    )
    assert load(write(tmp_path, text), {}) == load(env={})


def test_every_setting_is_documented() -> None:
    table = markdown()
    for f in dataclasses.fields(Settings):
        assert f"| `{f.name}` |" in table
        doc = f.metadata["doc"]
        assert doc.rstrip(")").endswith((".", '."', ".'")) or doc.endswith(".)"), f.name
        assert doc in table and doc in example_toml()
        assert "|" not in doc and "\n" not in doc
        if f.name.endswith(("_s", "_ms", "_bytes")):
            assert f.metadata["unit"], f"{f.name} has no unit"


def test_every_default_passes_its_own_check() -> None:
    found = load(env={})
    for f in dataclasses.fields(Settings):
        lowest = f.metadata["at_least"]
        assert lowest is None or getattr(found, f.name) >= lowest


def test_flags_know_the_kind_of_each_setting() -> None:
    kinds = {f.name: settings_module.flag_type(f.name) for f in dataclasses.fields(Settings)}
    assert set(kinds.values()) <= {str, int, float, bool, list, dict}
    assert (kinds["port"], kinds["drop_older"], kinds["feed_channels"]) == (int, bool, list)


# Tokens

KEY = "key-of-tokens-" * 3


def test_without_a_key_there_are_no_tokens() -> None:
    found = load(env={})
    assert (found.token_key, found.token_key_file, found.token_leeway_s, found.auth_timeout_s) == ("", [], 5.0, 10.0)
    assert not found.has_tokens and found.anonymous_entitlement is None


def test_the_key_of_tokens_may_come_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    path.write_text(f"\n {KEY} \n", encoding="utf-8")
    for found in (
        load(env={"QUOTEPUSH_TOKEN_KEY": KEY}),
        load(env={}, flags={"token_key": KEY}),
    ):
        assert found.token_key == KEY and found.has_tokens
    for found in (
        load(env={"QUOTEPUSH_TOKEN_KEY_FILE": str(path)}),
        load(write(tmp_path, f'token_key_file = "{path}"'), {}),
        load(write(tmp_path, f'token_key_file = ["{path}"]'), {}),
    ):
        assert found.token_key_file == [str(path)] and found.has_tokens


def test_there_may_be_several_keys_of_several_kinds(tmp_path: Path) -> None:
    first, second = tmp_path / "token.key", tmp_path / "public.pem"
    first.write_text(KEY)
    second.write_text(KeyPair("ES256").public_pem)
    url = "https://id.example/keys"
    found = load(env={}, flags={"token_key": KEY[::-1], "token_key_file": f"{first},{second}", "token_jwks_url": url})
    assert (found.token_key_file, found.token_jwks_url) == ([str(first), str(second)], url)


def test_no_repr_shows_a_secret() -> None:
    env = {"QUOTEPUSH_TOKEN_KEY": KEY, "QUOTEPUSH_FEED_REDIS_PASSWORD": SECRET}
    shown = repr(load(env=env, flags={"registry_redis": f"redis://:{SECRET}@h/0"}))
    assert KEY not in shown and SECRET not in shown
    assert "token_key='***'" in shown
    assert "token_key=''" in repr(load(env={}))
    assert "port=8008" in shown


@pytest.mark.parametrize("key", ["short-key", "x" * 31, "é" * 15])
def test_a_key_that_can_be_guessed_is_a_fault(tmp_path: Path, key: str) -> None:
    path = tmp_path / "token.key"
    path.write_text(key, encoding="utf-8")
    for source in ({"token_key": key}, {"token_key_file": str(path)}):
        (fault,) = faults(**source)
        assert "32 bytes" in fault and key not in fault


def test_a_file_without_a_usable_key_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "public.pem"
    pair = KeyPair("ES256")
    for text, reason in (
        ("-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n", "be read"),
        (pair.private_pem, "private key"),
        (pair.jwks(private=True), "no key"),
    ):
        path.write_text(text)
        (fault,) = faults(token_key_file=str(path))
        assert fault.startswith("token_key_file") and reason in fault and text[40:60] not in fault


@pytest.mark.parametrize(
    "url", ["https://id.example/keys", "http://127.0.0.1:1/k", "http://[::1]/k", "http://localhost/k"]
)
def test_keys_may_be_fetched_from_a_safe_place(url: str) -> None:
    assert load(env={}, flags={"token_jwks_url": url}).has_tokens


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example/keys", "ftp://127.0.0.1/k", "file:///etc/passwd", "https://", "127.0.0.1/k", "https://u:secret@h/k",
        "http://127.0.0.1.evil.example/k", "http://127.0.0.1@evil.example/", "http://0.0.0.0/", "https://h:x/", "https://[",
    ],
)  # fmt: skip
def test_keys_are_not_fetched_from_where_anybody_may_put_his_own(url: str) -> None:
    (fault,) = faults(token_jwks_url=url)
    assert fault.startswith("token_jwks_url") and "secret" not in fault


def test_what_the_anonymous_may_have_is_checked() -> None:
    few = {"anonymous": True, "anonymous_codes": "*.sh,aapl", "anonymous_max_rate": 2, "anonymous_max_codes": 5}
    found = load(env={}, flags={"token_key": KEY, **few}).anonymous_entitlement
    assert found == Entitlement(codes=Codes(["*.SH", "AAPL"]), max_rate=2.0, max_codes=5)
    assert load(env={}, flags={"token_key": KEY, "anonymous": True}).anonymous_entitlement == UNLIMITED
    late = load(env={}, flags={"token_key": KEY, "anonymous": True, "anonymous_delay_s": 900})
    assert late.anonymous_entitlement == Entitlement(delay_s=900)
    assert load(env={}, flags={"token_key": KEY, "anonymous": True, "anonymous_codes": ""}).anonymous_entitlement == (
        Entitlement(codes=Codes([]))
    )
    for flags in (
        few, {"token_key": KEY, **few, "anonymous": False}, {"token_key": KEY, **few, "anonymous_codes": "no such"},
        {"token_key": KEY, **few, "anonymous_max_rate": 1001}, {"token_key": KEY, **few, "anonymous_delay_s": 60},
        {"anonymous": True},
    ):  # fmt: skip
        assert all(fault.startswith("anonymous") for fault in faults(**flags))


def test_delays_are_whole_numbers(tmp_path: Path) -> None:
    assert load(env={}).delays == [900]
    assert load(env={"QUOTEPUSH_DELAYS": "60, 900"}).delays == [60, 900]
    assert load(write(tmp_path, "delays = [60]"), {}).delays == [60]
    for text in ('"x"', "[1.5]", "[true]", "900", "[0]", "[-5]"):
        (fault,) = faults(write(tmp_path, f"delays = {text}"))
        assert "delays" in fault and "whole number" in fault


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_file_without_a_key_never_opens_the_door(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "token.key"
    if text is not None:
        path.write_text(text)
    (fault,) = faults(token_key_file=str(path))
    assert fault.startswith("token_key_file")


def test_a_key_that_is_no_text_is_not_repeated(tmp_path: Path) -> None:
    (fault,) = faults(write(tmp_path, "token_key = 31415926535897932384"))
    assert "token_key" in fault and "31415" not in fault


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_leeway_s", 61), ("token_leeway_s", -1), ("auth_timeout_s", 0), ("token_jwks_refresh_s", 9)],
)
def test_the_times_of_tokens_have_bounds(name: str, value: int) -> None:
    (fault,) = faults(**{name: value})
    assert name in fault


@pytest.mark.parametrize("path", ["/stream", "/quotes", "/codes"])
def test_the_websocket_is_not_where_something_else_is(path: str) -> None:
    with pytest.raises(SettingsError, match="something else is there"):
        load(env={}, flags={"ws_path": path})


def test_the_token_of_the_http_api_comes_from_a_setting_or_a_file_and_is_never_shown(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text("sixteen-letters!\n")
    sources = ({"api_token": "sixteen-letters!"}, {"api_token_file": str(path)})
    for found in (
        *(load(env={}, flags=flags) for flags in sources),
        load(env={"QUOTEPUSH_API_TOKEN": "sixteen-letters!"}),
    ):
        assert found.api_token == "sixteen-letters!"
        assert "sixteen" not in repr(found)
    assert load(env={}).api_token == ""


def test_a_token_that_could_be_guessed_or_is_missing_is_a_fault(tmp_path: Path):
    path = tmp_path / "token"
    for wrong in ("short", "with blanks in between", "sixteen-letters\u00f6"):
        (fault,) = faults(api_token=wrong)
        assert fault.startswith("api_token must") and wrong not in fault
    path.write_text("\n")
    (fault,) = faults(api_token_file=str(path))
    assert fault.startswith("api_token_file")
    (fault,) = faults(api_token_file=str(tmp_path / "none"))
    assert "cannot be read" in fault
    path.write_text("sixteen-letters!")
    (fault,) = faults(api_token_file=str(path), api_token="letters-sixteen!")
    assert "both set" in fault


def test_the_private_listener_leaves_loopback_only_with_a_token():
    (fault,) = faults(admin_host="0.0.0.0")
    assert "admin_host" in fault and "api_token" in fault
    assert load(env={}, flags={"admin_host": "0.0.0.0", "api_token": "sixteen-letters!"}).admin_host == "0.0.0.0"
