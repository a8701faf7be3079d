"""Addresses of Redis: what they say, and what is said of wrong ones."""

from pathlib import Path
from typing import Any

import pytest

from quotepush.store.address import (
    OPTIONS,
    Address,
    BadAddress,
    parse_address,
    shown_address,
    with_password,
    without_password,
)

SECRET = "hunter2"
LOGIN = {"username": "me", "password": "p@ss/w:rd"}


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address("server", (("h", 6379),))),
        ("redis://h:7/3", Address("server", (("h", 7),), db=3)),
        ("redis://h?db=3", Address("server", (("h", 6379),), db=3)),
        ("redis://me:p%40ss%2Fw%3Ard@[::1]:7/", Address("server", (("::1", 7),), credentials=LOGIN)),
        ("redis://me:p@ss%2Fw:rd@h", Address("server", (("h", 6379),), credentials=LOGIN)),
        ("redis://h?username=me&password=p%40ss%2Fw:rd", Address("server", (("h", 6379),), credentials=LOGIN)),
        ("redis://me@h", Address("server", (("h", 6379),), credentials={"username": "me"})),
        ("rediss://h", Address("server", (("h", 6379),), tls={})),
        ("unix:///run/r.sock?db=2", Address("server", path="/run/r.sock", db=2)),
        ("unix://:a@/run/r.sock", Address("server", path="/run/r.sock", credentials={"password": "a"})),
        (
            "redis+sentinel://a,b:7,[::1]/quotes",
            Address("sentinel", (("a", 26379), ("b", 7), ("::1", 26379)), service="quotes"),
        ),
        (
            "redis+sentinel://me:p%40ss%2Fw%3Ard@a/quotes/4?sentinel_username=s&sentinel_password=t&role=replica",
            Address(
                "sentinel", (("a", 26379),), service="quotes", db=4, from_replica=True, credentials=LOGIN,
                sentinel_credentials={"username": "s", "password": "t"},
            ),
        ),
        ("rediss+sentinel://a/my%20quotes", Address("sentinel", (("a", 26379),), service="my quotes", tls={})),
        ("redis+cluster://a:1,b", Address("cluster", (("a", 1), ("b", 6379)))),
        ("redis+cluster://a/0", Address("cluster", (("a", 6379),))),
        (
            "rediss+cluster://a?ssl_check_hostname=no&ssl_cert_reqs=none",
            Address("cluster", (("a", 6379),), tls={"ssl_check_hostname": False, "ssl_cert_reqs": "none"}),
        ),
    ],
)  # fmt: skip
def test_an_address_says_where_redis_is(url: str, address: Address) -> None:
    assert parse_address(url) == address


def test_files_of_tls_are_looked_at(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("")
    assert parse_address(f"rediss://h?ssl_ca_certs={ca}").tls == {"ssl_ca_certs": str(ca)}
    with pytest.raises(BadAddress, match=r"ssl_certfile that cannot be read: .*/missing"):
        parse_address(f"rediss://h?ssl_certfile={tmp_path}/missing")
    with pytest.raises(BadAddress, match="ssl_keyfile without its ssl_certfile"):
        parse_address(f"rediss://h?ssl_keyfile={ca}")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://h", "must begin with redis://"),
        ("redis+http://h", "must begin with redis://"),
        (f"redis://:{SECRET}/x@h", "in place 1"),
        (f"redis://:{SECRET}#x@h", "is not a URL"),
        ("redis://", "names no host"),
        (f"redis://:{SECRET}@", "names no host"),
        (f"redis://:{SECRET}@h:x", "no host and port in place 1"),
        ("redis://h:0", "port 0"),
        ("redis://h:70000", "port 70000"),
        ("redis://a,b", "names several hosts"),
        ("redis+sentinel://a", "names no service"),
        ("redis+sentinel://a,,b/s", "in place 2"),
        ("redis+cluster://a/1", "has only database 0"),
        ("redis://h/x", "no number"),
        ("redis://h?db=x", "no number"),
        ("unix://h/run/r.sock", "names no socket"),
        ("unix://", "names no socket"),
        (f"redis://h?{SECRET}=1", "an option that is unknown"),
        ("redis://h?socket_timeout=1", "an option that is unknown"),
        ("redis://h?role=replica", "which is for redis+sentinel://"),
        ("redis+sentinel://h/s?role=slave", "must be master or replica"),
        ("redis://h?ssl_cert_reqs=none", "speaks no TLS; begin it with rediss"),
        ("rediss://h?ssl_check_hostname=maybe", "neither yes nor no"),
        ("rediss://h?ssl_cert_reqs=never", "neither required, optional nor none"),
    ],
)
def test_a_wrong_address_is_told_in_one_line_without_its_password(url: str, fault: str) -> None:
    with pytest.raises(BadAddress) as error:
        parse_address(url)
    assert fault in str(error.value)
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://me:{SECRET}@h:7/3?password={SECRET}", "h:7"),
        ("rediss://[::1]", "[::1]:6379"),
        (f"unix://:{SECRET}@/run/r.sock", "unix:/run/r.sock"),
        (f"redis+sentinel://:{SECRET}@a,b:1/quotes?sentinel_password={SECRET}", "quotes of sentinels a:26379,b:1"),
        ("redis+cluster://a,b", "cluster a:6379,b:6379"),
        (f"http://{SECRET}", "an address that is none"),
    ],
)
def test_where_it_points_to_can_be_shown(url: str, shown: str) -> None:
    assert shown_address(url) == shown


def test_neither_a_representation_nor_the_address_without_its_password_holds_one() -> None:
    url = f"redis+sentinel://me:{SECRET}@a,b/s?sentinel_password={SECRET}&Sentinel_passw%6Frd={SECRET}&role=replica"
    assert without_password(url).count("***") == 3
    assert SECRET not in without_password(url) and "role=replica" in without_password(url)
    assert SECRET not in repr(parse_address(url.replace("&Sentinel_passw%6Frd=" + SECRET, "")))


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis+sentinel://a,[::1]:7/s/2?role=replica", "redis+sentinel://:x%2F@a,[::1]:7/s/2?role=replica"),
        ("redis+cluster://me@a,b", "redis+cluster://me:x%2F@a,b"),
        ("redis+cluster://me:own@a", "redis+cluster://me:own@a"),
        ("redis://h?password=own", "redis://h?password=own"),
        ("unix:///run/r.sock?db=1", "unix://:x%2F@/run/r.sock?db=1"),
    ],
)
def test_a_password_from_elsewhere_goes_in_where_there_is_none(url: str, whole: str) -> None:
    assert with_password(url, "x/") == whole
    assert with_password(url, "") == url


def test_every_option_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    missing: list[Any] = [name for name in OPTIONS if f"`{name}`" not in text]
    assert not missing
