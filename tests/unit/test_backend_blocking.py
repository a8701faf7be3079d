"""The blocking twin: threads share it, and a process that forked is told."""

import asyncio
import subprocess
import sys
import threading

import pytest

from quotepush import Backend, BlockingBackend
from quotepush.errors import BackendUnavailable, SettingsError
from tests.support.redis_server import RedisServer
from tests.support.stand_in_node import stand_in
from tests.support.waiting import wait_until


def test_every_call_of_the_library_has_its_twin() -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert calls(BlockingBackend) == calls(Backend) - {"aclose"} | {"close"}


async def test_closing_ends_the_thread_and_the_calls_of_others(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node:
        await node.connect(1, user="ann")
        node.answer = lambda command: None
        backend = BlockingBackend(redis_server.url, timeout_s=60)
        call = asyncio.create_task(asyncio.to_thread(backend.send_to_user, "ann", 1))
        await wait_until(lambda: node.heard)
        await asyncio.to_thread(backend.close)
        await asyncio.to_thread(backend.close)
        with pytest.raises(BackendUnavailable):
            await call
        with pytest.raises(BackendUnavailable, match="is closed"):
            backend.connect()
        assert not [thread for thread in threading.enumerate() if thread.name == "quotepush backend"]


async def test_listings_are_iterated_gathered_and_paged(redis_server: RedisServer) -> None:
    async with stand_in(redis_server) as node, redis_server.client() as redis:
        await redis.sadd("qp:user:ann", *(node.fd(n) for n in range(2_000)))
        await redis.sadd("qp:user:ann", "gone.0.1")
        await redis.hset("qp:nodes", "gone", '{"renewed":1,"started":1}')

        def read() -> None:
            with BlockingBackend(redis_server.url, timeout_s=30) as backend:
                assert len(list(backend.user_conns("ann"))) == 2_000
                assert len(set(backend.user_conns("ann").all())) == backend.user_count("ann") == 2_000
                page = backend.user_conns("ann").page("", 10)
                assert 0 < len(page.items) < 100 and page.cursor

        await asyncio.to_thread(read)


FORKING = """
import os, sys
from quotepush import BlockingBackend
backend = BlockingBackend(sys.argv[1])  # no thread yet: none is forked
if os.fork() == 0:
    try:
        backend.connect()
    except RuntimeError as e:
        print(e, flush=True)
    os._exit(0)
os.wait()
with backend:
    backend.connect()
print("served")
"""


def test_after_a_fork_each_process_needs_its_own(redis_server: RedisServer) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKING, redis_server.url], capture_output=True, text=True, timeout=60, check=False
    )
    told, served = ended.stdout.splitlines()
    assert "make one after the fork" in told
    assert (served, ended.returncode, ended.stderr) == ("served", 0, "")


def test_an_address_that_is_none_is_said_at_once() -> None:
    with pytest.raises(SettingsError):
        BlockingBackend("http://x")
