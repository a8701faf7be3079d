"""Keys of tokens in main: read and fetched, changed without a restart, and kept when a source fails."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from quotepush.node import keyring as keyring_module
from quotepush.node.keyring import CannotFetch, Keyring, fetch_key_set
from quotepush.settings import Settings, load
from tests.support.key_site import KeySite, key_site
from tests.support.tokens import KEY, KeyPair
from tests.support.waiting import wait_until

FIRST, SECOND = KeyPair("ES256"), KeyPair("EdDSA")


@pytest.fixture
async def site() -> AsyncIterator[KeySite]:
    async with key_site(FIRST.jwks(kid="1")) as found:
        yield found


def settings(**flags: Any) -> Settings:
    return load(env={}, flags=flags)


@asynccontextmanager
async def running(changes: list[Any], **flags: Any) -> AsyncIterator[Keyring]:
    found = Keyring(settings(**flags), changes.append)
    await found.begin()
    task = asyncio.create_task(found.run())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait([task])


# Fetching


async def test_a_key_set_is_fetched(site: KeySite) -> None:
    assert await fetch_key_set(site.url) == site.text


async def test_what_is_no_key_set_is_not_taken(site: KeySite, monkeypatch: pytest.MonkeyPatch) -> None:
    good = site.text
    secret = '{"keys":[{"kty":"oct","k":"eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHg"}]}'
    for status, text, headers in (
        (404, good, {}), (500, good, {}), (204, "", {}), (200, "", {}), (200, "<html>", {}), (200, '{"keys":[]}', {}),
        (200, secret, {}), (200, KEY, {}), (200, FIRST.public_pem, {}), (200, good + " " * (1 << 18), {}),
        (302, good, {"Location": "/other"}), (301, good, {"Location": "http://127.0.0.1:1/"}),
    ):  # fmt: skip
        site.status, site.text, site.headers = status, text, headers
        with pytest.raises(CannotFetch) as found:
            await fetch_key_set(site.url)
        assert "s3cret" not in str(found.value)
    assert site.asked == 12  # no redirect was followed
    with pytest.raises(CannotFetch):
        await fetch_key_set("http://127.0.0.1:1/")
    monkeypatch.setattr(keyring_module, "_FETCH_TIMEOUT_S", 0.2)
    site.may_answer.clear()
    with pytest.raises(CannotFetch, match="no answer"):
        await fetch_key_set(site.url)


# Beginning


async def test_all_sources_count(site: KeySite, tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text(FIRST.public_pem)
    changes: list[Any] = []
    async with running(
        changes, token_key=KEY, token_key_file=str(tmp_path / "a.pem"), token_jwks_url=site.url
    ) as found:
        assert found.sources == [(KEY, False), (FIRST.public_pem, False), (site.text, True)]
        assert not changes and not found.lacks_keys


async def test_without_tokens_there_is_nothing_to_do() -> None:
    async with running([]) as found:
        assert found.sources == [] and not found.lacks_keys


async def test_a_server_begins_without_keys_when_they_cannot_be_fetched(
    site: KeySite, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring_module, "_AGAIN_S", 0.05)
    site.status = 503
    changes: list[Any] = []
    with caplog.at_level(logging.INFO, "quotepush.main"):
        async with running(changes, token_jwks_url=site.url) as found:
            assert found.lacks_keys
            await wait_until(lambda: site.asked >= 4)
            assert found.lacks_keys and not changes
            site.status = 200
            await wait_until(lambda: changes == [[(site.text, True)]])
            assert not found.lacks_keys
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "503" in line] == [
        "keys of tokens: token_jwks_url cannot be fetched: HTTP 503; the keys that are known stay"
    ]
    assert "keys of tokens: token_jwks_url is well again" in lines
    assert not any("s3cret" in line for line in lines)


# Changing


async def test_newer_keys_are_asked_for_when_a_token_names_an_unknown_one(
    site: KeySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring_module, "LEAST_BETWEEN_S", 0)
    changes: list[Any] = []
    order: list[str] = []
    async with running(changes, token_jwks_url=site.url) as found:
        site.text = SECOND.jwks(kid="2")
        site.may_answer.clear()
        found.renew(lambda: order.append(f"first {len(changes)}"))
        await wait_until(lambda: site.asked == 2)
        found.renew(lambda: order.append(f"second {len(changes)}"))
        assert not order
        site.may_answer.set()
        await wait_until(lambda: len(order) == 2)
        assert order == ["first 1", "second 1"] and changes == [[(site.text, True)]]
        assert site.asked == 2


async def test_nobody_can_make_main_fetch_again_and_again(site: KeySite) -> None:
    answered: list[None] = []
    async with running([], token_jwks_url=site.url) as found:
        for _ in range(100):
            found.renew(lambda: answered.append(None))
        assert len(answered) == 100  # it was fetched just now
        assert site.asked == 1


async def test_keys_that_are_known_stay_when_a_fetch_fails(site: KeySite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring_module, "LEAST_BETWEEN_S", 0)
    changes: list[Any] = []
    async with running(changes, token_jwks_url=site.url) as found:
        before = found.sources
        answered = asyncio.Event()
        site.text = "{}"
        found.renew(answered.set)
        await asyncio.wait_for(answered.wait(), 20)
        assert found.sources == before and not changes


async def test_a_file_is_read_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keyring_module, "_LOOK_EVERY_S", 0.02)
    path = tmp_path / "token.key"
    path.write_text(KEY)
    changes: list[Any] = []

    def replace(text: str) -> None:
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", path)

    with caplog.at_level(logging.INFO, "quotepush.main"):
        async with running(changes, token_key_file=str(path)) as found:
            replace(FIRST.public_pem)
            await wait_until(lambda: changes == [[(FIRST.public_pem, False)]])
            path.write_text(SECOND.public_pem)  # in place
            await wait_until(lambda: len(changes) == 2)
            replace("too short")
            await wait_until(lambda: "32 bytes" in caplog.text)
            path.unlink()
            found.renew(lambda: None)  # looks at once
            assert found.sources == [(SECOND.public_pem, False)] and len(changes) == 2
            replace(KEY)
            await wait_until(lambda: changes[2:] == [[(KEY, False)]])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert KEY not in caplog.text and "too short" not in caplog.text


async def test_who_asks_for_newer_keys_has_those_of_a_changed_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "token.key"
    path.write_text(KEY)
    changes: list[Any] = []
    async with running(changes, token_key_file=str(path)) as found:
        path.write_text(FIRST.public_pem)
        order: list[int] = []
        found.renew(lambda: order.append(len(changes)))
        assert order == [1]
